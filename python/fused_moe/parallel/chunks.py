# SPDX-License-Identifier: Apache-2.0
"""One chunk of a rank's tokens on its way to the experts and back, in the two forms there are."""

from __future__ import annotations

import dataclasses

import torch

from fused_moe.op import cutlass_fused_moe
from fused_moe.parallel import collectives, plan
from fused_moe.parallel.experts import ExpertWeights
from fused_moe.parallel.groups import ParallelGroups


@dataclasses.dataclass(frozen=True)
class Call:
    """What the chunks of one call have in common: its arguments, and the output they fill."""

    x: torch.Tensor
    ids: torch.Tensor
    scales: torch.Tensor | None
    experts: ExpertWeights
    groups: ParallelGroups
    output: torch.Tensor
    row_per_expert: bool
    backend: str | None

    def routing(self, begin: int, end: int) -> torch.Tensor:
        """Ids and scales in one int32 tensor: [slots, 1 or 2] a row for each expert, or [tokens,
        k or 2k], so that they travel in one message."""
        width = 1 if self.row_per_expert else self.ids.shape[1]
        ids = self.ids[begin:end].reshape(-1, width)
        if self.scales is None:
            return ids
        scales = self.scales[begin:end].reshape(-1, width)
        return torch.cat([ids, scales.view(torch.int32)], dim=1)

    def run_experts(self, x: torch.Tensor, routing: torch.Tensor) -> torch.Tensor:
        """This rank's experts on rows of any rank: [rows, H] of the output's dtype."""
        width = routing.shape[1] if self.scales is None else routing.shape[1] // 2
        scales = None
        if self.scales is not None:
            scales = routing[:, width:].contiguous().view(torch.float32)
        return cutlass_fused_moe(
            x,
            routing[:, :width].contiguous(),
            scales,
            output_dtype=self.output.dtype,
            backend=self.backend,
            **self.experts.arguments(),
            **self.groups.ranks(),
        )


class UnevenChunk:
    """Tokens [begin, end) of this rank, sent where their experts are."""

    def __init__(
        self,
        call: Call,
        begin: int,
        end: int,
        goes_to: torch.Tensor,
        sent: list[int],
        received: list[int],
    ) -> None:
        self._call, self._begin, self._end = call, begin, end
        self._goes_to, self._sent, self._received = goes_to, sent, received

    def dispatch(self) -> None:
        """Sends a row to every rank that holds any of its token's experts."""
        call = self._call
        top_k = call.ids.shape[1]
        most = 1 if call.row_per_expert else min(top_k, len(self._sent))
        self._plan = plan.plan_rows(self._goes_to, sum(self._sent), most)
        source = self._plan.tokens
        routing = call.routing(self._begin, self._end)[source]
        if call.row_per_expert:
            source = source // top_k
        self._x = self._exchange(call.x[self._begin : self._end][source], "the tokens' rows")
        self._routing = self._exchange(routing, "their ids and scales")

    def _exchange(self, rows: torch.Tensor, what: str) -> torch.Tensor:
        group = self._call.groups.ep
        assert group is not None
        out = rows.new_empty(sum(self._received), rows.shape[1])
        collectives.all_to_all(out, rows, what, "expert", group, self._received, self._sent)
        return out

    def compute(self) -> None:
        """Runs this rank's experts."""
        self._results = self._call.run_experts(self._x, self._routing)

    def bring_back(self) -> None:
        """Gets the results of the rows that were sent, and sums them for each token."""
        call, group = self._call, self._call.groups.ep
        assert group is not None
        results = self._results
        back = results.new_empty(sum(self._sent) + 1, results.shape[1])
        back[-1].zero_()
        collectives.all_to_all(
            back[:-1], results, "the results", "expert", group, self._sent, self._received
        )
        places = self._plan.places
        if call.row_per_expert:
            places = places.view(-1, call.ids.shape[1])
        call.output[self._begin : self._end] = plan.summed_rows(back, places)


class PaddedChunk:
    """Tokens [begin, end) of max_tokens, sent to every rank; those this rank lacks are padding."""

    def __init__(self, call: Call, begin: int, end: int) -> None:
        self._call, self._rows = call, end - begin
        tokens = call.x.shape[0]
        self._begin, self._end = min(begin, tokens), min(end, tokens)

    def dispatch(self) -> None:
        """Sends all rows to every rank, so that no message's size depends on the routing."""
        call, group = self._call, self._call.groups.ep
        assert group is not None
        x = call.x[self._begin : self._end]
        routing = call.routing(self._begin, self._end)
        missing = self._rows - x.shape[0]
        if missing:  # an id of -1 is nobody's
            x = torch.cat([x, x.new_zeros(missing, x.shape[1])])
            routing = torch.cat([routing, routing.new_full((missing, routing.shape[1]), -1)])
        self._x = collectives.all_gather(x, "the tokens' rows", "expert", group)
        self._routing = collectives.all_gather(routing, "their ids and scales", "expert", group)

    def compute(self) -> None:
        """Runs this rank's experts."""
        self._results = self._call.run_experts(self._x, self._routing)

    def bring_back(self) -> None:
        """Gets every rank's results for this rank's tokens, and sums them for each token."""
        call, group = self._call, self._call.groups.ep
        assert group is not None
        back = torch.empty_like(self._results)
        collectives.all_to_all(back, self._results, "the results", "expert", group)
        by_rank = back.view(group.size(), self._rows, -1)[:, : self._end - self._begin]
        total = by_rank[0].float()
        for rank in range(1, group.size()):
            total += by_rank[rank]
        call.output[self._begin : self._end] = total
