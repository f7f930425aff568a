"""The options and traits of Stable Diffusion 3 and 3.5. No torch here: --help needs this module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.families.shared.option_groups import FlowOptions
from library.options.base import opt
from library.types import FamilyTraits

if TYPE_CHECKING:
    from library.options.base import Options

SAMPLING_SHIFT = 3.0  # of the published models' schedule


def _sampling_shift(height: int, width: int) -> float:
    return SAMPLING_SHIFT  # at every size


TRAITS = FamilyTraits(
    label="Stable Diffusion 3/3.5",
    text_encoders=("te1", "te2", "te3"),  # CLIP-L, CLIP-G, T5-XXL
    latent_channels=16,
    pixel_multiple=16,
    bucket_step=32,
    objective="flow",
    cache_suffix="_sd3.npz",
    default_resolution=512,
    sample_steps=30,
    sample_scale=7.5,
    embedding_keys={"te1": "clip_l", "te2": "clip_g", "te3": "t5xxl"},
    cache_keys_by_size=True,
    tokens_in_a_row=True,
    norms_keep_dtype=True,
    flow_shift=_sampling_shift,
)

_SAVED_APART = "networks hold what was trained of the text encoders; whole encoders are saved by whole-model training"


@dataclass(frozen=True, kw_only=True)
class Sd3Options(FlowOptions, group="family", title="Stable Diffusion 3/3.5"):
    clip_g: str | None = opt(None, "file of the text encoder CLIP-G", exists="file")
    save_clip: bool = opt(
        False, "save CLIP-L and CLIP-G as separate files beside the model, even if they were not trained"
    )
    save_t5xxl: bool = opt(False, "save T5 as a separate file beside the model, even if it was not trained")
    t5xxl_device: str | None = opt(None, "deprecated; T5 is moved to the device while it is needed")
    t5xxl_dtype: str | None = opt(None, "deprecated; the dtype of T5 follows --mixed_precision and --fp8_base")
    t5xxl_max_token_length: int = opt(
        256, "maximum caption length for T5 in tokens, to which all captions are padded", at_least=1, off=0
    )
    apply_lg_attn_mask: bool = opt(False, "mask the padding tokens of CLIP-L and CLIP-G in attention")
    clip_l_dropout_rate: float = opt(
        0.0, "share of captions whose CLIP-L output is replaced by zeros in training", at_least=0, at_most=1
    )
    clip_g_dropout_rate: float = opt(
        0.0, "share of captions whose CLIP-G output is replaced by zeros in training", at_least=0, at_most=1
    )
    t5_dropout_rate: float = opt(
        0.0, "share of captions whose T5 output is replaced by zeros in training", at_least=0, at_most=1
    )
    pos_emb_random_crop_rate: float = opt(
        0.0,
        "share of training steps that crop the positional embedding at a random position instead of its "
        "centre; for SD3.5 medium",
        at_least=0,
        at_most=1,
    )
    enable_scaled_pos_embed: bool = opt(
        False,
        "scale the positional embedding so that images of every resolution span as much of it as 1024 "
        "pixel images do; for SD3.5 medium",
    )
    training_shift: float = opt(
        1.0, "shift of the timestep distribution: above 1 towards more noise, below 1 towards less", above=0
    )

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from super().warnings(opts, traits)
        for name, instead in (("t5xxl_device", "T5 is moved as needed"), ("t5xxl_dtype", "see --mixed_precision")):
            if getattr(self, name) is not None:
                yield f"--{name}: has no effect; {instead}"
        for name in ("save_clip", "save_t5xxl"):
            if getattr(self, name) and not opts.method.trains_model:
                yield f"--{name}: has no effect here; {_SAVED_APART}"


class Sd3ControlNetFamily(
    Sd3Options,
    without=(  # the ControlNet would see other texts and other positions than the denoiser
        *("clip_l_dropout_rate", "clip_g_dropout_rate", "t5_dropout_rate"),
        *("pos_emb_random_crop_rate", "enable_scaled_pos_embed", "save_clip", "save_t5xxl"),
    ),
):
    """The family's options where a ControlNet is trained."""
