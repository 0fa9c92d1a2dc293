# SPDX-License-Identifier: Apache-2.0
"""The macro that compiles CUDA sources."""

load("//tools/cuda/private:cuda_library.bzl", "cuda_library_rule")
load(":architectures.bzl", "BACKENDS")

def cuda_library(
        name,
        srcs = [],
        hdrs = [],
        deps = [],
        copts = [],
        local_defines = [],
        backend = "common",
        **kwargs):
    """Compiles CUDA sources for the chips of the architecture setting.

    C++ libraries, other CUDA libraries and binaries may depend on it. Where the setting leaves its
    backend out, `bazel test //...` leaves it out too, and fetches nothing for it.

    Args:
      name: the target.
      srcs: .cu files, one object each.
      hdrs: .cuh and .h files, included by their path from the repository's root.
      deps: C++ or CUDA libraries.
      copts: further nvcc flags, for these sources alone.
      local_defines: preprocessor definitions, for these sources alone.
      backend: folder of //kernels whose chips the code is for, or "common": for all backends that
        the setting builds.
      **kwargs: visibility, tags and the like.
    """
    if backend != "common" and backend not in BACKENDS:
        fail("cuda_library %s: backend is %r; it must be 'common' or one of %s" %
             (name, backend, ", ".join([repr(known) for known in BACKENDS])))
    built = "with_cuda" if backend == "common" else "backend_" + backend
    built = str(Label("//tools/cuda:" + built))
    cuda_library_rule(
        name = name,
        srcs = srcs,
        hdrs = hdrs,
        copts = copts,
        local_defines = local_defines,
        backend = backend,
        # Without CUDA not even looked at: a dependency on @cutlass would download it.
        deps = deps if type(deps) == "select" else select({
            built: deps,
            "//conditions:default": [],
        }),
        target_compatible_with = select({
            built: [],
            "//conditions:default": [str(Label("//tools/cuda:cuda_required"))],
        }),
        **kwargs
    )
