"""Options that several families have. A family's own group builds on these; each option is declared once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from library.options.base import OptionGroup, Options, opt

if TYPE_CHECKING:
    from library.types import FamilyTraits


@dataclass(frozen=True, kw_only=True)
class CommonOptions(OptionGroup, group="family", title="Model family"):
    """The family options of every training script; a family says which of them have an effect."""

    v2: bool = opt(False, "the base model is Stable Diffusion 2.x; has no effect on other families")
    v_parameterization: bool = opt(
        False, "the base model predicts v, as the 768 pixel version of 2.x and some SDXL models do"
    )
    clip_skip: int | None = opt(
        None,
        "use the output of this layer of the text encoder, counted from the end (1: the last, 2: the one"
        " before it); for SD 1.x only",
        at_least=1,
        off=0,
    )
    max_token_length: Literal[75, 150, 225] | None = opt(
        None, "maximum caption length in tokens; 75 if not given", off=75, synonyms={255: 225}
    )
    weighted_captions: bool = opt(False, "apply weights such as (word:1.2) and [word] in captions")

    def ignores_timestep_offset(self, traits: FamilyTraits) -> str | None:
        """With what a subset's offset of timesteps has no effect, for a message; None: it has one."""
        return f"on {traits.label}"

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if opts.loss.scale_v_pred_loss_like_noise_pred and not self.v_parameterization:
            yield "--scale_v_pred_loss_like_noise_pred: needs --v_parameterization"
        if opts.loss.v_pred_like_loss is not None and self.v_parameterization:
            yield "--v_pred_like_loss: cannot be used with --v_parameterization, which makes it a v loss already"

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if opts.noise.zero_terminal_snr and not self.v_parameterization:
            yield "--zero_terminal_snr: meant for --v_parameterization; predicting noise from pure noise trains little"


# Options of the scripts whose objective is Stable Diffusion's, by group; with rectified flow they do nothing.
_DDPM_ONLY = {
    "family": ("v2", "v_parameterization", "clip_skip", "max_token_length", "weighted_captions"),
    "noise": ("noise_offset", "adaptive_noise_scale", "multires_noise_iterations", "zero_terminal_snr"),
    "loss": ("min_snr_gamma", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss", "debiased_estimation_loss"),
}


_LOGIT_NORMAL = ("weighting_scheme=logit_normal",)


@dataclass(frozen=True, kw_only=True)
class FlowOptions(CommonOptions):
    """The options that the rectified-flow families share: T5, timestep density and loss weighting."""

    clip_l: str | None = opt(None, "file of the text encoder CLIP-L", exists="file")
    t5xxl: str | None = opt(None, "file of the text encoder T5-XXL", exists="file")
    apply_t5_attn_mask: bool = opt(False, "mask the padding tokens of T5 in attention")
    weighting_scheme: Literal["sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"] = opt(
        "uniform", "timestep density (logit_normal, mode) or loss weighting (sigma_sqrt, cosmap)"
    )
    logit_mean: float = opt(0.0, "mean of --weighting_scheme logit_normal", only_with=_LOGIT_NORMAL)
    logit_std: float = opt(
        1.0, "standard deviation of --weighting_scheme logit_normal", above=0, only_with=_LOGIT_NORMAL
    )
    mode_scale: float = opt(1.29, "strength of --weighting_scheme mode", only_with=("weighting_scheme=mode",))

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if opts.loss.loss_type in ("huber", "smooth_l1") and opts.loss.huber_schedule == "snr":
            yield (
                f"--huber_schedule: snr does not exist for {traits.label}, which has no such ratio; "
                "choose constant or exponential"
            )
        arguments = (entry.partition("=") for entry in getattr(opts.method, "network_args", None) or ())
        trains_t5 = not getattr(opts.method, "network_train_unet_only", True) and any(
            name.strip() == "train_t5xxl" and value.strip().lower() == "true" for name, _, value in arguments
        )
        if opts.text_cache.in_use and trains_t5:
            yield (
                "--cache_text_encoder_outputs: T5 cannot be trained when its outputs are cached; drop this option or "
                "train_t5xxl=True in --network_args"
            )

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        for group, names in _DDPM_ONLY.items():
            for name in names:
                if getattr(getattr(opts, group), name):
                    yield f"--{name}: has no effect on {traits.label}"
