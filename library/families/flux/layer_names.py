"""Names of the layers of FLUX.1 in network files."""

from __future__ import annotations

from library.checkpoints.layer_names import PartNames
from library.families.flux.keymap import flux_map
from library.families.shared.layer_names import LayerSizes, clip_names, t5_names

_TRANSFORMER = PartNames(keys=flux_map(), prefixes=("lora_unet",), diffusers="transformer", comfyui="diffusion_model")


def layer_names(sizes: LayerSizes) -> tuple[PartNames, ...]:
    """The parts of the model. `sizes` says nothing more about it."""
    return (
        _TRANSFORMER,
        clip_names("te1", "te", diffusers="text_encoder", comfyui="clip_l"),
        t5_names("te3", "te2", diffusers="text_encoder_2"),
    )
