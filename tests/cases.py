# SPDX-License-Identifier: Apache-2.0
"""The cases that the GPU tests run: a designed sample, not a full cross product.

The sample walks over every (model, TP degree, token count) and fills in the other factors
(dtype, weight format, activation, expert parallelism, routing, ...) greedily: of a few
pseudo-random candidates it takes the one that brings the most pairs of factor values not seen
before. So each value of a factor meets each value of every other factor at least once (a test
of its own asserts it), in about a thousand cases instead of millions. Nothing depends on the
machine: the list is the same everywhere.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator

from fused_moe import ActivationType
from fused_moe.models import MODELS

TOKENS = (0, 1, 2, 7, 64, 257, 1000, 4096)
TP_SIZES = (1, 2, 4, 8)

# The 16-bit weights of one case hold at most this many numbers: 3.4 GB. Larger layers keep
# their H and I and lose experts.
MAX_WEIGHT_NUMBERS = 1_700_000_000

# The formats of weights, and the groups of weights that share a scale; 0 is a whole row.
WEIGHTS = {
    "same": 0,
    "int8": 0,
    "uint8": 0,
    "int4_32": 32,
    "int4_64": 64,
    "int4_128": 128,
    "mxfp4": 32,
}
FOUR_BIT = tuple(weights for weights, group in WEIGHTS.items() if group)

# The factors that are not part of the (model, TP, tokens) grid, and their values.
FACTORS: dict[str, tuple[object, ...]] = {
    "dtype": ("bfloat16", "float16"),
    "weights": tuple(WEIGHTS),
    "activation": tuple(ActivationType),
    "ep_size": (1, 2, 4),
    "routing": ("uniform", "few_experts", "one_expert", "duplicates", "outside", "garbage"),
    "biases": ("none", "fc1", "fc2", "both"),
    "swiglu": ("defaults", "all", "some"),
    "scales": ("given", "none"),
    "output_dtype": ("same", "other"),
    "weight_scales": ("float32", "dtype"),
    "memory": ("given", "allocated"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the layer; everything but the random numbers.

    intermediate is this rank's share of I, experts those of this rank. `routing`:
    uniform (k distinct, by top-k softmax of random logits), few_experts (most get nothing),
    one_expert (every slot of every token), duplicates (drawn with repetition), outside (about
    half are -1, E or another rank's), garbage (any int32).
    `memory`: given means output= and workspace_buffer=, poisoned and guarded.
    """

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    tokens: int
    dtype: str = "bfloat16"
    weights: str = "same"
    activation: ActivationType = ActivationType.Swiglu
    tp_size: int = 1
    tp_rank: int = 0
    ep_size: int = 1
    ep_rank: int = 0
    routing: str = "uniform"
    biases: str = "none"
    swiglu: str = "defaults"
    scales: str = "given"
    output_dtype: str = "same"
    weight_scales: str = "float32"
    memory: str = "given"

    @property
    def rows(self) -> int:
        """Rows of one expert's fc1."""
        return self.intermediate * (2 if self.activation.is_gated else 1)

    @property
    def group_size(self) -> int:
        """How many weights of a row share a scale; 0 where it is the whole row, or none."""
        return WEIGHTS[self.weights]

    @property
    def weights_a_byte(self) -> int:
        """2 for 4-bit weights, which are elements of half the depth; 1 for others."""
        return 2 if self.weights in FOUR_BIT else 1

    @property
    def multiple(self) -> int:
        """What H and I must be multiples of."""
        return multiple_of(self.weights)

    @property
    def weight_numbers(self) -> int:
        """Numbers in fc1 and fc2 together."""
        return self.experts * self.hidden * (self.rows + self.intermediate)

    @property
    def id(self) -> str:
        """A test id that `-k` can select by any of its words."""
        words = [self.name, f"m{self.tokens}", f"h{self.hidden}", f"i{self.intermediate}"]
        words += [f"e{self.experts}", f"k{self.top_k}", self.dtype, self.activation.name]
        words += [] if self.weights == "same" else [self.weights, f"ws_{self.weight_scales}"]
        words += [] if self.tp_size == 1 else [f"tp{self.tp_rank}of{self.tp_size}"]
        words += [] if self.ep_size == 1 else [f"ep{self.ep_rank}of{self.ep_size}"]
        words += [self.routing]
        words += [] if self.biases == "none" else [f"bias_{self.biases}"]
        words += [] if self.swiglu == "defaults" else [f"swiglu_{self.swiglu}"]
        words += [] if self.scales == "given" else ["unscaled"]
        words += [] if self.output_dtype == "same" else ["other_output"]
        words += [] if self.memory == "given" else ["allocated"]
        return "-".join(words)

    def accepted(self) -> bool:
        """Whether the sizes are ones the interface takes."""
        return self.hidden % self.multiple == 0 and self.intermediate % self.multiple == 0


