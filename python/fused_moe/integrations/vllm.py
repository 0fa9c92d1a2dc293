# SPDX-License-Identifier: Apache-2.0
"""vLLM's mixture-of-experts layers on this package's kernels.

    from fused_moe.integrations import vllm as moe

    moe.register()                      # 16-bit experts
    llm = LLM(model)
    llm = LLM(model, quantization="fused_moe_int8")  # experts quantized to INT8 while loading

vLLM runs models in processes of its own, so a server needs this as a plugin: the wheel of this
package declares `plugin` under vLLM's entry points (`vllm.general_plugins`), which every process
loads. It always makes the name `fused_moe_int8` known; 16-bit experts move to our kernels where
the environment has FUSED_MOE_VLLM=1. See docs/vllm.md.
"""

from __future__ import annotations

import importlib
import logging
import os

# The release that this was written for and tested against; its interface changes often.
TESTED_VERSION = "0.33"
VARIABLE = "FUSED_MOE_VLLM"
QUANTIZATION = "fused_moe_int8"

_log = logging.getLogger(__name__)


def register(*, unquantized: bool = True, any_version: bool = False) -> None:
    """Makes vLLM, in this process, run its experts on our layer; again is harmless.

    Args:
        unquantized: run 16-bit experts: vLLM's out-of-tree replacement of
            UnquantizedFusedMoEMethod. False leaves those to vLLM and makes the quantization
            "fused_moe_int8" known, alone.
        any_version: try it with a vLLM other than TESTED_VERSION.

    Raises:
        ImportError: vLLM is not installed.
        RuntimeError: it is another version; or something else has replaced that method.
    """
    vllm = importlib.import_module("vllm")
    version = str(vllm.__version__)
    if not any_version and not (version + ".").startswith(TESTED_VERSION + "."):
        raise RuntimeError(
            f"vLLM is {version}; fused_moe was written for {TESTED_VERSION} and its interface for "
            f"experts changes often: install vllm=={TESTED_VERSION}.*, or try any_version=True"
        )
    experts = importlib.import_module("fused_moe.integrations._vllm_experts")
    quantization = importlib.import_module("vllm.model_executor.layers.quantization")
    quantization.register_quantization_config(QUANTIZATION)(experts.FusedMoeInt8Config)
    if not unquantized:
        return
    custom_op = importlib.import_module("vllm.model_executor.custom_op")
    name = experts.UnquantizedFusedMoEMethod.__name__
    present = custom_op.op_registry_oot.get(name)
    if present is experts.FusedMoeMethod:
        return
    if present is not None:
        raise RuntimeError(
            f"{present.__module__}.{present.__name__} has replaced vLLM's {name} already: load "
            "one of the two plugins (VLLM_PLUGINS names those that are loaded)"
        )
    custom_op.CustomOp.register_oot(name=name)(experts.FusedMoeMethod)


def plugin() -> None:
    """The entry point: what a process of vLLM calls at its start.

    Raises:
        ImportError, RuntimeError: FUSED_MOE_VLLM=1 asks for what `register` refuses, or has
            another value.
    """
    wanted = os.environ.get(VARIABLE, "0")
    if wanted not in ("0", "1"):
        raise RuntimeError(
            f"{VARIABLE} is {wanted!r}; it must be 1 (16-bit experts on fused_moe) or 0"
        )
    try:
        register(unquantized=wanted == "1")
    except (ImportError, RuntimeError) as error:
        if wanted == "1":
            raise
        # Nobody asked for anything: the server starts as if this package were not there.
        _log.warning("fused_moe is not available: %s", error)
