# SPDX-License-Identifier: Apache-2.0
"""vLLM's and SGLang's whole layers, where they are installed: loader, router, dispatch, experts.

Nothing stands in for anything here, so without them these tests are skipped. CPU tensors.
"""

from __future__ import annotations

import importlib
import importlib.util
import socket
from typing import Any

import pytest
import torch

from fused_moe import topk_softmax
from fused_moe.reference import reference_moe
from tolerances import assert_close

E, K, H, INTER = 8, 2, 64, 48
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)
needs_sglang = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None, reason="SGLang is not installed"
)

Checkpoint = dict[str, torch.Tensor]


def checkpoint(seed: int = 0) -> Checkpoint:
    """Each expert's w1 (gate), w3 (up) and w2 (down), exact in bfloat16 and in INT8."""
    draw = torch.Generator().manual_seed(seed)

    def whole(*shape: int, step: float) -> torch.Tensor:
        q = torch.randint(-127, 128, shape, generator=draw)
        q[:, :, 0] = 127
        return (q * step).bfloat16()

    return {
        "w1": whole(E, INTER, H, step=2**-9),
        "w3": whole(E, INTER, H, step=2**-8),
        "w2": whole(E, H, INTER, step=2**-9),
    }


def load(layer: Any, weights: Checkpoint) -> None:
    """As models' load_weights does: a tensor of an expert at a time."""
    for expert in range(E):
        for shard, tensor in weights.items():
            name = "w2_weight" if shard == "w2" else "w13_weight"
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor[expert], f"experts.{name}", shard, expert)


