#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Everything that is worth running on a machine with a GPU, in one command:
#
#     tools/gpu/check.sh OUT            all phases, in this order
#     tools/gpu/check.sh OUT test int8  these phases
#
#     build     the extension, the tests, the benchmark and the demo
#     test      //tests:sm80_moe with every GPU case; a case without its GPU fails
#     code      //tests:sm80_machine_code
#     demo      //:demo on the GPU
#     bench16   the six models, 16-bit weights, with the peers
#     int8      the same with INT8 weights
#     int4      the same with INT4 weights
#     zipf      two models with skewed routing
#     formats   from 512 tokens: INT8, INT4 and 16-bit weights in turns in one program
#     account   where the time goes: each launch of four cells
#     summary   bench16, int8, int4 and zipf, as far as OUT has them: ours over the best peer's
#     sanitize  the sanitizer cases under memcheck and racecheck
#
# and not in "all":
#
#     peers     every peer on few cells: do they load, are they right
#     mxfp4     the six models with MXFP4 weights, which no peer here has
#     sweep     every tactic on every cell; what the tactic choice is judged by
#     parallel  //tests:parallel by NCCL, and the times of one layer on two GPUs: needs two
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
#     PEERS           what tools/bench/bring_peers.py made; default: .peers/peers.tar.xz, if it is
#                     there. Without it the only peers are this benchmark's Triton and PyTorch's.
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
if [ -z "${PEERS+set}" ]; then
  PEERS=
  [ -s .peers/peers.tar.xz ] && PEERS=$PWD/.peers/peers.tar.xz
fi
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | head -1)
if [ -z "${CONFIG:-}" ]; then
  case $capability in
    9.*) CONFIG=sm80_on_sm90 ;;
    *) CONFIG=sm80 ;;
  esac
fi
# shellcheck disable=SC2206  # words
flags=(--config="$CONFIG" --config=gpu ${BAZEL_FLAGS:-})
programs=(//tools/bench:moe //tools/bench:formats //demo:demo)
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

parallel() {
  local status=0
  run_tests //tests:parallel || status=$?
  "$BAZEL" build "${flags[@]}" //tools/bench:parallel &&
    bazel-bin/tools/bench/parallel --json="$out/parallel.json" --table="$out/parallel.md" &&
    return "$status"
}

bench() {
  local name=$1
  shift
  # shellcheck disable=SC2086  # words
  "$BAZEL" build "${flags[@]}" //tools/bench:moe &&
    bazel-bin/tools/bench/moe --json="$out/$name.json" --table="$out/$name.md" "$@" \
      ${BENCH_FLAGS:-}
}

formats() {
  "$BAZEL" build "${flags[@]}" //tools/bench:formats &&
    bazel-bin/tools/bench/formats --json="$out/formats.json" --table="$out/formats.md"
}

with_peers() {
  local name=$1
  shift
  bench "$name" --peers="$PEERS" --plot="$out/$name.png" "$@"
}

summary() {
  local found=() name
  for name in bench16 int8 int4 zipf; do
    [ -s "$out/$name.json" ] && found+=("$out/$name.json")
  done
  python3 tools/bench/summary.py "${found[@]}" --out="$out/sm80_peers.json" \
    --table="$out/sm80_peers.md" --plot="$out/sm80_peers.png"
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
  set -- build test code demo bench16 int8 int4 zipf formats account summary sanitize
fi
for name in "$@"; do
  case $name in
    build) phase build build ;;
    test) phase test run_tests //tests:sm80_moe ;;
    code) phase code run_tests //tests:sm80_machine_code ;;
    demo) phase demo "$BAZEL" run "${flags[@]}" //demo:demo ;;
    bench16) phase bench16 with_peers bench16 ;;
    int8) phase int8 with_peers int8 --weights=int8 ;;
    int4) phase int4 with_peers int4 --weights=int4 ;;
    mxfp4) phase mxfp4 bench mxfp4 --weights=mxfp4 --backends=sm80 ;;
    zipf) phase zipf with_peers zipf --routing=zipf --models=Mixtral-8x7B,Qwen3-30B-A3B ;;
    formats) phase formats formats ;;
    account)
      phase account bench account --account \
        --cells=Mixtral-8x7B@16384,Qwen3-30B-A3B@1,Qwen3-30B-A3B@64,Qwen3-30B-A3B@4096
      ;;
    parallel) phase parallel parallel ;;
    summary) phase summary summary ;;
    peers)
      phase peers with_peers peers --weights=same,int8,int4 --seconds=0.02 \
        --cells=Qwen3-30B-A3B@1,Qwen3-30B-A3B@512
      ;;
    sanitize) phase sanitize tests/sanitize.sh "${flags[@]}" ;;
    sweep) phase sweep bench sweep --backends=sm80 --tactics=sweep ;;
    *) echo "no phase named $name" && failed=1 ;;
  esac
done
exit "$failed"
