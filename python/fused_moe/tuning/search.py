# SPDX-License-Identifier: Apache-2.0
"""The search for the fastest pair of tactics: plain arithmetic over a timer.

The two GEMMs follow each other on one stream, so a call's time is a sum, and each GEMM's tactic
can be varied with the other's held. That makes n + n pairs of n * n:

    screen    GEMM 1's tactics beside the untuned GEMM 2, once each, by height outward from the
              untuned tile's; a direction ends where a whole height is hopeless, because beyond
              it tiles waste yet more (16-row tiles at 16384 tokens take ten times the best)
    halve     the faster half again with twice the replays, until two are left or one is apart
    the same for GEMM 2, and for pairs that only work together
    confirm   the winners, their combination and the untuned pair in turn, many rounds

The confirmation decides. Its noise is what the untuned pair's own rounds show; a pair that is
not faster by more than that, in most rounds, loses to the untuned one.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

Pair = tuple[int, int]

# Times a pair: microseconds of a call in each of so many rounds. RuntimeError or ValueError: it
# does not run.
Timer = Callable[[Pair, int], Sequence[float]]


@dataclasses.dataclass(frozen=True)
class Space:
    """What may be tried.

    Attributes:
        untuned: what the library chooses by itself.
        independent: the tactics that either GEMM can use whatever the other does.
        heights: rows of a tile, by tactic.
        together: pairs that only work together.
    """

    untuned: Pair
    independent: tuple[int, ...]
    heights: Mapping[int, int]
    together: tuple[Pair, ...] = ()


@dataclasses.dataclass(frozen=True)
class Settings:
    """How hard to look; shares are of a call's time.

    Attributes:
        hopeless: a height whose best tactic is slower than this times the best ends the walk.
        apart: a candidate slower than this times the best is dropped after the first look.
        rounds, few_rounds, long: of the confirmation; few of them where a call takes longer than
            `long` microseconds, whose times scatter less.
        least_noise: a gain below this share is never worth another tactic.
        majority: the share of rounds in which the winner must be faster.
        seconds: after so long the halving stops, and what led is confirmed.
    """

    hopeless: float = 1.25
    apart: float = 1.1
    rounds: int = 9
    few_rounds: int = 5
    long: float = 2000.0
    least_noise: float = 0.005
    majority: float = 0.75
    seconds: float = 3.0


DEFAULTS = Settings()


@dataclasses.dataclass(frozen=True)
class Found:
    """The outcome; times are medians of the confirmation, `noise` a share of the untuned one's."""

    pair: Pair
    microseconds: float
    untuned_microseconds: float
    noise: float
    tried: int
    failed: dict[Pair, str]


