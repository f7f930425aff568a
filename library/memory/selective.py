"""Selective checkpointing: a block keeps what takes longest to compute again, and repeats only what the rest needs.

While a block runs, its operations are recorded. At its end, those results are chosen that are worth their bytes. For
the others the backward pass repeats just the operations that lead to them. The block's code runs once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

# What an operation takes on a present GPU; only their proportions matter.
_LAUNCH = 4e-6  # seconds
_FLOPS = 4e14  # per second, half precision
_BANDWIDTH = 2e12  # bytes per second
_SMALL = 1 / 32  # of the block's input: results that are kept at once, such as what has an adapter's rank as its width

_PRODUCTS = {"mm": 1, "bmm": 1, "addmm": 2, "baddbmm": 2, "_scaled_mm": 1}  # where the second factor stands


def selective_checkpoint(ratio: float) -> Callable[..., Any]:
    """A function for `enable_gradient_checkpointing`: ``(block, *inputs)`` to the block's output.

    Args: ratio: what a block may keep, in bytes, over what its input tensors have.
    """
    plans: dict[Any, _Plan] = {}
    latest: dict[Any, _Plan] = {}  # by what of a block is known before it runs

    def run(block: nn.Module, *inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return block(*inputs)
        tensors = [one for one in inputs if isinstance(one, Tensor)]
        given = sum(one.nbytes for one in tensors if one.is_floating_point())
        kind = type(block), *((one.shape, one.dtype, one.requires_grad) for one in tensors)
        recorder = _Recorder(latest.get(kind))
        with saved_tensors_hooks(recorder.pack, _Saved.unpack), recorder:
            output = block(*inputs)
        latest[kind] = recorder.finish(plans, ratio * given, _SMALL * given)
        return output

    return run


@dataclass(frozen=True)
class _Plan:
    """What a block's calls were, and the numbers of those whose results are kept."""

    budget: float
    calls: tuple[Any, ...]
    fates: tuple[Any, ...]  # whether each was needed, and whether it could be repeated
    kept: frozenset[int]


@dataclass(eq=False, slots=True)
class _Call:
    """An operation, and later what it gave.

    A tensor among the arguments comes from outside the block; a `_Slot` stands for one that another call gave.
    """

    index: int
    function: Any  # None: cannot be repeated, or would give something else
    arguments: Any
    outputs: list[Any] | None
    nbytes: int  # of new memory; a view has none
    cost: float  # seconds
    sources: list[_Call]
    outside: list[tuple[Tensor, int]]  # with their versions
    overwritten: bool = False  # the outputs are no longer what the call gave
    repeatable: bool = False
    uses: int = 1  # by saved tensors, by calls that are not yet repeated, and by the recorder

    def repeat(self) -> None:
        """Computes the outputs, and first those of the calls that it takes."""
        lacking, left = set(), [self]
        while left:
            call = left.pop()
            if call.outputs is None and call not in lacking:
                lacking.add(call)
                left.extend(call.sources)
        for call in sorted(lacking, key=lambda one: one.index):
            if any(_version(tensor) != version for tensor, version in call.outside):
                raise RuntimeError("a tensor that a checkpointed block was given has been changed in place since")
            args, kwargs = call.arguments
            result = call.function(*_bound(args), **{name: _bound(one) for name, one in kwargs.items()})
            call.outputs = list(result) if isinstance(result, tuple | list) else [result]
            del args, kwargs, result
            call._let_sources_go()

    @property
    def lost(self) -> bool:
        """Whether what it gave is no longer there to be kept."""
        return self.overwritten or self.outputs is None

    def release(self) -> None:
        """Counts a use less; after the last one nothing is held."""
        self.uses -= 1
        if self.uses == 0:
            self.outputs = None
            self._let_sources_go()

    def _let_sources_go(self) -> None:
        self.arguments, sources, self.sources, self.outside = None, self.sources, [], []
        for one in sources:
            one.release()


@dataclass(frozen=True, eq=False, slots=True)
class _Slot:
    call: _Call
    index: int

    def value(self) -> Tensor:
        return self.call.outputs[self.index]


class _Saved:
    """What autograd holds in the place of a tensor; it goes when the backward pass is past it."""

    __slots__ = ("slot",)

    def __init__(self, slot: _Slot):
        self.slot = slot
        slot.call.uses += 1

    def __del__(self) -> None:
        self.slot.call.release()

    @staticmethod
    def unpack(kept: Tensor | _Saved) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if kept.slot.call.outputs is None:
            # What is repeated lies below autocast, which has cast its inputs already.
            with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
                kept.slot.call.repeat()
        return kept.slot.value()


