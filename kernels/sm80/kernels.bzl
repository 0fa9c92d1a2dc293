# SPDX-License-Identifier: Apache-2.0
"""The instances of the sm80 kernels."""

load("@rules_cc//cc:defs.bzl", "cc_library")
load("//tools/cuda:defs.bzl", "cuda_library")

_DTYPES = {
    "bf16": "kBFloat16",
    "fp16": "kFloat16",
}

# Names of WeightKind.
_WEIGHTS = {
    "int4": "kInt4",
    "mxfp4": "kMxfp4",
    "w16": "k16Bit",
    "w8": "k8Bit",
}

def _instances(name, defines, **kwargs):
    """Compiles a source once for each dtype and kind of weights.

    Args:
      name: of the instances, which are NAME_DTYPE_WEIGHTS.
      defines: further preprocessor definitions.
      **kwargs: of cuda_library.

    Returns:
      The names of the instances.
    """
    instances = []
    for dtype, dtype_name in _DTYPES.items():
        for weights, weights_name in _WEIGHTS.items():
            instance = "%s_%s_%s" % (name, dtype, weights)
            cuda_library(
                name = instance,
                backend = "sm80",
                local_defines = defines + [
                    "MOE_DTYPE=" + dtype_name,
                    "MOE_WEIGHTS=" + weights_name,
                ],
                visibility = ["//visibility:private"],
                **kwargs
            )
            instances.append(instance)
    return instances

def sm80_kernels(name, tiles, gemm, decode, hdrs, deps):
    """Compiles every instance of the sm80 kernels.

    Each is a library of its own, so that they build in parallel and are cached apart.

    Args:
      name: a library of them all.
      tiles: how many tiles tiles.h lists.
      gemm: the source of the grouped GEMM, compiled for each of them.
      decode: the source of the layer for few tokens.
      hdrs: the headers of both.
      deps: what the sources need.
    """
    instances = _instances(name + "_decode", [], srcs = [decode], hdrs = hdrs, deps = deps)
    for tile in range(tiles):
        instances += _instances(
            "%s_%d" % (name, tile),
            ["MOE_TILE=%d" % tile],
            srcs = [gemm],
            hdrs = hdrs,
            deps = deps,
        )
    cc_library(
        name = name,
        target_compatible_with = select({
            "//tools/cuda:backend_sm80": [],
            "//conditions:default": ["//tools/cuda:cuda_required"],
        }),
        visibility = ["//visibility:private"],
        deps = instances,
    )
