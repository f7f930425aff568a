"""The common operations on fake tensors, several times as fast as FakeTensorMode computes them.

A fake tensor is one of the meta device that says it is elsewhere. For the operations listed here a kernel for that
device is all that is needed; FakeTensorMode would look at each argument many times first. All else is left to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

META = torch.device("meta")

_VIEWS = """view _unsafe_view _reshape_alias t transpose permute expand slice select split split_with_sizes unsqueeze
    squeeze unbind alias detach as_strided view_as_complex view_as_real unfold"""
_POINTWISE = """add sub mul div neg pow exp log sqrt rsqrt sin cos silu gelu sigmoid tanh clamp clamp_min clamp_max
    where eq ne gt lt ge le logical_not logical_and logical_or bitwise_and bitwise_not lerp addcmul addcdiv reciprocal
    abs maximum minimum sign zero fill copy masked_fill rsub square erf relu silu_backward gelu_backward tanh_backward
    sigmoid_backward isnan isinf mse_loss mse_loss_backward native_dropout round"""
_OTHERS = """sum mean amax amin linalg_vector_norm var_mean mm addmm bmm baddbmm convolution convolution_backward
    native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward _fused_rms_norm
    _fused_rms_norm_backward _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_backward
    _scaled_dot_product_efficient_attention _scaled_dot_product_efficient_attention_backward _softmax
    _softmax_backward_data select_backward slice_backward embedding upsample_nearest2d upsample_nearest2d_backward clone
    cat stack constant_pad_nd sum_to_size"""
_LIKE = "_to_copy empty_like zeros_like ones_like rand_like randn_like new_empty new_zeros new_full new_empty_strided"


def _overloads(names: str) -> set[Any]:
    found = set()
    for name in names.split():
        for spelling in (name, f"{name}_"):
            packet = getattr(torch.ops.aten, spelling, None)
            if packet is not None:
                found |= {getattr(packet, overload) for overload in packet.overloads() if overload != "out"}
    return found


_PLAIN = _overloads(f"{_VIEWS} {_POINTWISE} {_OTHERS}")
_GIVEN_DEVICE = _overloads(_LIKE)


class FastFakes:
    """Computes operations on the fakes of one mode."""

    def __init__(self, mode: FakeTensorMode):
        self._mode = mode
        with mode:
            sample = torch.empty(0)
        self._attributes = dict(vars(sample))

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """The result; NotImplemented: FakeTensorMode is needed."""
        if func in _PLAIN:
            device = None
        elif func in _GIVEN_DEVICE:
            device = kwargs.get("device")
        else:
            return NotImplemented
        common = self._common_device(args, kwargs)
        if common is None:
            return NotImplemented
        if device is not None:
            kwargs = {**kwargs, "device": META}
            device = torch.device(device)
        with _OnMeta(self._mode):
            result = func(*args, **kwargs)
        target = device or common
        if type(result) is Tensor:
            return self._fake(result, target)
        if isinstance(result, (list, tuple)):
            return type(result)(self._fake(one, target) if type(one) is Tensor else one for one in result)
        return result

    def _common_device(self, args: tuple, kwargs: dict) -> torch.device | None:
        """The device of tensors with axes; None: it is none of the simple cases."""
        found = scalar = None
        for one in (*args, *kwargs.values()):
            for tensor in one if type(one) in (list, tuple) else (one,):
                if type(tensor) is FakeTensor:
                    if tensor.constant is not None or tensor.fake_device.type == "meta":
                        return None
                    if tensor.dim():
                        if found is not None and tensor.fake_device != found:
                            return None
                        found = tensor.fake_device
                    elif scalar is None or scalar.type == "cpu":
                        scalar = tensor.fake_device
                elif isinstance(tensor, Tensor):
                    return None
        return found or scalar

    def _fake(self, made: Tensor, device: torch.device) -> FakeTensor:
        fake = Tensor._make_subclass(FakeTensor, made, False, dispatch_device=True, device_for_backend_keys=device)
        fake.__dict__.update(self._attributes)
        fake.fake_device = device
        return fake


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
