# SPDX-License-Identifier: Apache-2.0
"""The tuner: which contexts are open, what was found, and what a call does with both.

`settle` is all that a call sees of it, once for each of its signatures. The table and the
contexts are the process's, as FlashInfer's are: a context tunes the calls of every thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

from fused_moe import _extension
from fused_moe.arguments import MoeCall, check_call
from fused_moe.signature import Signature, sign
from fused_moe.tuning import keys, progress, samples, storage
from fused_moe.tuning.keys import Chip, Entry, Key, Layer, Names
from fused_moe.tuning.machine import Machine
from fused_moe.tuning.search import DEFAULTS, Pair, Settings, Space, search
from fused_moe.tuning.timing import Request

FILE_VARIABLE = "FUSED_MOE_TUNING_FILE"

# The names by which FlashInfer's `skip_ops` may mean this function: ours, and those of its own.
OPERATORS = frozenset(
    {"fused_moe::cutlass_fused_moe", "trtllm::fused_moe::gemm1", "trtllm::fused_moe::gemm2"}
)

log = logging.getLogger("fused_moe.tuning")


@dataclasses.dataclass(frozen=True)
class Context:
    """What an open `autotune` asks for; buckets None: by the call's tune_max_num_tokens."""

    tune: bool
    buckets: tuple[int, ...] | None
    routing: str
    bar: progress.Bar


