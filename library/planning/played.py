"""A machine that is played: tensors have a device, a dtype and a shape, and no values.

Inside `PlayedMachine` the code of a run works as it is. Operations are torch's own on fake tensors (FakeTensorMode).
What the code asks of the machine beside operations is played here: streams, events and pinned memory of a GPU, random
generators on it, and values that are read off tensors, which are 0, or True.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.nn import functional

from library.memory import block_swap
from library.planning.fast_fakes import META, FastFakes
from library.planning.gpu import GPU, clear_autocast_cache
from library.planning.watching import Watcher

aten = torch.ops.aten
_NUMPY = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.int16: np.int16,
    torch.int8: np.int8,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
}


class PlayedWatcher(Watcher):
    """A watcher of fake tensors, which answers what they cannot."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.prim.device.default:  # autograd asks it of nearly every tensor
            fake = args[0]
            return META if fake.fake_mode.in_kernel_invocation else fake.fake_device
        return super().__torch_dispatch__(func, types, args, kwargs)

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        for name in ("generator", "pin_memory"):
            if kwargs.get(name) is not None:
                kwargs = {**kwargs, name: None}
        try:
            return _fast_fakes().run(func, args, kwargs)
        except DataDependentOutputException:
            return _value_of(func, args)
        except DynamicOutputShapeException:
            return _one_found(func, args)


def _value_of(func: Any, args: tuple) -> Any:
    if func is aten._local_scalar_dense.default:
        dtype = args[0].dtype
        return True if dtype is torch.bool else 0.0 if dtype.is_floating_point else 0
    if func is aten.equal.default:
        return True
    raise NotImplementedError(f"{func} reads values, and there are none while a run is planned")


def _one_found(func: Any, args: tuple) -> Any:
    if func is aten.nonzero.default:
        return torch.zeros((1, args[0].dim()), dtype=torch.int64, device=args[0].device)
    raise NotImplementedError(f"{func}: the size of its result depends on values, and there are none while planning")


@contextmanager
def played_machine(watcher: PlayedWatcher, *, gpu: bool) -> Iterator[None]:
    """Within the block tensors are fakes, seen by the watcher. Libraries must not keep any of them.

    Tensors from outside, such as those made by NumPy, are taken as fakes of the same shape.

    Args: gpu: whether there is the GPU of `register_gpu`.
    """
    mode, _ = _fake_mode(), _fast_fakes()  # before anything is replaced
    with ExitStack() as stack:
        for owner, name, value in _REPLACED:
            stack.enter_context(_replaced(owner, name, value))
        making = _making_fakes(torch.device(GPU, 0) if gpu else torch.device("cpu"))
        stack.enter_context(_replaced(torch.Tensor, "_make_subclass", staticmethod(making)))
        # Backward passes in this thread: there is no device that another one would feed, and both would share Python.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(mode)
        stack.enter_context(watcher)
        yield


@cache
def _fake_mode() -> FakeTensorMode:
    """One for all, as fakes of different ones do not go together, and libraries keep tensors."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@cache
def _fast_fakes() -> FastFakes:
    return FastFakes(_fake_mode())


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


# ---- what fakes lack


def _numpy(tensor: Tensor, *, force: bool = False) -> np.ndarray:
    if tensor.dtype is torch.bool:
        return np.ones(tuple(tensor.shape), np.bool_)
    return np.zeros(tuple(tensor.shape), _NUMPY[tensor.dtype])


def _data_ptr(tensor: Tensor) -> int:
    """The address of the storage itself: as good as memory to know storages apart."""
    return tensor.untyped_storage().data_ptr() + tensor.storage_offset() * tensor.element_size()


def _storage_data_ptr(storage: torch.UntypedStorage) -> int:
    return storage._cdata if storage.device.type == "meta" else _REAL_DATA_PTR(storage)


def _set_data(tensor: FakeTensor, value: Tensor) -> None:
    torch._C.TensorBase.data.__set__(tensor, value)
    tensor.fake_device = value.device  # torch forgets it


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`Module._apply` as it is for real tensors, whose parameters stay the objects that they are."""
    if recurse:
        for child in module.children():
            child._apply(change)
    with torch.no_grad():
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            parameter.data = change(parameter)
            if parameter.grad is not None:
                parameter.grad.data = change(parameter.grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = change(buffer)
    return module


def _making_fakes(keys: torch.device) -> Callable[..., Tensor]:
    """`Tensor._make_subclass` by which all fakes get the dispatch keys of one device.

    `.data` of a tensor can then become one of another device, as it can with real ones. The device itself is what the
    fakes say.
    """

    def make(cls: type, elem: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("device_for_backend_keys") is not None:
            kwargs["device_for_backend_keys"] = keys
        return _REAL_SUBCLASS(cls, elem, *args, **kwargs)

    return make


_REAL_SUBCLASS = torch.Tensor._make_subclass
_REAL_DATA_PTR = torch.UntypedStorage.data_ptr


# ---- what a GPU does by itself


class _PlayedGenerator(torch.Generator):
    """A generator that says it is on a device. Nothing is drawn from it."""

    def __new__(cls, device: Any = "cpu") -> _PlayedGenerator:
        made = super().__new__(cls, "cpu")
        made.played = torch.device(device)
        return made

    def __init__(self, device: Any = "cpu"): ...

    @property
    def device(self) -> torch.device:
        return self.played


_REAL_ATTENTION = functional.scaled_dot_product_attention


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's scaled_dot_product_attention with the kernel that a GPU would choose: flash, or memory-efficient.

    Args: as torch's.
    """
    kind = query.device.type
    if kind != GPU:
        return _REAL_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    with torch.autocast(kind, enabled=False):
        head = query.shape[-1]
        if attn_mask is None and query.dtype != torch.float32 and head <= 256 and head % 8 == 0:
            return aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )[0]
        bias = None
        if attn_mask is not None:
            bias = attn_mask
            if bias.dtype is torch.bool:  # the kernel adds it
                bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(bias.logical_not(), float("-inf"))
            bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        needs_grad = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, needs_grad, dropout_p, is_causal, scale=scale
        )[0]


def _nothing(*_: Any, **__: Any) -> None: ...


def _false(*_: Any, **__: Any) -> bool:
    return False


_REPLACED: tuple[tuple[Any, str, Any], ...] = (
    (FakeTensor, "data", property(torch._C.TensorBase.data.__get__, _set_data)),
    (FakeTensor, "data_ptr", _data_ptr),
    (FakeTensor, "numpy", _numpy),
    (FakeTensor, "tolist", lambda tensor: _numpy(tensor).tolist()),
    (FakeTensor, "is_pinned", _false),
    (FakeTensor, "record_stream", _nothing),
    (torch.UntypedStorage, "data_ptr", _storage_data_ptr),
    (nn.Module, "_apply", _apply),
    (torch, "clear_autocast_cache", clear_autocast_cache),
    (torch, "Generator", _PlayedGenerator),
    (functional, "scaled_dot_product_attention", _attention),
    (block_swap, "PLAIN", (*block_swap.PLAIN, FakeTensor)),
)
