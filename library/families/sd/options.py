"""What only Stable Diffusion 1.x and 2.x are asked, and their numbers. No torch here: --help needs this module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from library.families.base import FamilyTraits
from library.options.base import OptionGroup, Options, opt

TRAITS = FamilyTraits(
    label="Stable Diffusion 1.x/2.x",
    text_encoders=("te",),
    latent_channels=4,
    pixel_multiple=8,
    bucket_step=64,
    objective="ddpm",
    cache_suffix="_sd.npz",
    default_resolution=512,
    sample_steps=30,
    sample_scale=7.5,
)


@dataclass(frozen=True, kw_only=True)
class SdOptions(OptionGroup, group="family", title="Stable Diffusion 1.x/2.x"):
    v2: bool = opt(False, "the base model is Stable Diffusion 2.x")
    v_parameterization: bool = opt(False, "the base model predicts v, as the 768 pixel version of 2.x does")
    clip_skip: int | None = opt(
        None, "text features from this layer, counted from the end: 1 the last, 2 the one before", at_least=1, off=0
    )
    max_token_length: Literal[75, 150, 225] | None = opt(None, "longest caption in tokens; 75 if not given", off=75)
    weighted_captions: bool = opt(False, "follow weights such as (word:1.2) and [word] in captions")

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if opts.loss.scale_v_pred_loss_like_noise_pred and not self.v_parameterization:
            yield "--scale_v_pred_loss_like_noise_pred: needs --v_parameterization"
        if opts.loss.v_pred_like_loss is not None and self.v_parameterization:
            yield "--v_pred_like_loss: cannot be used with --v_parameterization, which makes it a v loss already"

    def advise(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.v2 and self.clip_skip is not None:
            yield "--clip_skip: 2.x models use the layer before the last by themselves; leave it out for them"
        if opts.noise.zero_terminal_snr and not self.v_parameterization:
            yield "--zero_terminal_snr: meant for --v_parameterization; predicting noise in pure noise teaches little"


OPTIONS = SdOptions
SCRIPTS = {  # entry script -> method
    "train_network": "network",
    "train_db": "dreambooth",
    "fine_tune": "finetune",
}
