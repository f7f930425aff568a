"""Names of SDXL single files against diffusers and transformers. U-Net and VAE: see the shared maps."""

from __future__ import annotations

from library.checkpoints.keymap import Each, KeyMap, Rename, Transpose
from library.families.shared.open_clip import OPEN_CLIP_RULES
from library.families.shared.unet import SAME

TE1 = "conditioner.embedders.0.transformer."  # CLIP-L: transformers' own names follow
TE2 = "conditioner.embedders.1.model."  # bigG: OpenCLIP's names follow
PROJECTION = "text_projection"  # applied from the right, so the other way round than transformers' linear layer
PROJECTION_LAYER = "text_projection.weight"  # some files hold it as that linear layer


def text1_map() -> KeyMap:
    """CLIP-L's names in the file against transformers', which are always written with `text_model.` here."""
    return KeyMap(Each(TE1, "", *SAME))


def text2_map(projection: str = PROJECTION) -> KeyMap:
    """bigG's names in the file against those of CLIPTextModelWithProjection.

    Args:
        projection: what the file calls the projection, `PROJECTION` or `PROJECTION_LAYER`.
    """
    rule = Transpose if projection == PROJECTION else Rename
    return KeyMap(Each(TE2, "", *OPEN_CLIP_RULES, rule(projection, "text_projection.weight")))
