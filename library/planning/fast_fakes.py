"""The common operations on fake tensors, several times as fast as FakeTensorMode computes them.

A run does the same things to many tensors that are alike. What an operation gives is computed once for arguments of
each shape, layout, dtype and device, by FakeTensorMode, and then remembered. A view shares the memory of its argument:
a fake tensor is one of the meta device that says it is elsewhere, so that device's kernel is all that is needed.
"""

from __future__ import annotations

from enum import Enum, auto
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_iter

META = torch.device("meta")

_VIEWS = """view _unsafe_view _reshape_alias t transpose permute expand slice select split split_with_sizes unsqueeze
    squeeze unbind alias detach as_strided view_as_complex view_as_real unfold"""
_LIBRARIES = ("aten", "bitsandbytes")
# Tags of operations whose results depend on values, or which change a tensor's shape.
_KEPT_OUT = {"data_dependent_output", "dynamic_output_shape", "inplace_view"}

_Made = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]  # what a fresh tensor is like


class _Kind(Enum):
    """What an operation does with memory."""

    VIEW = auto()
    IN_PLACE = auto()  # it changes its first argument and gives it, or changes arguments and gives nothing
    FRESH = auto()  # it gives new tensors


@cache
def _kind(func: Any) -> _Kind | None:
    """None: FakeTensorMode is needed."""
    if func in _view_operations():
        return _Kind.VIEW
    if getattr(func, "namespace", "") not in _LIBRARIES or any(tag.name in _KEPT_OUT for tag in func.tags):
        return None
    schema = func._schema
    aliases = [argument.alias_info for argument in schema.arguments if argument.alias_info is not None]
    if not aliases:
        return _Kind.FRESH
    only_written = all(alias.is_write for alias in aliases)
    return _Kind.IN_PLACE if only_written and (schema.name.endswith("_") or not schema.returns) else None


@cache
def _view_operations() -> set[Any]:
    packets = [getattr(torch.ops.aten, name) for name in _VIEWS.split()]
    return {getattr(packet, overload) for packet in packets for overload in packet.overloads() if overload != "out"}


class FastFakes:
    """Computes operations on the fakes of one mode."""

    def __init__(self, mode: FakeTensorMode):
        self._mode = mode
        with mode:
            sample = torch.empty(0)
        self._attributes = dict(vars(sample))
        # By an operation and what its arguments are like: what it gives, or None where that cannot be repeated.
        self._known: dict[Any, list[Any] | None] = {}

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """The result of an operation. Raises: as the mode."""
        kind = _kind(func)
        if kind is None:
            return func(*args, **kwargs)
        try:
            if kind is _Kind.VIEW:
                return self._view(func, args, kwargs)
            key = func, torch.get_default_dtype(), _likeness(args), _likeness(tuple(kwargs.items()))
        except _NotPlainError:
            return func(*args, **kwargs)
        known = self._known.get(key)
        if known is None:
            result = func(*args, **kwargs)
            if key not in self._known:
                self._known[key] = _recipe(result, args, kind)
            return result
        if kind is _Kind.IN_PLACE:
            return args[0] if known else None
        made = [self._make(*one) if type(one) is tuple else one for one in known[1:]]
        return made[0] if known[0] is Tensor else known[0](made)

    def _view(self, func: Any, args: tuple, kwargs: dict) -> Any:
        device = _likeness(args[0])[-1]
        with _OnMeta(self._mode):
            result = func(*args, **kwargs)
        if type(result) is Tensor:
            return self._fake(result, device)
        return type(result)(self._fake(one, device) for one in result)

    def _make(self, shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> FakeTensor:
        guard = torch._C._DisableTorchDispatch()
        made = torch.empty_strided(shape, stride, dtype=dtype, device=META)
        del guard
        return self._fake(made, device)

    def _fake(self, made: Tensor, device: torch.device) -> FakeTensor:
        fake = Tensor._make_subclass(FakeTensor, made, False, dispatch_device=True, device_for_backend_keys=device)
        fake.__dict__.update(self._attributes)
        fake.fake_device = device
        return fake


class _NotPlainError(Exception):
    """An argument is none of the simple cases."""


def _likeness(value: Any) -> tuple:
    """All of an argument that shapes, dtypes and devices of results depend on. Raises: _NotPlainError."""
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None:
            raise _NotPlainError
        return value.shape, value.stride(), value.dtype, value.fake_device
    if kind is tuple or kind is list:
        return kind, *map(_likeness, value)
    if isinstance(value, Tensor):
        raise _NotPlainError
    return kind, value  # 1, 1.0 and True are equal, but not alike


def _recipe(result: Any, args: tuple, kind: _Kind) -> list[Any] | None:
    """How to make a result again: its own type, then what each of its tensors is like; None: it cannot be."""
    if kind is _Kind.IN_PLACE:
        return [True] if result is args[0] else [] if result is None else None
    parts = list(result) if isinstance(result, (list, tuple)) else [result]
    given = {tensor.untyped_storage()._cdata for tensor in tree_iter(args) if isinstance(tensor, Tensor)}
    recipe: list[Any] = [Tensor if isinstance(result, Tensor) else type(result)]
    for part in parts:
        if part is None or type(part) is int:
            recipe.append(part)
            continue
        if type(part) is not FakeTensor or part.constant is not None:
            return None
        storage = part.untyped_storage()
        if storage._cdata in given or part.storage_offset():
            return None
        given.add(storage._cdata)
        likeness = _likeness(part)
        if torch.empty_strided(*likeness[:2], dtype=part.dtype).untyped_storage().nbytes() != storage.nbytes():
            return None
        recipe.append(likeness)
    return recipe


class _OnMeta:
    """torch's `in_kernel_invocation_manager`, without its checks."""

    __slots__ = ("_dispatch", "_keys", "_mode")

    def __init__(self, mode: FakeTensorMode):
        self._mode = mode

    def __enter__(self) -> None:
        self._dispatch = torch._C._DisableTorchDispatch()
        self._mode.in_kernel_invocation = True
        self._keys = torch._C._PreserveDispatchKeyGuard()
        self._keys.__enter__()
        torch._C._set_meta_in_tls_dispatch_include(True)

    def __exit__(self, *_: Any) -> None:
        self._keys.__exit__(None, None, None)
        self._mode.in_kernel_invocation = False
        del self._dispatch
