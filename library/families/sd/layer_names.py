"""Names of the layers of Stable Diffusion 1.x/2.x in network files."""

from __future__ import annotations

from library.checkpoints.keymap import KeyMap
from library.checkpoints.layer_names import PartNames
from library.families.shared.layer_names import LayerSizes, clip_names
from library.families.shared.unet import TRANSFORMER, unet_rules

# Width of the text states, and so of the inputs of cross-attention -> whether projections are linear: of 1.x, of 2.x.
_LINEAR = {768: False, 1024: True}
_LEVELS = (True, True, True, False)  # which have transformers
_KEYS = KeyMap(*unet_rules(2, _LEVELS, transformer=TRANSFORMER))
_UNETS = {  # by whether projections are linear; None: not known
    linear: PartNames(
        keys=_KEYS,
        prefixes=("lora_unet",),
        diffusers="unet",
        comfyui="diffusion_model",
        kohya_by_module=True,
        linear_projections=linear,
    )
    for linear in (None, False, True)
}


def layer_names(sizes: LayerSizes) -> tuple[PartNames, ...]:
    """The parts of a model that a file with layers of these sizes is of."""
    widths = [width for name, (_, width) in sizes.items() if name.endswith(("attn2_to_k", "self_attn_q_proj"))]
    linear = _LINEAR.get(widths[0]) if widths else None
    return _UNETS[linear], clip_names("te", "te1", diffusers="text_encoder", comfyui="clip_h" if linear else "clip_l")
