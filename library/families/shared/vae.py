"""The image autoencoder of all families: key map, shape and construction of diffusers' AutoencoderKL."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from library.checkpoints.keymap import Conv1x1, Each, Entry, KeyMap, Rename, Rule
from library.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, ...]]

VAE = "first_stage_model."  # before every name in a single file of a whole model
NO_VAE = "holds no VAE; give one with --vae"
VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
# Diffusers' names of the attention, of early versions and today.
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}

RESNET = (
    Rename("norm1.{p}", "norm1.{p}"),
    Rename("conv1.{p}", "conv1.{p}"),
    Rename("norm2.{p}", "norm2.{p}"),
    Rename("conv2.{p}", "conv2.{p}"),
    Rename("nin_shortcut.{p}", "conv_shortcut.{p}"),
)
MIDDLE = (
    Each("mid.block_1", "mid_block.resnets.0", *RESNET),
    Each("mid.block_2", "mid_block.resnets.1", *RESNET),
    Each(
        "mid.attn_1",
        "mid_block.attentions.0",
        Rename("norm.{p}", "group_norm.{p}"),
        Conv1x1("q.{p}", "to_q.{p}"),
        Conv1x1("k.{p}", "to_k.{p}"),
        Conv1x1("v.{p}", "to_v.{p}"),
        Conv1x1("proj_out.{p}", "to_out.0.{p}"),
    ),
)
ENDS = (
    Rename("conv_in.{p}", "conv_in.{p}"),
    Rename("norm_out.{p}", "conv_norm_out.{p}"),
    Rename("conv_out.{p}", "conv_out.{p}"),
)


def vae_rules(levels: int) -> tuple[Rule, ...]:
    """Latent-diffusion names against diffusers', without prefix. The decoder's levels are numbered in reverse."""
    down = [
        rule
        for level in range(levels)
        for rule in (
            Each(f"down.{level}.block.{{j}}", f"down_blocks.{level}.resnets.{{j}}", *RESNET),
            Rename(f"down.{level}.downsample.conv.{{p}}", f"down_blocks.{level}.downsamplers.0.conv.{{p}}"),
        )
    ]
    up = [
        rule
        for level in range(levels)
        for rule in (
            Each(f"up.{levels - 1 - level}.block.{{j}}", f"up_blocks.{level}.resnets.{{j}}", *RESNET),
            Rename(f"up.{levels - 1 - level}.upsample.conv.{{p}}", f"up_blocks.{level}.upsamplers.0.conv.{{p}}"),
        )
    ]
    return (
        Each("encoder", "encoder", *ENDS, *MIDDLE, *down),
        Each("decoder", "decoder", *ENDS, *MIDDLE, *up),
        Rename("quant_conv.{p}", "quant_conv.{p}"),
        Rename("post_quant_conv.{p}", "post_quant_conv.{p}"),
    )


def missing_vae(keys: Iterable[str]) -> str | None:
    """The problem of a whole model's file without a VAE; None: it has one."""
    return None if any(key.startswith(VAE) for key in keys) else NO_VAE


def vae_map(levels: int, prefix: str = VAE) -> KeyMap:
    """VAE names in the file against those of AutoencoderKL; stand-alone files may have no prefix."""
    return KeyMap(Each(prefix, "", *vae_rules(levels)))


def has_diffusers_names(names: Iterable[str]) -> bool:
    """Whether a VAE's tensors have diffusers' names, else those of latent diffusion; both without prefix."""
    return any(name.startswith("encoder.down_blocks.") for name in names)


def file_entries(names: Iterable[str]) -> list[Entry]:
    """What a whole model's file holds of a VAE with these tensors, whichever of the two layouts its names are of.

    Raises: KeyMapError: a name that is of neither.
    """
    names = list(names)
    if not has_diffusers_names(names):
        same = Rename("{rest}", "{rest}")
        return [Entry(VAE + name, (name,), same) for name in names]
    own = {}  # by the names of today
    for name in names:
        new = name
        for old, today in _OLD_ATTENTION.items():
            new = new.replace(old, today)
        own[new] = name
    levels = 1 + max(int(name.split(".")[2]) for name in own if name.startswith("encoder.down_blocks."))
    return [Entry(e.file, tuple(own[name] for name in e.models), e.rule) for e in vae_map(levels).entries(own)]


def vae_shapes(shapes: Shapes) -> Shapes:
    """The VAE's part of a file's shapes, without prefix; a stand-alone file may have none to take off."""
    inside = {key.removeprefix(VAE): shape for key, shape in shapes.items() if key.startswith(VAE)}
    return inside or shapes


def vae_config(shapes: Shapes, scaling_factor: float, shift_factor: float | None = None) -> dict[str, Any]:
    """AutoencoderKL's arguments, read from the shapes of a latent-diffusion VAE (names without prefix).

    Args:
        scaling_factor, shift_factor: from raw latents z to what the denoiser sees, (z - shift) * scaling.
    Raises: UserError: the names are not those of such a VAE.
    """

    def count(template: str) -> int:
        number = 0
        while template.format(number) in shapes:
            number += 1
        return number

    levels = count("encoder.down.{}.block.0.conv1.weight")
    layers = count("encoder.down.0.block.{}.conv1.weight")
    if not levels or "decoder.conv_in.weight" not in shapes:
        raise UserError("the VAE's tensors are not those of a Stable Diffusion VAE")
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": tuple(shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(levels)),
        "layers_per_block": layers,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "norm_num_groups": 32,
        "scaling_factor": scaling_factor,
        "shift_factor": shift_factor,
    }


def encode_pixels(
    vae: nn.Module, pixels: Tensor, generator: torch.Generator | list[torch.Generator] | None = None
) -> Tensor:
    """Draws latents from the VAE's posterior: mean + std * eps, neither shifted nor scaled.

    Args:
        vae: AutoencoderKL; works in the dtype of its weights.
        pixels: (B, 3, H, W) in [-1, 1].
        generator: source of eps, for the same latents again; its device is where eps is drawn. A list: one per image.
    Returns: raw latents, (B, C, H/8, W/8), dtype of the VAE.
    Source: Kingma and Welling 2014 (arXiv:1312.6114), eq. 10.
    """
    return _posterior(vae, pixels).sample(generator)


def encode_mean(vae: nn.Module, pixels: Tensor) -> Tensor:
    """The mean of the distribution that `encode_pixels` draws from; the same arguments and shape."""
    return _posterior(vae, pixels).mode()


def _posterior(vae: nn.Module, pixels: Tensor) -> Any:
    import torch

    weight = next(vae.parameters())
    with torch.autocast(weight.device.type, enabled=False):  # half precision overflows in some published VAEs
        return vae.encode(pixels.to(weight.device, weight.dtype)).latent_dist


def decode_latents(vae: nn.Module, latents: Tensor) -> Tensor:
    """Raw latents (B, C, h, w) to pixels (B, 3, 8h, 8w), about [-1, 1], not clamped, dtype of the VAE."""
    import torch

    weight = next(vae.parameters())
    with torch.autocast(weight.device.type, enabled=False):
        return vae.decode(latents.to(weight.device, weight.dtype)).sample
