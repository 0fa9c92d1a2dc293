# SPDX-License-Identifier: Apache-2.0
"""`FusedMoE`: a whole MoE layer as one module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fused_moe.activation import ActivationType
from fused_moe.module import formats, layouts
from fused_moe.module.experts import Experts
from fused_moe.module.filling import fill
from fused_moe.module.router import Router
from fused_moe.module.shared import SharedExperts
from fused_moe.module.tensors import check_tokens, refuse_gradients
from fused_moe.routing import Routing

# Numbers in the constructor, tensors [E_l] in the module.
_SWIGLU = ("swiglu_alpha", "swiglu_beta", "swiglu_limit")


class FusedMoE(torch.nn.Module):
    """Router, experts and shared experts: y = sum of chosen experts(x) (+ shared experts(x)).

        layer = FusedMoE.from_gate_up(router, gate_up, down, Routing(top_k=2))
        y = layer.quantize("int8")(x)

    It is for inference and has no gradients; its parameters ask for none. It can be compiled
    (`torch.compile(fullgraph=True)`) and captured in a CUDA graph: nothing in it waits for the
    device or depends on values. `state_dict` holds contiguous tensors that share no memory, so
    safetensors saves them in every weight format; a module built with the same arguments, on
    the meta device too (`load_state_dict(..., assign=True)`), loads them strictly.

    The parts are modules of their own: `router` (`Router`), `experts` (`Experts`) and
    `shared_experts` (`SharedExperts`, or None).

    On several ranks the result is this rank's part of a sum that the caller takes: see
    `Experts` and `SharedExperts` for what each holds. The router holds all E experts' rows.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        routing: Routing,
        *,
        router_bias: bool = False,
        correction_bias: bool = False,
        router_dtype: torch.dtype | None = None,
        apply_router_weight_on_input: bool = False,
        shared_intermediate_size: int = 0,
        shared_scale_gate: bool = False,
        activation: ActivationType = ActivationType.Swiglu,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **experts: Any,
    ) -> None:
        """Makes a layer with random weights.

        Args:
            hidden_size: H.
            intermediate_size: I, of this rank.
            num_experts: E, of all ranks.
            routing: how experts follow from the router's logits.
            router_bias, correction_bias: as in `Router`.
            router_dtype: the router's own dtype, which it keeps when the model is converted;
                None is dtype.
            apply_router_weight_on_input: scale the expert's input, not its output (Llama 4);
                for top_k 1.
            shared_intermediate_size: that of the shared experts together, of this rank; 0 for
                none.
            shared_scale_gate: as in `SharedExperts`.
            activation: of the experts and of the shared ones.
            dtype: of the tokens, and of all weights that are not quantized.
            device: as in torch.nn.Linear.
            **experts: the other arguments of `Experts`: biases, swiglu parameters,
                weight_format, group_size, ranks, backend.

        Raises:
            ValueError: sizes that do not fit.
        """
        super().__init__()
        if apply_router_weight_on_input and routing.top_k != 1:
            raise ValueError(
                f"apply_router_weight_on_input is True with top_k {routing.top_k}; it must be "
                "False: a token has one input and several router weights"
            )
        if shared_scale_gate and not shared_intermediate_size:
            raise ValueError(
                "shared_scale_gate is True with shared_intermediate_size 0; it must be False: "
                "there are no shared experts to scale"
            )
        self.apply_router_weight_on_input = apply_router_weight_on_input
        self.hidden_size = hidden_size
        self.router = Router(
            hidden_size,
            num_experts,
            routing,
            bias=router_bias,
            correction_bias=correction_bias,
            keep_dtype=router_dtype is not None,
            dtype=dtype if router_dtype is None else router_dtype,
            device=device,
        )
        self.experts = Experts(
            hidden_size,
            intermediate_size,
            num_experts,
            activation=activation,
            dtype=dtype,
            device=device,
            **experts,
        )
        self.shared_experts: SharedExperts | None = None
        if shared_intermediate_size:
            self.shared_experts = SharedExperts(
                hidden_size,
                shared_intermediate_size,
                activation=activation,
                scale_gate=shared_scale_gate,
                dtype=dtype,
                device=device,
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Runs the layer.

        Args:
            x: [..., H], float16 or bfloat16 (float32 on CPU tensors), the dtype of the weights;
                under autocast any floating dtype.

        Returns:
            A tensor like x.

        Raises:
            RuntimeError: a gradient is required.
            ValueError: a last dimension that is not H, and what `cutlass_fused_moe` raises.
        """
        refuse_gradients(x)
        check_tokens("x", x, self.hidden_size)
        tokens = x.reshape(-1, self.hidden_size).contiguous()
        scales, ids = self.router(tokens)
        if self.apply_router_weight_on_input:
            y = self.experts(tokens * scales.to(tokens.dtype), ids, None)
        else:
            y = self.experts(tokens, ids, scales)
        if self.shared_experts is not None:
            y = y + self.shared_experts(tokens)
        return y.to(x.dtype).view(x.shape)

    def quantize(self, weight_format: str, group_size: int | None = None) -> FusedMoE:
        """Quantizes the experts in place, not the router nor the shared experts.

        Args:
            weight_format: "int8", "uint8", "int4" or "mxfp4".
            group_size: of int4: 32, 64 or 128; None is the largest that divides H and I.

        Returns:
            The module itself.

        Raises:
            ValueError: the experts are quantized already, are not finite, or do not fit.
        """
        self.experts.quantize(weight_format, group_size)
        return self

    @classmethod
    def from_gate_up(
        cls,
        router_weight: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        routing: Routing,
        *,
        transposed: bool = False,
        interleaved: bool = False,
        gate_up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        **options: Any,
    ) -> FusedMoE:
        """Makes a layer of weights in which gate and up are one tensor, the gate first.

        ===========================  ==========================  ================  ============
        checkpoint                   gate_up                     down              arguments
        ===========================  ==========================  ================  ============
        transformers 5: Mixtral,     [E, 2I, H], rows            [E, H, I]
        Qwen, DeepSeek, OLMoE, ...   [gate; up]
        Llama 4                      [E, H, 2I], columns         [E, I, H]         transposed
                                     [gate; up]
        gpt-oss, 16-bit              [E, H, 2I], columns gate,   [E, I, H]         transposed,
                                     up, gate, up, ...                             interleaved
        ===========================  ==========================  ================  ============

        Args:
            router_weight: [E, H].
            gate_up, down: this rank's experts, as in the table.
            routing: how experts follow from the router's logits.
            transposed: both weights are x @ W rather than x @ W.T.
            interleaved: gate and up alternate along 2I.
            gate_up_bias: [E, 2I], its halves in the order of gate_up's.
            down_bias: [E, H].
            **options: those of `from_tensors`, but for fc1_bias, fc2_bias and quant_scales.

        Raises:
            ValueError: tensors that do not fit.
        """
        fc1 = layouts.fc1_from_gate_up(gate_up, transposed=transposed, interleaved=interleaved)
        fc1_bias = None
        if gate_up_bias is not None:
            fc1_bias = layouts.fc1_bias_from_gate_up(gate_up_bias, interleaved=interleaved)
        if transposed:
            down = down.transpose(-1, -2).contiguous()
        return cls.from_tensors(
            router_weight, fc1, down, routing, fc1_bias=fc1_bias, fc2_bias=down_bias, **options
        )

    @classmethod
    def from_experts(
        cls,
        router_weight: torch.Tensor,
        w1: Sequence[torch.Tensor],
        w2: Sequence[torch.Tensor],
        w3: Sequence[torch.Tensor] | None,
        routing: Routing,
        **options: Any,
    ) -> FusedMoE:
        """Makes a layer of weights that are a tensor for each expert.

        In Mixtral's files these are block_sparse_moe.experts.N.w1, w2 and w3; in Qwen's,
        DeepSeek's and OLMoE's mlp.experts.N.gate_proj, down_proj and up_proj.

        Args:
            router_weight: [E, H].
            w1: the gate of each of this rank's experts, [I, H].
            w2: down of each, [H, I].
            w3: up of each, [I, H]; None for activations that are not gated, whose first weight
                is w1 (Nemotron's up_proj).
            routing: how experts follow from the router's logits.
            **options: those of `from_tensors`.

        Raises:
            ValueError: tensors that do not fit.
        """
        fc1, fc2 = layouts.stack_experts(w1, w2, w3)
        return cls.from_tensors(router_weight, fc1, fc2, routing, **options)

    @classmethod
    def from_tensors(
        cls,
        router_weight: torch.Tensor,
        fc1_weight: torch.Tensor,
        fc2_weight: torch.Tensor,
        routing: Routing,
        *,
        quant_scales: Sequence[torch.Tensor] | None = None,
        weight_format: str = "same",
        group_size: int | None = None,
        fc1_bias: torch.Tensor | None = None,
        fc2_bias: torch.Tensor | None = None,
        router_bias: torch.Tensor | None = None,
        correction_bias: torch.Tensor | None = None,
        shared_gate_up: torch.Tensor | None = None,
        shared_down: torch.Tensor | None = None,
        shared_scale_gate: torch.Tensor | None = None,
        activation: ActivationType = ActivationType.Swiglu,
        ep_size: int = 1,
        **options: Any,
    ) -> FusedMoE:
        """Makes a layer of tensors as `cutlass_fused_moe` takes them: **the gate second**.

        A tensor that is contiguous and a whole storage is kept, not copied.

        Args:
            router_weight: [E, H], E experts of all ranks.
            fc1_weight: [E_l, 2I, H] with rows [up; gate]; [E_l, I, H] if not gated.
            fc2_weight: [E_l, H, I].
            routing: how experts follow from the router's logits.
            quant_scales: [fc1's, fc2's] of weights that are quantized already in
                `weight_format`; None for floating point weights.
            weight_format: floating point weights are quantized to it.
            group_size: of int4, as in `Experts`.
            fc1_bias, fc2_bias: [E_l, 2I or I] and [E_l, H].
            router_bias: [E] (gpt-oss). correction_bias: [E] (e_score_correction_bias).
            shared_gate_up: [2 * I_s, H], rows [gate; up]; shared_down: [H, I_s].
            shared_scale_gate: [1, H] (Qwen's shared_expert_gate).
            activation: an `ActivationType`.
            ep_size: over how many ranks the experts are divided.
            **options: of the constructor apply_router_weight_on_input, dtype (None is that of
                fc1_weight; where that is quantized, of shared_down, fc1_bias, fc2_bias or
                router_weight, the first that is given), router_dtype (None is that of
                router_weight if it is not dtype), swiglu parameters, tp_size, tp_rank, ep_rank,
                backend.

        Raises:
            ValueError: tensors that do not fit.
        """
        scales = list(quant_scales or [])
        if len(scales) not in (0, 2):
            raise ValueError(f"quant_scales has {len(scales)} tensors; it must have 2, or none")
        if (shared_gate_up is None) != (shared_down is None):
            raise ValueError("one of shared_gate_up and shared_down is None; give both or neither")
        if shared_scale_gate is not None and shared_down is None:
            raise ValueError(
                "shared_scale_gate is given without shared_gate_up and shared_down, which it scales"
            )
        if shared_down is not None and shared_down.ndim != 2:
            raise ValueError(
                f"shared_down has the shape {list(shared_down.shape)}; it must have two "
                f"dimensions, [{router_weight.shape[-1]}, I_s]"
            )
        for name, weight in (("fc1_weight", fc1_weight), ("fc2_weight", fc2_weight)):
            if weight.ndim != 3:
                raise ValueError(
                    f"{name} has the shape {list(weight.shape)}; it must have three dimensions, "
                    "[experts, rows, columns]"
                )
        fc1_scale, fc2_scale = scales or (None, None)
        stored = formats.stored_format(weight_format, group_size, fc1_weight, fc1_scale)
        swiglu = {name: options.get(name) for name in _SWIGLU}
        dtype = options.pop("dtype", None)
        if dtype is None:
            # Beside quantized weights the router comes last: it may be float32 by itself.
            unquantized = (shared_down, fc1_bias, fc2_bias, router_weight)
            first = next(tensor for tensor in unquantized if tensor is not None)
            dtype = fc1_weight.dtype if fc1_scale is None else first.dtype
        if router_weight.dtype != dtype:
            options.setdefault("router_dtype", router_weight.dtype)
        layer = cls(
            fc2_weight.shape[1],
            fc2_weight.shape[2] * stored.weights_an_element,
            fc1_weight.shape[0] * ep_size,
            routing,
            router_bias=router_bias is not None,
            correction_bias=correction_bias is not None,
            shared_intermediate_size=0 if shared_down is None else shared_down.shape[1],
            shared_scale_gate=shared_scale_gate is not None,
            activation=activation,
            weight_format=stored.name,
            group_size=stored.group_size or None,
            fc1_bias=fc1_bias is not None,
            fc2_bias=fc2_bias is not None,
            ep_size=ep_size,
            dtype=dtype,
            device="meta",
            **options,
        )
        given: dict[str, tuple[str, torch.Tensor | None]] = {
            "router.weight": ("router_weight", router_weight),
            "router.bias": ("router_bias", router_bias),
            "router.correction_bias": ("correction_bias", correction_bias),
            "experts.fc1_weight": ("fc1_weight", fc1_weight),
            "experts.fc2_weight": ("fc2_weight", fc2_weight),
            "experts.fc1_scale": ("quant_scales[0]", fc1_scale),
            "experts.fc2_scale": ("quant_scales[1]", fc2_scale),
            "experts.fc1_bias": ("fc1_bias", fc1_bias),
            "experts.fc2_bias": ("fc2_bias", fc2_bias),
            "shared_experts.gate_up_weight": ("shared_gate_up", shared_gate_up),
            "shared_experts.down_weight": ("shared_down", shared_down),
            "shared_experts.scale_gate_weight": ("shared_scale_gate", shared_scale_gate),
        }
        for name, value in swiglu.items():
            if value is not None:
                shape, device = fc1_weight.shape[:1], fc1_weight.device
                full = torch.full(shape, value, dtype=torch.float32, device=device)
                given[f"experts.{name}"] = (name, full)
        fill(layer, given)
        return layer if stored.name == weight_format else layer.quantize(weight_format, group_size)
