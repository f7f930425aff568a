"""What a denoiser is trained to do: a draw of noise and time for clean latents, and the loss of a prediction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from library.objectives import ddpm, losses, weighting
from library.objectives import masks as loss_masks
from library.objectives import noise as noises
from library.objectives import timesteps as times
from library.types import NoiseDraw

if TYPE_CHECKING:
    from torch import Tensor

    from library.options.loss import LossOptions, NoiseOptions


class Objective(ABC):
    """All randomness comes from the generator, which must be on the latents' device. Nothing waits for the device.

    The options have been validated: what cannot be followed, alone or in combination, is refused by their groups.
    """

    def __init__(self, noise: NoiseOptions, loss: LossOptions):
        self.noise_opts, self.loss_opts = noise, loss
        self.span = times.timestep_range(noise.min_timestep, noise.max_timestep)

    def draw(
        self,
        latents: Tensor,
        generator: torch.Generator,
        timesteps: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> NoiseDraw:
        """Noise and time for clean latents (B, C, h, w) as the denoiser sees them.

        `timesteps` (B,) fixes the times, for validation; None draws them, as `draw_timesteps` does with `offsets`.
        Noisy latents have the latents' dtype, noise and target are float32.
        """
        clean = latents.float()
        noise = self.noise(clean, generator)
        input_noise = self.perturb(noise, generator)
        if timesteps is None:
            timesteps = self.draw_timesteps(len(latents), latents.shape[-2:], generator, offsets)
        draw = self.noised(clean, noise, input_noise, timesteps)
        return replace(draw, noisy=draw.noisy.to(latents.dtype))

    @abstractmethod
    def noised(self, clean: Tensor, noise: Tensor, input_noise: Tensor, timesteps: Tensor) -> NoiseDraw:
        """Clean latents with noise at timesteps (B,), all (B, C, h, w), float32.

        Args:
            noise: that of the target.
            input_noise: that of the noisy latents, see `perturb`.
        """

    @abstractmethod
    def draw_timesteps(
        self, count: int, size: tuple[int, int], generator: torch.Generator, offsets: Tensor | None = None
    ) -> Tensor:
        """`count` timesteps for latents of a size (h, w), (count,), on the generator's device.

        Args: offsets: `Batch.timestep_offsets`, (count,) on that device; without effect where no normal numbers are
            drawn.
        """

    @abstractmethod
    def noise(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        """The noise that training adds to clean latents (B, C, h, w), float32; pure noise looks so, too."""

    @abstractmethod
    def sampling_times(self, steps: int, shift: float) -> Tensor:
        """The times at which `steps` even steps from pure noise to an image begin, (steps,), on the CPU.

        Args: shift: of the levels of a flow, see `flow.shift_sigma`; nothing else has one.
        """

    @abstractmethod
    def step_back(
        self, noisy: Tensor, prediction: Tensor, now: Tensor, then: Tensor, generator: torch.Generator
    ) -> Tensor:
        """One sampling step: from latents (B, C, h, w) at the times `now` to those at the earlier times `then`, (B,).

        `prediction` is the denoiser's at `now`; float32.
        """

    def loss(self, prediction: Tensor, draw: NoiseDraw, loss_weights: Tensor, masks: Tensor | None = None) -> Tensor:
        """Weighted loss of every item, (B,), float32; the step's loss is its mean.

        Args:
            prediction: the denoiser's output for `draw`, (B, C, h, w).
            loss_weights: factor of each item, (B,).
            masks: (B, 1, H, W) in [0, 1] at any resolution, or None.
        """
        opts, switch_point = self.loss_opts, None
        if opts.loss_type in losses.HUBER_TYPES:
            switch_point = losses.huber_switch_point(
                opts.huber_schedule,
                draw.timesteps,
                self.signal(draw),
                huber_c=opts.huber_c,
                scale=opts.huber_scale,
                horizon=ddpm.NUM_TIMESTEPS,
            )
        loss = losses.pointwise(self.to_target_space(prediction, draw), draw.target, opts.loss_type, switch_point)
        if masks is not None:
            loss = loss_masks.mask_loss(loss, masks)
        return loss.flatten(1).mean(1) * loss_weights * self.weights(draw.timesteps)

    def signal(self, draw: NoiseDraw) -> Tensor | None:
        """The signal's share of the variance (alpha_bar) of each item, (B,); None without a variance schedule."""
        return None

    def to_target_space(self, prediction: Tensor, draw: NoiseDraw) -> Tensor:
        """The prediction as it is compared with the target, (B, C, h, w)."""
        return prediction

    @abstractmethod
    def weights(self, timesteps: Tensor) -> Tensor | float:
        """The factor that the options put on the loss of each item by its time, both (B,); or 1."""

    def validation_timesteps(self, count: int = 4) -> list[int]:
        """The fixed timesteps at which validation measures the loss of each image, ascending."""
        return times.validation_timesteps(self.span, count)

    def perturb(self, noise: Tensor, generator: torch.Generator) -> Tensor:
        """The noise to build noisy latents from, where --ip_noise_gamma makes it another than the one in the target."""
        opts = self.noise_opts
        if not opts.ip_noise_gamma:
            return noise
        return noises.perturbed_noise(
            noise, generator, gamma=opts.ip_noise_gamma, random_strength=opts.ip_noise_gamma_random_strength
        )


