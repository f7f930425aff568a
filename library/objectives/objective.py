"""What a denoiser is trained to do: a draw of noise and time for clean latents, and the loss of a prediction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.objectives import ddpm, losses, weighting
from library.objectives import masks as loss_masks
from library.objectives import noise as noises
from library.objectives import timesteps as times
from library.types import NoiseDraw

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Objective(ABC):
    """All randomness comes from the generator, which must be on the latents' device. Nothing waits for the device."""

    @abstractmethod
    def draw(self, latents: Tensor, generator: torch.Generator, timesteps: Tensor | None = None) -> NoiseDraw:
        """Noise and time for clean latents (B, C, h, w) as the denoiser sees them.

        `timesteps` (B,) fixes the times, for validation; None draws them. Noisy latents have the latents' dtype, noise
        and target are float32.
        """

    @abstractmethod
    def loss(self, prediction: Tensor, draw: NoiseDraw, loss_weights: Tensor, masks: Tensor | None = None) -> Tensor:
        """Weighted loss of every item, (B,), float32; the step's loss is its mean.

        Args:
            prediction: the denoiser's output for `draw`, (B, C, h, w).
            loss_weights: factor of each item, (B,).
            masks: (B, 1, H, W) in [0, 1] at any resolution, or None.
        """

    @abstractmethod
    def validation_timesteps(self) -> list[int]:
        """The fixed timesteps at which validation measures the loss."""


class DdpmObjective(Objective):
    """Noise (epsilon) or v prediction on Stable Diffusion's schedule.

    Args:
        prediction_type: "epsilon" or "v_prediction".
        noise: the option group `noise`.
        loss: the option group `loss`.
    Raises: UserError: options that contradict each other or the prediction type.
    """

    def __init__(self, prediction_type: str, noise: Any, loss: Any):
        problems = _problems(prediction_type, noise, loss)
        if problems:
            raise UserError(*problems)
        self.prediction_type = prediction_type
        self.noise_opts, self.loss_opts = noise, loss
        self.span = times.timestep_range(noise.min_timestep, noise.max_timestep)
        plain = ddpm.alpha_bars(ddpm.scaled_linear_betas())
        # The weights' ratio is taken before the zero-terminal fix, so that it stays above 0.
        self._snr = ddpm.signal_to_noise(plain).float()
        self._alpha_bar = (ddpm.zero_terminal(plain) if noise.zero_terminal_snr else plain).float()

    def draw(self, latents: Tensor, generator: torch.Generator, timesteps: Tensor | None = None) -> NoiseDraw:
        self._follow(latents)
        clean = latents.float()
        target_noise, input_noise = self._noise(clean, generator)
        if timesteps is None:
            timesteps = times.uniform(len(latents), self.span, generator)
        alpha_bar = self._alpha_bar[timesteps]
        noisy = ddpm.add_noise(clean, input_noise, alpha_bar).to(latents.dtype)
        if self.prediction_type == "v_prediction":
            target = ddpm.velocity(clean, target_noise, alpha_bar)
        else:
            target = target_noise
        return NoiseDraw(noisy=noisy, timesteps=timesteps, target=target, noise=target_noise)

    def loss(self, prediction: Tensor, draw: NoiseDraw, loss_weights: Tensor, masks: Tensor | None = None) -> Tensor:
        self._follow(prediction)
        opts, switch_point = self.loss_opts, None
        if opts.loss_type in losses.HUBER_TYPES:
            switch_point = losses.huber_switch_point(
                opts.huber_schedule,
                draw.timesteps,
                self._alpha_bar[draw.timesteps],
                huber_c=opts.huber_c,
                scale=opts.huber_scale,
                horizon=ddpm.NUM_TIMESTEPS,
            )
        loss = losses.pointwise(prediction, draw.target, opts.loss_type, switch_point)
        if masks is not None:
            loss = loss_masks.mask_loss(loss, masks)
        return loss.flatten(1).mean(1) * loss_weights * self._weights(draw.timesteps)

    def validation_timesteps(self) -> list[int]:
        return times.validation_timesteps(self.span)

    def _noise(self, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The noise to predict, and the noise to build noisy latents from."""
        opts = self.noise_opts
        noise = noises.standard_normal(latents, generator)
        if opts.noise_offset or opts.adaptive_noise_scale:
            noise = noises.offset_noise(
                noise,
                latents,
                generator,
                strength=opts.noise_offset,
                random_strength=opts.noise_offset_random_strength,
                adaptive_scale=opts.adaptive_noise_scale,
            )
        if opts.multires_noise_iterations:
            noise = noises.multires_noise(
                noise, generator, iterations=opts.multires_noise_iterations, discount=opts.multires_noise_discount
            )
        if not opts.ip_noise_gamma:
            return noise, noise
        perturbed = noises.perturbed_noise(
            noise, generator, gamma=opts.ip_noise_gamma, random_strength=opts.ip_noise_gamma_random_strength
        )
        return noise, perturbed

    def _weights(self, timesteps: Tensor) -> Tensor | float:
        opts, snr = self.loss_opts, self._snr[timesteps]
        weights: Tensor | float = 1.0
        if opts.min_snr_gamma:
            weights = weights * weighting.min_snr(snr, opts.min_snr_gamma, self.prediction_type)
        if opts.scale_v_pred_loss_like_noise_pred:
            weights = weights * weighting.v_like_epsilon(snr)
        if opts.v_pred_like_loss:
            weights = weights * weighting.epsilon_like_v(snr, opts.v_pred_like_loss)
        if opts.debiased_estimation_loss:
            weights = weights * weighting.debiased(snr, self.prediction_type)
        return weights

    def _follow(self, tensor: Tensor) -> None:
        """Keeps the tables where the latents are; they move once."""
        if self._alpha_bar.device != tensor.device:
            self._alpha_bar, self._snr = self._alpha_bar.to(tensor.device), self._snr.to(tensor.device)


def _problems(prediction_type: str, noise: Any, loss: Any) -> list[str]:
    """One line for each option that cannot be followed."""
    v_prediction = prediction_type == "v_prediction"
    checks = [
        (
            noise.adaptive_noise_scale is not None and noise.noise_offset is None,
            "--adaptive_noise_scale changes the noise offset: give --noise_offset too",
        ),
        (
            noise.multires_noise_iterations is not None and noise.multires_noise_iterations < 0,
            f"--multires_noise_iterations: must be 0 or more, got {noise.multires_noise_iterations}",
        ),
        (
            loss.loss_type in losses.HUBER_TYPES and loss.huber_c <= 0,
            f"--huber_c: must be above 0, got {loss.huber_c}",
        ),
        (
            loss.loss_type in losses.HUBER_TYPES and loss.huber_scale <= 0,
            f"--huber_scale: must be above 0, got {loss.huber_scale}",
        ),
        (
            loss.min_snr_gamma is not None and loss.min_snr_gamma < 0,
            f"--min_snr_gamma: must be 0 (off) or more, got {loss.min_snr_gamma}",
        ),
        (
            loss.scale_v_pred_loss_like_noise_pred and not v_prediction,
            "--scale_v_pred_loss_like_noise_pred needs a model that predicts v (--v_parameterization)",
        ),
        (
            bool(loss.v_pred_like_loss) and v_prediction,
            "--v_pred_like_loss is for models that predict noise; leave it out with --v_parameterization",
        ),
    ]
    return [line for wrong, line in checks if wrong]
