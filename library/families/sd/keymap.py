"""Names of Stable Diffusion 1.x/2.x single files (the latent-diffusion layout) against diffusers and transformers."""

from __future__ import annotations

from library.checkpoints.keymap import Each, KeyMap
from library.families.shared.open_clip import OPEN_CLIP_RULES
from library.families.shared.unet import SAME

CLIP = "cond_stage_model.transformer."  # SD 1.x: transformers' own names follow
OPEN_CLIP = "cond_stage_model.model."  # SD 2.x: OpenCLIP's names follow


def text_map(v2: bool, text_model_level: bool = True) -> KeyMap:
    """Text encoder names in the file against transformers', which are always written with `text_model.` here.

    Args:
        v2: the OpenCLIP layout of SD 2.x.
        text_model_level: False for the SD 1.x files that leave `text_model.` out.
    """
    if v2:
        return KeyMap(Each(OPEN_CLIP, "", *OPEN_CLIP_RULES))
    return KeyMap(Each(CLIP + ("text_model" if text_model_level else ""), "text_model", *SAME))
