"""Where the time of a run goes, and what is said when its steps have become slow."""

from __future__ import annotations

import pytest

from library.training.pace import Slowdown, StepTime, Stopwatch

FAST = StepTime(0.01, 0.4, 0.0)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_waiting_computing_and_what_is_between_are_told_apart():
    clock = Clock()
    watch = Stopwatch(clock)

    def batches():
        for seconds in (2.0, 1.0, 3.0):
            clock.now += seconds
            yield seconds

    found = []
    taken = watch.batches(batches())
    next(taken)
    clock.now += 0.25  # forward and backward of the first of two batches
    next(taken)
    clock.now += 0.5
    found.append(watch.step())
    clock.now += 7  # a sample image
    next(taken)
    clock.now += 0.125
    found.append(watch.step())
    assert list(taken) == []
    clock.now += 5  # the end of the epoch
    next(watch.batches(batches()))
    found.append(watch.step())
    assert found == [StepTime(3.0, 0.75, 0.0), StepTime(3.0, 0.125, 7.0), StepTime(2.0, 0.0, 5.0)]
    assert found[0].whole == 3.75


def lines(steps, *, swapped=lambda: 0, free=lambda: None):
    judge = Slowdown(swapped, free)
    return [line for line in map(judge.observe, steps) if line is not None]


def test_an_even_run_is_silent():
    even = [StepTime(0.01, 0.4 + 0.15 * (n % 3), 0.0) for n in range(500)]
    assert lines([StepTime(9.0, 30.0, 0.0), *even]) == []
    assert lines([*([FAST] * 100), *([StepTime(0.0, 5.0, 0.0)] * 9), *([FAST] * 100)]) == [], "a short pause"
    quick = [StepTime(0.0, 0.002, 0.0)] * 100
    assert lines([*quick, *[StepTime(0.0, 0.03, 0.0)] * 50]) == [], "nobody waits for milliseconds"


@pytest.mark.parametrize(
    ("slow", "clues", "cause"),
    [
        (StepTime(0.9, 0.4, 0.0), {}, "0.90 s of it wait for images"),
        (StepTime(0.01, 1.2, 0.0), {}, "the device computes more slowly"),
        (StepTime(0.01, 1.2, 0.0), {"free": lambda: 0.01}, "the memory of the GPU is full"),
        (StepTime(0.01, 1.2, 0.0), {"free": lambda: 0.4}, "the device computes more slowly"),
    ],
)
def test_a_slow_run_is_named_once_with_its_cause(slow, clues, cause):
    (line,) = lines([*([FAST] * 60), *([slow] * 200)], **clues)
    assert cause in line
    assert line.startswith(f"steps take {slow.whole:.2f} s now, {slow.whole / 0.41:.1f} times as long")


def test_a_machine_that_swaps():
    read = iter([1000, 5_000_000])
    (line,) = lines([*([FAST] * 60), *([StepTime(0.01, 1.2, 0.0)] * 50)], swapped=lambda: next(read))
    assert "reads from its swap file" in line


def test_saving_that_takes_longer_than_training():
    steps = [StepTime(0.0, 0.4, 8.0 if n % 5 == 0 else 0.0) for n in range(200)]
    (line,) = lines(steps)
    assert line.startswith("saving, sample images and validation have taken ")
    assert lines([StepTime(0.0, 0.4, 8.0 if n == 100 else 0.0) for n in range(300)]) == []
