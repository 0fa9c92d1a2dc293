# SPDX-License-Identifier: Apache-2.0
"""The cpu backend: the layer on CPU tensors, expert by expert, on PyTorch's matrix product.

The slots (token, j) are sorted by expert. The rows of one expert are gathered, at most
ROWS at a time, multiplied by a block of fc1's columns at a time, activated, multiplied by
fc2, scaled, and added to float32 sums of the output. So neither an expanded input nor
[rows, 2I] is ever held, and equal calls give equal bits: every sum has one fixed order.

Matrix products are in float32, on blocks of weights converted to it while they lie in the
cache, with one exception: bfloat16 on a processor with bfloat16 instructions takes those
(4.5 times as fast at 512 rows, measured on an AMD EPYC with AVX512_BF16). They sum in
float32 too but hand over bfloat16, which costs an error of 1.7e-3 each time. Before the
activation, which may enlarge it, that is repaired: a second product takes the first one's
result away from its own sum, and hands over what was rounded off. Both together are off by
2.5e-6 and still twice as fast as float32. INT8 values are exact in either, and so is MXFP4 with
its scales, powers of two; INT4 with its scales is not in bfloat16, and takes float32.
"""

from __future__ import annotations

import torch

from fused_moe.activation import (
    SWIGLU_BIAS_ALPHA,
    SWIGLU_BIAS_BETA,
    SWIGLU_BIAS_LIMIT,
    SWIGLU_STEP_LIMIT,
    ActivationType,
)
from fused_moe.arguments import WEIGHTS_INT4, WEIGHTS_MXFP4, WEIGHTS_UINT8, MoeCall
from fused_moe.quantization import UINT8_OFFSET, FourBitDecoder

# Rows of one expert worked on at once: enough for the full rate of a matrix product.
ROWS = 1024
# Numbers in a block of converted weights: 4 MiB of float32, which stay in the cache.
CONVERTED = 1 << 20
# Columns of a product where the weights are taken as they are.
COLUMNS = 1024


def _bfloat16_is_fast() -> bool:
    probe = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return probe is not None and bool(probe())


