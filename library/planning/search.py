"""Changes of options that make a run fit, each tried by the simulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.options import validation
from library.planning.plan import Plan
from library.planning.simulation import Request, simulate

if TYPE_CHECKING:
    from library.options.base import Options
    from library.types import FamilyTraits

Values = Mapping[str, Any]  # by option

# What costs little or no time, in the order in which it is added.
_CHEAP: tuple[Values, ...] = (
    {"cache_latents": True},
    {"cache_text_encoder_outputs": True},
    {"gradient_checkpointing": True},
)
# What is added to that, one at a time; then with the blocks that still have to be swapped.
_FURTHER: tuple[Values, ...] = (
    {},
    {"fused_backward_pass": True, "optimizer_type": "AdaFactor", "max_grad_norm": 0.0,
     "optimizer_args": ["relative_step=False", "scale_parameter=False", "warmup_init=False"]},
    {"full_bf16": True, "fused_backward_pass": True, "optimizer_type": "AdaFactor", "max_grad_norm": 0.0,
     "optimizer_args": ["relative_step=False", "scale_parameter=False", "warmup_init=False"]},
    {"optimizer_type": "AdamW8bit"},
    {"quantize_base": "int8"},
    {"fp8_base": True},
    {"quantize_base": "nf4"},
)  # fmt: skip


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


def find_changes(request: Request, report: Callable[[str], None]) -> list[Change]:
    """Changes that make a run fit, the fastest per image first; those that add something to a fitting one are left out.

    Args: report: gets a line about each one that was tried.
    """
    found: list[Change] = []
    base: dict[str, Any] = {}
    for values in _CHEAP:
        if not usable(request.opts, {**base, **values}, request.family.traits):
            continue
        base |= values
        plan = _try(request, base, report)
        if plan is not None and plan.fits:
            found.append(Change(dict(base), plan))
            break
    for values in _FURTHER:
        change = {**base, **values}
        if any(one.values.items() <= change.items() for one in found):
            continue
        if values and not usable(request.opts, change, request.family.traits):
            continue
        plan = _try(request, change, report) if values else None
        if plan is not None and plan.fits:
            found.append(Change(change, plan))
            continue
        swapped = _fewest_swapped(request, change, report)
        if swapped is not None:
            found.append(swapped)
    found += _smaller_batch(request, base, report)
    return sorted(found, key=lambda one: -one.plan.images_per_second)


def suggestions(opts: Options, traits: FamilyTraits) -> Iterator[str]:
    """Flags against a lack of memory that these options could take, untried, those that cost least first."""
    for values in (*_CHEAP, *_FURTHER[1:], {"blocks_to_swap": 16}):
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


def _fewest_swapped(request: Request, values: Values, report: Callable[[str], None]) -> Change | None:
    """The smallest number of swapped blocks with which the run fits; None: no number does."""
    if not usable(request.opts, {**values, "blocks_to_swap": 1}, request.family.traits):
        return None
    low, high, best = request.opts.swap.count, _most_swapped(request), None
    while low < high:
        # The most first, as all is in vain where that does not fit.
        number = high if best is None else (low + high) // 2
        if number == low:
            break
        plan = _try(request, {**values, "blocks_to_swap": number}, report)
        if plan is not None and plan.fits:
            high, best = number, Change({**values, "blocks_to_swap": number}, plan)
        elif best is None:
            return None
        else:
            low = number
    return best


def _most_swapped(request: Request) -> int:
    """The largest --blocks_to_swap that the model takes."""
    from library.memory.block_swap import NUM_BUFFERS

    return max(int((request.blocks - NUM_BUFFERS) / request.family.traits.blocks_per_swap), 0)


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
