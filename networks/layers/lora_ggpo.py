"""LoRA whose layers are disturbed while they are trained, so that it settles where small changes matter little.

LoRA-GGPO, gradient-guided perturbation optimisation (arXiv:2502.14538).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.layer_args import PerturbedLoraArgs
from networks.layers.lora import LoraLayer


class PerturbedLoraLayer(LoraLayer):
    """Adds ``x E^T`` to the output in training; E has the shape of the weight and is drawn for every forward pass.

    Row i of E is normal with the standard deviation ``(sigma * |W_i| + beta * |G_i|^2) / sqrt(rows)``. W_i is that row
    of the weight with its change, taken as orthogonal to each other: ``|W_i|^2 = |base_i|^2 + |change_i|^2``. G is the
    gradient of the change to first order, ``dUp Down + Up dDown``, as the last step saw it; there is none before the
    first. No gradient flows through E. Norms need matrices of the size of the rank only.
    """

    shares_input = False  # E is drawn in the dtype of the input

    def __init__(self, modules: Sequence[nn.Module], rank: int, alpha: float | None, args: PerturbedLoraArgs):
        super().__init__(modules, rank, alpha, args)
        self._sigma, self._beta = args.ggpo_sigma, args.ggpo_beta
        base = torch.cat([module.weight.detach().float().square().sum(1) for module in modules])
        self.register_buffer("base_squares", base.to("cpu"), persistent=False)  # (rows,)
        self.register_buffer("deviation", torch.zeros(sum(self.rows)))  # of E, by row; part of a state

    def adapt(self, index: int, x: Tensor, output: Tensor) -> Tensor:
        adapted = super().adapt(index, x, output)
        if not self.training:
            return adapted
        with torch.no_grad():
            drawn = torch.randn(self.rows[index], x.shape[-1], dtype=x.dtype, device=x.device)
            disturbance = F.linear(x, drawn) * self.deviation[self.rows_of(index)].to(x.dtype)
        return adapted + disturbance.to(adapted.dtype)

    def adapt_into(self, index: int, x: Tensor, output: Tensor) -> Tensor:
        return self.adapt(index, x, output)

    @torch.no_grad()
    def before_step(self) -> None:
        up, down = self.lora_up.weight, self.lora_down.weight
        if up.grad is None or down.grad is None:
            return
        up, down, up_grad, down_grad = (tensor.float() for tensor in (up, down, up.grad, down.grad))
        change = _row_products(up, down @ down.T, up) * self.scale**2
        gradient = (
            _row_products(up_grad, down @ down.T, up_grad)
            + 2 * _row_products(up_grad, down @ down_grad.T, up)
            + _row_products(up, down_grad @ down_grad.T, up)
        )
        weight = (self.base_squares + change).sqrt()
        deviation = self._sigma * weight + self._beta * gradient  # just below 0 by rounding, it is as good as above
        self.deviation.copy_(deviation / math.sqrt(len(weight)))

    def file_state(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in super().file_state().items() if name != "deviation"}


def _row_products(left: Tensor, middle: Tensor, right: Tensor) -> Tensor:
    """``left_i middle right_i^T`` for every row i: (n, r), (r, r), (n, r) -> (n,)."""
    return ((left @ middle) * right).sum(1)
