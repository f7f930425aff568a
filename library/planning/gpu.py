"""A type of device that stands for a GPU, on any machine: torch's place for devices of others, PrivateUse1.

Fake tensors can be on it, with autograd. Autocast does there what it does on CUDA. It stays registered for the life of
the process, to which nothing else changes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._pytree import tree_iter, tree_map_only

from library.errors import UserError

GPU = "gpu"
_AUTOCAST = DispatchKeySet(DispatchKey.AutocastPrivateUse1)

# CUDA's autocast, by aten/src/ATen/autocast_mode.h of torch 2.13. What a version of torch lacks is left out.
LOWER_PRECISION = """_convolution _convolution.deprecated conv1d conv2d conv3d conv_tbc conv_transpose1d
    conv_transpose2d.input conv_transpose3d.input convolution prelu addmm addmv addr matmul einsum mm mv linalg_vecdot
    linear addbmm baddbmm bmm chain_matmul linalg_multi_dot _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell
    gru_cell rnn_tanh_cell rnn_relu_cell _scaled_dot_product_flash_attention scaled_dot_product_attention"""
FLOAT32 = """acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar
    pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm rms_norm group_norm frobenius_norm.dim
    nuclear_norm nuclear_norm.dim cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d
    hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss multilabel_margin_loss
    soft_margin_loss triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm
    logsumexp upsample_nearest1d _upsample_nearest_exact1d upsample_nearest2d _upsample_nearest_exact2d
    upsample_nearest3d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa
    upsample_trilinear3d upsample_bicubic2d _upsample_bicubic2d_aa"""
FLOAT32_RESULT = """prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm linalg_matrix_norm
    linalg_matrix_norm.str_ord sum sum.dim_IntList"""
WIDEST = "addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add"

_casts: dict[int, tuple[Tensor, Tensor]] = {}  # of weights, until autocast ends


@cache
def register_gpu() -> torch.device:
    """The device that stands for a GPU. Raises: UserError: this torch cannot have one."""
    try:
        from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
    except ImportError:
        raise UserError(
            f"--plan: needs torch 2.10 or newer, {torch.__version__} is installed; plan in an environment that has it"
        ) from None

    class NoDevice(_DummyBackendModule):
        """So that no one takes it for one that computes."""

        def is_available(self) -> bool:
            return False

        def is_initialized(self) -> bool:
            return False

        def device_count(self) -> int:
            return 0

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

        Stream, Event = PlayedStream, PlayedEvent

        def current_stream(self, device: Any = None) -> PlayedStream:
            return PlayedStream()

        def stream(self, stream: Any) -> AbstractContextManager[None]:
            return nullcontext()

    class Guard(torch._C._acc.DeviceGuard):
        def type_(self) -> Any:  # autograd asks this whenever it changes streams, for which torch has no place here
            _keep_error()
            return PRIVATE

    _setup_privateuseone_for_python_backend(GPU, NoDevice(), device_guard=Guard())
    _kept.append(_autocast_library())
    return torch.device(GPU, 0)


PRIVATE = torch._C._autograd.DeviceType.PrivateUse1
_lost: list[BaseException] = []  # the last exception that autograd has lost
_pointers = [ctypes.c_void_p() for _ in range(3)]
_ADDRESSES = tuple(ctypes.byref(pointer) for pointer in _pointers)
_fetch, _normalise = ctypes.pythonapi.PyErr_Fetch, ctypes.pythonapi.PyErr_NormalizeException


@contextmanager
def true_errors() -> Iterator[None]:
    """A context in which a backward pass on the device raises what its hooks and operations raise."""
    _lost.clear()
    try:
        yield
    except SystemError:  # "returned NULL without setting an exception"
        if not _lost:
            raise
        raise _lost.pop() from None


def _keep_error() -> None:
    """Keeps the exception that is on its way through autograd, if there is one.

    Autograd goes back to the stream that it came from before it catches it; to call Python with an exception set ends
    the process. Before it is fetched no attribute may be read: where Python's cache of them misses, that clears it.
    """
    _fetch(*_ADDRESSES)
    kind, value, trace = _pointers
    if kind:
        _normalise(*_ADDRESSES)
        error = ctypes.cast(value, ctypes.py_object).value
        if trace:
            error = error.with_traceback(ctypes.cast(trace, ctypes.py_object).value)
        _lost[:] = [error]


class PlayedStream:
    """A stream on which all work is done at once."""

    def __init__(self, device: Any = None): ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> PlayedEvent:
        return PlayedEvent()

    def synchronize(self) -> None: ...


class PlayedEvent:
    """A point in a stream, which is always past."""

    def __init__(self, device: Any = None, **_: Any): ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


_kept: list[Any] = []  # a library's kernels go when it does


def _autocast_library() -> list[torch.library.Library]:
    key = "AutocastPrivateUse1"
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, key)
    library = torch.library.Library("aten", "IMPL")
    for names, rule in (
        (LOWER_PRECISION, _in_lower_precision),
        (FLOAT32, _in_float32),
        (FLOAT32_RESULT, _with_float32_result),
        (WIDEST, _in_widest),
    ):
        for op in _ops(names):
            library.impl(op, _kernel(op, rule), key)
    return [others, library]


def _ops(names: str) -> Iterable[Any]:
    for name in names.split():
        packet, _, overload = name.partition(".")
        with suppress(AttributeError):
            yield getattr(getattr(torch.ops.aten, packet), overload or "default")


Rule = Callable[[Any, tuple, dict], Any]


def _kernel(op: Any, rule: Rule) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return rule(op, args, kwargs)

    return run


def _eligible(value: Tensor) -> bool:
    return value.device.type == GPU and value.is_floating_point() and value.dtype is not torch.float64


def _cast_all(op: Any, args: tuple, kwargs: dict, dtype: torch.dtype) -> Any:
    def cast(value: Tensor) -> Tensor:
        return _cast(value, dtype) if _eligible(value) else value

    return op(*tree_map_only(Tensor, cast, args), **tree_map_only(Tensor, cast, kwargs))


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights are cast once in a block of autocast, as torch does it."""
    if value.dtype is dtype:
        return value
    lower = dtype is torch.get_autocast_dtype(GPU) and value.dtype is torch.float32
    if not (lower and value.requires_grad and value.is_leaf and torch.is_autocast_cache_enabled()):
        return value.to(dtype)
    known = _casts.get(id(value))
    if known is None:
        known = _casts[id(value)] = value, value.to(dtype)
    return known[1]