class Tuner:
    """Finds, remembers and applies tactics.

    Args:
        machine: where things are measured.
        settings: how hard to look.
    """

    def __init__(self, machine: Machine, settings: Settings = DEFAULTS) -> None:
        self.machine = machine
        self._settings = settings
        self._results: storage.Results = {}
        self._contexts: list[Context] = []
        self._lock = threading.RLock()
        self._said: set[str] = set()
        self._asked_environment = False
        self.generation = 0
        """Grows whenever calls that were settled may have to be settled anew."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when `generation` grows, with the tuner's lock held."""

    # What users do.

    @contextlib.contextmanager
    def context(
        self,
        tune_mode: bool,
        cache: str | None,
        buckets: Sequence[int] | None,
        routing: str,
        skip_ops: Set[str],
        show: bool | None | progress.Report,
    ) -> Iterator[None]:
        """The context manager behind `autotune`, whose arguments are explained there."""
        if cache is not None:
            folder = os.path.dirname(os.path.abspath(cache))
            if not os.path.isdir(folder):
                raise ValueError(f"cache is {cache!r}; its folder {folder} must exist: make it")
            if os.path.exists(cache):
                self.load(cache)
        bar = progress.Bar(show)
        tune = tune_mode and not skip_ops & OPERATORS
        context = Context(tune, None if buckets is None else tuple(buckets), routing, bar)
        with self._lock:
            before = {key: dict(entries) for key, entries in self._results.items()}
            self._contexts.append(context)
            self._changed()
        try:
            yield
        finally:
            with self._lock:
                self._contexts.remove(context)
            if cache is not None and tune:
                self._save_news(cache, before)

    def load(self, path: str) -> None:
        """Takes in a file's results; says, in the log, which of them do not count here.

        Raises:
            OSError, ValueError: as `storage.read`.
        """
        results = storage.read(path)
        version = _version()
        others = sorted({key.version for key in results if key.version != version})
        if others:
            log.warning(
                "tuning file %s: ignoring %d of %d layers, tuned with fused_moe %s; this is %s: "
                "tune again",
                path,
                sum(key.version != version for key in results),
                len(results),
                ", ".join(others),
                version,
            )
        current = {key: entries for key, entries in results.items() if key.version == version}
        here = self.machine.chips()
        foreign = sorted({_chip_words(key.chip) for key in current if key.chip not in here})
        if foreign and here:
            log.warning(
                "tuning file %s: %d of %d layers are for %s and do not count here, which is %s",
                path,
                sum(key.chip not in here for key in current),
                len(results),
                ", ".join(foreign),
                ", ".join(sorted(map(_chip_words, here))),
            )
        self._add(current)

    def save(self, path: str) -> None:
        """Merges all results of this process into a file.

        Raises:
            OSError, ValueError: as `storage.merge`.
        """
        with self._lock:
            storage.merge(path, self._results)

    def clear(self) -> None:
        """Forgets every result, the file's too."""
        with self._lock:
            self._results.clear()
            self._changed()

    def results(self) -> storage.Results:
        """A copy of what is known."""
        with self._lock:
            return {key: dict(entries) for key, entries in self._results.items()}

    # What a call does.

    def settle(self, call: MoeCall, arguments: Mapping[str, Any]) -> tuple[MoeCall, int | None]:
        """Returns the call with the tactics it is to run with, and when that was so.

        In a tuning context the first call of a layer measures. Nothing of the caller's is
        written.

        Args:
            call: checked, of a backend with tactics, its addresses too, with tokens.
            arguments: those of `cutlass_fused_moe` by name.

        Returns:
            The call, and the `generation` for which it is settled; None: ask again next time.
        """
        with self._lock:
            self._read_environment()
            if not self._results and not self._contexts:
                return call, self.generation
            key = self.key(call, arguments)
            done = True
            # The innermost context that tunes says how.
            context = next((c for c in reversed(self._contexts) if c.tune), None)
            if context is not None:
                done = self._tune(context, key, arguments)
            entries = self._results.get(key)
            if entries:
                call = dataclasses.replace(call, tactics=self._pick(key, call, entries))
            return call, self.generation if done else None

    def key(self, call: MoeCall, arguments: Mapping[str, Any]) -> Key:
        """What a result for the call is found under; arguments as in `settle`."""
        scales = ("float32", "float16", "bfloat16", "e8m0")
        return Key(
            chip=self.machine.chip(call.device),
            version=_version(),
            layer=Layer(
                backend=call.backend,
                hidden_size=call.hidden_size,
                intermediate_size=call.intermediate_size,
                experts=call.num_local_experts * arguments["ep_size"],
                local_experts=call.num_local_experts,
                top_k=call.top_k,
                activation=call.activation.name,
                input=str(call.input_dtype).removeprefix("torch."),
                output=str(call.output_dtype).removeprefix("torch."),
                weights=keys.WEIGHT_FORMATS[call.weight_format],
                weight_scales=scales[call.weight_scale_dtype] if call.weight_format else "",
                group_size=call.group_size,
            ),
        )

    def _pick(self, key: Key, call: MoeCall, entries: Mapping[int, Entry]) -> Pair | None:
        """The tactics for the call, or None: the library's own choice."""
        space, names = self.space(call, key.chip)
        untuned = (names[space.untuned[0]], names[space.untuned[1]])
        entry = keys.entry_for(call.num_tokens, untuned, entries)
        if entry is None or entry.tactics == untuned:
            return None
        unknown = [name for name in entry.tactics if name not in names]
        if unknown:
            self._say(
                "the tuning result for %s names the tactics %s, which this build does not have: "
                "using its own choice; tune again",
                key.layer.describe(),
                unknown,
            )
            return None
        pair = (names.index(entry.tactics[0]), names.index(entry.tactics[1]))
        if not (set(pair) <= set(space.independent) or pair in space.together):
            self._say(
                "the tuning result for %s names the tactics %s, which do not fit this layer and "
                "chip: using the library's own choice; tune again",
                key.layer.describe(),
                list(entry.tactics),
            )
            return None
        return pair

    def space(self, call: MoeCall, chip: Chip) -> tuple[Space, list[str]]:
        """What may be tried for a call on a chip, and the names of the backend's tactics."""
        extension: Any = _extension.require(call.backend)
        tactics = extension.tactics(call.backend, call.weight_format)
        untuned = extension.choose_tactics(
            call.backend,
            call.problem,
            multiprocessors=chip.multiprocessors,
            shared_memory_per_block=chip.shared_memory_per_block,
            shared_memory_per_multiprocessor=chip.shared_memory_per_multiprocessor,
        )
        limit = chip.shared_memory_per_block
        space = Space(
            untuned=untuned,
            independent=tuple(extension.supported_tactics(call.backend, call.problem, limit)),
            heights={index: tactic.tile_m for index, tactic in enumerate(tactics)},
            together=tuple(extension.whole_layer_tactics(call.backend, call.problem, limit)),
        )
        return space, [tactic.name for tactic in tactics]

    # Tuning.

    def _tune(self, context: Context, key: Key, arguments: Mapping[str, Any]) -> bool:
        """Fills the buckets that the context wants; False where it must be tried again."""
        buckets = context.buckets or keys.default_buckets(arguments["tune_max_num_tokens"])
        known = self._results.get(key, {})
        missing = [
            tokens
            for tokens in buckets
            if tokens not in known or known[tokens].routing != context.routing
        ]
        if not missing:
            return True
        if self.machine.capturing():
            self._say(
                "not tuning %s: the stream is being captured into a CUDA graph; make the first "
                "call of a layer outside of it",
                key.layer.describe(),
            )
            return False
        signature = sign(arguments)
        self._warn_of_narrow_routing(context, key, arguments)
        try:
            with context.bar.task(key.layer.describe(), len(missing)) as done:
                for tokens in missing:
                    entry = self._tune_bucket(context, key, signature, arguments, tokens)
                    if entry is not None:
                        self._add({key: {tokens: entry}})
                    done(f"{tokens} tokens")
        finally:
            self.machine.release()
        return True

    def _tune_bucket(
        self,
        context: Context,
        key: Key,
        signature: Signature,
        arguments: Mapping[str, Any],
        tokens: int,
    ) -> Entry | None:
        """Measures one number of tokens; None, with a message, where that cannot be done."""
        try:
            call = check_call(_with_tokens(signature, tokens))
            space, names = self.space(call, key.chip)
            experts = samples.Experts(
                key.layer.experts, call.first_local_expert, call.num_local_experts
            )
            request = Request(call, arguments, experts, context.routing)
            with self.machine.timer(request) as timer:
                found = search(space, timer, self._settings, self.machine.clock)
        except (RuntimeError, ValueError) as error:  # no memory, or too many tokens for a call
            log.warning("not tuning %s for %d tokens: %s", key.layer.describe(), tokens, error)
            return None
        for pair, why in found.failed.items():
            tactics = " / ".join(names[index] for index in pair)
            log.warning("the tactics %s do not run for %d tokens: %s", tactics, tokens, why)
        log.info(
            "%s, %d tokens: %s takes %.1f us, untuned %s %.1f us (noise %.1f%%, %d pairs tried)",
            key.layer.describe(),
            tokens,
            " / ".join(names[index] for index in found.pair),
            found.microseconds,
            " / ".join(names[index] for index in space.untuned),
            found.untuned_microseconds,
            100 * found.noise,
            found.tried,
        )
        return Entry(
            tactics=_names(names, found.pair),
            untuned=_names(names, space.untuned),
            microseconds=round(found.microseconds, 2),
            untuned_microseconds=round(found.untuned_microseconds, 2),
            routing=context.routing,
        )

    def _warn_of_narrow_routing(
        self, context: Context, key: Key, arguments: Mapping[str, Any]
    ) -> None:
        """A dummy batch often sends every token to the same experts."""
        if context.routing != "given":
            return
        ids = arguments["token_selected_experts"]
        tokens, top_k = ids.shape
        layer = key.layer
        if tokens * top_k < 4 * layer.experts:
            return
        different = int(ids.unique().numel())
        if different <= top_k < layer.experts:
            self._say(
                "tuning %s on a batch of %d tokens that all go to the same %d experts; if that is "
                'made-up data, use autotune(routing="uniform")',
                layer.describe(),
                tokens,
                different,
            )

    # The table.

    def _add(self, results: Mapping[Key, Mapping[int, Entry]]) -> None:
        with self._lock:
            for key, entries in results.items():
                self._results.setdefault(key, {}).update(entries)
            self._changed()

    def _changed(self) -> None:
        self.generation += 1
        self.on_change()

    def _save_news(self, path: str, before: storage.Results) -> None:
        """Merges what came since `before` into a file; what goes wrong goes to the log."""
        news: storage.Results = {}
        for key, entries in self.results().items():
            old = before.get(key, {})
            if new := {tokens: e for tokens, e in entries.items() if old.get(tokens) != e}:
                news[key] = new
        if not news:
            return
        try:
            storage.merge(path, news)
        except (OSError, ValueError) as error:
            log.error("tuning results could not be written to %s: %s", path, error)

    def _read_environment(self) -> None:
        if self._asked_environment:
            return
        self._asked_environment = True
        path = os.environ.get(FILE_VARIABLE)
        if not path:
            return
        try:
            self.load(path)
        except (OSError, ValueError) as error:
            log.error("%s=%s: %s; running untuned", FILE_VARIABLE, path, error)

    def _say(self, message: str, *values: object) -> None:
        """A warning, once."""
        text = message % values
        if text not in self._said:
            self._said.add(text)
            log.warning("%s", text)


def _version() -> str:
    from fused_moe import __version__  # not above: the package imports this module first

    return __version__


def _names(names: Sequence[str], pair: Pair) -> Names:
    return names[pair[0]], names[pair[1]]


def _chip_words(chip: Chip) -> str:
    return (
        f"{chip.name} ({chip.multiprocessors} SMs, {chip.shared_memory_per_block // 1024} KiB "
        "a block)"
    )


def _with_tokens(signature: Signature, tokens: int) -> Signature:
    """The signature of a like call for another number of tokens, with memory of its own."""
    changes: dict[str, Any] = {"output": None, "workspace_buffer": None}
    for name in ("input", "token_selected_experts", "token_final_scales"):
        meta = getattr(signature, name)
        if meta is not None:
            shape = type(meta.shape)((tokens, *meta.shape[1:]))
            changes[name] = meta._replace(shape=shape)
    return signature._replace(**changes)
