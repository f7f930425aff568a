"""Training in pure half precision: gradients in fp16, and bf16 weights that small steps still move."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from library.runtime import seeds


class HalfGradScaler(torch.amp.GradScaler):
    """torch's scaler, which by itself refuses gradients in fp16.

    They have fewer bits to overflow into, but overflow shows in them as in float32, and the step is left out.
    """

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)


def round_stochastically(values: Tensor, rng: torch.Generator) -> Tensor:
    """float32 to bf16, up or down with a chance equal to the nearness, so that the mean over draws is `values`.

    What bf16 holds exactly stays; so do infinities and NaN. Never waits for the device.

    Args:
        rng: on the device of `values`.
    Source: Gupta et al. 2015 (arXiv:1502.02551), section 3.1.
    """
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=rng)
    bits = (values.view(torch.int32) + noise) & -(1 << 16)
    return torch.where(values.isnan(), values, bits.view(torch.float32)).to(torch.bfloat16)


class StochasticRounding:
    """Lets any optimizer step on float32 copies of bf16 weights, whose results are rounded stochastically.

    Its state is float32 then. Only the weights that are stepped at the moment have a copy: all of them with
    `optimizer.step()`, fewer with `stepping.step_chunked` or inside the backward pass. The random stream of a weight
    in a step depends on the seed, the step and the weight's place among the groups' parameters, and so is the same in
    every process and after a resume.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, seed: int):
        self.step = 0  # optimizer steps done; set it before each
        self._seed = seed
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        self._places = {id(weight): place for place, weight in enumerate(weights)}
        self._away: list[tuple[Tensor, Tensor, Tensor | None]] = []  # (weight, its bf16 memory, its gradient)
        for state in optimizer.state.values():  # what some make before the first step
            state.update({name: _widened(value) for name, value in state.items()})
        optimizer.register_step_pre_hook(self._widen_with_gradients)
        optimizer.register_step_post_hook(self._narrow)
        # An optimizer casts a loaded state to the format of its weights.
        optimizer.register_load_state_dict_pre_hook(self._widen_all)
        optimizer.register_load_state_dict_post_hook(self._put_back)

    def _widen(self, weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        self._away.append((weight, weight.data, gradient))
        weight.data = weight.data.float()
        weight.grad = None if gradient is None else gradient.float()

    def _widen_with_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if weight.grad is not None and weight.dtype == torch.bfloat16:
                    self._widen(weight)

    @torch.no_grad()
    def _narrow(self, *_: Any) -> None:
        for weight, home, _ in self._away:
            rng = seeds.generator(weight.device, self._seed, "rounding", self.step, self._places[id(weight)])
            home.copy_(round_stochastically(weight.data, rng))
        self._put_back()

    def _widen_all(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if weight.dtype == torch.bfloat16:
                    self._widen(weight)

    def _put_back(self, *_: Any) -> None:
        for weight, home, gradient in self._away:
            weight.grad = None
            weight.data, weight.grad = home, gradient
        self._away.clear()


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
