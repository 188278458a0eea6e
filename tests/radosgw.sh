#!/usr/bin/env bash
# A real S3 server on loopback for the tests: Ceph's radosgw over one monitor and one store, data in a sparse file.
#
#   radosgw.sh FOLDER MONITOR_PORT S3_PORT
#
# As root, with the packages of install-radosgw.sh. When it returns the server answers; key and secret are "testkey" and
# "testsecret", addresses are path-style. To stop it, end the processes whose ids are in FOLDER/*.pid.
set -euo pipefail
folder=$1 monitor_port=$2 s3_port=$3
cluster=$(uuidgen) store=$(uuidgen)
config=$folder/ceph.conf
mkdir -p "$folder"/{mon,osd,rgw,log}

cat >"$config" <<SETTINGS
[global]
fsid = $cluster
# one machine, nobody else on it
mon_host = [v2:127.0.0.1:$monitor_port]
ms_bind_msgr1 = false
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
ms_mon_client_mode = crc
ms_mon_service_mode = crc
ms_mon_cluster_mode = crc
# everything below one folder
run_dir = $folder
admin_socket = $folder/\$name.asok
log_file = $folder/log/\$name.log
crash_dir = $folder/log
mon_data = $folder/mon
osd_data = $folder/osd
rgw_data = $folder/rgw
# one copy, few groups, short waits
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
paxos_propose_interval = 0.05
paxos_min_wait = 0.01
osd_objectstore = bluestore
bluestore_block_size = 4294967296
# without tcp_nodelay each request takes 45 ms
rgw_frontends = beast endpoint=127.0.0.1:$s3_port tcp_nodelay=1
rgw_run_sync_thread = false
SETTINGS

background() {
  local name=$1
  shift
  setsid "$@" </dev/null >"$folder/$name.out" 2>&1 &
  echo $! >"$folder/$name.pid"
}

monmaptool --create --fsid "$cluster" --addv a "[v2:127.0.0.1:$monitor_port]" "$folder/monmap" >/dev/null
ceph-mon -c "$config" --mkfs -i a --monmap "$folder/monmap"
background mon ceph-mon -c "$config" -f -i a

timeout 30 ceph -c "$config" osd new "$store" 0 >/dev/null
ceph-osd -c "$config" -i 0 --mkfs --osd-uuid "$store" 2>"$folder/mkfs.out"
background osd ceph-osd -c "$config" -f -i 0

background rgw radosgw -c "$config" -f -n client.rgw.a
for _ in $(seq 600); do
  kill -0 "$(cat "$folder/rgw.pid")"
  (exec 3<>"/dev/tcp/127.0.0.1/$s3_port") 2>/dev/null && break
  sleep 0.1
done
timeout 60 radosgw-admin -c "$config" -n client.rgw.a user create --uid tests --display-name tests \
  --access-key testkey --secret-key testsecret >/dev/null 2>&1
