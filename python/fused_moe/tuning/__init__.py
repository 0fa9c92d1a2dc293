# SPDX-License-Identifier: Apache-2.0
"""Finding the fastest tactics of a layer on the GPU at hand, and keeping what was found.

    with fused_moe.autotune(cache="moe_tactics.json"):
        model(batch)

Without tuning, a model of the chip chooses tactics. docs/tuning.md says when it is worth more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

from fused_moe.tuning import progress as _progress
from fused_moe.tuning.engine import FILE_VARIABLE, Tuner
from fused_moe.tuning.keys import ROUTINGS
from fused_moe.tuning.machine import Machine

__all__ = ["FILE_VARIABLE", "autotune", "clear", "load", "save"]

# The process's own. Results are of chips, not of devices, so that like GPUs share them.
tuner = Tuner(Machine())


@contextlib.contextmanager
def autotune(
    tune_mode: bool = True,
    cache: str | None = None,
    tuning_buckets: Sequence[int] | None = None,
    round_up: bool | None = None,
    skip_ops: str | Collection[str] | None = None,
    cuda_graph_profile_replays: int | None = None,
    *,
    routing: str = "given",
    progress: bool | None | _progress.Report = None,
) -> Iterator[None]:
    """Tunes the layers that are called inside; FlashInfer's `autotune`, with its arguments.

    The first call of each layer (sizes, dtypes, formats) measures tactics for every bucket of
    tokens up to the call's `tune_max_num_tokens`, which takes a fraction of a second to a few
    seconds, then runs as always. Calls inside and after use what was found. Nothing that was
    found before, here or in a file, is measured again. While any such context is open the calls
    of all threads tune; other work on the GPU would disturb the times.

    Within the capture of a CUDA graph nothing is tuned, and the log says so. Results are those
    of the chosen tactics: equal calls give equal bits before tuning and after, and the two may
    differ in rounding where another tactic sums in another order.

    Args:
        tune_mode: False measures nothing; `cache` is still read.
        cache: a file of results: read at the start if it exists, and what was found is merged
            into it at the end.
        tuning_buckets: the numbers of tokens to tune, in place of powers of two up to
            `tune_max_num_tokens`.
        round_up: accepted, changes nothing: between two buckets the nearer one counts, where
            the choice without tuning is the same.
        skip_ops: names of operators not to tune; those of this function are
            "fused_moe::cutlass_fused_moe" and FlashInfer's "trtllm::fused_moe::gemm1", "...gemm2".
        cuda_graph_profile_replays: accepted, changes nothing: CUDA graphs are always replayed,
            as often as the noise asks for.
        routing: the expert ids to measure on: "given" takes rows of the calls' own (for buckets
            beyond the call's tokens, uniform ones), "uniform" and "skewed" random ones: skewed by
            Zipf's law. Use "uniform" where the calls' ids are made up, as in a warm-up.
        progress: None shows a bar where stderr is a terminal and tqdm is installed, True always,
            False never; a function is called with (done, of how many, what).

    Raises:
        TypeError, ValueError: an argument that does not fit, or a cache that is no such file.
        OSError: the cache cannot be read.
    """
    if routing not in ROUTINGS:
        raise ValueError(f"routing is {routing!r}; it must be one of {list(ROUTINGS)}")
    if cuda_graph_profile_replays is not None and cuda_graph_profile_replays < 1:
        raise ValueError(
            f"cuda_graph_profile_replays is {cuda_graph_profile_replays}; it must be 1 or more"
        )
    buckets = None
    if tuning_buckets is not None:
        buckets = sorted(set(tuning_buckets))
        if not buckets or not all(isinstance(b, int) and b >= 1 for b in buckets):
            raise ValueError(
                f"tuning_buckets is {tuning_buckets!r}; it must hold numbers of tokens, 1 or more, "
                "or be None for powers of two"
            )
    skipped = {skip_ops} if isinstance(skip_ops, str) else frozenset(skip_ops or ())
    with tuner.context(tune_mode, cache, buckets, routing, skipped, progress):
        yield


def load(path: str) -> None:
    """Takes in a file of results, for all calls from now on.

    The file that the environment variable FUSED_MOE_TUNING_FILE names is taken in by itself.
    Results of another version or chip are ignored, and the log says so.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no file of tuning results.
    """
    tuner.load(path)


def save(path: str) -> None:
    """Merges everything that this process found or loaded into a file.

    Raises:
        OSError: it cannot be written.
        ValueError: what is there is no file of tuning results; it is left alone.
    """
    tuner.save(path)


def clear() -> None:
    """Forgets every result: calls go back to the choice without tuning."""
    tuner.clear()
