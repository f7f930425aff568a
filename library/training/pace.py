"""Where the time of a run goes, and when its steps have become slow."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

T = TypeVar("T")

_FIRST = 5  # steps that are not judged: kernels are chosen, caches filled
_BASE = 30  # steps after them with which later ones are compared
_RECENT = 20  # steps that are judged together
_SLOWER = 2.0  # times the first ones' median
_LEAST = 0.05  # seconds by which a step must have become slower
_LONG = 60.0  # seconds of saving and sampling before they are worth a word


class StepTime(NamedTuple):
    """Seconds."""

    waited: float  # for batches
    computed: float
    between: float  # before it: saving, sample images, validation

    @property
    def whole(self) -> float:
        return self.waited + self.computed


class Stopwatch:
    """Divides the time of the loop. A device that works on its own shows in whatever waits for it next."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._mark: float | None = None  # the end of the last step
        self._began: float | None = None  # of the present step
        self._waited = self._between = 0.0

    def batches(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; waiting for them is measured."""
        while True:
            asked = self._clock()
            if self._began is None:
                self._began = asked
                self._between = 0.0 if self._mark is None else asked - self._mark
            try:
                batch = next(batches)
            except StopIteration:
                self._began = None
                return
            self._waited += self._clock() - asked
            yield batch

    def step(self) -> StepTime:
        """Ends the present step."""
        now = self._clock()
        began = now if self._began is None else self._began
        found = StepTime(self._waited, max(0.0, now - began - self._waited), self._between)
        self._mark, self._began, self._waited = now, None, 0.0
        return found


class Slowdown:
    """Compares steps with the run's own first ones, and says once what makes them slow.

    Args:
        swapped: bytes that were read from the swap file since the machine was started.
        free: the share of the device's memory that is free; None: not known.
    """

    def __init__(self, swapped: Callable[[], int], free: Callable[[], float | None]):
        self._swapped, self._free = swapped, free
        self._seen = 0
        self._base: list[StepTime] = []
        self._recent: deque[StepTime] = deque(maxlen=_RECENT)
        self._swapped_before = 0
        self._between = self._stepping = 0.0
        self._said: set[str] = set()

    def observe(self, step: StepTime) -> str | None:
        """A line about steps that have become slow, or None; each kind of line comes once."""
        self._seen += 1
        if self._seen <= _FIRST:
            return None
        self._between, self._stepping = self._between + step.between, self._stepping + step.whole
        if len(self._base) < _BASE:
            self._base.append(step)
            if len(self._base) == _BASE:
                self._swapped_before = self._swapped()
            return None
        self._recent.append(step)
        if "slow" not in self._said and len(self._recent) == _RECENT:
            before, now = _median(self._base), _median(self._recent)
            if now.whole > max(_SLOWER * before.whole, before.whole + _LEAST):
                self._said.add("slow")
                return (
                    f"steps take {now.whole:.2f} s now, {now.whole / before.whole:.1f} times as long as at first: "
                    f"{self._cause(before, now)}"
                )
        if "between" not in self._said and self._between > max(_LONG, self._stepping):
            self._said.add("between")
            return (
                f"saving, sample images and validation have taken {self._between:.0f} s, and the steps themselves "
                f"{self._stepping:.0f} s; less of the former would shorten the run"
            )
        return None

    def _cause(self, before: StepTime, now: StepTime) -> str:
        if now.waited - before.waited > now.computed - before.computed:
            return (
                f"{now.waited:.2f} s of it wait for images; more --max_data_loader_n_workers, --cache_latents or a "
                "faster disk would help"
            )
        if self._swapped() > self._swapped_before:
            return "the machine reads from its swap file, as memory is short; close other programs"
        free = self._free()
        if free is not None and free < 0.03:
            return (
                "the memory of the GPU is full, and some drivers then move parts of it to CPU memory; a smaller batch "
                "or --gradient_checkpointing needs less"
            )
        return "the device computes more slowly; another program may use it, or it is hot"


def _median(steps: list[StepTime] | deque[StepTime]) -> StepTime:
    return StepTime(*(statistics.median_low(values) for values in zip(*steps, strict=True)))
