"""What a network may adapt in Stable Diffusion 3/3.5, with the names that LoRA files use for it.

They are the names of the single files' own layers, in which query, key and value are one.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from library.checkpoints.keymap import SwapHalves
from library.families.sd3.keymap import mmdit_map
from library.families.shared.targets import lora_key
from library.types import FilePlace, LoraTarget

if TYPE_CHECKING:
    from torch import nn

BLOCK = re.compile(r"joint_blocks\.(\d+)\.(context_block|x_block)\.(.+)")
# In a block, in this order; the text's side comes first.
SIDES = ("context_block", "x_block")
LAYERS = ("attn.qkv", "attn.proj", "attn2.qkv", "attn2.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
# Outside the blocks: adapted only where a network asks for them one by one.
EMBEDDINGS = (
    "context_embedder",
    "t_embedder.mlp.0",
    "t_embedder.mlp.2",
    "x_embedder.proj",
    "y_embedder.mlp.0",
    "y_embedder.mlp.2",
    "final_layer.adaLN_modulation.1",
    "final_layer.linear",
)


def mmdit_targets(denoiser: nn.Module) -> list[LoraTarget]:
    """The layers of the blocks, in the file's order, then, marked `optional`, the layers outside them."""
    from torch import nn

    keys = mmdit_map(denoiser.config.num_layers, prefix="")
    layers = [name for name, module in denoiser.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    groups = keys.groups(layers)
    matches = sorted(
        filter(None, map(BLOCK.fullmatch, groups)),
        key=lambda match: (int(match[1]), SIDES.index(match[2]), LAYERS.index(match[3])),
    )
    in_blocks = [match[0] for match in matches]
    outside = sorted((name for name in groups if not BLOCK.fullmatch(name)), key=EMBEDDINGS.index)
    targets = []
    for name in (*in_blocks, *outside):
        entry = keys.by_file(f"{name}.weight")
        assert entry is not None
        # The classes that contain a layer in the code of the model's authors.
        classes = ((".".join(name.split(".")[:3]), "SingleDiTBlock"),) if name in in_blocks else ()
        targets.append(
            LoraTarget(
                lora_key("unet", name),
                "denoiser",
                groups[name],
                swap_halves=isinstance(entry.rule, SwapHalves),
                optional=name in outside,
                place=FilePlace(name, classes),
            )
        )
    return targets
