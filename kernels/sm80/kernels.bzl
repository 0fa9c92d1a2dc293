# SPDX-License-Identifier: Apache-2.0
"""The instances of the sm80 grouped GEMM."""

load("@rules_cc//cc:defs.bzl", "cc_library")
load("//tools/cuda:defs.bzl", "cuda_library")

_DTYPES = {
    "bf16": "kBFloat16",
    "fp16": "kFloat16",
}

# Whether weights are 8-bit integers.
_WEIGHTS = {
    "w16": 0,
    "w8": 1,
}

def sm80_kernels(name, srcs, hdrs, tiles, deps):
    """Compiles the kernel once for each tile, dtype and weight width.

    Each instance is a library of its own, so that they build in parallel and are cached apart.

    Args:
      name: a library of them all; the instances are NAME_TILE_DTYPE_WEIGHTS.
      srcs: the one source.
      hdrs: its headers.
      tiles: how many tiles tiles.h lists.
      deps: what the source needs.
    """
    instances = []
    for tile in range(tiles):
        for dtype, dtype_name in _DTYPES.items():
            for weights, quantized in _WEIGHTS.items():
                instance = "%s_%d_%s_%s" % (name, tile, dtype, weights)
                cuda_library(
                    name = instance,
                    srcs = srcs,
                    hdrs = hdrs,
                    backend = "sm80",
                    local_defines = [
                        "MOE_TILE=%d" % tile,
                        "MOE_DTYPE=" + dtype_name,
                        "MOE_QUANTIZED=%d" % quantized,
                    ],
                    visibility = ["//visibility:private"],
                    deps = deps,
                )
                instances.append(instance)
    cc_library(
        name = name,
        target_compatible_with = select({
            "//tools/cuda:backend_sm80": [],
            "//conditions:default": ["//tools/cuda:cuda_required"],
        }),
        visibility = ["//visibility:private"],
        deps = instances,
    )
