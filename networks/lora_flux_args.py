"""What `--network_args` says to networks.lora_flux. No torch here."""

from __future__ import annotations

from collections.abc import Mapping

from networks import lora_dit_args
from networks.lora_dit_args import BlockKind, DitArgs, Layout

_DOUBLE, _SINGLE = r"^lora_unet_double_\D*(\d+)_", r"^lora_unet_single_\D*(\d+)_"

LAYOUT = Layout(
    module="networks.lora_flux",
    blocks={
        "double": BlockKind("train_double_block_indices", _DOUBLE),
        "single": BlockKind("train_single_block_indices", _SINGLE),
    },
    types={
        "img_attn_dim": _DOUBLE + "img_attn_",
        "txt_attn_dim": _DOUBLE + "txt_attn_",
        "img_mlp_dim": _DOUBLE + "img_mlp_",
        "txt_mlp_dim": _DOUBLE + "txt_mlp_",
        "img_mod_dim": _DOUBLE + "img_mod_",
        "txt_mod_dim": _DOUBLE + "txt_mod_",
        "single_dim": _SINGLE + "linear",
        "single_mod_dim": _SINGLE + "modulation_",
    },
    outer="in_dims",
    outer_layers=(
        r"^lora_unet_img_in$",
        r"^lora_unet_time_in_",
        r"^lora_unet_vector_in_",
        r"^lora_unet_guidance_in_",
        r"^lora_unet_txt_in$",
    ),
    more=lora_dit_args.GGPO,
)


def parse(args: Mapping[str, str]) -> DitArgs:
    """The arguments as values. Raises: UserError: every problem at once."""
    return lora_dit_args.parse(args, LAYOUT)


def reads_gradients(args: Mapping[str, str]) -> str | None:
    """The argument that needs the gradients when the backward pass is over, where there is one."""
    return next((name for name in lora_dit_args.GGPO if name in args), None)


def check(args: Mapping[str, str], *, ranks_from_file: bool, dim: int | None = None) -> list[str]:
    """What can be said about the arguments without a model: a warning for each that has no effect."""
    return lora_dit_args.check(args, LAYOUT, ranks_from_file=ranks_from_file)
