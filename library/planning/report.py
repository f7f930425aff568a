"""A plan in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from library.options.devices import GIB
from library.screen import counted

if TYPE_CHECKING:
    from library.planning.plan import Plan
    from library.planning.search import Change

SMALLEST = 0.005  # of a peak, that is shown on a line of its own


def lines_of(plan: Plan) -> list[str]:
    """The report of a plan."""
    device, run_plan = plan.request.device, plan.request.run_plan
    lines = [f"plan for {device.name} ({gib(device.memory)}); nothing is computed, the run's own code is simulated", ""]
    lines += _phases(plan)
    lines += ["", *_peak(plan), ""]
    where = "GPU memory" if plan.on_gpu else "CPU memory"
    left = device.memory - plan.device_bytes
    verdict = f"fits, {gib(left)} are left" if plan.fits else f"does not fit, {gib(-left)} are missing"
    lines.append(f"{where}: {gib(plan.device_bytes)} of {gib(device.memory)}: {verdict}")
    if plan.on_gpu:
        lines.append(f"CPU memory: about {gib(plan.cpu_bytes)}, with {gib(_process(plan))} of Python and its libraries")
    disk = ", ".join(f"{name} {gib(size)}" for name, size in plan.disk.items())
    lines.append(f"disk over the run: {gib(sum(plan.disk.values()))} ({disk})")
    lines.append(
        f"length: {counted(run_plan.total_steps, 'step')}, {counted(run_plan.epochs, 'epoch')}, of "
        f"{counted(plan.simulated.images, 'image')} a step; "
        f"{plan.simulated.trained:,} numbers are trained"
    )
    caching = f", of which {clock(plan.caching_seconds)} for caching" if plan.caching_seconds >= 1 else ""
    lines.append(f"time: about {clock(plan.seconds)}{caching}; {plan.step_seconds:.3g} s a step")
    lines.append(f"  estimated from {plan.basis()}")
    return lines


def changes_in_words(changes: Sequence[Change]) -> list[str]:
    """What to add so that a run fits, the fastest first."""
    if not changes:
        return ["no change that was tried makes it fit; smaller images or another model would have to"]
    lines = ["these changes make it fit, by the same simulation, the fastest first:"]
    for change in changes:
        plan = change.plan
        lines.append(
            f"  {change.flags}  ({gib(plan.device_bytes)}, {plan.step_seconds:.3g} s a step, "
            f"{plan.images_per_second:.3g} images a second)"
        )
    return lines


def _process(plan: Plan) -> int:
    from library.planning.plan import PROCESS

    return PROCESS


def _phases(plan: Plan) -> list[str]:
    head = f"{'phase':24}" + (f"{'GPU memory at most':>20}" if plan.on_gpu else "") + f"{'CPU memory at most':>20}"
    lines = [head]
    for phase in plan.simulated.phases:
        sizes = [phase.peaks[kind].size if kind in phase.peaks else 0 for kind in _kinds(plan)]
        lines.append(f"{phase.name:24}" + "".join(f"{gib(size):>20}" for size in sizes))
    return lines


def _kinds(plan: Plan) -> list[str]:
    return [plan.request.device.kind, "cpu"] if plan.on_gpu else ["cpu"]


def _peak(plan: Plan) -> list[str]:
    kind = plan.request.device.kind
    _, phase = plan.simulated.peak(kind)
    if phase is None:
        return []
    peak = phase.peaks[kind]
    lines = [f"the most is in use in: {phase.name}, at the operation {peak.operation or 'before its first one'}"]
    shown = [(name, size) for name, size in peak.kinds.most_common() if size >= SMALLEST * peak.size]
    rest = peak.size - sum(size for _, size in shown)
    lines += [f"  {name:40}{gib(size):>12}" for name, size in shown]
    if rest:
        lines.append(f"  {'smaller ones':40}{gib(rest):>12}")
    if plan.request.device.overhead:
        lines.append(f"  {'CUDA and its libraries, assumed':40}{gib(plan.request.device.overhead):>12}")
    return lines


def gib(size: float) -> str:
    """Bytes in GiB, to two places; small ones in MiB."""
    return f"{size / GIB:.2f} GiB" if abs(size) >= GIB // 10 else f"{size / 2**20:.1f} MiB"


def clock(seconds: float) -> str:
    """ "1 h 05 min", "3 min", "12 s"."""
    if not math.isfinite(seconds):
        return "an unknown time"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
