#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds and tests with Bazel 7 as Debian unstable packages it, offline rule sets and all:
#
#     sudo [FLAGS="--jobs=1"] [FOLDERS="/a /b"] tools/bazel/try-7.sh ROOT [STEP ...]
#
# ROOT becomes a Debian unstable with Bazel and gcc 14, the newest that CUDA 13.0 takes, made by
# debootstrap the first time and used as it is after that (2 GB, and 8 GB with what is built). The
# tree as it is here is copied into it. STEPs, all of them where none is named:
#
#     cpu        the test on the CPU, in the configuration without CUDA
#     consumer   the same for another module that depends on this one: tests/consumer
#     workspace  the same without MODULE.bazel, from WORKSPACE
#     kernels    the sm80 kernel library, and the test in the default configuration
#
# FLAGS are more options of Bazel. pip's configuration comes along; FOLDERS are those that it reads
# wheels from, if it names any.
set -euo pipefail

if [ $# -eq 0 ] || [ "$(id -u)" != 0 ]; then
  echo "usage, as root: $0 ROOT [cpu|consumer|workspace|kernels ...]" >&2
  exit 2
fi

# Once more in mount and process namespaces of our own: what is mounted and started below goes with
# them.
if [ -z "${TRY7_UNSHARED:-}" ]; then
  TRY7_UNSHARED=1 exec unshare --mount --pid --fork --kill-child "$0" "$@"
fi

tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
mkdir -p "$1"
root=$(cd "$1" && pwd)
shift
[ $# -gt 0 ] || set -- cpu consumer workspace kernels

packages=(bazel-bootstrap gcc-14 g++-14 python3 python3-pip python3.13-dev ca-certificates)

inside() {
  # Debian's python3 is newer than the wheels that are locked.
  chroot "$root" /usr/bin/env -i HOME=/root USER=root LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive \
    PATH=/usr/sbin:/usr/bin:/sbin:/bin CC=gcc-14 MOE_PYTHON=/usr/bin/python3.13 \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
    ${http_proxy:+http_proxy="$http_proxy"} ${https_proxy:+https_proxy="$https_proxy"} "$@"
}

if [ ! -e "$root/debootstrap-done" ]; then
  if [ -n "$(ls -A "$root")" ]; then
    echo "$0: $root must be empty, or a folder that an earlier run completed; empty it first" >&2
    exit 2
  fi
  debootstrap --variant=minbase unstable "$root"
  touch "$root/debootstrap-done"
fi

mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
for folder in ${FOLDERS:-}; do
  mkdir -p "$root$folder"
  mount --bind "$folder" "$root$folder"
done
cp /etc/resolv.conf "$root/etc/resolv.conf"

if [ ! -e "$root/packages-done" ]; then
  # A mirror may be older than unstable's index claims to be valid for.
  inside apt-get -q -o Acquire::Check-Valid-Until=no update
  inside apt-get -q install -y --no-install-recommends "${packages[@]}"
  touch "$root/packages-done"
fi

# The user's pip settings, and the certificates that they may rely on.
if [ -e /etc/ssl/certs/ca-certificates.crt ]; then
  cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
fi
for file in /etc/pip.conf "$HOME/.config/pip/pip.conf"; do
  if [ -e "$file" ]; then
    to=$root${file/#$HOME\//\/root\/}
    mkdir -p "${to%/*}"
    cp "$file" "$to"
  fi
done

rm -rf "$root/src"
mkdir -p "$root/src"
(cd "$tree" && git ls-files -z --cached --others --exclude-standard |
  xargs -0 sh -c 'for f; do [ ! -f "$f" ] || printf "%s\0" "$f"; done' sh |
  tar --null --files-from=- -cf -) | tar -C "$root/src" -xf -

# Debian's rc overrides the rule sets it packages. Bazel itself asks for modules that Debian does
# not: nothing here uses them, so empty ones answer.
rc=$root/root/.bazelrc
{
  echo "common --lockfile_mode=off"
  for module in apple_support buildozer protobuf zlib; do
    mkdir -p "$root/opt/modules/$module"
    echo "module(name = \"$module\")" > "$root/opt/modules/$module/MODULE.bazel"
    echo "common --override_module=$module=/opt/modules/$module"
  done
} > "$rc"

# Runs `bazel COMMAND` in a folder below ROOT.
bazel() {
  local folder=$1 command=$2
  shift 2
  # One word each.
  # shellcheck disable=SC2086
  inside nice -n 10 sh -c 'cd "$0" && exec bazel "$@"' "$folder" "$command" ${FLAGS:-} "$@"
}

for step in "$@"; do
  printf '\n==== Bazel 7, %s\n' "$step"
  start=$SECONDS
  case $step in
    cpu) bazel /src test --config=cpu //tests:cpu_moe ;;
    consumer) bazel /src/tests/consumer test //... ;;
    workspace)
      overrides=()
      for repository in bazel_skylib=tools/skylib platforms=tools/platforms rules_cc=rules/cc \
        rules_java=rules/java rules_license=rules/license rules_proto=rules/proto \
        rules_python=rules/python; do
        overrides+=("--override_repository=${repository/=/=/usr/share/bazel/}")
      done
      bazel /src test --noenable_bzlmod --enable_workspace "${overrides[@]}" --config=cpu \
        //tests:cpu_moe
      ;;
    kernels)
      bazel /src build --config=sm80 //kernels/...
      bazel /src test //tests:cpu_moe
      ;;
    *)
      echo "$0: no step $step" >&2
      exit 2
      ;;
  esac
  printf '==== Bazel 7, %s: passed in %d s\n' "$step" $((SECONDS - start))
done
