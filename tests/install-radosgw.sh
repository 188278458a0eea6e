#!/usr/bin/env bash
# Installs the real S3 server that the tests start (tests/radosgw.sh), where that is possible: as root, on Debian or Ubuntu.
# Never fails: without it the tests use moto's server, and their output says so.
set -u
command -v radosgw >/dev/null 2>&1 && command -v ceph-osd >/dev/null 2>&1 && command -v uuidgen >/dev/null 2>&1 && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
  echo "S3 in the tests will be moto's server: Ceph's radosgw can be installed by root, with apt-get, only"
  exit 0
fi
echo "installing Ceph's radosgw (a real S3 server for the tests)"
DEBIAN_FRONTEND=noninteractive bash -c \
  "apt-get update -qq && apt-get install -y -qq --no-install-recommends radosgw ceph-mon ceph-osd uuid-runtime" >/dev/null 2>&1 \
  || echo "it could not be installed; S3 in the tests will be moto's server"
exit 0
