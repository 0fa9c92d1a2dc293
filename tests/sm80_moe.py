# SPDX-License-Identifier: Apache-2.0
"""The sm80 backend against the float32 reference, on more than a thousand designed cases.

The sample and the edge cases come from cases.py. Each case runs twice, with memory poisoned
differently, has to give the same bits, to write nothing outside its buffers, and to be close to
the reference as a whole, in each row and in each element. How one call behaves among others
(graphs, streams) is in sm80_calls.py, sizes beyond 2^31 are in sm80_large.py; every tactic is
tried in sm80_tactics.py, on exact numbers in sm80_exact.py, beside other rows in sm80_rows.py.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from cases import FACTORS, TOKENS, TP_SIZES, Case, designed_sample, edge_cases, factor_pairs
from cases import sanitizer_cases as _sanitizer_cases
from fused_moe import cutlass_fused_moe
from fused_moe.models import MODELS
from gpu_layer import check, realized, require_sm80, run_poisoned, same_bits

# Models one after another, and within one model a dtype of weights after another: the pool of
# random weights is filled anew whenever its dtype changes.
_SAMPLE = sorted(designed_sample(), key=lambda c: (c.weights != "same", c.dtype, c.name))
_EDGES = edge_cases()


def _run_case(case: Case, exact: bool = False) -> None:
    with realized(case, exact) as layer:
        if case.memory == "given":
            out, again = run_poisoned(layer, 0xFF), run_poisoned(layer, 0x7B)
        else:
            out, again = layer.run(), layer.run()
        assert same_bits(out, again), "two runs on the same input differ"
        check(layer, out)


@pytest.mark.parametrize("case", _SAMPLE, ids=lambda case: case.id)
def test_model_layer(case: Case) -> None:
    require_sm80()
    _run_case(case)


@pytest.mark.parametrize("case", _EDGES, ids=lambda case: case.id)
def test_edge(case: Case) -> None:
    require_sm80()
    _run_case(case)


@pytest.mark.parametrize("case", _sanitizer_cases(), ids=lambda case: case.id)
def test_sanitizer_subset(case: Case) -> None:
    """What compute-sanitizer runs (-k sanitizer); part of every run, too."""
    require_sm80()
    _run_case(case, exact=True)


def test_the_sample_is_large_and_has_no_twins() -> None:
    ids = [case.id for case in _SAMPLE + _EDGES]
    assert len(ids) >= 1000
    assert len(set(ids)) == len(ids)


def test_every_pair_of_factor_values_is_in_the_sample() -> None:
    seen = {frozenset(pair) for case in _SAMPLE for pair in factor_pairs(case)}
    values: dict[str, tuple[object, ...]] = {
        **FACTORS,
        "model": tuple(MODELS),
        "tokens": TOKENS,
        "tp_size": TP_SIZES,
    }
    missing = [
        (first, second)
        for (f, f_values), (g, g_values) in itertools.combinations(values.items(), 2)
        for first, second in itertools.product(
            [(f, value) for value in f_values], [(g, value) for value in g_values]
        )
        if frozenset((first, second)) not in seen
    ]
    assert not missing, f"{len(missing)} pairs are in no case, such as {missing[:3]}"


_FP8 = torch.float8_e4m3fn
_REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8_input": ("FP8", {"input": _FP8}),
    "fp8_weights": ("FP8", {"fc1_expert_weights": _FP8, "fc2_expert_weights": _FP8}),
    "fp8_blocks": ("FP8 block scaling", {"use_deepseek_fp8_block_scale": True}),
    "w4a8": (
        "W4A8 group scaling",
        {"use_packed_weights": True, "use_w4_group_scaling": True},
    ),
    "fp4": ("FP4", {"input": torch.uint8}),
    "fp32": ("FP32", {"input": torch.float32}),
    "min_latency": ("Min latency mode", {"min_latency_mode": True}),
}


@pytest.mark.parametrize("name", list(_REFUSED))
def test_refusals_need_no_gpu_and_write_nothing(name: str) -> None:
    words, changes = _REFUSED[name]
    tensors = {
        "input": torch.zeros(3, 32),
        "fc1_expert_weights": torch.zeros(4, 32, 32),
        "fc2_expert_weights": torch.zeros(4, 32, 16),
    }
    dtypes = {key: value for key, value in changes.items() if isinstance(value, torch.dtype)}
    flags = {key: value for key, value in changes.items() if key not in dtypes}
    output = torch.full((3, 32), float("nan"), dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match=words):
        cutlass_fused_moe(
            **{key: t.to(dtypes.get(key, torch.bfloat16)) for key, t in tensors.items()},
            token_selected_experts=torch.zeros(3, 2, dtype=torch.int32),
            token_final_scales=None,
            output_dtype=torch.bfloat16,
            quant_scales=None,
            output=output,
            backend="sm80",
            **flags,
        )
    assert bool(output.isnan().all())
