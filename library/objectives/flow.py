"""Rectified flow: the straight path from image to noise, how its timesteps are sampled, and the loss's weighting.

``x_sigma = (1 - sigma) * x_0 + sigma * noise`` with sigma from 0 (clean) to 1 (pure noise); the velocity along the path
is ``noise - x_0``. Timesteps are ``1000 * sigma``. Source: Esser et al. 2024 (arXiv:2403.03206), sections 2 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from library.objectives import noise as noises
from library.objectives.ddpm import NUM_TIMESTEPS
from library.objectives.objective import Objective
from library.types import NoiseDraw

if TYPE_CHECKING:
    from library.options.loss import LossOptions, NoiseOptions

Sampling = Literal["sigma", "uniform", "sigmoid", "shift", "flux_shift", "discrete"]
WeightingScheme = Literal["sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"]
PredictionKind = Literal["raw", "additive", "sigma_scaled"]
Target = Literal["velocity", "clean"]

# The first step above no noise at all. The weight 1 / sigma² has no limit at sigma 0, where an infinite weight times a
# loss of zero is not a number; one such image would spoil the whole batch. Below this step the weight grows no more.
LEAST_SIGMA = 1 / NUM_TIMESTEPS


@dataclass(frozen=True)
class FlowSettings:
    """The flow-matching settings of a family."""

    sampling: Sampling  # where sigma comes from; "discrete": whole timesteps, drawn by the weighting scheme and shifted
    shift: float = 1.0  # above 1 more noise, below 1 less; for "sigma", "shift" and "discrete"
    shift_of: Callable[[int, int], float] | None = None  # (height, width) of the latents -> shift; flux_shift needs it
    sigmoid_scale: float = 1.0  # deviation before the sigmoid; for "sigmoid", "shift" and "flux_shift"
    weighting_scheme: WeightingScheme = "uniform"
    logit_mean: float = 0.0  # for the scheme "logit_normal"
    logit_std: float = 1.0
    mode_scale: float = 1.29  # for the scheme "mode"
    prediction: PredictionKind = "raw"
    target: Target = "velocity"


class FlowObjective(Objective):
    """Velocity or clean image on a straight path.

    Noise offsets, multi-resolution noise and weights by signal-to-noise ratio do not exist here.
    """

    def __init__(self, settings: FlowSettings, noise: NoiseOptions, loss: LossOptions):
        super().__init__(noise, loss)
        self.settings = settings

    def noised(self, clean: Tensor, noise: Tensor, input_noise: Tensor, timesteps: Tensor) -> NoiseDraw:
        """See `Objective.noised`. Timesteps are 1000 * sigma: whole numbers for "discrete", else float32."""
        if self.settings.sampling != "discrete":
            timesteps = timesteps.float()
        noisy = interpolate(clean, input_noise, _sigma_of(timesteps))
        target = clean if self.settings.target == "clean" else noise - clean
        return NoiseDraw(noisy=noisy, timesteps=timesteps, target=target, noise=noise)

    def noise(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        return noises.standard_normal(latents, generator)

    def sampling_times(self, steps: int, shift: float = 1.0) -> Tensor:
        """Step k of N begins at 1000 times the shifted level of 1 - k / N; float32."""
        levels = 1 - torch.arange(steps, dtype=torch.float64) / steps
        return NUM_TIMESTEPS * shift_sigma(levels, shift).float()

    def step_back(
        self, noisy: Tensor, prediction: Tensor, now: Tensor, then: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Euler's step along the predicted velocity, ``noisy + (sigma_then - sigma_now) * velocity``."""
        return noisy.float() + _column(_sigma_of(then) - _sigma_of(now), noisy) * prediction.float()

    def to_target_space(self, prediction: Tensor, draw: NoiseDraw) -> Tensor:
        """The prediction in the target's space, float32; for sigma_scaled the clean image that a velocity implies."""
        if self.settings.prediction == "raw":
            return prediction
        if self.settings.prediction == "additive":
            return prediction.float() + draw.noisy.float()
        return draw.noisy.float() - _column(_sigma_of(draw.timesteps), prediction) * prediction.float()

    def weights(self, timesteps: Tensor) -> Tensor | float:
        if self.settings.prediction != "sigma_scaled":
            return 1.0
        return loss_weighting(self.settings.weighting_scheme, _sigma_of(timesteps))

    def draw_timesteps(
        self, count: int, size: tuple[int, int], generator: torch.Generator, offsets: Tensor | None = None
    ) -> Tensor:
        """In the range of --min_timestep and --max_timestep, see `Objective.draw_timesteps`."""
        low, high = self.span
        if self.settings.sampling == "discrete":
            sigma = shift_sigma(timestep_density(self.settings, count, generator), self.settings.shift)
            # the product may round up to the end, which is no timestep any more
            return (sigma * (high - low) + low).clamp(max=high - 1).long()
        sigma = self._draw_sigma(count, size, generator, offsets)
        return low + sigma * (high - low)

    def _draw_sigma(
        self, count: int, size: tuple[int, int], generator: torch.Generator, offsets: Tensor | None
    ) -> Tensor:
        """Draws sigma, (count,), float32, in [0, 1]."""
        settings = self.settings
        if settings.sampling == "uniform":
            return _uniform(count, generator)
        if settings.sampling == "sigma":
            u = timestep_density(settings, count, generator)
            index = (u * NUM_TIMESTEPS).floor().clamp(max=NUM_TIMESTEPS - 1)  # u may be 1
            return shift_sigma((NUM_TIMESTEPS - index) / NUM_TIMESTEPS, settings.shift)
        normal = _normal(count, generator)
        sigma = torch.sigmoid(settings.sigmoid_scale * (normal if offsets is None else normal + offsets))
        if settings.sampling == "shift":
            return shift_sigma(sigma, settings.shift)
        if settings.sampling == "flux_shift":
            return shift_sigma(sigma, settings.shift_of(*size))
        return sigma