def _in_lower_precision(op: Any, args: tuple, kwargs: dict) -> Any:
    return _cast_all(op, args, kwargs, torch.get_autocast_dtype(GPU))


def _in_float32(op: Any, args: tuple, kwargs: dict) -> Any:
    return _cast_all(op, args, kwargs, torch.float32)


def _with_float32_result(op: Any, args: tuple, kwargs: dict) -> Any:
    if not _eligible(args[0]):
        return op(*args, **kwargs)
    names = [argument.name for argument in op._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if given.get("dtype") is None:
        given["dtype"] = torch.float32
    positional = [argument.name for argument in op._schema.arguments if not argument.kwarg_only]
    args = tuple(given.pop(name) if name in given else op._schema.arguments[names.index(name)].default_value
                 for name in positional)  # fmt: skip
    return op(*args, **given)


def _in_widest(op: Any, args: tuple, kwargs: dict) -> Any:
    dtypes = {one.dtype for one in tree_iter((args, kwargs)) if isinstance(one, Tensor) and _eligible(one)}
    widest = torch.float32 if torch.float32 in dtypes else torch.get_autocast_dtype(GPU)
    return _cast_all(op, args, kwargs, widest)


_clear_torchs = torch.clear_autocast_cache


def clear_autocast_cache() -> None:
    """In place of torch's, which autocast calls when it ends."""
    _casts.clear()
    _clear_torchs()