class DdpmObjective(Objective):
    """Noise (epsilon) or v prediction on Stable Diffusion's schedule."""

    def __init__(self, prediction_type: weighting.Prediction, noise: NoiseOptions, loss: LossOptions):
        super().__init__(noise, loss)
        self.prediction_type = prediction_type
        plain = ddpm.alpha_bars(ddpm.scaled_linear_betas())
        # The weights' ratio is taken before the zero-terminal fix, so that it stays above 0.
        self._snr = ddpm.signal_to_noise(plain).float()
        self._alpha_bar = (ddpm.zero_terminal(plain) if noise.zero_terminal_snr else plain).float()

    def noised(self, clean: Tensor, noise: Tensor, input_noise: Tensor, timesteps: Tensor) -> NoiseDraw:
        self._follow(clean)
        alpha_bar = self._alpha_bar[timesteps]
        noisy = ddpm.add_noise(clean, input_noise, alpha_bar)
        target = ddpm.velocity(clean, noise, alpha_bar) if self.prediction_type == "v_prediction" else noise
        return NoiseDraw(noisy=noisy, timesteps=timesteps, target=target, noise=noise)

    def draw_timesteps(
        self, count: int, size: tuple[int, int], generator: torch.Generator, offsets: Tensor | None = None
    ) -> Tensor:
        return times.uniform(count, self.span, generator)

    def signal(self, draw: NoiseDraw) -> Tensor:
        self._follow(draw.noisy)
        return self._alpha_bar[draw.timesteps]

    def weights(self, timesteps: Tensor) -> Tensor | float:
        self._follow(timesteps)
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

    def sampling_times(self, steps: int, shift: float = 1.0) -> Tensor:
        """Step k of N begins at timestep 999 - floor(1000 k / N), so that the first begins at pure noise; int64."""
        last = ddpm.NUM_TIMESTEPS - 1
        return last - torch.div(torch.arange(steps) * ddpm.NUM_TIMESTEPS, steps, rounding_mode="floor")

    def step_back(
        self, noisy: Tensor, prediction: Tensor, now: Tensor, then: Tensor, generator: torch.Generator
    ) -> Tensor:
        """An ancestral step, see `ddpm.ancestral_step`."""
        self._follow(noisy)
        here, there, noisy = self._alpha_bar[now], self._alpha_bar[then], noisy.float()
        if self.prediction_type == "v_prediction":
            clean = ddpm.clean_from_velocity(noisy, prediction.float(), here)
        else:
            clean = ddpm.clean_from_noise(noisy, prediction.float(), here)
        return ddpm.ancestral_step(noisy, clean, here, there, noises.standard_normal(noisy, generator))

    def noise(self, latents: Tensor, generator: torch.Generator) -> Tensor:
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
        return noise

    def _follow(self, tensor: Tensor) -> None:
        """Keeps the tables where the latents are; they move once."""
        if self._alpha_bar.device != tensor.device:
            self._alpha_bar, self._snr = self._alpha_bar.to(tensor.device), self._snr.to(tensor.device)
