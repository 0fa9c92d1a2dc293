// SPDX-License-Identifier: Apache-2.0
//
// The sm80 backend: A100, A30, A10, RTX 30 (and, through its PTX, newer chips).

#ifndef KERNELS_SM80_BACKEND_H_
#define KERNELS_SM80_BACKEND_H_

#include "moe/backend.h"

namespace moe::sm80 {

const Backend* GetBackend();

}  // namespace moe::sm80

#endif  // KERNELS_SM80_BACKEND_H_
