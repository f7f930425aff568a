"""Selective checkpointing: a block keeps what takes longest to compute again, and recomputes the rest when it is needed.

While a block runs, its operations are recorded. At its end, those results are chosen that are worth their bytes; for the
others the backward pass repeats just the operations that lead to them, and no others. The block's code runs once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

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

    calls: tuple[Any, ...]
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

    def outline(self) -> tuple[Any, ...]:
        return self.function, self.nbytes, self.cost, *(one.index for one in self.sources)

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
            args, kwargs = tree_map_only(_Slot, _Slot.value, call.arguments)
            call.outputs = tree_leaves(call.function(*args, **kwargs))
            del args, kwargs
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
        self._add(torch.ops.aten.as_strided.default, arguments, [tensor], 0, 0.0, [whole[0].call], [])
        return self._slots[key]

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        outputs = tree_leaves(result)
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        given_storages = {_storage(one) for one in given}
        arguments = tree_map_only(Tensor, self._source, (args, kwargs))
        sources, outside = [], []
        for one in tree_leaves(arguments):
            if isinstance(one, _Slot):
                sources.append(one.call)
            elif isinstance(one, Tensor):
                outside.append((one, _version(one)))
        if func._schema.is_mutable:
            self._note_change(func, arguments, (args, kwargs), outputs, sources, outside)
            return
        repeated = None if torch.Tag.nondeterministic_seeded in func.tags else func
        new = [one for one in outputs if isinstance(one, Tensor) and _storage(one) not in given_storages]
        nbytes = sum({_storage(one): one.nbytes for one in new}.values())
        cost = _seconds(func, given, new) if new else 0.0
        for storage in {_storage(one) for one in new}:  # memory that another tensor may have had before
            self._forget(storage)
        self._add(repeated, arguments, outputs, nbytes, cost, sources, outside)

    def _note_change(
        self, func: Any, arguments: Any, given: Any, outputs: list[Any], sources: list[_Call], outside: list[Any]
    ) -> None:
        """A change in place is a call that gives a new tensor; what lies in the same memory is known no more."""
        changed = _changed(func, *given)
        for storage in {_storage(one) for one in changed}:
            for call in self._forget(storage):
                call.overwritten = True
        repeated = _out_of_place(func)
        if len(changed) != 1 or changed[0] is not given[0][0] or not _is_whole(changed[0]):
            return  # from now on it counts as from outside
        given = [one for one in tree_leaves(given) if isinstance(one, Tensor)]
        outside = [(one, version if one is not changed[0] else -1) for one, version in outside]
        call = self._add(
            repeated, arguments, outputs[:1], changed[0].nbytes, _seconds(func, given, changed), sources, outside
        )
        self._whole[_storage(changed[0])] = _Slot(call, 0), changed[0].dtype

    def _forget(self, storage: int) -> list[_Call]:
        """Takes it that nothing is known of what lies in a storage; returns what was known."""
        self._whole.pop(storage, None)
        within = self._within.pop(storage, [])
        for key, _ in within:
            self._slots.pop(key, None)
        return [call for _, call in within]

    def _add(
        self,
        function: Any,
        arguments: Any,
        outputs: list[Any],
        nbytes: int,
        cost: float,
        sources: list[_Call],
        outside: list[tuple[Tensor, int]],
    ) -> _Call:
        call = _Call(len(self._calls), function, arguments, outputs, nbytes, cost, sources, outside)
        self._calls.append(call)
        self._drop_unless_kept(call)
        for index, one in enumerate(outputs):
            if isinstance(one, Tensor):
                key = _key(one)
                self._slots[key] = _Slot(call, index)
                self._within[key[0]].append((key, call))
        return call

    def _drop_unless_kept(self, call: _Call) -> None:
        expected = self._expected
        if expected is None:
            return
        if len(expected.calls) <= call.index or expected.calls[call.index] != call.outline():
            self._expected = None
        elif call.index not in expected.kept and call.function is not None:
            call.outputs = None

    def finish(self, plans: dict[Any, _Plan], budget: float, small: float) -> _Plan:
        """Keeps what is chosen, and what it takes to compute the rest that the backward pass needs."""
        calls = self._calls
        for call in calls:
            same = all(_version(tensor) == version for tensor, version in call.outside)
            known = all(one.repeatable or not one.lost for one in call.sources)
            call.repeatable = call.function is not None and same and known
        needed = [call for call in calls if call.uses > 1]
        outlines = tuple(call.outline() for call in calls)
        fates = tuple((call.uses > 1, call.lost, call.repeatable) for call in calls)
        plan = plans.get((budget, outlines, fates))
        if plan is None:
            kept = _chosen(calls, needed, budget, small)
            plan = plans[budget, outlines, fates] = _Plan(outlines, frozenset(one.index for one in kept))
        kept = {calls[index] for index in plan.kept}
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
        cost, best, most = sum(call.cost for call in repeated), None, 0.0
        for call in repeated:
            if 0 < call.nbytes <= left + small and not call.lost:
                saved = cost - sum(one.cost for one in _repeated(needed, kept | {call}))
                if saved / call.nbytes > most:
                    best, most = call, saved / call.nbytes
        if best is None:
            return kept & _reached(needed, repeated)
        kept.add(best)
        left -= best.nbytes
        repeated = _repeated(needed, kept)


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


def _seconds(func: Any, given: Sequence[Tensor], new: Sequence[Tensor]) -> float:
    """About what a call takes on a GPU."""
    name = func._schema.name.partition("::")[2].removesuffix("_")
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


def _changed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that a call writes to."""
    written = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            one = args[index] if index < len(args) else kwargs.get(argument.name)
            written.extend(part for part in tree_leaves(one) if isinstance(part, Tensor))
    return written


def _out_of_place(func: Any) -> Any:
    """The same operation with a new result; None: there is none, or it would be another result each time."""
    namespace, _, name = func._schema.name.partition("::")
    if torch.Tag.nondeterministic_seeded in func.tags or not name.endswith("_"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    return getattr(packet, func._overloadname, None)


def _is_whole(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _key(tensor: Tensor) -> tuple[Any, ...]:
    return _storage(tensor), tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
