// SPDX-License-Identifier: Apache-2.0
//
// Dynamic shared memory beyond the 48 KiB that a kernel gets without asking.

#ifndef KERNELS_SM80_SHARED_MEMORY_H_
#define KERNELS_SM80_SHARED_MEMORY_H_

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

namespace moe::sm80 {

// Raises the kernel's limit, once a device: the runtime takes a microsecond for it. That threads
// may do so at the same time is harmless.
template <auto kKernel>
cudaError_t AllowSharedMemory(int bytes) {
  static std::atomic<uint64_t> allowed = 0;  // a bit a device; those beyond are asked each time
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((allowed.load() & bit) != 0) return cudaSuccess;
  status = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status == cudaSuccess) allowed.fetch_or(bit);
  return status;
}

}  // namespace moe::sm80

#endif  // KERNELS_SM80_SHARED_MEMORY_H_