class _Search:
    def __init__(
        self, space: Space, timer: Timer, settings: Settings, clock: Callable[[], float]
    ) -> None:
        self.space = space
        self.settings = settings
        self.failed: dict[Pair, str] = {}
        self.tried: set[Pair] = set()
        self._timer = timer
        self._clock = clock
        self._end = clock() + settings.seconds

    def time(self, pair: Pair, rounds: int) -> list[float]:
        """Rounds of a pair; none if it does not run."""
        if pair in self.failed:
            return []
        self.tried.add(pair)
        try:
            return list(self._timer(pair, rounds))
        except (RuntimeError, ValueError) as error:
            self.failed[pair] = str(error)
            return []

    @property
    def late(self) -> bool:
        return self._clock() > self._end

    def screen(self, pairs: Mapping[int, Pair], start: int) -> dict[Pair, float]:
        """One round of each pair, those of like height together, outward from height `start`."""
        heights = sorted({self.space.heights[tactic] for tactic in pairs})
        up = [h for h in heights if h >= start]
        down = [h for h in reversed(heights) if h < start]
        times: dict[Pair, float] = {}
        for direction in (up, down):
            for height in direction:
                here: dict[Pair, float] = {}
                for tactic, pair in pairs.items():
                    if self.space.heights[tactic] == height and (one := self.time(pair, 1)):
                        here[pair] = one[0]
                times.update(here)
                if here and min(here.values()) > self.settings.hopeless * min(times.values()):
                    break
        return times

    def halve(self, times: dict[Pair, float]) -> Pair | None:
        """The best of the screened pairs after repeated halving; None where none ran."""
        if not times:
            return None
        best = min(times.values())
        ranked = sorted(times, key=times.__getitem__)
        left = [p for p in ranked if times[p] < self.settings.apart * best]
        rounds = 2
        while len(left) > 1 and not self.late:
            again = {p: min(t) for p in left if (t := self.time(p, rounds))}
            if not again:
                return None
            ranked = sorted(again, key=again.__getitem__)
            left = ranked[: max(1, len(ranked) // 2)]
            rounds *= 2
        return left[0]

    def confirm(self, finalists: Iterable[Pair], count: int) -> dict[Pair, list[float]]:
        """All finalists in turn, round after round, so that a drift of clocks hits all alike."""
        rounds: dict[Pair, list[float]] = {pair: [] for pair in finalists}
        for _ in range(count):
            for pair, times in rounds.items():
                times += self.time(pair, 1)
        return {pair: times for pair, times in rounds.items() if len(times) == count}


def noise_of(rounds: Sequence[float]) -> float:
    """The distance between the quartiles of repeated measurements, as a share of the median."""
    low, median, high = statistics.quantiles(rounds, n=4)
    return (high - low) / median


def search(
    space: Space,
    timer: Timer,
    settings: Settings = DEFAULTS,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """Finds the fastest pair, or returns the untuned one.

    Raises:
        RuntimeError, ValueError: the untuned pair does not run; the timer's own error.
    """
    s = _Search(space, timer, settings, clock)
    untuned = space.untuned
    # Brings clocks up, and is where an error of the call itself shows.
    first_look = min(timer(untuned, 3))
    partners = untuned
    if space.independent and not set(untuned) <= set(space.independent):
        # The untuned pair only works together: vary beside tactics as high as its own.
        partners = (_like(untuned[0], space), _like(untuned[1], space))
    start1, start2 = space.heights[partners[0]], space.heights[partners[1]]
    best1 = s.halve(s.screen({i: (i, partners[1]) for i in space.independent}, start1))
    first = best1[0] if best1 else partners[0]
    beside = partners[0] if partners == untuned else first
    best2 = s.halve(s.screen({i: (beside, i) for i in space.independent}, start2))
    second = best2[1] if best2 else partners[1]
    together = s.halve({p: min(t) for p in space.together if (t := s.time(p, 1))})

    finalists = [untuned, (first, second)]
    if partners == untuned:
        finalists += [(first, untuned[1]), (untuned[0], second)]
    if together is not None:
        finalists.append(together)
    count = settings.rounds if first_look < settings.long else settings.few_rounds
    rounds = s.confirm(dict.fromkeys(p for p in finalists if p not in s.failed), count)
    if untuned not in rounds:
        raise RuntimeError(s.failed.get(untuned, "the untuned tactics did not run"))
    own = rounds[untuned]
    own_time = statistics.median(own)
    noise = max(settings.least_noise, noise_of(own))
    pair = min(rounds, key=lambda p: statistics.median(rounds[p]))
    best_time = statistics.median(rounds[pair])
    faster = sum(a < b for a, b in zip(rounds[pair], own, strict=True))
    if best_time >= own_time * (1 - noise) or faster < settings.majority * count:
        pair, best_time = untuned, own_time
    return Found(pair, best_time, own_time, noise, len(s.tried), s.failed)


def _like(tactic: int, space: Space) -> int:
    """The independent tactic whose height is nearest."""
    return min(space.independent, key=lambda i: abs(space.heights[i] - space.heights[tactic]))
