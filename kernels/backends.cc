// SPDX-License-Identifier: Apache-2.0
//
// Where backends are listed: adding an architecture adds a line here and one in BUILD.bazel.

#include "moe/backend.h"

#if defined(MOE_WITH_SM80)
#include "kernels/sm80/backend.h"
#endif

namespace moe {

const std::vector<const Backend*>& Backends() {
  static const std::vector<const Backend*> backends = {
#if defined(MOE_WITH_SM80)
      sm80::GetBackend(),
#endif
  };
  return backends;
}

}  // namespace moe
