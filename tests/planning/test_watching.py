"""The watcher of memory, against sizes that are known."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from library.planning.watching import WORKING, Watcher


def test_a_peak_is_the_sum_of_what_lived_at_the_same_time():
    watcher = Watcher()
    with watcher, watcher.phase("one") as one:
        first = torch.ones(1000)  # 4,000 bytes, given as 4,096
        second = first + 1
        view = second[:10]
        del second
        third = view * 2  # 40 bytes, given as 512
        del first
    assert one.peaks["cpu"].size == 2 * 4096 + 512
    assert one.left["cpu"] == 4096 + 512  # the view keeps what it looks at
    del view, third
    assert watcher.in_use("cpu") == 0


def test_what_is_named_later_counts_under_its_name_at_the_peak_too():
    watcher = Watcher()
    with watcher, watcher.phase("one") as one:
        weight = torch.ones(256)
        work = weight + weight
        watcher.name("weights", [weight])
        del work
    assert one.peaks["cpu"].kinds == {"weights": 1024, WORKING: 1024}
    assert watcher.kinds("cpu")["weights"] == 1024


def test_gradients_that_backward_keeps_are_seen_and_freed():
    watcher = Watcher()
    with watcher, watcher.phase("one") as one:
        weight = torch.ones(1024, requires_grad=True)
        (weight * weight).sum().backward()
        left = watcher.in_use("cpu")
        weight.grad = None
        assert watcher.in_use("cpu") == left - 4096
    assert one.peaks["cpu"].size >= 3 * 4096


def peak_by_profiler(work):
    """The most bytes over what was there before, by torch's own record of allocations."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    sizes = [one.nbytes() for one in seen.profiler.kineto_results.events() if one.name() == "[memory]"]
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("keeps", [False, True], ids=["alone", "held by others, too"])
def test_gradients_that_autograd_adds_up_take_one_place_where_it_holds_them_alone(keeps):
    """What several branches give is added up in place, unless someone has the first one."""
    x, held = torch.ones(100_000, requires_grad=True), []

    def work():
        shared = x * 2
        branches = [shared * factor for factor in (2, 3, 4)]
        if keeps:
            for branch in branches:
                branch.grad_fn.register_hook(lambda gradients, _: held.append(gradients[0]))
        torch.stack([branch.sum() for branch in branches]).sum().backward()
        x.grad = None
        held.clear()

    work()
    with Watcher() as watcher, watcher.phase("one") as one:
        work()
    assert one.peaks["cpu"].size == pytest.approx(peak_by_profiler(work), abs=20 * 512)
