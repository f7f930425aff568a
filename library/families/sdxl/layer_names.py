"""Names of the layers of SDXL in network files."""

from __future__ import annotations

from library.checkpoints.keymap import KeyMap
from library.checkpoints.layer_names import PartNames
from library.families.shared.layer_names import LayerSizes, clip_names
from library.families.shared.unet import TRANSFORMER, unet_rules

_LEVELS = (False, True, True)  # which have transformers
_UNET = PartNames(
    keys=KeyMap(*unet_rules(2, _LEVELS, added=True, transformer=TRANSFORMER)),
    prefixes=("lora_unet",),
    diffusers="unet",
    comfyui="diffusion_model",
    linear_projections=True,
)


def layer_names(sizes: LayerSizes) -> tuple[PartNames, ...]:
    """The parts of the model. `sizes` says nothing more about it."""
    return (
        _UNET,
        clip_names("te1", "te", diffusers="text_encoder", comfyui="clip_l"),
        clip_names("te2", diffusers="text_encoder_2", comfyui="clip_g"),
    )
