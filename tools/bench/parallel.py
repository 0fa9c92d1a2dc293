# SPDX-License-Identifier: Apache-2.0
"""Times a layer on several GPUs beside the same layer on one, and compares the results.

    bazel run //tools/bench:parallel -- --json=/tmp/parallel.json --table=/tmp/parallel.md

Every form of `fused_moe.parallel` computes the same M tokens: the replicated forms have all of
them on every rank, the dispatched ones M / ranks on each. A time is the slowest rank's median.
The graph column holds CUDA-graph replays where a form can be captured; in an eager call the host
takes its part, most of all with few tokens. NCCL's share is the time of its kernels, which
includes waiting for the other rank, over the time of the call.

On CPU tensors it runs by gloo, to be tried: --device=cpu --shrink=8 --tokens=8.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from absl import app, flags

from floors import Shape
from fused_moe import cutlass_fused_moe
from fused_moe.parallel import ExpertWeights, ParallelGroups, dispatched_moe, replicated_moe
from layers import DTYPES, Layer, Model, find_model, make_layers, make_weights
from tolerances import TOLERANCES, relative_error

_MODEL = flags.DEFINE_string("model", "DeepSeek-V2-Lite", "A name of fused_moe.models.")
_TOKENS = flags.DEFINE_list("tokens", ["64", "4096"], "M of each table, over all ranks.")
_WEIGHTS = flags.DEFINE_enum(
    "weights", "same", ["same", "int8", "uint8", "int4", "mxfp4"], "Same is that of activations."
)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", sorted(DTYPES), "Of activations.")
_RANKS = flags.DEFINE_integer("ranks", 2, "Processes, one a GPU.")
_DEVICE = flags.DEFINE_enum("device", "cuda", ["cuda", "cpu"], "Where.")
_SHRINK = flags.DEFINE_integer("shrink", 1, "Divides H and I, for a try where there is no GPU.")
_CALLS = flags.DEFINE_integer("calls", 100, "Calls that a median is taken of.")
_TIMEOUT = flags.DEFINE_integer("timeout", 120, "Seconds until an exchange, or all, gives up.")
_JSON = flags.DEFINE_string("json", "", "Where to write everything that was measured.")
_TABLE = flags.DEFINE_string("table", "", "Where to write the printed table, Markdown.")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the ranks need of the command line."""

    model: str
    tokens: tuple[int, ...]
    weights: str
    dtype: str
    ranks: int
    device: str
    shrink: int
    calls: int
    timeout: int


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to compute the layer: what a rank calls, and which of the M rows it then has."""

    name: str
    run: Callable[[], torch.Tensor]
    rows: slice
    captured: bool


def model_of(options: Options) -> Model:
    """The model, its H and I divided by --shrink."""
    model = find_model(options.model)
    shape = model.shape
    smaller = Shape(
        hidden=shape.hidden // options.shrink,
        intermediate=shape.intermediate // options.shrink,
        experts=shape.experts,
        top_k=shape.top_k,
        gated=shape.gated,
    )
    return dataclasses.replace(model, shape=smaller)


def one_gpu(layer: Layer, whole: ExpertWeights) -> torch.Tensor:
    """The layer without any other rank."""
    return cutlass_fused_moe(
        layer.x, layer.ids, layer.scales, output_dtype=layer.x.dtype, **whole.arguments()
    )


def forms_of(layer: Layer, whole: ExpertWeights, shares: dict[str, ExpertWeights]) -> list[Form]:
    """All forms on these tokens; the first is one GPU alone."""
    tokens = layer.x.shape[0]
    groups = {"tp": ParallelGroups(tp=dist.group.WORLD), "ep": ParallelGroups(ep=dist.group.WORLD)}
    every = slice(0, tokens)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = slice(tokens * rank // ranks, tokens * (rank + 1) // ranks)
    most = -(-tokens // ranks)

    def replicated(kind: str) -> Callable[[], torch.Tensor]:
        return lambda: replicated_moe(layer.x, layer.ids, layer.scales, shares[kind], groups[kind])

    x, ids, scales = (t[mine].contiguous() for t in (layer.x, layer.ids, layer.scales))

    def dispatched(**options: Any) -> Callable[[], torch.Tensor]:
        return lambda: dispatched_moe(x, ids, scales, shares["ep"], groups["ep"], **options)

    return [
        Form("one GPU", lambda: one_gpu(layer, whole), every, True),
        Form(f"TP {ranks}, all-reduce", replicated("tp"), every, True),
        Form(f"EP {ranks}, replicated, all-reduce", replicated("ep"), every, True),
        Form(f"EP {ranks}, dispatched", dispatched(), mine, False),
        Form(f"EP {ranks}, dispatched, 2 chunks", dispatched(chunks=2), mine, False),
        Form(f"EP {ranks}, dispatched, 4 chunks", dispatched(chunks=4), mine, False),
        Form(
            f"EP {ranks}, dispatched, a row an expert", dispatched(row_per_expert=True), mine, False
        ),
        Form(f"EP {ranks}, dispatched, padded", dispatched(max_tokens=most), mine, True),
        Form(
            f"EP {ranks}, dispatched, padded, 2 chunks",
            dispatched(max_tokens=most, chunks=2),
            mine,
            True,
        ),
    ]


def medians(run: Callable[[], object], calls: int, cuda: bool) -> float:
    """Microseconds of one call: the median on this rank, all ranks starting together."""
    for _ in range(3):
        run()
    dist.barrier()
    if not cuda:
        times = []
        for _ in range(min(calls, 5)):
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e6)
        return statistics.median(times)
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(
        before.elapsed_time(after) * 1e3 for before, after in itertools.pairwise(marks)
    )


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """One call as a graph; it has run before, and NCCL is connected."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Only this thread is kept from waiting: PyTorch's watchdog looks at older exchanges.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph


def nccl_microseconds(run: Callable[[], object], calls: int) -> float | None:
    """Time of NCCL's kernels in one call, mean over the calls; None where there are none."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    dist.barrier()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    kernels = [
        event.time_range.elapsed_us()
        for event in profile.events()
        if "nccldevkernel" in event.name.lower() or "ncclkernel" in event.name.lower()
    ]
    return sum(kernels) / calls if kernels else None


def measure(form: Form, alone: torch.Tensor, layer: Layer, options: Options) -> dict[str, Any]:
    """This rank's numbers of one form."""
    cuda = options.device == "cuda"
    out = form.run()
    tokens = layer.x.shape[0]
    chosen = [row for row in range(tokens)[form.rows] if row < 32 or row >= tokens - 32]
    rows = torch.tensor(chosen, dtype=torch.int64, device=layer.x.device)
    result: dict[str, Any] = {
        "same_bits": bool(torch.equal(out, alone[form.rows])),
        "of_one_gpu": relative_error(out, alone[form.rows].float()),
        "of_reference": relative_error(out[rows - form.rows.start], layer.reference(rows)),
        "eager_us": medians(form.run, options.calls, cuda),
    }
    timed, us = form.run, result["eager_us"]
    if cuda and form.captured:
        graph = capture(form.run)
        timed = graph.replay
        us = result["graph_us"] = medians(timed, options.calls, cuda)
    if cuda and (nccl := nccl_microseconds(timed, 20)):
        result.update(nccl_us=nccl, nccl_share=nccl / us)
    return result


