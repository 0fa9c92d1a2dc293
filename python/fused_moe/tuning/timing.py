# SPDX-License-Identifier: Apache-2.0
"""Times a call on the GPU as a server runs it: in a CUDA graph, its weights not in the cache.

A layer's weights are used once a forward pass, with all other layers' between. So a graph holds
several calls, each with a routing of its own that reaches other experts, as many as put four
L2 caches full of weights between two uses of one. Layers too small for that are copied. Where
calls are long, one fills the cache several times over by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fused_moe import cuda
from fused_moe.arguments import MoeCall
from fused_moe.tuning import samples
from fused_moe.tuning.search import Pair, Timer

_CACHES_BETWEEN = 4
# Few tokens: enough calls that the gap between two replays, a few microseconds, does not count.
_BYTES_OF_A_GRAPH = 1_500_000_000
_FEW_ROWS_AN_EXPERT = 64
_MOST_CALLS = 32
_CYCLES_AHEAD = 200_000  # about 0.1 ms
_MOST_COPIES = 16  # of a layer that fits the cache many times: such toys stay partly cached

# The kernels that ran before in this process. The first launch loads a kernel's code, which is
# neither to be timed nor possible within a capture.
_loaded: set[tuple[Any, ...]] = set()


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be timed.

    Attributes:
        call: checked for the number of tokens to be timed.
        tensors: the arguments of the caller's call by name; weights, scales and biases are
            used as they are, `token_selected_experts` where the routing is "given".
        experts: which experts there are.
        routing: one of fused_moe.tuning.keys.ROUTINGS.
    """

    call: MoeCall
    tensors: Mapping[str, Any]
    experts: samples.Experts
    routing: str


@contextlib.contextmanager
def graph_timer(request: Request) -> Iterator[Timer]:
    """A timer of the request's call, on a stream of its own with memory of its own.

    The caller's output and workspace are not touched; its random numbers neither.

    Raises:
        RuntimeError: no memory, or an error of the CUDA runtime.
    """
    device = request.call.device
    with torch.cuda.device(device), torch.no_grad():
        # What runs would be timed along, and may still write the weights.
        torch.cuda.synchronize()
        stream = _stream_of(device)
        with torch.cuda.stream(stream):
            launches = _launches(request)
        stream.synchronize()
        timer = _GraphTimer(launches, request.call, stream)
        try:
            yield timer
        finally:
            stream.synchronize()


@functools.cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """One stream a device, so that PyTorch's allocator uses its memory again."""
    return torch.cuda.Stream()


class _GraphTimer:
    """Keeps a pair's graph, since the search comes back to the good ones."""

    def __init__(
        self,
        launches: Sequence[Callable[[MoeCall], object]],
        call: MoeCall,
        stream: torch.cuda.Stream,
    ) -> None:
        self._launches = launches
        self._call = call
        self._stream = stream
        self._graphs: dict[Pair, torch.cuda.CUDAGraph] = {}

    def __call__(self, pair: Pair, rounds: int) -> list[float]:
        """Microseconds of a call in each of `rounds` replays."""
        with torch.cuda.stream(self._stream):
            if pair not in self._graphs:
                self._graphs[pair] = self._capture(pair)
            graph = self._graphs[pair]
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
            # The host's way to the first launch would count where the device waits for it.
            torch.cuda._sleep(_CYCLES_AHEAD)
            marks[0].record()
            for mark in marks[1:]:
                graph.replay()
                mark.record()
            marks[-1].synchronize()
        calls = len(self._launches)
        return [1e3 * a.elapsed_time(b) / calls for a, b in itertools.pairwise(marks)]

    def _capture(self, pair: Pair) -> torch.cuda.CUDAGraph:
        call = dataclasses.replace(self._call, tactics=pair)
        self._load(call, pair)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on allocating meanwhile.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for launch in self._launches:
                launch(call)
        finally:
            graph.capture_end()
        if len(self._launches) > 1:
            # Uploads the graph; where it holds one long call that is not worth another.
            graph.replay()
        return graph

    def _load(self, call: MoeCall, pair: Pair) -> None:
        kind = (call.backend, call.device, call.input_dtype, call.output_dtype, call.weight_format)
        kernels = {(*kind, call.activation, gemm, tactic) for gemm, tactic in enumerate(pair)}
        if not kernels <= _loaded:
            self._launches[0](call)
            self._stream.synchronize()
            _loaded.update(kernels)


def _launches(request: Request) -> list[Callable[[MoeCall], object]]:
    """The calls of a graph, which take tactics in a MoeCall: one for each sample of routing."""
    call, tensors = request.call, request.tensors
    tokens, device = call.num_tokens, call.device
    generator = torch.Generator(device).manual_seed(0)
    x = torch.empty(tokens, call.hidden_size, dtype=call.input_dtype, device=device)
    x.normal_(generator=generator)
    scales = None
    if tensors["token_final_scales"] is not None:
        shape = (tokens, call.top_k)
        scales = torch.full(shape, 1 / call.top_k, dtype=torch.float32, device=device)
    output = torch.empty(tokens, call.hidden_size, dtype=call.output_dtype, device=device)
    workspace = torch.empty(call.workspace_bytes, dtype=torch.uint8, device=device)

    ids = tensors["token_selected_experts"]
    given = request.routing == "given" and ids.shape[0] >= tokens

    def sample(number: int, count: int) -> torch.Tensor:
        if given:
            return samples.given_ids(ids, tokens, number, count, request.experts)
        skewed = request.routing == "skewed"
        return samples.random_ids(tokens, call.top_k, request.experts, skewed, generator)

    fc1, fc2 = tensors["fc1_expert_weights"], tensors["fc2_expert_weights"]
    between = _CACHES_BETWEEN * torch.cuda.get_device_properties(device).L2_cache_size
    nbytes = fc1.nbytes + fc2.nbytes
    share = samples.touched(sample(0, 1), request.experts) / request.experts.local
    few = tokens * call.top_k < _FEW_ROWS_AN_EXPERT * request.experts.total
    wanted = max(between, _BYTES_OF_A_GRAPH) if few else between
    count = min(_MOST_CALLS, max(1, math.ceil(wanted / max(share * nbytes, 1))))
    copies = [(fc1, fc2)]
    while len(copies) < min(_MOST_COPIES, count, math.ceil(between / nbytes)):
        copies.append((fc1.clone(), fc2.clone()))

    def address(name: str) -> int:
        tensor = tensors[name]
        return 0 if tensor is None else tensor.data_ptr()

    quant_scales = tensors["quant_scales"] or (None, None)
    rest = (
        *(0 if scale is None else scale.data_ptr() for scale in quant_scales),
        *(address("fc1_expert_biases"), address("fc2_expert_biases")),
        *(address("swiglu_alpha"), address("swiglu_beta"), address("swiglu_limit")),
    )

    def bind(
        ids: torch.Tensor, weights: tuple[torch.Tensor, torch.Tensor]
    ) -> Callable[[MoeCall], object]:
        def launch(tactics: MoeCall) -> object:
            return cuda.launch(
                tactics,
                output,
                workspace,
                *(x.data_ptr(), ids.data_ptr(), 0 if scales is None else scales.data_ptr()),
                *(weights[0].data_ptr(), weights[1].data_ptr(), *rest),
            )

        return launch

    return [bind(sample(n, count), copies[n % len(copies)]) for n in range(count)]
