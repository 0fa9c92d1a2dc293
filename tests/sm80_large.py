# SPDX-License-Identifier: Apache-2.0
"""Sizes whose offsets pass 2^31, and more tokens than a grid dimension holds.

The float32 reference would take minutes on all of it: it looks at the first and last rows and
at random ones between, which is where an index that wraps around shows.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from cases import FOUR_BIT, Case
from gpu_layer import (
    check,
    output_dtype,
    realized,
    require_sm80,
    weight_dtype,
    weight_shapes,
    workspace_bytes,
)

_GIB = 2**30


def _need_memory(gibibytes: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < gibibytes * _GIB:
        pytest.skip(f"needs {gibibytes:.0f} GiB of device memory, {free / _GIB:.1f} are free")


# Each names the tensor whose number of elements passes 2^31, or 2^32.
_LARGE = {
    "slots_x_hidden": Case("large", 4096, 128, experts=8, top_k=8, tokens=70000),
    "slots_x_hidden_twice": Case("large", 4096, 64, experts=8, top_k=8, tokens=140000),
    "slots_x_intermediate": Case("large", 64, 4096, experts=8, top_k=8, tokens=70000),
    "input": Case("large", 4096, 64, experts=4, top_k=1, tokens=540000),
    "one_expert": Case(
        "large", 4096, 64, experts=8, top_k=8, tokens=70000, routing="one_expert", biases="both"
    ),
    "int8": Case("large", 4096, 128, experts=8, top_k=8, tokens=70000, weights="int8"),
    "int4": Case("large", 4096, 128, experts=8, top_k=8, tokens=70000, weights="int4_128"),
    "mxfp4": Case("large", 4096, 128, experts=8, top_k=8, tokens=70000, weights="mxfp4"),
    "garbage": Case("large", 4096, 64, experts=8, top_k=8, tokens=70000, routing="garbage"),
}


@pytest.mark.parametrize("name", list(_LARGE))
def test_activations_beyond_2_to_31(name: str) -> None:
    require_sm80()
    case = _LARGE[name]
    assert case.tokens * max(case.hidden, case.top_k * max(case.hidden, case.intermediate)) > 2**31
    _need_memory(20 + workspace_bytes(case) / _GIB)
    with realized(case) as layer:
        out = layer.run()
        ends = torch.arange(64, device="cuda")
        between = torch.randint(case.tokens, (512,), device="cuda")
        rows = torch.cat([ends, between, case.tokens - 1 - ends])
        check(layer, out[rows], rows)
        # The rest at least is finite, and not one row of it was left out.
        assert all(bool(chunk.isfinite().all()) for chunk in out.split(1 << 16))
        if case.routing != "garbage":
            assert all(bool(chunk.any(dim=1).all()) for chunk in out.split(1 << 16))


@pytest.mark.parametrize("weights", ["same", "int8", "int4_32", "int4_128", "mxfp4"])
def test_weights_beyond_2_to_31(weights: str) -> None:
    """128 experts of DeepSeek-V3's size: fc1 alone has 3.8e9 numbers; 256 of them in 4 bits."""
    require_sm80()
    experts = 256 if weights in FOUR_BIT else 128
    case = Case("large", 7168, 2048, experts=experts, top_k=8, tokens=96, weights=weights)
    assert math.prod(weight_shapes(case)[0]) > 2**31
    size = weight_dtype(case).itemsize / case.weights_a_byte
    _need_memory(6 + case.weight_numbers * size * (1.5 if case.group_size else 1) / _GIB)
    small = dataclasses.replace(case, experts=1, top_k=1)
    with realized(small) as one:
        # Random numbers are made in one expert's size and scaled for each: it is quick, and a
        # mix-up of experts shows.
        factor = torch.linspace(0.5, 1.5, case.experts, device="cuda")
        if weights == "same":
            fc1 = torch.empty(case.experts, *one.fc1.shape[1:], dtype=one.fc1.dtype, device="cuda")
            fc2 = torch.empty(case.experts, *one.fc2.shape[1:], dtype=one.fc2.dtype, device="cuda")
            for expert in range(case.experts):
                torch.mul(one.fc1[0], factor[expert].to(fc1.dtype), out=fc1[expert])
                torch.mul(one.fc2[0], factor[expert].to(fc2.dtype), out=fc2[expert])
            quant_scales = []
        else:
            fc1 = one.fc1.expand(case.experts, -1, -1).contiguous()
            fc2 = one.fc2.expand(case.experts, -1, -1).contiguous()
            steps = factor.view(-1, *[1] * (one.quant_scales[0].ndim - 1))
            quant_scales = [s.expand(case.experts, *s.shape[1:]) for s in one.quant_scales]
            if weights == "mxfp4":  # powers of two, then
                steps = (torch.arange(case.experts, device="cuda") % 3 - 1).view(-1, 1, 1)
                quant_scales = [(s + steps).to(torch.uint8) for s in quant_scales]
            else:
                quant_scales = [s * steps for s in quant_scales]
        ids = torch.rand(case.tokens, case.experts, device="cuda").topk(case.top_k).indices
        layer = dataclasses.replace(
            one,
            case=case,
            ids=ids.to(torch.int32),
            scales=torch.rand(case.tokens, case.top_k, device="cuda"),
            fc1=fc1,
            fc2=fc2,
            quant_scales=quant_scales,
        )
        out = layer.run()
        assert out.dtype == output_dtype(case)
        check(layer, out)
