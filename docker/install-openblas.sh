#!/usr/bin/env bash
# On Linux, MLX's wheel carries a slow reference BLAS; OpenBLAS, where present, is used instead. Installs it where that is
# allowed, and says how where it is not. On macOS there is nothing to do. Never fails: everything works without, only slower.
set -u
[ "$(uname -s)" = Linux ] || exit 0
have_blas() { ldconfig -p 2>/dev/null | grep -q 'libopenblas\.so\.0' || /sbin/ldconfig -p 2>/dev/null | grep -q 'libopenblas\.so\.0'; }
need=()
have_blas || need+=(libopenblas0-pthread)
command -v g++ >/dev/null 2>&1 || need+=(g++)
[ ${#need[@]} -eq 0 ] && exit 0

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  if command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then as_root=(sudo -n); else as_root=(false); fi
fi
if command -v apt-get >/dev/null 2>&1 && [ "${as_root[0]:-}" != false ]; then
  echo "installing ${need[*]} (fast linear algebra and fused kernels for MLX on this CPU)"
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive bash -c "apt-get update -qq && apt-get install -y -qq ${need[*]}" >/dev/null 2>&1 \
    && exit 0
fi
echo "MLX will be several times slower on this CPU without: ${need[*]}"
echo "  Debian, Ubuntu:  sudo apt-get install ${need[*]}"
echo "  Fedora:          sudo dnf install openblas gcc-c++"
exit 0