def expected(
    weights: Checkpoint, x: torch.Tensor, scales: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """The float32 reference."""
    up_gate = torch.cat([weights["w3"], weights["w1"]], dim=1)
    return reference_moe(x, ids, scales, up_gate, weights["w2"])


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(13, H, generator=draw).bfloat16()
    return x, torch.randn(13, E, generator=draw).bfloat16()


@needs_vllm
@pytest.mark.parametrize("quantization", [None, "fused_moe_int8"])
def test_vllms_layer(quantization: str | None) -> None:
    platforms = importlib.import_module("vllm.platforms")
    cpu = importlib.import_module("vllm.platforms.cpu").CpuPlatform()
    vars(platforms)["_current_platform"] = cpu
    integration = importlib.import_module("fused_moe.integrations.vllm")
    integration.register()
    config = importlib.import_module("vllm.config")
    distributed = importlib.import_module("vllm.distributed")
    fused_moe = importlib.import_module("vllm.model_executor.layers.fused_moe")
    registry = importlib.import_module("vllm.model_executor.layers.quantization")
    context = importlib.import_module("vllm.forward_context")
    reload = importlib.import_module("vllm.model_executor.model_loader.reload.layerwise")
    x, logits = tokens()
    vllm_config = config.VllmConfig()
    with config.set_current_vllm_config(vllm_config):
        if not distributed.model_parallel_is_initialized():
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            distributed.init_distributed_environment(
                world_size=1,
                rank=0,
                distributed_init_method=f"tcp://127.0.0.1:{port}",
                local_rank=0,
                backend="gloo",
            )
            distributed.initialize_model_parallel(1)
        prefix = f"model.layers.0.mlp.experts.{quantization}"
        runner = fused_moe.FusedMoEFactory(
            num_experts=E,
            top_k=K,
            hidden_size=H,
            intermediate_size=INTER,
            params_dtype=torch.bfloat16,
            renormalize=True,
            quant_config=quantization and registry.get_quantization_config(quantization)(),
            prefix=prefix,
        )
        reload.record_metadata_for_reloading(runner)
        [experts] = [m for m in runner.modules() if isinstance(m, fused_moe.RoutedExperts)]
        assert type(experts.quant_method).__module__ == "fused_moe.integrations._vllm_experts"
        load(experts, checkpoint())
        if quantization is None:  # online quantization does this once all weights have arrived
            experts.quant_method.process_weights_after_loading(experts)
        else:
            assert experts.w13_weight.dtype == torch.int8
        for seed in (0, 1):
            with context.set_forward_context(None, vllm_config, num_tokens=x.shape[0]):
                out = runner(x, logits)
            ref = expected(checkpoint(seed), x, *topk_softmax(logits, K))
            assert_close(out, ref, torch.bfloat16)
            with pytest.raises(RuntimeError, match=r"w13_weight is in .*reload_weights"):
                load(experts, checkpoint())
            # What reload_weights does around the model's load_weights.
            reload.initialize_layerwise_reload(runner)
            load(experts, checkpoint(seed + 1))
            reload.finalize_layerwise_reload(runner, None)


def sglang_for(backend: str) -> Any:
    """SGLang as it is on one rank where --moe-runner-backend says `backend`."""
    integration = importlib.import_module("fused_moe.integrations.sglang")
    integration.register()
    hooks = importlib.import_module("sglang.srt.plugins.hook_registry")
    hooks.HookRegistry.apply_hooks()
    runtime = importlib.import_module("sglang.srt.runtime_context")
    server_args = importlib.import_module("sglang.srt.server_args")
    utils = importlib.import_module("sglang.srt.layers.moe.utils")
    runtime.get_context().set_server_args(
        server_args.ServerArgs(model_path="none", device="cpu", moe_runner_backend=backend)
    )
    runtime.get_flags().moe.runner_backend = utils.resolve_moe_runner_backend(backend)
    one_rank = {"moe_ep_size": 1, "moe_ep_rank": 0, "moe_tp_size": 1, "moe_tp_rank": 0}
    return runtime.get_parallel().override(**one_rank, tp_group=None)


@needs_sglang
@pytest.mark.parametrize("backend", ["fused_moe", "fused_moe_int8"])
def test_sglangs_layer(backend: str) -> None:
    layers = importlib.import_module("sglang.srt.layers.moe.fused_moe_triton.layer")
    topk = importlib.import_module("sglang.srt.layers.moe.topk")
    x, logits = tokens()
    scales, ids = topk_softmax(logits, K)
    with sglang_for(backend):
        layer = layers.FusedMoE(
            num_experts=E,
            hidden_size=H,
            intermediate_size=INTER,
            layer_id=0,
            top_k=K,
            params_dtype=torch.bfloat16,
        )
        load(layer, checkpoint())
        layer.quant_method.process_weights_after_loading(layer)
        assert type(layer.runner.runner_core).__module__ == "fused_moe.integrations._sglang_runner"
        out = layer(x, topk.StandardTopKOutput(scales, ids, None))
        assert_close(out, expected(checkpoint(), x, scales, ids), torch.bfloat16)
        if backend == "fused_moe_int8":
            with pytest.raises(RuntimeError, match="fused_moe_int8 quantized"):
                load(layer, checkpoint(1))
            return
        # A session of updates of weights, without any of this layer's and with.
        for seed in (0, 1):
            layer.quant_method.restore_weights_before_loading(layer)
            if seed:
                load(layer, checkpoint(seed))
            layer.quant_method.process_weights_after_loading(layer)
            out = layer(x, topk.StandardTopKOutput(scales, ids, None))
            assert_close(out, expected(checkpoint(seed), x, scales, ids), torch.bfloat16)


@needs_sglang
def test_sglangs_quantized_layer() -> None:
    layers = importlib.import_module("sglang.srt.layers.moe.fused_moe_triton.layer")
    fp8 = importlib.import_module("sglang.srt.layers.quantization.fp8")
    with sglang_for("fused_moe"), pytest.raises(NotImplementedError, match="Fp8MoEMethod's"):
        layers.FusedMoE(
            num_experts=E,
            hidden_size=H,
            intermediate_size=INTER,
            layer_id=0,
            top_k=K,
            params_dtype=torch.bfloat16,
            quant_config=fp8.Fp8Config(is_checkpoint_fp8_serialized=True),
        )