class _Weights:
    """One of the two weights of all experts, [E_l, N, K], with what makes numbers of it.

    4-bit weights are [E_l, N, K / 2] with the scales [E_l, N, K / group]; other scales are
    those of channels, [E_l, N].
    """

    def __init__(
        self,
        call: MoeCall,
        weights: torch.Tensor,
        scales: torch.Tensor | None,
        biases: torch.Tensor | None,
        *,
        repair: bool,
    ) -> None:
        self.weights = weights
        self.format = call.weight_format
        self.scales = scales
        self.channel_scales = None if call.group_size else scales
        self.biases = biases
        self.dtype = torch.float32
        if (
            call.input_dtype == torch.bfloat16
            and self.format != WEIGHTS_INT4
            and _bfloat16_is_fast()
        ):
            self.dtype = torch.bfloat16
        self.decoder: FourBitDecoder | None = None
        if call.group_size:
            mxfp4 = self.format == WEIGHTS_MXFP4
            self.decoder = FourBitDecoder(self.dtype, weights.device, mxfp4=mxfp4)
        self.repair = repair and self.dtype == torch.bfloat16
        depth = weights.shape[2] * (2 if call.group_size else 1)
        self.columns = COLUMNS
        if weights.dtype != self.dtype:
            self.columns = max(CONVERTED // depth, 16)

    def _numbers(self, expert: int, begin: int, end: int) -> torch.Tensor:
        """Rows of an expert's weight, [end - begin, K] of `self.dtype`, channel scales apart."""
        block = self.weights[expert, begin:end]
        if self.decoder is not None and self.scales is not None:
            return self.decoder(block, self.scales[expert, begin:end])
        if block.dtype != self.dtype:
            block = block.to(self.dtype)
            if self.format == WEIGHTS_UINT8:
                block -= UINT8_OFFSET
        return block

    def product(self, x: torch.Tensor, expert: int, begin: int, end: int) -> torch.Tensor:
        """x @ weights[expert, begin:end].T, scaled, with the bias: float32 [rows, end - begin].

        x is [rows, K] of `self.dtype`.
        """
        block = self._numbers(expert, begin, end)
        rounded = torch.nn.functional.linear(x, block)
        y = rounded.float()
        if self.repair:
            # An infinity minus itself would be a NaN: leave the infinity.
            y += torch.addmm(rounded, x, block.T, beta=-1).nan_to_num_(nan=0.0)
        if self.channel_scales is not None:
            y *= self.channel_scales[expert, begin:end].float()
        if self.biases is not None:
            y += self.biases[expert, begin:end].float()
        return y


def _gated(
    activation: ActivationType,
    lin: torch.Tensor,
    gate: torch.Tensor,
    alpha: float,
    beta: float,
    limit: float,
) -> torch.Tensor:
    """The gated activations on float32 [rows, columns]; may overwrite its arguments."""
    functional = torch.nn.functional
    if activation == ActivationType.Swiglu:
        return functional.silu(gate, inplace=True).mul_(lin)
    if activation == ActivationType.Geglu:
        return functional.gelu(gate).mul_(lin)
    if activation == ActivationType.GegluTanh:
        return functional.gelu(gate, approximate="tanh").mul_(lin)
    lin = lin.clamp_(-limit, limit)
    if activation == ActivationType.SwigluStep:
        return functional.silu(gate, inplace=True).clamp_(max=limit).mul_(lin)
    gate = gate.clamp_(max=limit)
    return torch.sigmoid(alpha * gate).mul_(gate).mul_(lin.add_(beta))


def _plain(activation: ActivationType, x: torch.Tensor) -> torch.Tensor:
    """The activations that are not gated, on float32 [rows, columns]; may overwrite x."""
    if activation == ActivationType.Gelu:
        return torch.nn.functional.gelu(x)
    if activation == ActivationType.Silu:
        return torch.nn.functional.silu(x, inplace=True)
    if activation == ActivationType.Relu:
        return x.relu_()
    if activation == ActivationType.Relu2:
        return x.relu_().square_()
    return x


def _rows_by_expert(call: MoeCall, experts: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Sorts the slots of this rank by expert: their indices, and the number of each expert."""
    local = experts.reshape(-1).long() - call.first_local_expert
    outside = (local < 0) | (local >= call.num_local_experts)
    # The slots of other ranks, and ids that are no expert at all, sort to the end.
    local.masked_fill_(outside, call.num_local_experts)
    slots = torch.argsort(local, stable=True)
    counts = torch.bincount(local, minlength=call.num_local_experts + 1)
    return slots, counts[:-1].tolist()


@torch.no_grad()
def run(
    call: MoeCall,
    input: torch.Tensor,
    experts: torch.Tensor,
    scales: torch.Tensor | None,
    fc1_weights: torch.Tensor,
    fc2_weights: torch.Tensor,
    fc1_scales: torch.Tensor | None,
    fc2_scales: torch.Tensor | None,
    fc1_bias: torch.Tensor | None,
    fc2_bias: torch.Tensor | None,
    swiglu_alpha: torch.Tensor | None,
    swiglu_beta: torch.Tensor | None,
    swiglu_limit: torch.Tensor | None,
    output: torch.Tensor,
) -> None:
    """Computes a checked call into `output`, [M, H]; the arguments are those of the call."""
    fc1 = _Weights(call, fc1_weights, fc1_scales, fc1_bias, repair=True)
    fc2_bias = fc2_bias if call.add_fc2_bias else None
    fc2 = _Weights(call, fc2_weights, fc2_scales, fc2_bias, repair=False)
    step = call.activation == ActivationType.SwigluStep
    default_limit = SWIGLU_STEP_LIMIT if step else SWIGLU_BIAS_LIMIT

    def activated(x: torch.Tensor, expert: int) -> torch.Tensor:
        """[rows, I] of the dtype that fc2's product takes."""
        width = call.intermediate_size
        a = torch.empty(x.shape[0], width, dtype=fc2.dtype)
        for begin in range(0, width, fc1.columns):
            end = min(begin + fc1.columns, width)
            part = fc1.product(x, expert, begin, end)
            if call.activation.is_gated:
                part = _gated(
                    call.activation,
                    part,
                    fc1.product(x, expert, width + begin, width + end),
                    SWIGLU_BIAS_ALPHA if swiglu_alpha is None else float(swiglu_alpha[expert]),
                    SWIGLU_BIAS_BETA if swiglu_beta is None else float(swiglu_beta[expert]),
                    default_limit if swiglu_limit is None else float(swiglu_limit[expert]),
                )
            else:
                part = _plain(call.activation, part)
            a[:, begin:end] = part
        return a

    sums = torch.zeros(output.shape, dtype=torch.float32)
    slots, counts = _rows_by_expert(call, experts)
    flat_scales = None if scales is None else scales.reshape(-1)
    first = 0
    for expert, count in enumerate(counts):
        for group in slots[first : first + count].split(ROWS) if count else ():
            tokens = group // call.top_k
            a = activated(input[tokens].to(fc1.dtype), expert)
            for begin in range(0, call.hidden_size, fc2.columns):
                end = min(begin + fc2.columns, call.hidden_size)
                y = fc2.product(a, expert, begin, end)
                if flat_scales is not None:
                    y *= flat_scales[group].unsqueeze(1)
                sums[:, begin:end].index_add_(0, tokens, y)
        first += count
    output.copy_(sums)
