"""Training in pure half precision: loss scaling with fp16 gradients, and stochastic rounding of bf16 weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from library.runtime import seeds

_CHUNK = 1 << 26  # elements that are rounded together, as many as are stepped: 0.7 GiB, no more than the step took


class HalfGradScaler(torch.amp.GradScaler):
    """torch's gradient scaler, but for fp16 gradients too, which torch's refuses.

    They overflow earlier, but an overflow shows in them as in float32, and the step is skipped.
    """

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)


def round_stochastically(values: Tensor, rng: torch.Generator) -> Tensor:
    """Rounds float32 to bf16, up or down with a probability that makes the expected result equal to `values`.

    Values that bf16 holds exactly do not change, nor do infinities and NaN. Never waits for the device.

    Args:
        rng: on the device of `values`.
    Source: Gupta et al. 2015 (arXiv:1502.02551), section 3.1.
    """
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=rng)
    return _rounded(values.clone(), noise)


def _rounded(values: Tensor, noise: Tensor) -> Tensor:
    """`noise`: int32, from 0 to 2**16 - 1, in the shape of `values`; both are overwritten."""
    bits = noise.add_(values.view(torch.int32)).bitwise_and_(-(1 << 16))
    return torch.where(values.isnan(), values, bits.view(torch.float32), out=values).to(torch.bfloat16)


def _chunks(tensors: Sequence[Tensor], most: int) -> Iterator[list[int]]:
    """Positions of tensors that have at most `most` elements together, or of one that has more."""
    chunk, size = [], 0
    for number, tensor in enumerate(tensors):
        if chunk and size + tensor.numel() > most:
            yield chunk
            chunk, size = [], 0
        chunk.append(number)
        size += tensor.numel()
    if chunk:
        yield chunk


class StochasticRounding:
    """Lets any optimizer step on float32 copies of bf16 weights, whose results are rounded stochastically.

    The optimizer state is float32. Only the weights that are being stepped have a copy: all with `optimizer.step()`,
    fewer with `stepping.step_chunked` or inside the backward pass. The random stream of a weight in a step depends on
    the seed, the step and the weight's index among the groups' parameters, so it is the same in every process and
    after a resume.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, seed: int):
        self.step = 0  # optimizer steps done; set it before each
        self._seed, self._streams = seed, seeds.Streams()
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        self._indices = {id(weight): index for index, weight in enumerate(weights)}
        self._copied: list[tuple[Tensor, Tensor, Tensor | None]] = []  # (weight, its bf16 values, its gradient)
        for state in optimizer.state.values():  # some optimizers create it before the first step
            for name, value in state.items():
                if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
                    state[name] = value.float()
        optimizer.register_step_pre_hook(self._copy_stepped)
        optimizer.register_step_post_hook(self._round_back)
        # An optimizer casts a loaded state to the dtype of its weights.
        optimizer.register_load_state_dict_pre_hook(self._copy_all)
        optimizer.register_load_state_dict_post_hook(self._restore)

    @torch.no_grad()
    def _copy_to_float32(self, weights: Sequence[Tensor]) -> None:
        kept = [(weight, weight.data, weight.grad) for weight in weights]
        values = [values for _, values, _ in kept]
        gradients = [gradient for _, _, gradient in kept if gradient is not None]
        copies, of_gradients = (
            [torch.empty_like(one, dtype=torch.float32) for one in given] for given in (values, gradients)
        )
        if kept:
            torch._foreach_copy_(copies + of_gradients, values + gradients)
        left = iter(of_gradients)
        for (weight, _, gradient), copy in zip(kept, copies, strict=True):
            weight.grad = None
            weight.data = copy
            weight.grad = None if gradient is None else next(left)
        self._copied += kept

    def _copy_stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        weights = (weight for group in optimizer.param_groups for weight in group["params"])
        self._copy_to_float32([one for one in weights if one.grad is not None and one.dtype == torch.bfloat16])

    @torch.no_grad()
    def _round_back(self, *_: Any) -> None:
        for numbers in _chunks([bf16 for _, bf16, _ in self._copied], _CHUNK):
            chunk = [self._copied[number][:2] for number in numbers]
            size, device = sum(bf16.numel() for _, bf16 in chunk), chunk[0][1].device
            values = torch.empty(size, dtype=torch.float32, device=device)
            noise = torch.empty(size, dtype=torch.int32, device=device)
            start, pieces = 0, []
            for weight, bf16 in chunk:
                pieces.append(slice(start, start + bf16.numel()))
                start = pieces[-1].stop
                rng = self._streams.at(device, self._seed, "rounding", self.step, self._indices[id(weight)])
                noise[pieces[-1]].random_(0, 1 << 16, generator=rng)
            shapes = [bf16.shape for _, bf16 in chunk]
            parts = [values[piece].view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
            torch._foreach_copy_(parts, [weight.data for weight, _ in chunk])
            rounded = _rounded(values, noise)
            parts = [rounded[piece].view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
            torch._foreach_copy_([bf16 for _, bf16 in chunk], parts)
        self._restore()

    def _copy_all(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        weights = (weight for group in optimizer.param_groups for weight in group["params"])
        self._copy_to_float32([one for one in weights if one.dtype == torch.bfloat16])

    def _restore(self, *_: Any) -> None:
        for weight, bf16, gradient in self._copied:
            weight.grad = None
            weight.data, weight.grad = bf16, gradient
        self._copied.clear()
