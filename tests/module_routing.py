# SPDX-License-Identifier: Apache-2.0
"""`Routing` against each model's formula, written out token by token in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import hypothesis
import pytest
import torch
from hypothesis import strategies

from fused_moe import Routing, topk_softmax

# What a formula returns for a token: the scale of each chosen expert.
Chosen = dict[int, float]
Formula = Callable[[list[float], list[float]], Chosen]


def softmax(values: list[float]) -> list[float]:
    largest = max(values)
    powers = [math.exp(v - largest) for v in values]
    return [p / sum(powers) for p in powers]


def sigmoid(values: list[float]) -> list[float]:
    return [1 / (1 + math.exp(-v)) for v in values]


def best(values: list[float], k: int, among: list[int] | None = None) -> list[int]:
    """The indices of the k largest; all indices take part, or those of `among`."""
    indices = range(len(values)) if among is None else among
    return sorted(indices, key=lambda i: -values[i])[:k]


def shares(chosen: Chosen) -> Chosen:
    return {e: s / sum(chosen.values()) for e, s in chosen.items()}


def mixtral(logits: list[float], _: list[float]) -> Chosen:
    """Mixtral (arXiv 2401.04088, 2.1): softmax over the logits of the two best."""
    ids = best(logits, 2)
    return dict(zip(ids, softmax([logits[e] for e in ids]), strict=True))


def gpt_oss(logits: list[float], _: list[float]) -> Chosen:
    """gpt-oss (gpt_oss/torch/model.py, MLPBlock): topk of the gate, then softmax over it."""
    ids = best(logits, 4)
    return dict(zip(ids, softmax([logits[e] for e in ids]), strict=True))


def qwen3(logits: list[float], _: list[float]) -> Chosen:
    """Qwen3-MoE (modeling_qwen3_moe.py) with norm_topk_prob: softmax, topk, renormalize."""
    scores = softmax(logits)
    return shares({e: scores[e] for e in best(scores, 8)})


def olmoe(logits: list[float], _: list[float]) -> Chosen:
    """OLMoE (arXiv 2409.02060, 2) and DeepSeek-V2-Lite: probabilities among all experts."""
    scores = softmax(logits)
    return {e: scores[e] for e in best(scores, 6)}


def ernie(logits: list[float], bias: list[float]) -> Chosen:
    """Ernie 4.5 (modeling_ernie4_5_moe.py): softmax, chosen with a bias, renormalized."""
    scores = softmax(logits)
    ids = best([s + b for s, b in zip(scores, bias, strict=True)], 6)
    return shares({e: scores[e] for e in ids})


def groups_of_8(values: list[float]) -> list[list[int]]:
    return [list(range(first, first + 8)) for first in range(0, len(values), 8)]


def deepseek_v2(logits: list[float], _: list[float]) -> Chosen:
    """DeepSeek-V2 (arXiv 2405.04434, 2.2.2; modeling_deepseek_v2.py, group_limited_greedy)."""
    scores = softmax(logits)
    groups = sorted(groups_of_8(logits), key=lambda g: -max(scores[e] for e in g))[:3]
    return {e: 16.0 * scores[e] for e in best(scores, 6, among=[e for g in groups for e in g])}


def deepseek_v3(logits: list[float], bias: list[float]) -> Chosen:
    """DeepSeek-V3 (arXiv 2412.19437, 2.1.2; inference/model.py, class Gate)."""
    scores = sigmoid(logits)
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    groups = groups_of_8(logits)
    groups.sort(key=lambda g: -sum(sorted(choice[e] for e in g)[-2:]))
    ids = best(choice, 8, among=[e for g in groups[:4] for e in g])
    return {e: 2.5 * s for e, s in shares({e: scores[e] for e in ids}).items()}


def minimax_m2(logits: list[float], bias: list[float]) -> Chosen:
    """MiniMax-M2 (modeling_minimax_m2.py): DeepSeek-V3 without groups or a factor."""
    scores = sigmoid(logits)
    ids = best([s + b for s, b in zip(scores, bias, strict=True)], 8)
    return shares({e: scores[e] for e in ids})


def llama4(logits: list[float], _: list[float]) -> Chosen:
    """Llama 4 (modeling_llama4.py, Llama4Router): the sigmoid of the best logit."""
    (expert,) = best(logits, 1)
    return {expert: sigmoid(logits)[expert]}


def phimoe(logits: list[float], _: list[float]) -> Chosen:
    """Phi-3.5-MoE (modeling_phimoe.py, sparsemixer with training=False), jitter 0.01."""
    chosen: Chosen = {}
    for _choice in range(2):
        among = [e for e in range(len(logits)) if e not in chosen]
        first = max(among, key=lambda e: logits[e])
        top = logits[first]
        near = [e for e in among if (top - logits[e]) / max(abs(logits[e]), top) <= 0.02]
        chosen[first] = softmax([logits[e] for e in near])[near.index(first)]
    return chosen


# Each model's formula and how `Routing` is told of it; whether there is a correction bias.
MODELS: dict[str, tuple[Formula, Routing, bool]] = {
    "mixtral": (mixtral, Routing(2), False),
    "gpt_oss": (gpt_oss, Routing(4), False),
    "qwen3": (qwen3, Routing(8), False),
    "olmoe": (olmoe, Routing(6, renormalize=False), False),
    "ernie": (ernie, Routing(6), True),
    "deepseek_v2": (deepseek_v2, Routing.deepseek_v2(6, 8, 3, 16.0), False),
    "deepseek_v3": (deepseek_v3, Routing.deepseek_v3(8, 8, 4, 2.5), True),
    "minimax_m2": (minimax_m2, Routing.deepseek_v3(8), True),
    "llama4": (llama4, Routing.llama4(), False),
    "phimoe": (phimoe, Routing.sparsemixer(), False),
}


def draw_logits(tokens: int, experts: int, seed: int = 0) -> torch.Tensor:
    """Logits of a deviation that also brings near ties, where sparsemixer decides."""
    draw = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(tokens, experts, generator=draw)
    logits[::2] = 5 + 0.05 * logits[::2]
    return logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_models(model: str, dtype: torch.dtype) -> None:
    formula, routing, biased = MODELS[model]
    logits = draw_logits(80, 64)
    if dtype != torch.float32:
        # Rows without two equal logits in 16 bits: which of equals is taken is tested below.
        logits = torch.stack(
            [torch.randperm(64, generator=torch.Generator().manual_seed(t)) for t in range(40)]
        )
        logits = (logits / 16 - 1).to(dtype)
    bias = None
    if biased:
        bias = 0.3 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    scales, ids = routing(logits, bias)
    assert scales.shape == ids.shape == (len(logits), routing.top_k)
    assert scales.dtype == torch.float32 and ids.dtype == torch.int32
    assert scales.is_contiguous() and ids.is_contiguous(), "as cutlass_fused_moe wants them"
    for token, row in enumerate(logits.double().tolist()):
        expected = formula(row, [0.0] * 64 if bias is None else bias.double().tolist())
        got = dict(zip(ids[token].tolist(), scales[token].tolist(), strict=True))
        assert got == pytest.approx(expected, rel=1e-5), f"token {token}"


def test_groups_that_are_left_out_stay_out() -> None:
    """Where the bias makes every choice negative, a 0 in other groups must not win."""
    bias = torch.full((64,), -3.0)
    bias[8:16] = -2.0
    _, ids = Routing.deepseek_v3(4, 8, 1)(draw_logits(20, 64), bias)
    assert ((ids >= 8) & (ids < 16)).all()


def test_groups_are_chosen_by_scores() -> None:
    """Two good experts beat one that is better by its logit, but hardly by its score."""
    _, ids = Routing.deepseek_v3(1, 2, 1)(torch.tensor([[10.0, -1.0, 1.0, 2.0]]))
    assert ids.tolist() == [[3]]


def test_experts_are_told_apart_where_their_scores_are_not() -> None:
    _, ids = Routing(1, scoring="sigmoid")(torch.tensor([[50.0, 60.0, 40.0]]))
    assert ids.tolist() == [[1]]


def test_small_groups() -> None:
    """Of one expert where the best one counts, of two where two count, and no group at all."""
    logits = draw_logits(9, 8)
    _, ids = Routing(1, scoring="sigmoid", num_groups=8)(logits)
    assert torch.equal(ids[:, 0], logits.argmax(dim=1).int())
    _, ids = Routing.deepseek_v3(2, 4, 1)(logits)
    pairs = torch.sigmoid(logits).view(9, 4, 2).sum(dim=2).argmax(dim=1)
    assert torch.equal(ids // 2, pairs.int().unsqueeze(1).expand(9, 2))
    scales, ids = Routing.deepseek_v3(1)(logits[:, :1])
    assert not ids.any() and torch.equal(scales, torch.ones(9, 1))


def test_sparsemixer_near_ties() -> None:
    """By hand: 10, 9.9 and 9.5 with a threshold of 2 %: the first two share, the third not."""
    scales, ids = Routing.sparsemixer()(torch.tensor([[9.5, 10.0, 9.9, 1.0], [0, 0, 0, 0]]))
    assert ids.tolist() == [[1, 2], [0, 1]]
    torch.testing.assert_close(scales[0], torch.tensor([1 / (1 + math.exp(-0.1)), 1.0]))
    torch.testing.assert_close(scales[1], torch.tensor([1 / 4, 1 / 3]))


@pytest.mark.parametrize("model", MODELS)
def test_ties_take_the_lowest_ids(model: str) -> None:
    _, routing, biased = MODELS[model]
    _, ids = routing(torch.ones(3, 64), torch.zeros(64) if biased else None)
    assert ids.tolist() == [list(range(routing.top_k))] * 3


@pytest.mark.parametrize("model", MODELS)
def test_no_tokens(model: str) -> None:
    _, routing, biased = MODELS[model]
    scales, ids = routing(torch.zeros(0, 64), torch.zeros(64) if biased else None)
    assert scales.shape == ids.shape == (0, routing.top_k)


def test_plain_softmax_is_topk_softmax() -> None:
    logits = draw_logits(30, 64)
    for renormalize in (True, False):
        ours = Routing(6, renormalize=renormalize)(logits)
        assert all(map(torch.equal, ours, topk_softmax(logits, 6, renormalize)))


any_float = strategies.floats(width=32, allow_nan=True, allow_infinity=True)


@hypothesis.settings(max_examples=40, deadline=None, database=None, derandomize=True)
@hypothesis.given(data=strategies.data())
@pytest.mark.parametrize("model", MODELS)
def test_any_logits(model: str, data: strategies.DataObject) -> None:
    """Ids are distinct experts whatever the logits are, and a NaN is not lost."""
    _, routing, biased = MODELS[model]
    logits = draw_logits(3, 64, seed=1)
    places = strategies.tuples(strategies.integers(0, 2), strategies.integers(0, 63), any_float)
    for token, expert, value in data.draw(strategies.lists(places, max_size=60)):
        logits[token, expert] = value
    scales, ids = routing(logits, torch.linspace(-1, 1, 64) if biased else None)
    assert ((ids >= 0) & (ids < 64)).all()
    assert all(len(set(row)) == routing.top_k for row in ids.tolist())
    assert scales[logits.isnan().any(dim=1)].isnan().any(dim=1).all()
    finite = logits.isfinite().all(dim=1)
    assert scales[finite].isfinite().all() and (scales[finite] >= 0).all()


@pytest.mark.parametrize("model", MODELS)
def test_compile(model: str) -> None:
    torch.compiler.reset()
    _, routing, biased = MODELS[model]
    bias = torch.linspace(-1, 1, 64) if biased else None
    compiled = torch.compile(lambda x: routing(x, bias), fullgraph=True, backend="aot_eager")
    for tokens in (7, 5, 12):
        logits = draw_logits(tokens, 64, seed=tokens)
        assert all(map(torch.equal, compiled(logits), routing(logits, bias)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"top_k": 0}, "top_k is 0; it must be an int of 1 or more"),
        ({"top_k": 2.0}, "top_k is 2.0; it must be an int"),
        ({"top_k": 2, "scoring": "tanh"}, "scoring is 'tanh'; it must be one of softmax, sigmoid"),
        ({"top_k": 2, "group_score": "mean"}, "group_score is 'mean'; it must be one of max, top2"),
        (
            {"top_k": 2, "num_groups": 2, "top_k_groups": 3},
            "top_k_groups is 3; it must be at most num_groups, 2",
        ),
        ({"top_k": 2, "scoring": "sparsemixer"}, "use Routing.sparsemixer()"),
        (
            {"top_k": 3, "scoring": "sparsemixer", "renormalize": False},
            "sparsemixer is defined for top_k=2",
        ),
        (
            {"top_k": 2, "scoring": "sparsemixer", "renormalize": False, "num_groups": 2},
            "sparsemixer is defined for top_k=2, renormalize=False and num_groups=1",
        ),
    ],
)
def test_bad_routings(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError) as error:
        Routing(**arguments)  # type: ignore[arg-type]
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("routing", "experts", "bias", "words"),
    [
        (Routing(9), 8, None, "top_k is 9; it must be at most 8"),
        (Routing.deepseek_v3(2, 3, 1), 8, None, "must be a multiple of num_groups, 3"),
        (Routing.deepseek_v3(5, 4, 2), 8, None, "top_k is 5; it must be at most 4: 8 experts"),
        (Routing.deepseek_v3(1, 8, 1), 8, None, 'group_score is "top2", but 8 experts in 8'),
        (Routing(2), 8, torch.zeros(9), "correction_bias is a torch.float32 tensor of shape [9]"),
        (Routing(2), 8, torch.zeros(8, dtype=torch.int32), "a floating point tensor [8]"),
        (Routing.sparsemixer(), 8, torch.zeros(8), "correction_bias is given, which sparsemixer"),
    ],
)
def test_bad_calls(routing: Routing, experts: int, bias: torch.Tensor | None, words: str) -> None:
    with pytest.raises(ValueError) as error:
        routing(torch.zeros(2, experts), bias)
    assert words in str(error.value)
    with pytest.raises(ValueError, match=r"router_logits is a torch\.int64 tensor"):
        routing(torch.zeros(2, experts, dtype=torch.int64))
