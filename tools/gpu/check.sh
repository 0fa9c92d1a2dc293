#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Everything that is worth running on a machine with a GPU, in one command:
#
#     tools/gpu/check.sh OUT            all phases, in this order
#     tools/gpu/check.sh OUT test bench these phases
#
#     build     the extension, the tests, the benchmark and the demo
#     test      //tests:sm80_moe with every GPU case; a case without its GPU fails
#     code      //tests:sm80_machine_code
#     demo      //:demo on the GPU
#     bench     the six models, 16-bit weights, with the peers
#     int8      the same with INT8 weights
#     sanitize  the sanitizer cases under memcheck and racecheck
#     sweep     every tactic on every cell; what the tactic choice is judged by (not in "all")
#
# Each phase's output goes to OUT/PHASE.log, results beside it (JUnit, JSON, tables, pictures), and
# a line with its seconds to OUT/summary.txt. A phase that fails does not stop the next one.
#
# It needs no network where the toolkit, the Python packages and Bazel are installed; on such a
# machine pip is told where the CUTLASS wheel lies (PIP_NO_INDEX=1 PIP_FIND_LINKS=folder).
#
#     CONFIG          sm80 or sm80_on_sm90; chosen by the GPU
#     MOE_CUDA_TOOLKIT, MOE_PYTHON_PACKAGES   the toolkit under /usr/local/cuda and the machine's
#                     own packages, unless they are set (set to nothing: the locked ones)
#     BAZEL           the program; default: bazel if it is installed, else ./bazelw
#     BAZEL_FLAGS     further flags, such as --disk_cache=/path
#     BENCH_FLAGS     further flags of the benchmark
set -uo pipefail
if [ $# -lt 1 ]; then
  sed -n '4,/^set /p' "${BASH_SOURCE[0]}" | grep '^#' | cut -c3-
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit

if [ -z "${MOE_CUDA_TOOLKIT+set}" ] && [ -x /usr/local/cuda/bin/nvcc ]; then
  export MOE_CUDA_TOOLKIT=/usr/local/cuda
fi
if [ -z "${MOE_PYTHON_PACKAGES+set}" ] && python3 -c 'import torch, pytest' 2> /dev/null; then
  export MOE_PYTHON_PACKAGES=system
fi
if [ -z "${BAZEL:-}" ]; then
  BAZEL=$(command -v bazel || echo ./bazelw)
fi
export BAZEL
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | head -1)
if [ -z "${CONFIG:-}" ]; then
  case $capability in
    9.*) CONFIG=sm80_on_sm90 ;;
    *) CONFIG=sm80 ;;
  esac
fi
# shellcheck disable=SC2206  # words
flags=(--config="$CONFIG" --config=gpu ${BAZEL_FLAGS:-})
programs=(//tools/bench:moe //demo:demo)
tests=(//tests:sm80_moe //tests:sm80_machine_code)

build() { "$BAZEL" build "${flags[@]}" "${tests[@]}" "${programs[@]}"; }

run_tests() {
  local status=0
  "$BAZEL" test "${flags[@]}" --test_output=all "$@" || status=$?
  for target in "$@"; do
    local name=${target##*:}
    cp -L "bazel-testlogs/tests/$name/test.xml" "$out/$name.xml" && chmod u+w "$out/$name.xml"
  done
  return "$status"
}

bench() {
  local name=$1
  shift
  # shellcheck disable=SC2086  # words
  "$BAZEL" build "${flags[@]}" //tools/bench:moe &&
    bazel-bin/tools/bench/moe --json="$out/$name.json" --table="$out/$name.md" \
      --plot="$out/$name.png" "$@" ${BENCH_FLAGS:-}
}

phase() {
  local name=$1 start=$SECONDS result=passed
  shift
  echo "==== $name"
  "$@" > "$out/$name.log" 2>&1 || result=FAILED
  printf '%-9s %-7s %5d s\n' "$name" "$result" $((SECONDS - start)) | tee -a "$out/summary.txt"
  if [ "$result" = FAILED ]; then
    failed=1
    tail -n 25 "$out/$name.log"
  fi
}

failed=0
{
  date -u
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  echo "config $CONFIG, toolkit ${MOE_CUDA_TOOLKIT:-locked}, packages ${MOE_PYTHON_PACKAGES:-locked}"
} > "$out/summary.txt" 2>&1
cat "$out/summary.txt"
if [ $# -eq 0 ]; then
  set -- build test code demo bench int8 sanitize
fi
for name in "$@"; do
  case $name in
    build) phase build build ;;
    test) phase test run_tests //tests:sm80_moe ;;
    code) phase code run_tests //tests:sm80_machine_code ;;
    demo) phase demo "$BAZEL" run "${flags[@]}" //demo:demo ;;
    bench) phase bench bench bench ;;
    int8) phase int8 bench int8 --weights=int8 ;;
    sanitize) phase sanitize tests/sanitize.sh "${flags[@]}" ;;
    sweep) phase sweep bench sweep --backends=sm80 --tactics=sweep ;;
    *) echo "no phase named $name" && failed=1 ;;
  esac
done
exit "$failed"
