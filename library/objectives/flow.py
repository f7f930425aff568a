"""Rectified flow: the straight path from image to noise, which moments of it are trained, and the loss.

``x_sigma = (1 - sigma) * x_0 + sigma * noise`` with sigma from 0 (clean) to 1 (pure noise); the velocity along the path
is ``noise - x_0``. Timesteps are ``1000 * sigma``. Source: Esser et al. 2024 (arXiv:2403.03206), sections 2 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from library.errors import UserError
from library.objectives import losses
from library.objectives import masks as loss_masks
from library.objectives import noise as noises
from library.objectives import timesteps as times
from library.objectives.ddpm import NUM_TIMESTEPS
from library.objectives.objective import Objective
from library.types import NoiseDraw

Sampling = Literal["sigma", "uniform", "sigmoid", "shift", "flux_shift", "discrete"]
WeightingScheme = Literal["sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"]
PredictionKind = Literal["raw", "additive", "sigma_scaled"]
Target = Literal["velocity", "clean"]

# The first step above no noise at all. The weight 1 / sigma² has no limit at sigma 0, where an infinite weight times a
# loss of zero is not a number; one such image would spoil the whole batch. Below this step the weight grows no more.
LEAST_SIGMA = 1 / NUM_TIMESTEPS


@dataclass(frozen=True)
class FlowSettings:
    """How a family trains its flow."""

    sampling: Sampling  # where sigma comes from; "discrete": whole timesteps, drawn by the weighting scheme and shifted
    shift: float = 1.0  # above 1 more noise, below 1 less; for "sigma", "shift" and "discrete"
    shift_of: Callable[[int, int], float] | None = None  # (height, width) of the latents -> shift; for "flux_shift"
    sigmoid_scale: float = 1.0  # deviation before the sigmoid; for "sigmoid", "shift" and "flux_shift"
    weighting_scheme: WeightingScheme = "uniform"
    logit_mean: float = 0.0  # for the scheme "logit_normal"
    logit_std: float = 1.0
    mode_scale: float = 1.29  # for the scheme "mode"
    prediction: PredictionKind = "raw"
    target: Target = "velocity"


class FlowObjective(Objective):
    """Velocity or clean image on a straight path.

    Args:
        settings: of the family.
        noise: the option group `noise`: min_timestep, max_timestep, ip_noise_gamma. Other kinds of noise do not apply.
        loss: the option group `loss`: loss_type and the Huber options. Weights by signal-to-noise ratio do not apply.
    Raises: UserError: options that contradict each other or rectified flow.
    """

    def __init__(self, settings: FlowSettings, noise: Any, loss: Any):
        assert settings.sampling in get_args(Sampling), settings.sampling
        assert settings.weighting_scheme in get_args(WeightingScheme), settings.weighting_scheme
        assert settings.prediction in get_args(PredictionKind), settings.prediction
        assert settings.target in get_args(Target), settings.target
        assert settings.sampling != "flux_shift" or settings.shift_of is not None, "flux_shift needs shift_of"
        problems = _problems(settings, loss)
        if problems:
            raise UserError(*problems)
        self.settings, self.noise_opts, self.loss_opts = settings, noise, loss
        self.span = times.timestep_range(noise.min_timestep, noise.max_timestep)

    def draw(self, latents: Tensor, generator: torch.Generator, timesteps: Tensor | None = None) -> NoiseDraw:
        """See `Objective.draw`. Timesteps are 1000 * sigma: whole numbers for "discrete", else float32."""
        clean, opts = latents.float(), self.noise_opts
        noise = noises.standard_normal(clean, generator)
        input_noise = noise
        if opts.ip_noise_gamma:
            input_noise = noises.perturbed_noise(
                noise, generator, gamma=opts.ip_noise_gamma, random_strength=opts.ip_noise_gamma_random_strength
            )
        if timesteps is None:
            timesteps = self._draw_timesteps(latents, generator)
        elif self.settings.sampling != "discrete":
            timesteps = timesteps.float()
        noisy = interpolate(clean, input_noise, _sigma_of(timesteps)).to(latents.dtype)
        target = clean if self.settings.target == "clean" else noise - clean
        return NoiseDraw(noisy=noisy, timesteps=timesteps, target=target, noise=noise)

    def loss(self, prediction: Tensor, draw: NoiseDraw, loss_weights: Tensor, masks: Tensor | None = None) -> Tensor:
        opts, sigma, switch_point = self.loss_opts, _sigma_of(draw.timesteps), None
        if opts.loss_type in losses.HUBER_TYPES:
            switch_point = losses.huber_switch_point(
                opts.huber_schedule,
                draw.timesteps,
                sigma,  # there is no alpha_bar; schedules other than snr take no more than its shape
                huber_c=opts.huber_c,
                scale=opts.huber_scale,
                horizon=NUM_TIMESTEPS,
            )
        output = _read_prediction(self.settings.prediction, prediction.float(), draw.noisy.float(), sigma)
        loss = losses.pointwise(output, draw.target, opts.loss_type, switch_point)
        if masks is not None:
            loss = loss_masks.mask_loss(loss, masks)
        weighted = loss.flatten(1).mean(1) * loss_weights
        if self.settings.prediction == "sigma_scaled":
            weighted = weighted * loss_weight(self.settings.weighting_scheme, sigma)
        return weighted

    def validation_timesteps(self) -> list[int]:
        return times.validation_timesteps(self.span)

    def _draw_timesteps(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        """(B,), in the range of --min_timestep and --max_timestep."""
        low, high = self.span
        if self.settings.sampling == "discrete":
            sigma = shifted(self._draw_density(len(latents), generator), self.settings.shift)
            # the product may round up to the end, which is no timestep any more
            return (sigma * (high - low) + low).floor().clamp(max=high - 1).long()
        sigma = self._draw_sigma(latents, generator)
        return low + sigma * (high - low)

    def _draw_sigma(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        """(B,), float32, in [0, 1]."""
        settings, count = self.settings, len(latents)
        if settings.sampling == "uniform":
            return _uniform(count, generator)
        if settings.sampling == "sigma":
            u = self._draw_density(count, generator)
            index = (u * NUM_TIMESTEPS).floor().clamp(max=NUM_TIMESTEPS - 1)  # u may be 1
            return shifted((NUM_TIMESTEPS - index) / NUM_TIMESTEPS, settings.shift)
        sigma = torch.sigmoid(settings.sigmoid_scale * _normal(count, generator))
        if settings.sampling == "shift":
            return shifted(sigma, settings.shift)
        if settings.sampling == "flux_shift":
            return shifted(sigma, settings.shift_of(*latents.shape[-2:]))
        return sigma

    def _draw_density(self, count: int, generator: torch.Generator) -> Tensor:
        settings = self.settings
        return density(
            settings.weighting_scheme,
            count,
            generator,
            logit_mean=settings.logit_mean,
            logit_std=settings.logit_std,
            mode_scale=settings.mode_scale,
        )


def interpolate(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Noisy latents ``(1 - sigma) * clean + sigma * noise``.

    Args:
        clean: latents as the denoiser sees them, (B, C, h, w).
        noise: same shape.
        sigma: noise level of each item in [0, 1], (B,). Not a timestep.
    """
    level = _column(sigma, clean)
    return (1 - level) * clean + level * noise


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """``s * sigma / (1 + (s - 1) * sigma)``: moves levels in [0, 1] towards noise for s > 1, and keeps both ends.

    Source: Esser et al. 2024 (arXiv:2403.03206), equation 23.
    """
    return (shift * sigma / (1 + (shift - 1) * sigma)).clamp(max=1)  # rounding may lead past the end


