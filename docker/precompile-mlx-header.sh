#!/usr/bin/env bash
# MLX on Linux's CPU compiles each fused kernel with g++, and nearly all of that second is spent reading one header. GCC takes
# a precompiled one beside it where compiler and options are the same (else it ignores it): 0.95 s a kernel become 0.17 s.
# Usage: precompile-mlx-header.sh PYTHON. Does nothing where there is nothing to do; never fails an installation.
set -u
[ "$(uname)" = Linux ] && command -v g++ >/dev/null || exit 0
package=$("$1" -c 'import importlib.util as u; print(next(iter(u.find_spec("mlx").submodule_search_locations)))' 2>/dev/null) || exit 0
header=$package/include/mlx/backend/cpu/compiled_preamble.h
[ -f "$header" ] || exit 0
stamp=$({ g++ --version; cat "$package"/include/mlx/backend/cpu/*.h "$package"/include/mlx/types/*.h; } | sha256sum | cut -c1-16)
folder=$header.gch # GCC tries every file in it
[ -f "$folder/$stamp" ] && exit 0
# MLX's own options: GCC compares them. Made aside and renamed: a kernel compiled meanwhile never sees half of it.
made=$header.gch.tmp-$$
trap 'rm -rf "$made"' EXIT
mkdir "$made" && g++ -std=c++17 -O3 -Wall -fPIC -w -I "$package/include" -x c++-header "$header" -o "$made/$stamp" 2>/dev/null || exit 0
rm -rf "$folder" && mv "$made" "$folder"
exit 0
