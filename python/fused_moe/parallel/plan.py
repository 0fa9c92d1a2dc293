# SPDX-License-Identifier: Apache-2.0
"""Which rows of a rank's tokens go to which expert rank, and where their results come back.

A rank sends a token once to every rank that holds any of its experts (never once for each
expert), in the order (rank, token):

    token    experts' owners        rows sent                      places
      0        1, 1, 0               0 -> rank 0   (row 0)         [0, 2]
      1        0, 0, 0               1 -> rank 0   (row 1)         [1, 3]   3: no row
      2        none                  0 -> rank 1   (row 2)         [3, 3]

Row i of what comes back is the result for row i of what was sent. `places` holds a token's rows
in the order of ranks, which is the order of its sum, and stands for a row of zeros where it has
no more. Everything here is arithmetic on tensors: nothing waits for a device.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class SendPlan:
    """The rows of one exchange.

    Attributes:
        tokens: [rows] int64, the token that each row sent is, in the order (rank, token).
        places: [M, min(k, ep_size)] int64, the rows of each token in ascending order; `rows`
            where there are fewer.
    """

    tokens: torch.Tensor
    places: torch.Tensor


def destinations(ids: torch.Tensor, experts_each: int, ep_size: int) -> torch.Tensor:
    """Which ranks hold any of a token's experts.

    Args:
        ids: [M, k] int32; negative ones and those past all experts belong to nobody.
        experts_each: experts of a rank.
        ep_size: number of ranks.

    Returns:
        [M, ep_size] bool.
    """
    owner = torch.div(ids, experts_each, rounding_mode="floor").long()
    nobody = (ids < 0) | (owner >= ep_size)
    owner.masked_fill_(nobody, ep_size)
    marks = torch.zeros(ids.shape[0], ep_size + 1, dtype=torch.bool, device=ids.device)
    return marks.scatter_(1, owner, True)[:, :ep_size]


def plan_rows(goes_to: torch.Tensor, rows: int, most_ranks: int) -> SendPlan:
    """Lays out the rows to send.

    Args:
        goes_to: [M, ep_size] bool, of `destinations`.
        rows: how many True there are, known from the exchange of counts.
        most_ranks: the most ranks a token can go to, min(k, ep_size).
    """
    tokens, ranks = goes_to.shape
    by_rank = goes_to.T  # [ep_size, M]: rows are in this order
    row = by_rank.reshape(-1).cumsum(0).sub_(1).view(ranks, tokens)
    row = torch.where(by_rank, row, rows)
    token = torch.arange(tokens, device=goes_to.device).expand(ranks, tokens)
    # The place behind the last takes the pairs that are not sent, so that no size depends on data.
    sent = torch.empty(rows + 1, dtype=torch.int64, device=goes_to.device)
    sent.scatter_(0, row.reshape(-1), token.reshape(-1))
    places = row.T.sort(dim=1).values[:, :most_ranks]
    return SendPlan(sent[:rows], places)


def summed_rows(back: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Sums each token's rows in the order of `places`: float32 [M, H].

    Args:
        back: [rows + 1, H], the last row zeros.
        places: [M, n] int64 into back.
    """
    total = back[places[:, 0]].float()
    for column in range(1, places.shape[1]):
        total += back[places[:, column]]
    return total
