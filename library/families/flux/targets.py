"""What a network may adapt in FLUX.1, with the names that LoRA files use for it: those of the original layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from library.checkpoints.keymap import SwapHalves
from library.families.flux.keymap import EMBEDDERS, flux_map
from library.families.shared.t5 import t5_targets
from library.families.shared.targets import clip_targets, lora_key
from library.types import FilePlace, LoraTarget

if TYPE_CHECKING:
    from torch import nn

DOUBLE_LAYERS = tuple(
    f"{stream}_{layer}" for stream in ("img", "txt") for layer in ("mod.lin", "attn.qkv", "attn.proj", "mlp.0", "mlp.2")
)
SINGLE_LAYERS = ("linear1", "linear2", "modulation.lin")
_BLOCK_CLASSES = {"double_blocks": "DoubleStreamBlock", "single_blocks": "SingleStreamBlock"}
# Outside the blocks: adapted only where a network asks for them.
OUTER_LAYERS = (
    "img_in",
    *(f"{name}.{layer}" for name in EMBEDDERS for layer in ("in_layer", "out_layer")),
    "txt_in",
)


# What control LoRAs have, too: the final layer, whose modulation has halves the other way round, and norms.
FINAL_LAYERS = ("final_layer.linear", "final_layer.adaLN_modulation.1")
DOUBLE_NORMS = tuple(f"{stream}_attn.norm.{name}_norm" for stream in ("img", "txt") for name in ("query", "key"))
SINGLE_NORMS = ("norm.query_norm", "norm.key_norm")


def transformer_targets(denoiser: nn.Module) -> list[LoraTarget]:
    """The layers of the blocks, in the order of the original layers, then those outside them, marked `optional`.

    Last are, `from_file`, the final layer and the norms of queries and keys.
    """
    config, keys = denoiser.config, flux_map()
    names = [f"double_blocks.{i}.{layer}" for i in range(config.num_layers) for layer in DOUBLE_LAYERS]
    names += [f"single_blocks.{i}.{layer}" for i in range(config.num_single_layers) for layer in SINGLE_LAYERS]
    outer = [name for name in OUTER_LAYERS if config.guidance_embeds or not name.startswith("guidance_in.")]
    targets = []
    for name in (*names, *outer):
        entry = keys.by_file(f"{name}.weight")
        assert entry is not None
        modules = tuple(model.removesuffix(".weight") for model in entry.models)
        # The classes that contain the layer in the code of the model's authors.
        kind, *inside = name.split(".")
        classes = [(f"{kind}.{inside[0]}", _BLOCK_CLASSES[kind])] if kind in _BLOCK_CLASSES else []
        if "_attn." in name:
            classes.append((name.rpartition(".")[0], "SelfAttention"))
        place = FilePlace(name, tuple(classes))
        more = {"optional": name in outer, "grows": name == "img_in"}
        targets.append(LoraTarget(lora_key("unet", name), "denoiser", modules, place=place, **more))
    return targets + _from_file(denoiser)


def _from_file(denoiser: nn.Module) -> list[LoraTarget]:
    config, keys = denoiser.config, flux_map()
    norms = [f"double_blocks.{i}.{layer}" for i in range(config.num_layers) for layer in DOUBLE_NORMS]
    norms += [f"single_blocks.{i}.{layer}" for i in range(config.num_single_layers) for layer in SINGLE_NORMS]
    targets = []
    for name in (*FINAL_LAYERS, *norms):
        entry = keys.by_file(f"{name}.{'scale' if name in norms else 'weight'}")
        assert entry is not None
        kinds = {"norm": name in norms, "swap_halves": isinstance(entry.rule, SwapHalves)}
        modules = (entry.models[0].removesuffix(".weight"),)
        targets.append(LoraTarget(lora_key("unet", name), "denoiser", modules, optional=True, from_file=True, **kinds))
    return targets


def text_targets(text_encoders: Mapping[str, nn.Module]) -> list[LoraTarget]:
    """The layers of CLIP-L and T5, as far as they are loaded."""
    targets = clip_targets(text_encoders["te1"], "te1") if "te1" in text_encoders else []
    return targets + (t5_targets(text_encoders["te3"]) if "te3" in text_encoders else [])