def multiple_of(weights: str) -> int:
    """What H and I must be multiples of: 8, 16 for 8-bit weights, the group for 4-bit ones."""
    return WEIGHTS[weights] or (8 if weights == "same" else 16)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def experts_that_fit(wanted: int, hidden: int, intermediate: int, gated: bool) -> int:
    """`wanted`, or as many as MAX_WEIGHT_NUMBERS allows; two at least."""
    numbers = hidden * intermediate * (3 if gated else 2)
    return max(2, min(wanted, MAX_WEIGHT_NUMBERS // numbers))


def factor_pairs(case: Case) -> Iterator[tuple[tuple[str, object], tuple[str, object]]]:
    """Every pair of (factor, value)s that the case shows, the model and the grid included."""
    values = [(factor, getattr(case, factor)) for factor in FACTORS]
    values += [("model", case.name), ("tokens", case.tokens), ("tp_size", case.tp_size)]
    return itertools.combinations(values, 2)


def _candidate(model: str, tp_size: int, tokens: int, draw: random.Random) -> Case | None:
    shape = MODELS[model]
    values = {factor: draw.choice(choices) for factor, choices in FACTORS.items()}
    # As many cases of 16-bit weights as of 8-bit ones, and twice as many of 4-bit ones.
    if draw.random() < 0.15:
        values["weights"] = "same"
    # Half of the cases keep the model's own activation: it is what people run.
    if draw.random() < 0.3:
        values["activation"] = shape.activation
    ep_size = values["ep_size"]
    activation = values["activation"]
    assert isinstance(ep_size, int) and isinstance(activation, ActivationType)
    intermediate = shape.intermediate_size // tp_size
    hidden = shape.hidden_size
    # Where groups do not divide a model's sizes, its neighbours above are taken.
    group = WEIGHTS[str(values["weights"])]
    if group:
        hidden, intermediate = _up(hidden, group), _up(intermediate, group)
    local = experts_that_fit(
        -(-shape.num_experts // ep_size), hidden, intermediate, activation.is_gated
    )
    case = Case(
        name=model,
        hidden=hidden,
        intermediate=intermediate,
        experts=local,
        top_k=min(shape.top_k, local * ep_size),
        tokens=tokens,
        tp_size=tp_size,
        tp_rank=draw.randrange(tp_size),
        ep_rank=draw.randrange(ep_size),
        **values,  # type: ignore[arg-type]
    )
    return case if case.accepted() else None


def designed_sample(per_cell: int = 2, candidates: int = 12) -> list[Case]:
    """The sample, `per_cell` cases for each (model, TP degree, token count), in model order."""
    seen: set[object] = set()
    cases = []
    for number, (model, tp_size, tokens, _) in enumerate(
        itertools.product(MODELS, TP_SIZES, TOKENS, range(per_cell))
    ):
        draw = random.Random(number)
        best: Case | None = None
        best_new = -1
        for _ in range(candidates):
            case = _candidate(model, tp_size, tokens, draw)
            if case is None:
                continue
            new = sum(pair not in seen for pair in factor_pairs(case))
            if new > best_new:
                best, best_new = case, new
        assert best is not None, (model, tp_size, tokens)
        seen.update(factor_pairs(best))
        cases.append(best)
    return cases


def edge_cases() -> list[Case]:
    """Shapes and routings that models do not have, small enough to be quick."""
    cases = []

    def add(
        name: str, tokens: int, hidden: int, inter: int, experts: int, k: int, **kw: object
    ) -> None:
        case = Case(name, hidden, inter, experts, k, tokens, **kw)  # type: ignore[arg-type]
        assert case.accepted(), case
        cases.append(case)

    # k = 1, k = E, one expert, as many experts as slots, more slots a token than experts.
    for k, experts in ((1, 1), (1, 8), (8, 8), (3, 3), (16, 16), (5, 7), (4, 2)):
        for tokens, weights in itertools.product((1, 33, 300), ("same", "int8")):
            routing = "uniform" if k <= experts else "duplicates"
            add("k", tokens, 256, 128, experts, k, weights=weights, routing=routing)
    for number, (tokens, (k, experts)) in enumerate(
        itertools.product((1, 33, 300), ((1, 8), (8, 8), (5, 7), (4, 2)))
    ):
        routing = "uniform" if k <= experts else "duplicates"
        weights = FOUR_BIT[number % 4]
        add("k", tokens, 256, 128, experts, k, weights=weights, routing=routing)
    # Sizes that divide no tile, down to the smallest that is accepted.
    sizes = (8, 16, 24, 40, 72, 96, 104, 136, 176, 200, 232, 264, 328, 352, 464, 520)
    for number, hidden in enumerate(sizes):
        inter = sizes[(number * 5 + 3) % len(sizes)]
        for tokens, activation in ((5, ActivationType.Swiglu), (130, ActivationType.Relu2)):
            add("odd", tokens, hidden, inter, 6, 2, activation=activation, biases="both")
    for number, hidden in enumerate((16, 48, 112, 176, 208, 272, 352, 464)):
        inter = (16, 48, 80, 96, 144, 176, 304, 336)[(number * 3 + 1) % 8]
        for tokens, weights in ((3, "int8"), (150, "uint8"), (700, "int8")):
            add("odd", tokens, hidden, inter, 6, 2, weights=weights, biases="both")
    # The same of 4-bit weights, in groups: odd numbers of them among others.
    for weights in FOUR_BIT:
        group = WEIGHTS[weights]
        for number, groups in enumerate((1, 2, 3, 5, 7, 9)):
            inter = (1, 3, 4, 5, 9, 11)[(number * 5 + 2) % 6] * group
            dtype = ("bfloat16", "float16")[number % 2]
            for tokens in (3, 150) if number % 2 else (40, 700):
                hidden = groups * group
                add("odd", tokens, hidden, inter, 6, 2, weights=weights, biases="both", dtype=dtype)
    # gpt-oss's layer at its own width, in the format of its checkpoints, and in INT4.
    for number, tokens in enumerate((1, 4, 16, 64, 300, 2000)):
        for weights in ("mxfp4", "int4_32", "int4_64"):
            add(
                *("gpt_oss", tokens, 2880, 2880, 8, 4),
                activation=ActivationType.SwigluBias,
                weights=weights,
                dtype=("bfloat16", "float16")[number % 2],
                biases="both",
                swiglu="all",
            )
    # Token counts around every power of two and around the sizes of tiles and of blocks.
    for power in (4, 5, 6, 7, 8, 9, 10, 11, 12, 13):
        for tokens in (2**power - 1, 2**power, 2**power + 1):
            add("tokens", tokens, 128, 64, 8, 2)
        weights = ("int4_32", "int4_64", "mxfp4")[power % 3]
        add("tokens", 2**power + 1, 128, 64, 8, 2, weights=weights)
    # Every routing with many experts, and every routing with duplicates at every size.
    for routing, tokens in itertools.product(
        ("uniform", "few_experts", "one_expert", "duplicates", "outside", "garbage"),
        (1, 9, 300, 3000),
    ):
        add("routing", tokens, 64, 48, 512, 10, routing=routing)
        add("routing", tokens, 64, 48, 16, 16, routing=routing, dtype="float16")
        add("routing", tokens, 64, 48, 4, 2, routing=routing, ep_size=4, ep_rank=2)
        weights = ("int4_32", "mxfp4")[tokens % 2]
        add("routing", tokens, 64, 96, 16, 4, routing=routing, weights=weights)
    # Routing across the one-launch limit, and up to more than 65536 tokens.
    for experts, k in ((1, 1), (8, 2), (64, 6), (384, 8), (512, 10), (1024, 3), (2048, 2)):
        for tokens in (3, 200, 511, 2049, 9000, 33000):
            add("slots", tokens, 32, 16, experts, k)
    for tokens in (65535, 65536, 65537, 131073):
        add("slots", tokens, 32, 16, 8, 2)
        add("slots", tokens, 32, 16, 128, 8, routing="outside")
    # Top-10 of 512 experts at Qwen3-Next's own size.
    for tokens, weights in itertools.product((1, 64, 1000), ("same", "int8", "int4_128", "mxfp4")):
        add("top10", tokens, 2048, 512, 512, 10, weights=weights)
    return cases


def sanitizer_cases() -> list[Case]:
    """A few dozen tiny cases for compute-sanitizer, which slows kernels down a hundredfold."""
    cases = []
    routings = ("uniform", "garbage", "one_expert", "outside", "duplicates", "few_experts")
    activations = tuple(ActivationType)
    shapes = ((72, 40), (128, 96), (264, 176), (136, 64))
    for number, (tokens, dtype, weights) in enumerate(
        itertools.product((1, 5, 70, 200), ("bfloat16", "float16"), WEIGHTS)
    ):
        hidden, inter = (_up(size, multiple_of(weights)) for size in shapes[number % len(shapes)])
        cases.append(
            Case(
                "sanitizer",
                hidden,
                inter,
                experts=5,
                top_k=3,
                tokens=tokens,
                dtype=dtype,
                weights=weights,
                activation=activations[(number * 3) % len(activations)],
                routing=routings[number % len(routings)],
                biases=("both", "none", "fc1")[number % 3],
                swiglu=("defaults", "all")[number % 2],
                ep_size=1 + number % 2,
            )
        )
    # Enough slots for the routing of several launches.
    for routing in ("uniform", "garbage"):
        cases.append(Case("sanitizer", 16, 16, 40, 3, 2800, routing=routing))
    # Enough units of work for the few-token launch to hand them out.
    cases.append(Case("sanitizer", 1024, 512, 64, 8, 16))
    cases.append(Case("sanitizer", 1024, 1024, 96, 8, 32, weights="int4_128"))
    return cases