def slowest(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all ranks: the slowest times, the largest errors, the mean share."""
    merged: dict[str, Any] = {
        name: max(result[name] for result in results)
        for name in results[0]
        if name not in ("same_bits", "nccl_share")
    }
    merged["same_bits"] = all(result["same_bits"] for result in results)
    if "nccl_share" in results[0]:
        merged["nccl_share"] = statistics.mean(result["nccl_share"] for result in results)
    return merged


def run_rank(rank: int, options: Options, folder: str) -> None:
    """The life of one rank; rank 0 writes what all found."""
    # Multicast through NVLink is the host's: others may share its switches.
    for name, value in (("NCCL_NVLS_ENABLE", "0"), ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")):
        os.environ.setdefault(name, value)
    cuda = options.device == "cuda"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=(pathlib.Path(folder) / "rendezvous").as_uri(),
        rank=rank,
        world_size=options.ranks,
        timeout=datetime.timedelta(seconds=options.timeout),
        device_id=device if cuda else None,
    )
    model = model_of(options)
    dtype = DTYPES[options.dtype]
    torch.manual_seed(0)  # the same layer and the same tokens on every rank
    weights = make_weights(model, options.weights, dtype, device)
    whole = ExpertWeights(
        weights.fc1,
        weights.fc2,
        weights.quant_scales,
        activation_type=model.activation,
        use_packed_weights=options.weights == "int4",
        use_w4_group_scaling=options.weights == "mxfp4",
    )
    shares = {
        kind: whole.shard(ParallelGroups(**{kind: dist.group.WORLD})) for kind in ("tp", "ep")
    }
    cells = []
    for tokens in options.tokens:
        layer = make_layers(model, tokens, 1, [weights], dtype)[0]
        alone = one_gpu(layer, whole)
        for form in forms_of(layer, whole, shares):
            everyone: list[Any] = [None] * options.ranks
            dist.all_gather_object(everyone, measure(form, alone, layer, options))
            cells.append({"tokens": tokens, "form": form.name, **slowest(everyone)})
    if rank == 0:
        document = {
            "chip": torch.cuda.get_device_name() if cuda else "CPU",
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "torch": torch.__version__,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else "",
            "options": dataclasses.asdict(options),
            "cells": cells,
        }
        (pathlib.Path(folder) / "document.json").write_text(json.dumps(document), encoding="utf-8")
    dist.destroy_process_group()


def markdown(document: dict[str, Any]) -> str:
    """One table for each M."""
    options = document["options"]
    lines = [
        f"{options['ranks']} x {document['chip']}, {document['date']}, torch {document['torch']}, "
        f"NCCL {document['nccl'] or 'none'}. {options['model']}, {options['weights']} weights, "
        f"{options['dtype']}.",
    ]
    for tokens in options["tokens"]:
        cells = [cell for cell in document["cells"] if cell["tokens"] == tokens]
        one = cells[0].get("graph_us", cells[0]["eager_us"])
        lines += ["", f"M = {tokens}", ""]
        lines += [
            "| form | graph us | eager us | one GPU / this | in NCCL | off one GPU | off ref |"
        ]
        lines += ["|---|--:|--:|--:|--:|--:|--:|"]
        for cell in cells:
            best = cell.get("graph_us", cell["eager_us"])
            graph = f"{cell['graph_us']:.0f}" if "graph_us" in cell else "–"
            share = f"{cell['nccl_share']:.0%}" if "nccl_share" in cell else "–"
            off = "same bits" if cell["same_bits"] else f"{cell['of_one_gpu']:.1e}"
            lines.append(
                f"| {cell['form']} | {graph} | {cell['eager_us']:.0f} | {one / best:.2f} | "
                f"{share} | {off} | {cell['of_reference']:.1e} |"
            )
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """Starts the ranks, prints, writes."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; flags are written --name=value")
    options = Options(
        _MODEL.value,
        tuple(int(tokens) for tokens in _TOKENS.value),
        _WEIGHTS.value,
        _DTYPE.value,
        _RANKS.value,
        _DEVICE.value,
        _SHRINK.value,
        _CALLS.value,
        _TIMEOUT.value,
    )
    if options.device == "cuda" and torch.cuda.device_count() < options.ranks:
        raise app.UsageError(
            f"--ranks={options.ranks}, but PyTorch sees {torch.cuda.device_count()} CUDA devices; "
            "--device=cpu --shrink=8 --tokens=8 tries the program without"
        )
    begin = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=run_rank, args=(rank, options, folder), daemon=True)
            for rank in range(options.ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(max(1.0, begin + options.timeout - time.monotonic()))
        failed = [rank for rank, process in enumerate(ranks) if process.exitcode != 0]
        for process in ranks:
            process.kill()
        if failed:
            raise SystemExit(f"ranks {failed} failed, or took longer than {options.timeout} s")
        document = json.loads((pathlib.Path(folder) / "document.json").read_text(encoding="utf-8"))
    document["seconds"] = time.monotonic() - begin
    text = markdown(document)
    print(text)
    for path, content in ((_TABLE.value, text), (_JSON.value, json.dumps(document, indent=1))):
        if path:
            pathlib.Path(path).write_text(content, encoding="utf-8")
    bound = TOLERANCES[DTYPES[options.dtype]]
    wrong = [cell for cell in document["cells"] if not cell["of_reference"] < bound]
    if wrong:
        raise SystemExit(f"too far from the reference: {wrong}")


if __name__ == "__main__":
    app.run(main)
