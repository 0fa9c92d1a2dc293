# SPDX-License-Identifier: Apache-2.0
"""SGLang's mixture-of-experts layers on this package's kernels.

The wheel of this package declares `plugin` under SGLang's entry points (`sglang.srt.plugins`),
which each of its processes loads. It adds two names for --moe-runner-backend:

    python -m sglang.launch_server --model-path ... --moe-runner-backend fused_moe
    python -m sglang.launch_server --model-path ... --moe-runner-backend fused_moe_int8

Without one of these names nothing changes. See docs/sglang.md.
"""

from __future__ import annotations

import importlib
import logging

# The release that this was written for and tested against; its interface changes often.
TESTED_VERSION = "0.5.23"

_METHOD = "sglang.srt.layers.quantization.unquant.UnquantizedFusedMoEMethod."
# What is hooked, and which function of _sglang_runner goes around each. `forward_native` is
# another name of `forward_cpu` there and needs a hook of its own.
_HOOKS = {
    _METHOD + "create_moe_runner": "around_create_moe_runner",
    _METHOD + "process_weights_after_loading": "around_process_weights",
    _METHOD + "restore_weights_before_loading": "around_restore",
    _METHOD
    + "maybe_restore_flashinfer_trtllm_bf16_weight_shape_for_load": "around_restore_for_load",
    _METHOD + "forward_cuda": "around_forward",
    _METHOD + "forward_cpu": "around_forward",
    _METHOD + "forward_native": "around_forward",
    _METHOD + "_torch_compile_forward": "around_torch_compile_forward",
    _METHOD + "get_moe_quant_info": "around_quant_info",
    "sglang.srt.layers.moe.fused_moe_triton.layer._validate_hpc_ops_quant_method": (
        "around_validate"
    ),
}

_log = logging.getLogger(__name__)
_registered = False


def register(*, any_version: bool = False) -> None:
    """Adds our runners to SGLang, in this process; again is harmless.

    The hooks take effect when SGLang applies them, which its `load_plugins` does after all
    plugins; a program that calls this itself calls `HookRegistry.apply_hooks()` after.

    Args:
        any_version: try it with an SGLang other than TESTED_VERSION.

    Raises:
        ImportError: SGLang is not installed.
        RuntimeError: it is another version.
    """
    global _registered
    version = str(importlib.import_module("sglang.version").__version__)
    if not any_version and not (version + ".").startswith(TESTED_VERSION + "."):
        raise RuntimeError(
            f"SGLang is {version}; fused_moe was written for {TESTED_VERSION}, and its interface "
            f"for experts changes often: install sglang=={TESTED_VERSION}, or try any_version=True"
        )
    if _registered:
        return
    ours = importlib.import_module("fused_moe.integrations._sglang_runner")
    runner = importlib.import_module("sglang.srt.layers.moe.moe_runner.runner")
    choices = importlib.import_module("sglang.srt.arg_groups.choices")
    hooks = importlib.import_module("sglang.srt.plugins.hook_registry")
    for name in ours.BACKENDS:
        runner.register_moe_runner_core(
            name, lambda config, name=name: ours.FusedMoeRunnerCore(config, name)
        )
    choices.add_moe_runner_backend_choices(list(ours.BACKENDS))
    for target, function in _HOOKS.items():
        hooks.HookRegistry.register(target, getattr(ours, function), hooks.HookType.AROUND)
    _registered = True


def plugin() -> None:
    """The entry point: what a process of SGLang calls at its start."""
    try:
        register()
    except (ImportError, RuntimeError) as error:
        # --moe-runner-backend then does not know our names and says so.
        _log.warning("fused_moe is not available: %s", error)