def density(
    scheme: WeightingScheme,
    count: int,
    generator: torch.Generator,
    *,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
) -> Tensor:
    """Numbers u in [0, 1] by the scheme's density, (count,), float32, on the generator's device.

    logit_normal: sigmoid of N(logit_mean, logit_std²). mode: ``1 - u - m (cos²(πu/2) - 1 + u)`` of a uniform u, with m
    the mode_scale. All others: uniform.

    Source: Esser et al. 2024 (arXiv:2403.03206), section 3.1.
    """
    if scheme == "logit_normal":
        return torch.sigmoid(logit_mean + logit_std * _normal(count, generator))
    u = _uniform(count, generator)
    if scheme == "mode":
        bent = 1 - u - mode_scale * (torch.cos(math.pi * u / 2).square() - 1 + u)
        return bent.clamp(0, 1)  # scales outside of the paper's range leave it
    return u


def loss_weight(scheme: WeightingScheme, sigma: Tensor) -> Tensor:
    """The scheme's factor on the loss of items with levels `sigma`, both (B,).

    sigma_sqrt: 1 / sigma², sigma at least `LEAST_SIGMA`. cosmap: 2 / (π (1 - 2 sigma + 2 sigma²)). All others: 1.
    """
    if scheme == "sigma_sqrt":
        return sigma.clamp(min=LEAST_SIGMA) ** -2.0
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square()))
    return torch.ones_like(sigma)


def _read_prediction(kind: PredictionKind, prediction: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
    """What is compared with the target, (B, C, h, w); for sigma_scaled the clean image that a velocity implies."""
    if kind == "raw":
        return prediction
    if kind == "additive":
        return prediction + noisy
    return noisy - _column(sigma, noisy) * prediction


def _problems(settings: FlowSettings, loss: Any) -> list[str]:
    """One line for each option that cannot be followed."""
    huber = loss.loss_type in losses.HUBER_TYPES
    checks = [
        (
            huber and loss.huber_schedule == "snr",
            f"--loss_type {loss.loss_type}: the --huber_schedule snr needs a noise schedule, which this model does not "
            "have; give --huber_schedule=exponential or constant",
        ),
        (huber and loss.huber_c <= 0, f"--huber_c: must be above 0, got {loss.huber_c}"),
        (huber and loss.huber_scale <= 0, f"--huber_scale: must be above 0, got {loss.huber_scale}"),
        (not settings.shift > 0, f"the flow shift must be above 0, got {settings.shift}"),
    ]
    return [line for wrong, line in checks if wrong]


def _sigma_of(timesteps: Tensor) -> Tensor:
    return timesteps.float() / NUM_TIMESTEPS


def _column(sigma: Tensor, like: Tensor) -> Tensor:
    return sigma.view(-1, *[1] * (like.ndim - 1))


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, device=generator.device)


def _normal(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, generator=generator, device=generator.device)
