# SPDX-License-Identifier: Apache-2.0
"""From router logits to what `cutlass_fused_moe` takes: expert ids and scales."""

from __future__ import annotations

import dataclasses

import torch


def topk_softmax(
    router_logits: torch.Tensor, k: int, renormalize: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses the k experts of largest probability for each token.

    Deterministic: of equal logits the one with the lower expert id comes first. The k ids of
    a token are distinct and within [0, E) whatever the logits are; a row with a NaN (or
    +inf) keeps valid ids and gets NaN scales, so that the fault shows in the output.

    Args:
        router_logits: [M, E], any floating dtype.
        k: experts a token, 1 <= k <= E.
        renormalize: make the k scales of a token sum to 1 (Mixtral, Qwen3); otherwise they
            are probabilities among all E experts (OLMoE).

    Returns:
        scales [M, k] float32 in descending order, and ids [M, k] int32.

    Raises:
        ValueError: `router_logits` is not a floating [M, E] tensor, or k is out of range.
    """
    _check_logits(router_logits)
    num_experts = router_logits.shape[1]
    if not 1 <= k <= num_experts:
        raise ValueError(f"k is {k}; it must be from 1 to the number of experts, {num_experts}")
    logits = router_logits.float()
    # A stable sort, because torch.topk leaves the order of equal values open.
    ordered, order = torch.sort(logits, dim=1, descending=True, stable=True)
    # A NaN sorts first and +inf - +inf is NaN, so that both show in the scales of their row.
    considered = ordered[:, :k] if renormalize else ordered
    scales = torch.softmax(considered, dim=1)[:, :k].contiguous()
    return scales, order[:, :k].to(torch.int32)


# The ways to make scores of logits.
_SCORINGS = ("softmax", "sigmoid", "sparsemixer")
# How the experts of a group make the group's own score.
_GROUP_SCORES = ("max", "top2")


@dataclasses.dataclass(frozen=True)
class Routing:
    """How a token's experts and their scales follow from its router logits.

    Calling it turns logits [M, E] into scales [M, k] float32 and ids [M, k] int32:

        score  = softmax(logits) or sigmoid(logits), in float32
        choice = score + correction_bias, where there is one
        choice = -infinity in all but the best `top_k_groups` of `num_groups` groups of
                 consecutive experts
        ids    = the k largest of choice, the largest first; of equals the lower id
        scale  = score[ids], divided by their sum if `renormalize`, times `scaling_factor`

    Only elementwise operations, sums and sorts: no synchronization, no control flow that
    depends on values, so that it can be compiled and captured in a CUDA graph. The ids of a
    token are distinct and within [0, E) whatever the logits are; a NaN among them makes a scale
    of its row NaN, so that the fault shows in the output.

    Models: `Routing(k)` is Mixtral, Qwen3-MoE, Qwen3-Next, Granite-MoE and gpt-oss (top-k of
    the logits, then a softmax over the k: the same numbers); `renormalize=False` OLMoE,
    Qwen2-MoE and DeepSeek-V2-Lite; a softmax with a correction bias is Ernie 4.5; the class
    methods are the others.

    Attributes:
        top_k: k, experts a token.
        scoring: "softmax", "sigmoid" or "sparsemixer" (see `sparsemixer`).
        renormalize: make the k scales of a token sum to 1 before the factor.
        scaling_factor: multiplies every scale.
        num_groups: E is divided into this many groups; 1 for no groups.
        top_k_groups: how many groups a token may choose experts from.
        group_score: a group counts as much as its best expert ("max", DeepSeek-V2) or its two
            best together ("top2", DeepSeek-V3).
        jitter_eps: sparsemixer's threshold.
    """

    top_k: int
    scoring: str = "softmax"
    renormalize: bool = True
    scaling_factor: float = 1.0
    num_groups: int = 1
    top_k_groups: int = 1
    group_score: str = "max"
    jitter_eps: float = 0.01

    def __post_init__(self) -> None:
        for name in ("top_k", "num_groups", "top_k_groups"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be an int of 1 or more")
        for name, known in (("scoring", _SCORINGS), ("group_score", _GROUP_SCORES)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
        if self.top_k_groups > self.num_groups:
            raise ValueError(
                f"top_k_groups is {self.top_k_groups}; it must be at most num_groups, "
                f"{self.num_groups}"
            )
        if self.scoring == "sparsemixer" and (
            self.top_k != 2 or self.renormalize or self.num_groups != 1
        ):
            raise ValueError(
                "sparsemixer is defined for top_k=2, renormalize=False and num_groups=1; got "
                f"top_k={self.top_k}, renormalize={self.renormalize}, "
                f"num_groups={self.num_groups}: use Routing.sparsemixer()"
            )

    @classmethod
    def deepseek_v2(
        cls, top_k: int, n_group: int, topk_group: int, routed_scaling_factor: float = 1.0
    ) -> Routing:
        """DeepSeek-V2's "group_limited_greedy": softmax, groups by their best expert.

        The arguments are named as in the model's configuration (`num_experts_per_tok` first).
        """
        return cls(
            top_k,
            renormalize=False,
            scaling_factor=routed_scaling_factor,
            num_groups=n_group,
            top_k_groups=topk_group,
        )

    @classmethod
    def deepseek_v3(
        cls,
        top_k: int,
        n_group: int = 1,
        topk_group: int = 1,
        routed_scaling_factor: float = 1.0,
        norm_topk_prob: bool = True,
    ) -> Routing:
        """DeepSeek-V3's "noaux_tc": sigmoid, a correction bias, groups by their two best.

        Kimi-K2, GLM-4.5, MiniMax-M2 and Nemotron-3 use it with numbers of their own. The
        arguments are named as in the model's configuration (`num_experts_per_tok` first).
        """
        return cls(
            top_k,
            scoring="sigmoid",
            renormalize=norm_topk_prob,
            scaling_factor=routed_scaling_factor,
            num_groups=n_group,
            top_k_groups=topk_group,
            group_score="top2",
        )

    @classmethod
    def llama4(cls, top_k: int = 1) -> Routing:
        """Llama 4's: the sigmoid of the largest logit, not renormalized.

        The model multiplies the expert's input by it, not the output: see FusedMoE's
        `apply_router_weight_on_input`.
        """
        return cls(top_k, scoring="sigmoid", renormalize=False)

    @classmethod
    def sparsemixer(cls, jitter_eps: float = 0.01) -> Routing:
        """Phi-3.5-MoE's top 2, as inference defines it (arXiv 2409.12136).

        The best expert's scale is its probability among the experts whose logit is within 2 *
        jitter_eps of the best, relative to max(|logit|, best logit). The second is found and
        scaled in the same way with the first left out.
        """
        return cls(2, scoring="sparsemixer", renormalize=False, jitter_eps=jitter_eps)

    def __call__(
        self, router_logits: torch.Tensor, correction_bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Chooses experts.

        Args:
            router_logits: [M, E], any floating dtype, the router's own bias included.
            correction_bias: [E], any floating dtype, or None: added to the scores for the
                choice of experts, not to their scales (DeepSeek-V3's
                e_score_correction_bias).

        Returns:
            scales [M, k] float32, and ids [M, k] int32, both contiguous.

        Raises:
            ValueError: a tensor that does not fit, or an E that top_k or the groups do not fit.
        """
        self._check(router_logits, correction_bias)
        logits = router_logits.float()
        if self.scoring == "sparsemixer":
            scales, ids = _sparsemixer(logits, self.jitter_eps)
        elif self.scoring == "softmax" and correction_bias is None and self.num_groups == 1:
            scales, ids = topk_softmax(logits, self.top_k, self.renormalize)
        else:
            scales, ids = self._by_choice(logits, correction_bias)
        if self.scaling_factor != 1.0:
            scales = scales * self.scaling_factor
        return scales, ids

    def check_num_experts(self, num_experts: int) -> None:
        """Raises ValueError unless this many experts fit `top_k` and the groups."""
        size, rest = divmod(num_experts, self.num_groups)
        if rest:
            raise ValueError(
                f"the number of experts is {num_experts}; it must be a multiple of num_groups, "
                f"{self.num_groups}"
            )
        if self.top_k > size * self.top_k_groups:
            raise ValueError(
                f"top_k is {self.top_k}; it must be at most {size * self.top_k_groups}: "
                f"{num_experts} experts, of which {self.top_k_groups} of {self.num_groups} groups "
                "may be chosen"
            )
        if self.num_groups > 1 and self.group_score == "top2" and size < 2:
            raise ValueError(
                f'group_score is "top2", but {num_experts} experts in {self.num_groups} groups '
                "are one expert a group"
            )

    def _check(self, logits: torch.Tensor, bias: torch.Tensor | None) -> None:
        _check_logits(logits)
        self.check_num_experts(logits.shape[1])
        if bias is None:
            return
        if bias.shape != logits.shape[1:] or not bias.is_floating_point():
            raise ValueError(
                f"correction_bias is a {bias.dtype} tensor of shape {list(bias.shape)}; it must be "
                f"a floating point tensor [{logits.shape[1]}], one number an expert"
            )
        if self.scoring == "sparsemixer":
            raise ValueError("correction_bias is given, which sparsemixer has no use for")

    def _by_choice(
        self, logits: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The general form, on float32 logits."""
        scores = torch.sigmoid(logits) if self.scoring == "sigmoid" else logits.softmax(dim=1)
        if bias is not None:
            choice = scores + bias.float()
        elif self.num_groups > 1:
            choice = scores
        else:
            choice = logits  # the same order, and no two logits round to one score
        if self.num_groups > 1:
            choice = self._within_groups(choice)
        order = _descending(choice)[:, : self.top_k]
        scales = scores.gather(1, order)
        if self.renormalize:
            # As DeepSeek-V3 has it: scores that are all 0 stay 0.
            scales = scales / (scales.sum(dim=1, keepdim=True) + 1e-20)
        return scales, order.to(torch.int32)

    def _within_groups(self, choice: torch.Tensor) -> torch.Tensor:
        """`choice` with -infinity in the groups that are not among the best."""
        tokens, experts = choice.shape
        grouped = choice.view(tokens, self.num_groups, experts // self.num_groups)
        if self.group_score == "top2":
            group = grouped.topk(2, dim=2).values.sum(dim=2)
        else:
            group = grouped.amax(dim=2)
        best = _descending(group)[:, : self.top_k_groups]
        kept = torch.zeros_like(group, dtype=torch.bool).scatter(1, best, True)
        return grouped.masked_fill(~kept.unsqueeze(2), float("-inf")).reshape(tokens, experts)


def _sparsemixer(logits: torch.Tensor, jitter_eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rounds on float32 logits [M, E], the second without the winner of the first."""
    ids = _descending(logits)[:, :2]
    scales = []
    left = logits
    for choice in range(2):
        chosen = ids[:, choice : choice + 1]
        best = logits.gather(1, chosen)
        distance = (best - logits) / torch.maximum(logits.abs(), best)
        # 0 / 0, at logits that are all 0, is no distance: those experts stay.
        near = left.masked_fill(distance > 2 * jitter_eps, float("-inf"))
        scales.append(near.softmax(dim=1).gather(1, chosen))
        left = logits.scatter(1, chosen, float("-inf"))
    return torch.cat(scales, dim=1), ids.to(torch.int32)


def _descending(values: torch.Tensor) -> torch.Tensor:
    """The order of each row of [M, N], largest first, of equals the lower index first."""
    return torch.sort(values, dim=1, descending=True, stable=True).indices


def _check_logits(router_logits: torch.Tensor) -> None:
    if router_logits.ndim != 2 or not router_logits.is_floating_point():
        raise ValueError(
            f"router_logits is a {router_logits.dtype} tensor of shape "
            f"{list(router_logits.shape)}; it must be a floating point tensor [tokens, experts]"
        )
