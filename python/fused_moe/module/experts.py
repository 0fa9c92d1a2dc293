# SPDX-License-Identifier: Apache-2.0
"""The experts of this rank, in any weight format, as one call of `cutlass_fused_moe`."""

from __future__ import annotations

from typing import Any

import torch

from fused_moe.activation import ActivationType
from fused_moe.arguments import check_parallelism
from fused_moe.module.formats import WeightFormat
from fused_moe.module.tensors import (
    InferenceModule,
    check_tokens,
    copied,
    is_aligned,
    parameter,
    refuse_gradients,
)
from fused_moe.op import cutlass_fused_moe

# Weights and their scales; what `_load_from_state_dict` compares with a checkpoint's.
_STORED = ("fc1_weight", "fc2_weight", "fc1_scale", "fc2_scale")


class Experts(InferenceModule):
    """out[t] = sum over j of scales[t, j] * expert[ids[t, j]](x[t]), this rank's experts.

    State, E_l experts of this rank, N rows (2I if the activation is gated, else I):

        fc1_weight  [E_l, N, H], gated rows [up; gate]: **the gate is the second half**
        fc2_weight  [E_l, H, I]
        fc1_scale, fc2_scale   of quantized weights; shapes and dtypes in `WeightFormat`
        fc1_bias    [E_l, N];  fc2_bias [E_l, H]
        swiglu_alpha, swiglu_beta, swiglu_limit  [E_l] float32

    all but the two weights only where they are asked for.
    """

    fc1_scale: torch.Tensor | None
    fc2_scale: torch.Tensor | None
    swiglu_alpha: torch.Tensor | None
    swiglu_beta: torch.Tensor | None
    swiglu_limit: torch.Tensor | None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        activation: ActivationType = ActivationType.Swiglu,
        swiglu_alpha: float | None = None,
        swiglu_beta: float | None = None,
        swiglu_limit: float | None = None,
        fc1_bias: bool = False,
        fc2_bias: bool = False,
        weight_format: str = "same",
        group_size: int | None = None,
        tp_size: int = 1,
        tp_rank: int = 0,
        ep_size: int = 1,
        ep_rank: int = 0,
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Makes experts with random weights and biases of 0.

        Args:
            hidden_size: H.
            intermediate_size: I, of this rank.
            num_experts: E, of all ranks; this one holds E_l = E / ep_size.
            activation: an `ActivationType`.
            swiglu_alpha, swiglu_beta, swiglu_limit: SwigluBias's parameters, the limit also
                SwigluStep's; None is `cutlass_fused_moe`'s own value.
            fc1_bias, fc2_bias: whether the products have biases.
            weight_format: "same" (as dtype), "int8", "uint8", "int4" or "mxfp4".
            group_size: of int4; None is the largest of 128, 64 and 32 that divides H and I.
            tp_size, tp_rank, ep_size, ep_rank, backend: as in `cutlass_fused_moe`. The result
                is this rank's part of a sum that the caller takes.
            dtype: of the tokens, of biases and of weights that are not quantized.
            device: as in torch.nn.Linear.

        Raises:
            ValueError: sizes or ranks that do not fit.
        """
        super().__init__()
        check_parallelism(tp_size, tp_rank, ep_size, ep_rank)
        if num_experts < 1 or num_experts % ep_size:
            raise ValueError(
                f"num_experts is {num_experts}; it must be a positive multiple of ep_size, "
                f"{ep_size}"
            )
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_experts, self.num_local_experts = num_experts, num_experts // ep_size
        self.activation = ActivationType(activation)
        self.ranks: dict[str, Any] = {
            "tp_size": tp_size,
            "tp_rank": tp_rank,
            "ep_size": ep_size,
            "ep_rank": ep_rank,
        }
        self.backend = backend
        self.format = WeightFormat.of(weight_format, group_size, (hidden_size, intermediate_size))
        self.kept.update(("fc1_scale", "fc2_scale"))
        for name, shape in self._shapes().items():
            stored, stored_dtype = self.format.weight(shape, dtype)
            self.register_parameter(f"{name}_weight", parameter(stored, stored_dtype, device))
            scale = self.format.scale(shape)
            empty = None
            if scale is not None:
                empty = torch.empty(scale[0], dtype=scale[1], device=device)
            self.register_buffer(f"{name}_scale", empty)
        for name, wanted in (("fc1", fc1_bias), ("fc2", fc2_bias)):
            bias = parameter(self._shapes()[name][:2], dtype, device) if wanted else None
            self.register_parameter(f"{name}_bias", bias)
        swiglu = {
            "swiglu_alpha": swiglu_alpha,
            "swiglu_beta": swiglu_beta,
            "swiglu_limit": swiglu_limit,
        }
        self._swiglu = {name: value for name, value in swiglu.items() if value is not None}
        self.kept.update(swiglu)
        for name in swiglu:
            empty = None
            if name in self._swiglu:
                empty = torch.empty(self.num_local_experts, dtype=torch.float32, device=device)
            self.register_buffer(name, empty)
        self.reset_parameters()

    @property
    def weight_format(self) -> str:
        """The name of the format: "same", "int8", "uint8", "int4" or "mxfp4"."""
        return self.format.name

    def _shapes(self) -> dict[str, tuple[int, int, int]]:
        """[E_l, N, K] of both weights as numbers, however they are stored."""
        rows = self.intermediate_size * (2 if self.activation.is_gated else 1)
        return {
            "fc1": (self.num_local_experts, rows, self.hidden_size),
            "fc2": (self.num_local_experts, self.hidden_size, self.intermediate_size),
        }

    def reset_parameters(self) -> None:
        """Weights of deviation K^-0.5, so that a product keeps the size of its input.

        Biases become 0, and the swiglu parameters what the constructor was given.
        """
        for name, (_, rows, depth) in self._shapes().items():
            weight, scale = getattr(self, f"{name}_weight"), getattr(self, f"{name}_scale")
            for expert in range(0 if weight.is_meta else self.num_local_experts):
                if scale is None:
                    torch.nn.init.normal_(weight[expert], std=depth**-0.5)
                    continue
                # One expert at a time: all of them as numbers may be larger than the memory.
                drawn = torch.randn(1, rows, depth, device=weight.device).mul_(depth**-0.5)
                stored, its_scale = self.format.quantize(drawn)
                weight[expert] = stored[0]
                scale[expert] = its_scale[0]
            bias = getattr(self, f"{name}_bias", None)
            if bias is not None:
                torch.nn.init.zeros_(bias)
        for name, value in self._swiglu.items():
            getattr(self, name).fill_(value)

    # Not inference tensors, whatever mode the caller is in: parameters outlive it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def quantize(self, weight_format: str, group_size: int | None = None) -> Experts:
        """Replaces the weights by quantized ones; returns the module itself.

        Args:
            weight_format: "int8", "uint8", "int4" or "mxfp4".
            group_size: as in the constructor.

        Raises:
            ValueError: the weights are quantized already, are not finite, or do not fit.
        """
        if self.format.is_quantized:
            raise ValueError(
                f"the weights are {self.format.name} already; quantize those of the checkpoint"
            )
        wanted = WeightFormat.of(
            weight_format, group_size, (self.hidden_size, self.intermediate_size)
        )
        if not wanted.is_quantized:
            raise ValueError(
                f"weight_format is {weight_format!r}; to quantize, it must be one of int8, uint8, "
                "int4, mxfp4"
            )
        if self.fc1_weight.is_meta:
            raise ValueError(
                "the weights are on the meta device, without numbers to quantize; load them first, "
                "or build the module with this weight_format"
            )
        made = {name: wanted.quantize(getattr(self, f"{name}_weight")) for name in ("fc1", "fc2")}
        for name, (stored, scale) in made.items():
            setattr(self, f"{name}_weight", torch.nn.Parameter(stored, requires_grad=False))
            setattr(self, f"{name}_scale", scale)
        self.format = wanted
        return self

    def forward(
        self, x: torch.Tensor, ids: torch.Tensor, scales: torch.Tensor | None
    ) -> torch.Tensor:
        """Runs the experts of this rank.

        Args:
            x: [M, H], float16 or bfloat16 (float32 on CPU tensors), of the weights' dtype
                unless they are quantized. Under autocast any floating dtype: computed in the
                weights', or in autocast's where they are quantized.
            ids: [M, k] int32 among all E experts.
            scales: [M, k] float32; None is 1.

        Returns:
            [M, H] in the dtype of x.

        Raises:
            RuntimeError: a gradient is required.
            and what `cutlass_fused_moe` raises.
        """
        refuse_gradients(x, self.fc1_weight, self.fc2_weight, self.fc1_bias, self.fc2_bias)
        check_tokens("x", x, self.hidden_size)
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            cast = torch.get_autocast_dtype(x.device.type)
            x = x.to(cast if self.format.is_quantized else self.fc1_weight.dtype)
        y = cutlass_fused_moe(
            x,
            ids,
            scales,
            self.fc1_weight,
            self.fc2_weight,
            x.dtype,
            None if self.fc1_scale is None else [self.fc1_scale, self.fc2_scale],
            fc1_expert_biases=self.fc1_bias,
            fc2_expert_biases=self.fc2_bias,
            swiglu_alpha=self.swiglu_alpha,
            swiglu_beta=self.swiglu_beta,
            swiglu_limit=self.swiglu_limit,
            activation_type=self.activation,
            backend=self.backend,
            **self.ranks,
            **self.format.call_arguments,
        )
        return y.to(dtype)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, torch.Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As every module, but for two things.

        A format that is not this module's is an error: a copy from int8 to float16 or from
        float32 to uint8 would convert numbers that mean something else. And with `assign`,
        tensors that start anywhere in a file, as safetensors maps it, are copied: kernels want
        them aligned.
        """
        if local_metadata.get("assign_to_params_buffers", False):
            for name in (*self._parameters, *self._buffers):
                tensor = state_dict.get(prefix + name)
                if tensor is not None and not is_aligned(tensor):
                    state_dict[prefix + name] = copied(tensor)
        for name in _STORED:
            own, given = getattr(self, name), state_dict.get(prefix + name)
            if own is None or given is None:
                continue
            convertible = own.is_floating_point() and given.is_floating_point()
            if own.dtype != given.dtype and not convertible:
                error_msgs.append(
                    f"{prefix}{name} is {given.dtype} in the checkpoint and {own.dtype} in the "
                    f'module, whose weight_format is "{self.format.name}": build the module with '
                    "the format of the checkpoint"
                )
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def extra_repr(self) -> str:
        """Format, activation and ranks, then the tensors."""
        ranks = ", ".join(f"{n}={v}" for n, v in self.ranks.items() if v != int("size" in n))
        head = f"{self.format.name}, {self.activation.name}" + (f", {ranks}" if ranks else "")
        return f"{head}, {super().extra_repr()}"
