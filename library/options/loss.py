"""The noise that is added, and how the prediction is judged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from library.options.base import OptionGroup, Options, opt

if TYPE_CHECKING:
    from library.types import FamilyTraits


_SHOWN = ("show_timesteps",)


@dataclass(frozen=True, kw_only=True)
class NoiseOptions(OptionGroup, group="noise", title="Noise and timesteps"):
    noise_offset: float | None = opt(
        None,
        "strength of extra noise that is constant within a channel, for darker and brighter images; 0.05"
        " to 0.1 are usual",
        at_least=0,
        off=0,
    )
    noise_offset_random_strength: bool = opt(
        False, "draw the strength at random between 0 and --noise_offset each time", only_with=("noise_offset",)
    )
    adaptive_noise_scale: float | None = opt(
        None, "add the absolute mean of the latents, times this, to the strength of the noise offset", off=0
    )
    multires_noise_iterations: int | None = opt(
        None, "number of coarser layers of noise to add (pyramid noise), e.g. 6", at_least=1, off=0
    )
    multires_noise_discount: float = opt(
        0.3,
        "strength of each coarser layer relative to the one before",
        above=0,
        only_with=("multires_noise_iterations",),
    )
    ip_noise_gamma: float | None = opt(
        None, "strength of input perturbation noise (arXiv:2301.11706), e.g. 0.1", at_least=0, off=0
    )
    ip_noise_gamma_random_strength: bool = opt(
        False, "draw the strength at random between 0 and --ip_noise_gamma each time", only_with=("ip_noise_gamma",)
    )
    zero_terminal_snr: bool = opt(
        False, "rescale the noise schedule to zero terminal SNR, so that it ends in pure noise (arXiv:2305.08891)"
    )
    min_timestep: int | None = opt(None, "lowest timestep that is trained (0 if not given)", at_least=0, at_most=999)
    max_timestep: int | None = opt(
        None, "timesteps below this one are trained (1000 if not given)", at_least=1, at_most=1000
    )
    show_timesteps: Literal["console", "image", "off"] | None = opt(
        None,
        "show which timesteps would be drawn and how they are weighed, as text or as a PNG file in --output_dir, and "
        "train nothing",
        off="off",
    )
    show_timesteps_resolution: str = opt(
        "1024",
        "size of images for --show_timesteps, on which --timestep_sampling flux_shift depends: one side of a square, "
        "or height,width",
        comma_list=True,
        only_with=_SHOWN,
    )
    show_timesteps_offset: float = opt(
        0.0,
        "for --show_timesteps: what custom_attributes.timestep_sampling.offset of a subset would be",
        only_with=_SHOWN,
    )

    @property
    def shown_size(self) -> tuple[int, int] | None:
        """(height, width) of --show_timesteps_resolution, in pixels; None: it is none."""
        try:
            sides = [int(side) for side in self.show_timesteps_resolution.split(",")]
        except ValueError:
            return None
        return (sides[0], sides[-1]) if len(sides) in (1, 2) and min(sides) > 0 else None

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.noise_offset is not None and self.multires_noise_iterations is not None:
            yield "--noise_offset: cannot be used with --multires_noise_iterations; use one of them"
        if self.adaptive_noise_scale is not None and self.noise_offset is None:
            yield "--adaptive_noise_scale: needs --noise_offset, which it changes"
        if self.show_timesteps and self.shown_size is None:
            wanted = "must be one number or height,width in pixels"
            yield f"--show_timesteps_resolution: {wanted}, got {self.show_timesteps_resolution!r}"
        low = 0 if self.min_timestep is None else self.min_timestep
        high = 1000 if self.max_timestep is None else self.max_timestep
        if low >= high:
            yield f"--min_timestep: must be below --max_timestep, got {low} and {high}"


_HUBER = ("loss_type=huber", "loss_type=smooth_l1")


@dataclass(frozen=True, kw_only=True)
class LossOptions(OptionGroup, group="loss", title="Loss"):
    loss_type: Literal["l1", "l2", "huber", "smooth_l1"] = opt("l2", "loss function of prediction and target")
    huber_schedule: Literal["constant", "exponential", "snr"] = opt(
        "snr", "how the switch point of huber and smooth_l1 depends on the noise level", only_with=_HUBER
    )
    huber_c: float = opt(
        0.1, "switch point of huber and smooth_l1, from squared to absolute distance", above=0, only_with=_HUBER
    )
    huber_scale: float = opt(1.0, "factor on the switch point", above=0, only_with=_HUBER)
    prior_loss_weight: float = opt(1.0, "weight of regularisation images in the loss", at_least=0)
    masked_loss: bool = opt(
        False, "weight the loss by masks: the images of --conditioning_data_dir, or transparency with --alpha_mask"
    )
    min_snr_gamma: float | None = opt(
        None, "gamma of min-SNR loss weighting (arXiv:2303.09556); 5 is usual; 0 = off", at_least=0, off=0
    )
    scale_v_pred_loss_like_noise_pred: bool = opt(False, "weight a v-prediction loss as if noise were predicted")
    v_pred_like_loss: float | None = opt(
        None, "add a v-prediction-like loss, times this, to the loss of a noise prediction", at_least=0, off=0
    )
    debiased_estimation_loss: bool = opt(False, "weight the loss by debiased estimation (arXiv:2310.08442)")
