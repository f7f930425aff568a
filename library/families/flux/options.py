"""The options and traits of FLUX.1. No torch here: --help needs this module."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from library.families.shared.option_groups import FlowOptions
from library.options.base import opt
from library.types import FamilyTraits

if TYPE_CHECKING:
    from library.options.base import Options

# (tokens of an image, mu): sampling schedules lie on the line through these two.
FEW_TOKENS, MANY_TOKENS = (256, 0.5), (4096, 1.15)


def resolution_shift(height: int, width: int) -> float:
    """The flow shift e^mu of images with latents of this size: large images need more noise.

    Source: the sampling schedule of the model's authors, github.com/black-forest-labs/flux.
    """
    tokens = (height // 2) * (width // 2)
    slope = (MANY_TOKENS[1] - FEW_TOKENS[1]) / (MANY_TOKENS[0] - FEW_TOKENS[0])
    return math.exp(FEW_TOKENS[1] + slope * (tokens - FEW_TOKENS[0]))


TRAITS = FamilyTraits(
    label="FLUX.1",
    text_encoders=("te1", "te3"),  # CLIP-L, T5-XXL
    latent_channels=16,
    pixel_multiple=16,
    bucket_step=32,
    objective="flow",
    cache_suffix="_flux.npz",
    default_resolution=512,
    sample_steps=20,
    sample_scale=1.0,
    embedding_keys={"te1": "clip_l", "te3": "t5xxl"},
    cache_keys_by_size=True,
    extra_graphs=1,  # what a single block gives are parts of one tensor; what the last double block gives are two
    tokens_in_a_row=True,
    norms_keep_dtype=True,
    blocks_per_swap=1.5,  # two of the smaller single blocks count as one
    flow_shift=resolution_shift,
)


_OF_NORMAL_NUMBERS = ("sigmoid", "shift", "flux_shift")  # values of --timestep_sampling


@dataclass(frozen=True, kw_only=True)
class FluxOptions(FlowOptions, group="family", title="FLUX.1"):
    ae: str | None = opt(None, "file of the autoencoder", exists="file")
    controlnet_model_name_or_path: str | None = opt(
        None, "ControlNet to apply during training; refused, as no conditioning images can be given here"
    )
    t5xxl_max_token_length: int | None = opt(
        None,
        "maximum caption length for T5 in tokens, to which all captions are padded; if not given, 512 "
        "for FLUX.1 dev, else 256",
        at_least=1,
        off=0,
    )
    guidance_scale: float = opt(3.5, "guidance value fed to FLUX.1 dev during training; 1 for new concepts")
    timestep_sampling: Literal["sigma", "uniform", "sigmoid", "shift", "flux_shift"] = opt(
        "sigma",
        "distribution of the timesteps in training; shift and flux_shift (shifted by image size) match "
        "image generation",
    )
    sigmoid_scale: float = opt(
        1.0,
        "scale of --timestep_sampling sigmoid, shift and flux_shift: lower concentrates on the middle timesteps",
        above=0,
        only_with=tuple(f"timestep_sampling={name}" for name in _OF_NORMAL_NUMBERS),
    )
    model_prediction_type: Literal["raw", "additive", "sigma_scaled"] = opt(
        "sigma_scaled", "how the loss interprets the model's output; raw is right for FLUX"
    )
    discrete_flow_shift: float = opt(
        3.0,
        "shift of --timestep_sampling sigma and shift: above 1 more noise, below 1 less",
        above=0,
        only_with=("timestep_sampling=sigma", "timestep_sampling=shift"),
    )
    model_type: Literal["flux", "chroma"] = opt(
        "flux", "type of model; chroma is refused, as it has another architecture"
    )

    def ignores_timestep_offset(self, traits: FamilyTraits) -> str | None:
        """See `CommonOptions`: it is added to normal numbers, which only some ways of sampling draw."""
        drawn = self.timestep_sampling in _OF_NORMAL_NUMBERS
        return None if drawn else f"with --timestep_sampling {self.timestep_sampling}"

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from super().check(opts, traits)
        if self.model_type == "chroma":
            yield "--model_type: chroma is not supported; leave it out and give a FLUX.1 model"
        if self.controlnet_model_name_or_path is not None:
            yield (
                "--controlnet_model_name_or_path: not supported, as no option gives the ControlNet its images; "
                "leave it out"
            )

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from super().warnings(opts, traits)
        if opts.model.vae:
            yield f"--vae: has no effect on {traits.label}; give its autoencoder with --ae"
        if self.model_prediction_type != "raw":
            kept = " (the default, kept for old commands)" if self.model_prediction_type == "sigma_scaled" else ""
            yield (
                f"--model_prediction_type: {self.model_prediction_type}{kept} does not fit the velocity that FLUX "
                "predicts and is trained on; --model_prediction_type raw does"
            )
        if "weighting_scheme" in opts.explicit:
            for other in self._idle_weighting():
                yield f"--weighting_scheme: has no effect with --{other} {getattr(self, other)}"

    def _idle_weighting(self) -> Iterator[str]:
        """The options that keep the weighting scheme from acting."""
        if self.weighting_scheme in ("logit_normal", "mode") and self.timestep_sampling != "sigma":
            yield "timestep_sampling"
        if self.weighting_scheme in ("sigma_sqrt", "cosmap") and self.model_prediction_type != "sigma_scaled":
            yield "model_prediction_type"


class FluxControlNetFamily(FluxOptions, without=("controlnet_model_name_or_path",)):
    """The family's options where a ControlNet is trained, which the method's option names."""