class _Recorder(TorchDispatchMode):
    """The calls of one forward pass of a block.

    What they give is held until `finish`; but while all goes as in `expected`, only what was kept then.
    """

    def __init__(self, expected: _Plan | None = None) -> None:
        super().__init__()
        self._expected = expected
        self._calls: list[_Call] = []
        self._outlines: list[tuple[Any, ...]] = []
        self._slots: dict[Any, _Slot] = {}  # by where a tensor lies and how
        self._within: dict[int, list[tuple[Any, _Call]]] = defaultdict(list)  # by storage: what lies in it
        self._whole: dict[int, tuple[_Slot, torch.dtype]] = {}  # by storage: what has overwritten all of it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._note(func, args, kwargs, result)
        return result

    def pack(self, tensor: Tensor) -> Tensor | _Saved:
        source = self._source(tensor)
        return _Saved(source) if isinstance(source, _Slot) else tensor

    def _source(self, tensor: Tensor) -> Tensor | _Slot:
        """The call that gave a tensor; the tensor itself if it is from outside the block, or not known."""
        key = _key(tensor)
        if key in self._slots:
            return self._slots[key]
        whole = self._whole.get(key[0])
        if whole is None or whole[1] != tensor.dtype:
            return tensor
        arguments = (whole[0], tensor.shape, tensor.stride(), tensor.storage_offset()), {}
        seen = _Arguments([], [whole[0].call], [])
        self._add(torch.ops.aten.as_strided.default, arguments, [tensor], 0, 0.0, seen)
        return self._slots[key]

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        operator = _operator(func)
        outputs = list(result) if isinstance(result, tuple | list) else [result]
        seen = _Arguments([], [], [])
        arguments = self._traced(args, seen), {name: self._traced(one, seen) for name, one in kwargs.items()}
        if operator.writes:
            self._note_change(operator, arguments, (args, kwargs), outputs, seen)
            return
        given_storages = {_storage(one) for one in seen.tensors}
        new = {_storage(one): one for one in outputs if isinstance(one, Tensor)}
        new = {storage: one for storage, one in new.items() if storage not in given_storages}
        for storage in new:  # memory that another tensor may have had before
            self._forget(storage)
        nbytes = sum(one.nbytes for one in new.values())
        cost = _seconds(operator.name, seen.tensors, list(new.values())) if new else 0.0
        self._add(operator.repeated, arguments, outputs, nbytes, cost, seen)

    def _traced(self, one: Any, seen: _Arguments) -> Any:
        """An argument with slots in the place of tensors; `seen` gets what it refers to."""
        if isinstance(one, Tensor):
            seen.tensors.append(one)
            source = self._source(one)
            if isinstance(source, _Slot):
                seen.sources.append(source.call)
            else:
                seen.outside.append((one, _version(one)))
            return source
        if isinstance(one, tuple | list):
            return [self._traced(part, seen) for part in one]
        return one

    def _note_change(
        self, operator: _Operator, arguments: Any, given: Any, outputs: list[Any], seen: _Arguments
    ) -> None:
        """A change in place is a call that gives a new tensor; what lies in the same memory is known no more."""
        changed = operator.changed(*given)
        for storage in {_storage(one) for one in changed}:
            for call in self._forget(storage):
                call.overwritten = True
        if len(changed) != 1 or changed[0] is not given[0][0] or not _is_whole(changed[0]):
            return  # from now on it counts as from outside
        seen.outside = [(one, version if one is not changed[0] else -1) for one, version in seen.outside]
        cost = _seconds(operator.name, seen.tensors, changed)
        call = self._add(operator.repeated, arguments, outputs[:1], changed[0].nbytes, cost, seen)
        self._whole[_storage(changed[0])] = _Slot(call, 0), changed[0].dtype

    def _forget(self, storage: int) -> list[_Call]:
        """Takes it that nothing is known of what lies in a storage; returns what was known."""
        self._whole.pop(storage, None)
        within = self._within.pop(storage, [])
        for key, _ in within:
            self._slots.pop(key, None)
        return [call for _, call in within]

    def _add(
        self, function: Any, arguments: Any, outputs: list[Any], nbytes: int, cost: float, seen: _Arguments
    ) -> _Call:
        index = len(self._calls)
        call = _Call(index, function, arguments, outputs, nbytes, cost, seen.sources, seen.outside)
        self._calls.append(call)
        outline = function, nbytes, cost, *(one.index for one in seen.sources)
        self._outlines.append(outline)
        for number, one in enumerate(outputs):
            if isinstance(one, Tensor):
                key = _key(one)
                self._slots[key] = _Slot(call, number)
                self._within[key[0]].append((key, call))
        expected = self._expected
        if expected is not None:
            if len(expected.calls) <= index or expected.calls[index] != outline:
                self._expected = None
            elif index not in expected.kept and function is not None:
                call.outputs = None
        return call

    def finish(self, plans: dict[Any, _Plan], budget: float, small: float) -> _Plan:
        """Keeps what is chosen, and what it takes to compute the rest that the backward pass needs."""
        calls = self._calls
        for call in calls:
            same = all(_version(tensor) == version for tensor, version in call.outside)
            known = all(one.repeatable or not one.lost for one in call.sources)
            call.repeatable = call.function is not None and same and known
        needed = [call for call in calls if call.uses > 1]
        outlines, fates = tuple(self._outlines), tuple((call.uses > 1, call.repeatable) for call in calls)
        plan = self._expected
        if plan is None or (plan.budget, plan.fates, len(plan.calls)) != (budget, fates, len(calls)):
            plan = plans.get((budget, outlines, fates))
        if plan is None:
            kept = frozenset(one.index for one in _chosen(calls, needed, budget, small))
            plan = plans[budget, outlines, fates] = _Plan(budget, outlines, fates, kept)
        # Where another plan than this one was expected, some of it is no longer there.
        kept = {calls[index] for index in plan.kept if not calls[index].lost}
        repeated = _repeated(needed, kept)
        for call in calls:
            if call in repeated:
                for one in call.sources:
                    one.uses += 1
            else:
                call.arguments, call.sources, call.outside = None, [], []
            if call not in kept:
                call.outputs = None
        for call in calls:
            call.release()
        self._calls, self._slots, self._within, self._whole = [], {}, {}, {}
        return plan