def interpolate(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Noisy latents ``(1 - sigma) * clean + sigma * noise``.

    Args:
        clean: latents as the denoiser sees them, (B, C, h, w).
        noise: same shape.
        sigma: noise level of each item in [0, 1], (B,). Not a timestep.
    """
    level = _column(sigma, clean)
    return (1 - level) * clean + level * noise


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """``s * sigma / (1 + (s - 1) * sigma)``: moves levels in [0, 1] towards noise for s > 1, and keeps both ends.

    Source: Esser et al. 2024 (arXiv:2403.03206), equation 23.
    """
    return (shift * sigma / (1 + (shift - 1) * sigma)).clamp(max=1)  # rounding may lead past the end


def timestep_density(settings: FlowSettings, count: int, generator: torch.Generator) -> Tensor:
    """Numbers u in [0, 1] by the density of the weighting scheme, (count,), float32, on the generator's device.

    logit_normal: sigmoid of N(logit_mean, logit_std²). mode: ``1 - u - m (cos²(πu/2) - 1 + u)`` of a uniform u, with m
    the mode_scale. All others: uniform.

    Source: Esser et al. 2024 (arXiv:2403.03206), section 3.1.
    """
    if settings.weighting_scheme == "logit_normal":
        return torch.sigmoid(settings.logit_mean + settings.logit_std * _normal(count, generator))
    u = _uniform(count, generator)
    if settings.weighting_scheme == "mode":
        bent = 1 - u - settings.mode_scale * (torch.cos(math.pi * u / 2).square() - 1 + u)
        return bent.clamp(0, 1)  # scales outside of the paper's range leave it
    return u


def loss_weighting(scheme: WeightingScheme, sigma: Tensor) -> Tensor:
    """The scheme's factor on the loss of items with levels `sigma`, both (B,).

    sigma_sqrt: 1 / sigma², sigma at least `LEAST_SIGMA`. cosmap: 2 / (π (1 - 2 sigma + 2 sigma²)). All others: 1.
    """
    if scheme == "sigma_sqrt":
        return sigma.clamp(min=LEAST_SIGMA) ** -2.0
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square()))
    return torch.ones_like(sigma)


def _sigma_of(timesteps: Tensor) -> Tensor:
    return timesteps.float() / NUM_TIMESTEPS


def _column(sigma: Tensor, like: Tensor) -> Tensor:
    return sigma.view(-1, *[1] * (like.ndim - 1))


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, device=generator.device)


def _normal(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, generator=generator, device=generator.device)
