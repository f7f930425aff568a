"""Training in pure half precision: loss scaling with fp16 gradients, and stochastic rounding of bf16 weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from library.runtime import seeds


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
    bits = (values.view(torch.int32) + noise) & -(1 << 16)
    return torch.where(values.isnan(), values, bits.view(torch.float32)).to(torch.bfloat16)


class StochasticRounding:
    """Lets any optimizer step on float32 copies of bf16 weights, whose results are rounded stochastically.

    The optimizer state is float32. Only the weights that are being stepped have a copy: all with `optimizer.step()`,
    fewer with `stepping.step_chunked` or inside the backward pass. The random stream of a weight in a step depends on
    the seed, the step and the weight's index among the groups' parameters, so it is the same in every process and
    after a resume.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, seed: int):
        self.step = 0  # optimizer steps done; set it before each
        self._seed = seed
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

    def _copy_to_float32(self, weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        self._copied.append((weight, weight.data, gradient))
        weight.data = weight.data.float()
        weight.grad = None if gradient is None else gradient.float()

    def _copy_stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if weight.grad is not None and weight.dtype == torch.bfloat16:
                    self._copy_to_float32(weight)

    @torch.no_grad()
    def _round_back(self, *_: Any) -> None:
        for weight, bf16, _ in self._copied:
            rng = seeds.generator(weight.device, self._seed, "rounding", self.step, self._indices[id(weight)])
            bf16.copy_(round_stochastically(weight.data, rng))
        self._restore()

    def _copy_all(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if weight.dtype == torch.bfloat16:
                    self._copy_to_float32(weight)

    def _restore(self, *_: Any) -> None:
        for weight, bf16, gradient in self._copied:
            weight.grad = None
            weight.data, weight.grad = bf16, gradient
        self._copied.clear()
