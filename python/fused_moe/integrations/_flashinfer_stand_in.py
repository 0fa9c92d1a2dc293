# SPDX-License-Identifier: Apache-2.0
"""Modules by the name of FlashInfer's, for programs that cannot change their imports."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

# The release whose names, order and defaults are followed, marked as not being it.
VERSION = "0.7.2.post1+fused.moe"
_MARK = "__fused_moe_stand_in__"
_SOURCE = "fused_moe.integrations.flashinfer"

# What each module offers besides what `fused_moe.integrations.flashinfer` has; None is all of it.
_MODULES: dict[str, tuple[str, ...] | None] = {
    "flashinfer": (
        "ActivationType",
        "B12xMoEWrapper",
        "CuteDslBf16MoEWrapper",
        "CuteDslMoEWrapper",
        "CuteDslMxfp8Mxfp4MoEWrapper",
        "GatedActType",
        "NVFP44Over6Config",
        "NVFP44Over6ErrMode",
        "RoutingMethodType",
        "autotune",
        "b12x_fused_moe",
        "cudnn_frost_grouped_gemm1_swiglu",
        "cudnn_frost_grouped_gemm1_swiglu_workspace_size",
        "cute_dsl_fused_moe",
        "cute_dsl_fused_moe_bf16",
        "cute_dsl_fused_moe_mxfp8_mxfp4",
        "cute_dsl_fused_moe_nvfp4",
        "cutlass_fused_moe",
        "is_gated_activation",
        "reorder_rows_for_gated_act_gemm",
        "trtllm_bf16_moe",
        "trtllm_bf16_routed_moe",
        "trtllm_fp4_block_scale_moe",
        "trtllm_fp4_block_scale_routed_moe",
        "trtllm_fp8_block_scale_moe",
        "trtllm_fp8_block_scale_routed_moe",
        "trtllm_fp8_per_tensor_scale_moe",
        "trtllm_fp8_per_tensor_scale_routed_moe",
    ),
    "flashinfer.autotuner": ("autotune",),
    "flashinfer.fused_moe": None,
    "flashinfer.fused_moe.core": None,
    "flashinfer.tllm_enums": (
        "ActivationType",
        "Fp8QuantizationType",
        "GatedActType",
        "RoutingInputMode",
        "RoutingMethodType",
        "WeightLayout",
        "is_gated_activation",
    ),
}


def install() -> None:
    """Makes `flashinfer.fused_moe` this package, in this process, where FlashInfer is absent.

    After it, `from flashinfer.fused_moe import cutlass_fused_moe` works, and so do `flashinfer`
    (what it repeats of that module, and `autotune`), `flashinfer.fused_moe.core`,
    `flashinfer.autotuner` and `flashinfer.tllm_enums`. Nothing else of FlashInfer is there: do not
    use it in a program that looks whether FlashInfer is installed to choose, say, its attention
    (vLLM, SGLang). A second call changes nothing.

    Raises:
        RuntimeError: the real FlashInfer is installed. Import `fused_moe.integrations.flashinfer`
            instead, by its own name.
    """
    present = sys.modules.get("flashinfer")
    if present is not None and hasattr(present, _MARK):
        return
    found = getattr(present, "__file__", None)
    if present is None:
        spec = importlib.util.find_spec("flashinfer")
        if spec is not None:
            found = spec.origin
    if present is not None or found is not None:
        raise RuntimeError(
            f"FlashInfer itself is installed ({found}), and is not replaced: import "
            f"{_SOURCE} by that name"
        )
    source = importlib.import_module(_SOURCE)
    for name, offered in _MODULES.items():
        sys.modules[name] = _stand_in(name, source, offered)
    for name in _MODULES:
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])


def uninstall() -> None:
    """Undoes `install`; without it, changes nothing. What was imported before stays usable."""
    for name in _MODULES:
        if hasattr(sys.modules.get(name), _MARK):
            del sys.modules[name]


def _stand_in(
    name: str, source: types.ModuleType, offered: tuple[str, ...] | None
) -> types.ModuleType:
    """A module called `name` with the names `offered` of `source`, or with all of them."""
    module = types.ModuleType(name, f"Part of FlashInfer's names on fused_moe: see {_SOURCE}.")
    package = any(other.startswith(name + ".") for other in _MODULES)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=package)
    module.__dict__[_MARK] = True
    if package:
        module.__path__ = []
    if name == "flashinfer":
        module.__dict__["__version__"] = VERSION

    def get(attribute: str) -> Any:
        # Python's own look-ups (__file__, __all__, ...) are not for the source to answer.
        own = attribute.startswith("__")
        if not own and (offered is None or attribute in offered):
            return getattr(source, attribute)
        raise AttributeError(
            f"module {name!r} has no attribute {attribute!r}: it is the stand-in of fused_moe, "
            "which has FlashInfer's names of fused_moe alone"
        )

    def names() -> list[str]:
        return sorted(dir(source) if offered is None else offered)

    module.__dict__["__getattr__"] = get
    module.__dict__["__dir__"] = names
    return module
