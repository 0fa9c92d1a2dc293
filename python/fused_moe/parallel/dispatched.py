# SPDX-License-Identifier: Apache-2.0
"""Every rank has tokens of its own and sends each to the ranks that hold its experts.

    counts   how many rows go from whom to whom                    (one all-to-all, host waits)
    dispatch rows of the input, with their ids and scales          (all-to-all)
    compute  `cutlass_fused_moe` on what arrived: a row's experts of this rank, weighted and summed
    back     one row for each row                                  (all-to-all)
    sum      a token's rows in float32, in the order of ranks

A row carries all k ids and scales of its token: the operator leaves out the experts of other
ranks anyway, so that one row, and one result, stands for all of a token's experts on a rank.
"""

from __future__ import annotations

import itertools

import torch

from fused_moe.cuda import capturing
from fused_moe.parallel import collectives, lanes, plan
from fused_moe.parallel.chunks import Call, PaddedChunk, UnevenChunk
from fused_moe.parallel.errors import reject_gradients
from fused_moe.parallel.experts import ExpertWeights
from fused_moe.parallel.groups import ParallelGroups
from fused_moe.parallel.replicated import replicated_moe

# The counts of this many chunks are exchanged whatever the number is, so that ranks that disagree
# about it can tell each other.
MAX_CHUNKS = 16
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def dispatched_moe(
    input: torch.Tensor,
    token_selected_experts: torch.Tensor,
    token_final_scales: torch.Tensor | None,
    experts: ExpertWeights,
    groups: ParallelGroups,
    *,
    output_dtype: torch.dtype | None = None,
    chunks: int = 1,
    row_per_expert: bool = False,
    max_tokens: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """The layer over expert-parallel ranks with tokens of their own, M of each rank's own too.

    **The host waits for the device once a call**, for the number of rows that go to and come from
    each rank: torch.distributed needs them on the host to split a message unevenly. With
    `max_tokens` nothing depends on the routing, the host does not wait, and a CUDA graph can
    capture the call; every rank's tokens then go to all ranks. That is the form for few tokens.

    The order of a token's sum: the experts of one rank as `cutlass_fused_moe` sums them, rounded
    to output_dtype; then the ranks in ascending order, in float32, rounded once more. Equal calls
    give equal bits. With `row_per_expert` each expert's summand is rounded to output_dtype, and
    all k are summed in float32 in the order of the ids: as the sm80 backend does on one GPU.

    Args:
        input: [M, H], this rank's tokens. M may differ from rank to rank and be 0. Ranks of one
            tensor-parallel group must have the same tokens, as the next two.
        token_selected_experts: [M, k] int32 ids among all E experts; those that are none of them
            contribute 0 and are sent nowhere.
        token_final_scales: [M, k] float32, or None for 1.
        experts: this rank's share, `ExpertWeights.shard(groups)`.
        groups: `ep` exchanges rows; `tp`, if there is one, sums the result.
        output_dtype: None is input's.
        chunks: the tokens are taken in so many parts, from 1 to 16. On CUDA the exchanges of one
            part then run beside the computation of another, on a stream of their own.
        row_per_expert: send a row for every (token, expert): more traffic, other sums, see above.
        max_tokens: the most tokens any rank has, the same number on every rank; every exchange
            is padded to it.
        backend: as `cutlass_fused_moe`'s.

        All ranks give the same H, k, dtypes and options.

    Returns:
        [M, H] output_dtype: this rank's tokens, complete.

    Raises:
        ParallelError: a rank died or made another call.
        RuntimeError: a tensor requires a gradient; a CUDA graph is captured without max_tokens.
        TypeError, ValueError: an argument does not fit, or not those of the other ranks. Raised
            before anything is exchanged where this rank alone can see it: the others then wait
            until their timeout.
    """
    reject_gradients(input=input, token_final_scales=token_final_scales, **experts.tensors())
    output_dtype = input.dtype if output_dtype is None else output_dtype
    _check_tensors(input, token_selected_experts, token_final_scales, experts, output_dtype)
    _check_options(input.shape[0], chunks, row_per_expert, max_tokens)
    if groups.ep is None or groups.ep_size == 1:
        return replicated_moe(
            input,
            token_selected_experts,
            token_final_scales,
            experts,
            groups,
            output_dtype=output_dtype,
            backend=backend,
        )
    if max_tokens is None and capturing(input.device):
        raise RuntimeError(
            "max_tokens is None, and the current stream is being captured in a CUDA graph: the "
            "host then waits for the numbers of rows, which a graph cannot hold; pass max_tokens, "
            "the most tokens that any rank has"
        )
    with torch.no_grad():
        call = Call(
            input,
            token_selected_experts,
            token_final_scales,
            experts,
            groups,
            torch.empty(input.shape, dtype=output_dtype, device=input.device),
            row_per_expert,
            backend,
        )
        # The operator's own checks, by a call without tokens: an error of this rank must not come
        # when the others wait for its results.
        call.run_experts(input[:0], call.routing(0, 0))
        parts: list[lanes.Chunk]
        if max_tokens is None:
            parts = _uneven_chunks(call, chunks)
        else:
            bounds = _bounds(max_tokens, chunks)
            parts = [PaddedChunk(call, begin, end) for begin, end in bounds if begin < end]
        if len(parts) > 1 and input.is_cuda:
            lanes.run_overlapped(parts, groups.exchange_stream(input.device))
        else:
            lanes.run_in_sequence(parts)
        # The ranks of a tensor-parallel group have the same tokens, and so none, all of them.
        if groups.tp is not None and groups.tp_size > 1 and input.shape[0]:
            collectives.all_reduce(call.output, "the output", "tensor", groups.tp)
        return call.output


def _uneven_chunks(call: Call, chunks: int) -> list[lanes.Chunk]:
    """The chunks with their counts, which are exchanged here."""
    groups = call.groups
    assert groups.ep is not None
    size = groups.ep_size
    top_k = call.ids.shape[1]
    ids = call.ids.reshape(-1, 1) if call.row_per_expert else call.ids
    each = top_k if call.row_per_expert else 1  # rows of `ids` a token
    goes_to = plan.destinations(ids, call.experts.num_experts, size)
    bounds = _bounds(call.x.shape[0], chunks)
    parts = [goes_to[begin * each : end * each] for begin, end in bounds]
    named = {
        "the hidden size": call.x.shape[1],
        "k, the experts a token": top_k,
        "the dtype of input": _DTYPES.index(call.x.dtype),
        "output_dtype": _DTYPES.index(call.output.dtype),
        "the number of experts of a rank": call.experts.num_experts,
        "chunks": chunks,
        "row_per_expert": int(call.row_per_expert),
        "token_final_scales (given or not)": int(call.scales is not None),
    }
    # From pinned memory, because a copy from pageable memory would let the host wait twice.
    header = torch.tensor(list(named.values()), pin_memory=call.x.is_cuda)
    header = header.to(call.x.device, non_blocking=True).expand(size, -1)
    counts = torch.zeros(size, MAX_CHUNKS, dtype=torch.int64, device=call.x.device)
    counts[:, :chunks] = torch.stack([part.sum(0) for part in parts], dim=1)
    out = torch.cat([header, counts], dim=1)
    into = torch.empty_like(out)
    collectives.all_to_all(into, out, "the numbers of rows", "expert", groups.ep)
    sent, received = torch.stack([out, into]).tolist()  # here the host waits
    for rank, theirs in enumerate(received):
        for (name, mine), their in zip(named.items(), theirs, strict=False):
            if mine != their:
                raise ValueError(
                    f"{name} differs between the ranks of the expert-parallel group: "
                    f"{_shown(name, mine)} on rank {groups.ep_rank}, {_shown(name, their)} on "
                    f"rank {rank}; all ranks must make the same call"
                )
    first = len(named)
    return [
        UnevenChunk(
            call,
            *bounds[chunk],
            parts[chunk],
            [row[first + chunk] for row in sent],
            [row[first + chunk] for row in received],
        )
        for chunk in range(chunks)
    ]


def _shown(name: str, value: int) -> object:
    return _DTYPES[value] if "dtype" in name else value


def _bounds(tokens: int, chunks: int) -> list[tuple[int, int]]:
    """Where the chunks begin and end; their sizes differ by one at most."""
    marks = [tokens * chunk // chunks for chunk in range(chunks + 1)]
    return list(itertools.pairwise(marks))


def _check_tensors(
    input: torch.Tensor,
    ids: torch.Tensor,
    scales: torch.Tensor | None,
    experts: ExpertWeights,
    output_dtype: torch.dtype,
) -> None:
    """Checks what this package itself relies on; the operator checks the rest."""
    if input.ndim != 2 or input.shape[1] != experts.hidden_size or input.dtype not in _DTYPES:
        raise ValueError(
            f"input is a {input.dtype} tensor of shape {list(input.shape)}; it must be [tokens, "
            f"{experts.hidden_size}], the hidden size of experts, and one of {list(_DTYPES)}"
        )
    shape = list(ids.shape)
    if ids.dtype != torch.int32 or shape[:1] != [input.shape[0]] or len(shape) != 2 or not shape[1]:
        raise ValueError(
            f"token_selected_experts is a {ids.dtype} tensor of shape {shape}; it must be "
            f"torch.int32, [{input.shape[0]}, experts a token: 1 or more]"
        )
    if scales is not None and (scales.dtype != torch.float32 or scales.shape != ids.shape):
        raise ValueError(
            f"token_final_scales is a {scales.dtype} tensor of shape {list(scales.shape)}; it "
            f"must be torch.float32, {list(ids.shape)} as token_selected_experts, or None"
        )
    if output_dtype not in _DTYPES:
        raise ValueError(f"output_dtype is {output_dtype}; it must be one of {list(_DTYPES)}")
    given = {"input": input, "token_selected_experts": ids, "token_final_scales": scales}
    for name, tensor in given.items():
        if tensor is not None and tensor.device != experts.fc1.device:
            raise ValueError(
                f"{name} is on {tensor.device}; it must be on the device of experts, "
                f"{experts.fc1.device}: use {name}.to(...)"
            )
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"{name} is not contiguous; it must be contiguous, row-major: use "
                f"{name}.contiguous()"
            )


def _check_options(tokens: int, chunks: int, row_per_expert: bool, max_tokens: int | None) -> None:
    if not 1 <= chunks <= MAX_CHUNKS:
        raise ValueError(f"chunks is {chunks}; it must be from 1 to {MAX_CHUNKS}")
    if max_tokens is None:
        return
    if row_per_expert:
        raise ValueError(
            "row_per_expert and max_tokens are both given; padded exchanges send each token to "
            "every rank: leave one of them out"
        )
    if tokens > max_tokens:
        raise ValueError(
            f"input has {tokens} tokens, max_tokens is {max_tokens}; it must be the most tokens "
            "that any rank has"
        )
