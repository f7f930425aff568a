"""Changes of options that make a run fit, each tried by the simulation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.options import validation
from library.planning.plan import Plan
from library.planning.simulation import GRADIENTS, STATE, Request, simulate

if TYPE_CHECKING:
    from library.options.base import Options
    from library.types import FamilyTraits

Values = Mapping[str, Any]  # by option

_CACHES: Values = {"cache_latents": True, "cache_text_encoder_outputs": True}  # what costs no time
_CHECKPOINTING: Values = {"gradient_checkpointing": True}
_ADAFACTOR = {
    "optimizer_type": "AdaFactor",
    "optimizer_args": ["relative_step=False", "scale_parameter=False", "warmup_init=False"],
}
# Against what training adds to the weights; each is tried by itself.
_OF_TRAINING: tuple[Values, ...] = (
    {"optimizer_type": "AdamW8bit"},
    {**_ADAFACTOR, "fused_backward_pass": True, "max_grad_norm": 0.0},
    {**_ADAFACTOR, "fused_backward_pass": True, "max_grad_norm": 0.0, "full_bf16": True},
)
_MUCH = 0.1  # share of the memory from which on those are tried
# Against the size of frozen weights, likewise.
AGAINST_WEIGHTS: tuple[Values, ...] = (
    {"quantize_base": "int8"},
    {"fp8_base": True},
    {"quantize_base": "nf4"},
    {**_CACHES, "evict_modulation": 32},
)
_TRIES = 3  # numbers of swapped blocks


@dataclass(frozen=True)
class Change:
    """Options that make a run fit, and its plan."""

    values: dict[str, Any]
    plan: Plan

    @property
    def flags(self) -> str:
        return " ".join(as_flags(self.values))


def as_flags(values: Values) -> list[str]:
    """Options as a command line has them."""
    words = []
    for name, value in values.items():
        if value is True:
            words.append(f"--{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            words.append(f"--{name}={value:g}" if isinstance(value, float) else f"--{name}={value}")
    return words


def find_changes(plan: Plan, report: Callable[[str], None]) -> list[Change]:
    """Changes that make a run fit which does not, the fastest per image first.

    Args: report: gets a line about each one that was tried.
    """
    request, traits = plan.request, plan.request.family.traits
    base: dict[str, Any] = {}
    for values in (_CACHES, _CHECKPOINTING):
        added = {name: value for name, value in values.items() if usable(request.opts, {**base, name: value}, traits)}
        if not added:
            continue
        base |= added
        plan = _try(request, base, report) or plan
        if plan.fits:
            break
    found = [Change(dict(base), plan)] if plan.fits else [*_swapped(request, base, plan, report)]
    for values in (*(_OF_TRAINING if _trains_much(plan) else ()), *AGAINST_WEIGHTS):
        change = {**base, **values}
        if not usable(request.opts, change, traits):
            continue
        other = _try(request, change, report)
        if other is not None and other.fits:
            found.append(Change(change, other))
        elif other is not None:
            found += _swapped(request, change, other, report)
    found += _smaller_batch(request, base, report)
    return sorted(found, key=lambda one: -one.plan.images_per_second)


def _trains_much(plan: Plan) -> bool:
    """Whether gradients and the optimizer's state are a large part of the memory."""
    _, phase = plan.simulated.peak(plan.request.device.kind)
    if phase is None:
        return False
    peak = phase.peaks[plan.request.device.kind]
    return peak.kinds[GRADIENTS] + peak.kinds[STATE] > _MUCH * peak.size


def suggestions(opts: Options, traits: FamilyTraits) -> Iterator[str]:
    """Flags against a lack of memory that these options could take, untried, those that cost least first."""
    single = ({name: value} for name, value in (*_CHECKPOINTING.items(), *_CACHES.items()))
    for values in (*single, *AGAINST_WEIGHTS[:1], *_OF_TRAINING[:1], *_OF_TRAINING[2:], {"blocks_to_swap": 16}):
        if usable(opts, values, traits):
            yield " ".join(as_flags(values))


def usable(opts: Options, values: Values, traits: FamilyTraits) -> bool:
    """Whether the script has these options, they change something, and go with the others."""
    now = opts.flat()
    if not values.keys() <= now.keys() or all(now[name] == value for name, value in values.items()):
        return False
    if "quantize_base" in values and (now["fp8_base"] or now["quantize_base"]):
        return False
    changed = opts.replaced(**values)
    try:
        return not validation.problems(changed, traits)
    except UserError:
        return False


def _try(request: Request, values: Values, report: Callable[[str], None]) -> Plan | None:
    """The plan with other options; None: the run would refuse them."""
    changed = replace(request, opts=request.opts.replaced(**values))
    try:
        plan = Plan(changed, simulate(changed, whole=False))
    except UserError as error:
        report(f"{' '.join(as_flags(values))}: {error.problems[0]}")
        return None
    report(f"{' '.join(as_flags(values))}: {plan.device_bytes / 2**30:.2f} GiB, {'fits' if plan.fits else 'too much'}")
    return plan


def _swapped(request: Request, values: Values, plan: Plan, report: Callable[[str], None]) -> Iterator[Change]:
    """The fewest swapped blocks with which the run fits, if any number does.

    Args: plan: of the run with `values`, which does not fit. Each block saves about as much.
    """
    fewest, most = request.opts.swap.count, _most_swapped(plan)
    if most <= fewest or not usable(request.opts, {**values, "blocks_to_swap": most}, request.family.traits):
        return
    largest = _try(request, {**values, "blocks_to_swap": most}, report)
    if largest is None or not largest.fits:
        return
    saved = max(plan.device_bytes - largest.device_bytes, 1) / (most - fewest)
    number = fewest + math.ceil((plan.device_bytes - request.device.memory) / saved)
    for tried in range(number, min(number + _TRIES, most)):
        other = _try(request, {**values, "blocks_to_swap": tried}, report)
        if other is not None and other.fits:
            yield Change({**values, "blocks_to_swap": tried}, other)
            return
    yield Change({**values, "blocks_to_swap": most}, largest)


def _most_swapped(plan: Plan) -> int:
    """The largest --blocks_to_swap that the model takes."""
    from library.memory.block_swap import NUM_BUFFERS

    return max(int((plan.simulated.blocks - NUM_BUFFERS) / plan.request.family.traits.blocks_per_swap), 0)


def _smaller_batch(request: Request, base: Values, report: Callable[[str], None]) -> list[Change]:
    size = request.opts.data.train_batch_size
    while size > 1:
        size //= 2
        values = {**base, "train_batch_size": size}
        smaller = request.with_batch_size(size)
        plan = _try(smaller, values, report)
        if plan is not None and plan.fits:
            return [Change(values, plan)]
    return []
