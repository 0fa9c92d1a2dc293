#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs the small sanitizer cases of //tests:sm80_moe under compute-sanitizer, on a GPU machine:
#
#     tests/sanitize.sh                                     memcheck, then racecheck
#     TOOLS=memcheck tests/sanitize.sh --config=sm80_on_sm90 ...     one tool; flags for bazel
#
# Each tool has to find an error that is planted in a kernel of its own first: a filter that
# matches no kernel would find none anywhere.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
toolkit=${MOE_CUDA_TOOLKIT:-${CUDA_HOME:-/usr/local/cuda}}
sanitizer=$toolkit/bin/compute-sanitizer
bazel=${BAZEL:-./bazelw}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

if [ ! -x "$sanitizer" ]; then
  echo "no compute-sanitizer in $toolkit/bin; set MOE_CUDA_TOOLKIT to a whole CUDA toolkit" >&2
  exit 1
fi

cat > "$scratch/planted.cu" <<'CUDA'
namespace moe {
// A race for racecheck; a store past the end of the allocation for memcheck.
__global__ void Planted(int* out) {
  volatile __shared__ int value;  // volatile, or the compiler forwards the value
  value = threadIdx.x;
  out[threadIdx.x] = value;
}
}  // namespace moe
int main() {
  int* out;
  cudaMalloc(&out, 32 * sizeof(int));
  moe::Planted<<<1, 64>>>(out);
  return cudaDeviceSynchronize() == cudaSuccess ? 0 : 1;
}
CUDA
"$toolkit/bin/nvcc" -arch=native -o "$scratch/planted" "$scratch/planted.cu"

# Kernels of this library only, where the tool can filter: PyTorch's are many and slow to check.
finds_planted() {
  ! "$sanitizer" --error-exitcode 9 --tool "$@" "$scratch/planted" > "$scratch/log" 2>&1 &&
    grep -qE 'ERROR SUMMARY: [1-9]|RACECHECK SUMMARY: [1-9]' "$scratch/log"
}

status=0
for tool in ${TOOLS:-memcheck racecheck}; do
  filter=none
  for candidate in "--kernel-name kns=3moe" ""; do
    # shellcheck disable=SC2086  # two words
    if finds_planted "$tool" $candidate; then
      filter=$candidate
      break
    fi
  done
  if [ "$filter" = none ]; then
    echo "$tool does not find the planted error:" >&2
    cat "$scratch/log" >&2
    exit 1
  fi
  echo "$tool finds the planted error${filter:+ with $filter}"
  "$bazel" test --config=gpu "$@" //tests:sm80_moe \
    --test_filter=sanitizer --test_output=all --test_timeout=3000 \
    --strategy=TestRunner=local --test_env=PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    --run_under="$sanitizer --tool $tool $filter --target-processes all --launch-timeout 300 --error-exitcode 9" ||
    status=1
done
exit "$status"