def _chosen(calls: Sequence[_Call], needed: Iterable[_Call], budget: float, small: float) -> set[_Call]:
    """The calls whose results are kept: small ones, and by turns the one that saves most time for each byte.

    Small ones do not count towards the budget, which the last one may exceed by as much as a small one has.
    """
    kept = {call for call in calls if 0 < call.nbytes <= small and not call.lost}
    repeated = _repeated(needed, kept)
    left = budget - sum(call.nbytes for call in kept & _reached(needed, repeated) if call.nbytes > small)
    while True:
        cost, best, most = _cost(repeated), None, 0.0
        for call in sorted(repeated, key=lambda one: one.index):  # the first of several that save as much
            if 0 < call.nbytes <= left + small and not call.lost:
                saved = cost - _cost(_repeated(needed, kept | {call}))
                if saved / call.nbytes > most:
                    best, most = call, saved / call.nbytes
        if best is None:
            return kept & _reached(needed, repeated)
        kept.add(best)
        left -= best.nbytes
        repeated = _repeated(needed, kept)


def _cost(calls: Iterable[_Call]) -> float:
    """Seconds, the same to the bit in any order of calls."""
    return math.fsum(call.cost for call in calls)


def _repeated(needed: Iterable[_Call], kept: set[_Call]) -> set[_Call]:
    """The calls that must be repeated where `kept` are kept. What cannot be repeated is added to `kept`."""
    found: set[_Call] = set()
    left = list(needed)
    while left:
        call = left.pop()
        if call in kept or call in found:
            continue
        if call.repeatable:
            found.add(call)
            left.extend(call.sources)
        elif call.lost:
            raise RuntimeError("a block needs for its backward pass what it has changed in place since")
        else:
            kept.add(call)
    return found


def _reached(needed: Iterable[_Call], repeated: set[_Call]) -> set[_Call]:
    return {*needed, *(one for call in repeated for one in call.sources)}


def _seconds(name: str, given: Sequence[Tensor], new: Sequence[Tensor]) -> float:
    """About what a call takes on a GPU."""
    if name.startswith(("empty", "new_empty")):
        return 0.0
    flops = 0.0
    if name in _PRODUCTS:
        flops = 2 * new[0].numel() * given[_PRODUCTS[name]].shape[-2] if len(given) > _PRODUCTS[name] else 0
    elif "convolution" in name:
        flops = 2 * new[0].numel() * given[1].numel() / given[1].shape[0]
    elif "attention" in name and len(given) > 1:
        flops = 4 * given[0].numel() * max(given[1].shape[1:-1])
    moved = sum(one.nbytes for one in (*given, *new))
    return _LAUNCH + flops / _FLOPS + moved / _BANDWIDTH


@dataclass
class _Arguments:
    """What a call was given."""

    tensors: list[Tensor]
    sources: list[_Call]
    outside: list[tuple[Tensor, int]]


@dataclass(frozen=True)
class _Operator:
    """What is to be known of an operator."""

    name: str
    writes: tuple[tuple[int, str], ...]  # the places and names of the arguments that it changes
    repeated: Any  # what gives its result again, in new memory; None: nothing does

    def changed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors that a call writes to."""
        found = (args[index] if index < len(args) else kwargs.get(name) for index, name in self.writes)
        parts = (part for one in found for part in (one if isinstance(one, tuple | list) else [one]))
        return [part for part in parts if isinstance(part, Tensor)]


@cache
def _operator(func: Any) -> _Operator:
    schema = func._schema
    namespace, _, name = schema.name.partition("::")
    places = enumerate(schema.arguments)
    writes = tuple((at, one.name) for at, one in places if one.alias_info is not None and one.alias_info.is_write)
    repeated = None if torch.Tag.nondeterministic_seeded in func.tags else func
    if writes and repeated is not None:
        packet = getattr(getattr(torch.ops, namespace), name[:-1], None) if name.endswith("_") else None
        repeated = getattr(packet, func._overloadname, None)
    return _Operator(name.removesuffix("_"), writes, repeated)


def _bound(one: Any) -> Any:
    """An argument with tensors in the place of slots."""
    if isinstance(one, _Slot):
        return one.value()
    if isinstance(one, tuple | list):
        return [_bound(part) for part in one]
    return one


def _is_whole(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _key(tensor: Tensor) -> tuple[Any, ...]:
    return _storage(tensor), tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
