"""What `--network_args` says to networks.lora_sd3. No torch here."""

from __future__ import annotations

from collections.abc import Mapping

from networks import lora_dit_args
from networks.lora_dit_args import BlockKind, DitArgs, Layout

_JOINT = r"^lora_unet_joint_\D*(\d+)_"

LAYOUT = Layout(
    module="networks.lora_sd3",
    blocks={"joint": BlockKind("train_block_indices", _JOINT)},
    types={
        "context_attn_dim": _JOINT + "context_block_attn",
        "context_mlp_dim": _JOINT + "context_block_mlp_",
        "context_mod_dim": _JOINT + "context_block_adaLN_",
        "x_attn_dim": _JOINT + "x_block_attn",  # attn2 too
        "x_mlp_dim": _JOINT + "x_block_mlp_",
        "x_mod_dim": _JOINT + "x_block_adaLN_",
    },
    outer="emb_dims",
    outer_layers=(
        r"^lora_unet_context_embedder$",
        r"^lora_unet_t_embedder_",
        r"^lora_unet_x_embedder_",
        r"^lora_unet_y_embedder_",
        r"^lora_unet_final_layer_adaLN_",
        r"^lora_unet_final_layer_linear$",
    ),
)


def parse(args: Mapping[str, str]) -> DitArgs:
    """The arguments as values. Raises: UserError: every problem at once."""
    return lora_dit_args.parse(args, LAYOUT)


def check(args: Mapping[str, str], *, ranks_from_file: bool, dim: int | None = None) -> list[str]:
    """What can be said about the arguments without a model: a warning for each that has no effect."""
    return lora_dit_args.check(args, LAYOUT, ranks_from_file=ranks_from_file)
