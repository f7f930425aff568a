"""The U-Net of the latent-diffusion layout: its names against diffusers', its shape from a file's, its blocks.

No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from library.checkpoints.keymap import Each, KeyMap, Rename, Rule
from library.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from library.options.base import Options
    from library.types import Models

Shapes = Mapping[str, tuple[int, ...]]

CHANNELS = 4  # of latents, and so of a U-Net's input and output
INPAINTING_CHANNELS = 2 * CHANNELS + 1  # noisy latents, mask, latents of the masked image
SPECIAL_CHANNELS = {  # number of input channels -> what such a model is
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an instruct-pix2pix model",
    INPAINTING_CHANNELS: "an inpainting model",
}

UNET = "model.diffusion_model."  # before every name in a single file
HEAD_WIDTH = 64  # not visible in shapes; the real models' rule, except for the first ones
TIME_WIDTH = 256  # of the embedding of each value of the size conditioning

RESNET = (
    Rename("in_layers.0.{p}", "norm1.{p}"),
    Rename("in_layers.2.{p}", "conv1.{p}"),
    Rename("emb_layers.1.{p}", "time_emb_proj.{p}"),
    Rename("out_layers.0.{p}", "norm2.{p}"),
    Rename("out_layers.3.{p}", "conv2.{p}"),
    Rename("skip_connection.{p}", "conv_shortcut.{p}"),
)
SAME = (Rename("{rest}", "{rest}"),)
# `SAME`, layer by layer, for the transformers of a U-Net.
TRANSFORMER = (
    *(Rename(f"{name}.{{p}}", f"{name}.{{p}}") for name in ("norm", "proj_in", "proj_out")),
    *(
        Rename(f"transformer_blocks.{{n}}.{name}.{{p}}", f"transformer_blocks.{{n}}.{name}.{{p}}")
        for name in (
            *(f"attn{n}.{layer}" for n in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0")),
            *("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"),
        )
    ),
)


def unet_rules(
    layers: int, attention: tuple[bool, ...], *, added: bool = False, transformer: tuple[Rule, ...] = SAME
) -> tuple[Rule, ...]:
    """U-Net rules without the prefix.

    The file numbers its blocks through; which number a block has follows from the shape of the model.

    Args:
        layers: resnets of a level on the way down, 2 in the real models; one more on the way up.
        attention: for each level (resolution), whether its resnets are followed by transformers.
        added: whether there is an embedding of other facts beside that of the time.
        transformer: the rules inside a transformer.
    """
    levels = len(attention)
    rules: list[Rule] = [
        Rename("input_blocks.0.0.{p}", "conv_in.{p}"),
        Rename("time_embed.0.{p}", "time_embedding.linear_1.{p}"),
        Rename("time_embed.2.{p}", "time_embedding.linear_2.{p}"),
        Rename("out.0.{p}", "conv_norm_out.{p}"),
        Rename("out.2.{p}", "conv_out.{p}"),
        Each("middle_block.0", "mid_block.resnets.0", *RESNET),
        Each("middle_block.1", "mid_block.attentions.0", *transformer),
        Each("middle_block.2", "mid_block.resnets.1", *RESNET),
    ]
    if added:
        rules.append(Rename("label_emb.0.0.{p}", "add_embedding.linear_1.{p}"))
        rules.append(Rename("label_emb.0.2.{p}", "add_embedding.linear_2.{p}"))
    for level in range(levels):
        up = levels - 1 - level  # diffusers counts the way up from its own beginning
        for layer in range(layers + 1):
            down_number, up_number = (layers + 1) * level + layer + 1, (layers + 1) * up + layer
            if layer < layers:
                rules.append(Each(f"input_blocks.{down_number}.0", f"down_blocks.{level}.resnets.{layer}", *RESNET))
            rules.append(Each(f"output_blocks.{up_number}.0", f"up_blocks.{up}.resnets.{layer}", *RESNET))
            if attention[level]:
                if layer < layers:
                    name = f"down_blocks.{level}.attentions.{layer}"
                    rules.append(Each(f"input_blocks.{down_number}.1", name, *transformer))
                rules.append(Each(f"output_blocks.{up_number}.1", f"up_blocks.{up}.attentions.{layer}", *transformer))
        if level < levels - 1:
            number = (layers + 1) * (level + 1)
            rules.append(Rename(f"input_blocks.{number}.0.op.{{p}}", f"down_blocks.{level}.downsamplers.0.conv.{{p}}"))
        if level > 0:
            number, place = (layers + 1) * up + layers, 2 if attention[level] else 1
            file = f"output_blocks.{number}.{place}.conv.{{p}}"
            rules.append(Rename(file, f"up_blocks.{up}.upsamplers.0.conv.{{p}}"))
    return tuple(rules)


def channels_problem(channels: int, *, inpainting: bool = False) -> str | None:
    """What is wrong with a U-Net that takes so many channels; None for none.

    Args: inpainting: whether models for inpainting will do.
    """
    if channels == CHANNELS or (inpainting and channels == INPAINTING_CHANNELS):
        return None
    what = f"this is {SPECIAL_CHANNELS[channels]}: " if channels in SPECIAL_CHANNELS else ""
    if channels == INPAINTING_CHANNELS:
        return f"{what}its U-Net takes {channels} channels; --train_inpainting trains such models, where it is offered"
    wanted = f"{CHANNELS} can be trained here"
    if inpainting:
        wanted = f"{CHANNELS}, or {INPAINTING_CHANNELS} for inpainting, can be used here"
    return f"{what}its U-Net takes {channels} channels; only those that take {wanted}"


def inpainting_facts(architecture: str, inpaints: bool) -> dict[str, Any]:
    """What `Writer.metadata` says of a model for inpainting; of others nothing. Args: architecture: of a whole one."""
    return {"ss_train_inpainting": True, "modelspec.whole": architecture} if inpaints else {}


def takes_inpainting(opts: Options) -> bool:
    """Whether models for inpainting will do: where images are generated, and where such a model is to be trained."""
    return opts.model.takes_inpainting or opts.data.train_inpainting


def input_problem(shapes: Shapes, *, inpainting: bool = False) -> str | None:
    """`channels_problem` of the U-Net in a single file, whose names have the file's prefix."""
    shape = shapes.get(f"{UNET}input_blocks.0.0.weight", ())
    return channels_problem(shape[1], inpainting=inpainting) if len(shape) > 1 else None


@cache  # it is asked about every single weight
def unet_map(layers: int, attention: tuple[bool, ...], *, added: bool = False, prefix: str = UNET) -> KeyMap:
    """U-Net names in the file, with their prefix, against those of UNet2DConditionModel. See `unet_rules`."""
    return KeyMap(Each(prefix, "", *unet_rules(layers, attention, added=added)))


def map_of_config(config: Any, prefix: str = UNET) -> KeyMap:
    """`unet_map` for a live UNet2DConditionModel, from its `config`."""
    attention = tuple("CrossAttn" in block for block in config.down_block_types)
    added = getattr(config, "addition_embed_type", None) is not None
    return unet_map(config.layers_per_block, attention, added=added, prefix=prefix)


@dataclass(frozen=True)
class UnetShape:
    """The architecture of a U-Net in a single file, by its names and shapes."""

    widths: tuple[int, ...]  # channels of each level
    layers: int  # resnets of a level on the way down
    attention: tuple[bool, ...]  # whether a level has transformers
    depths: tuple[int, ...]  # transformer blocks of a level's transformers; the last is also the middle's
    context: int  # width of the text states
    in_channels: int
    out_channels: int
    linear_projection: bool
    added: int | None = None  # width of the facts that are embedded beside the time

    def diffusers_config(self, *, heads: int | None = None, sample_size: int = 64) -> dict[str, Any]:
        """UNet2DConditionModel's arguments. `attention_head_dim` is its odd word for the number of heads.

        Args:
            heads: of every attention; None: as many as are 64 wide.
            sample_size: the side of the latents, which pipelines take by default.
        Raises: UserError: a width that does not divide into heads.
        """
        unit = heads or HEAD_WIDTH
        if any(width % unit for width in self.widths):
            raise UserError(
                f"the U-Net's widths {self.widths} are not multiples of {unit}, so they have no whole heads"
            )
        down = tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in self.attention)
        up = tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(self.attention))
        config = {
            "sample_size": sample_size,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "block_out_channels": self.widths,
            "layers_per_block": self.layers,
            "down_block_types": down,
            "up_block_types": up,
            "cross_attention_dim": self.context,
            "transformer_layers_per_block": self.depths,
            "attention_head_dim": heads or tuple(width // HEAD_WIDTH for width in self.widths),
            "use_linear_projection": self.linear_projection,
        }
        if self.added is not None:
            config |= {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": TIME_WIDTH,
                "projection_class_embeddings_input_dim": self.added,
            }
        return config


def unet_shape(shapes: Shapes, *, inpainting: bool = False) -> UnetShape:
    """Reads the U-Net's architecture from a single file's shapes.

    Args:
        shapes: of the whole file, names as in the file.
        inpainting: whether models for inpainting will do.
    Raises: UserError: the names are not those of such a U-Net, or it takes other channels than latents have.
    """
    problem = input_problem(shapes, inpainting=inpainting)
    if problem:
        raise UserError(problem)
    try:
        return _unet_shape({key.removeprefix(UNET): shape for key, shape in shapes.items() if key.startswith(UNET)})
    except (KeyError, IndexError) as error:
        raise UserError(f"the U-Net lacks the tensor {UNET}{error.args[0]}") from None


def _unet_shape(shapes: Shapes) -> UnetShape:
    levels: list[list[int]] = [[]]  # the numbers of each level's resnets
    number = 1
    while True:
        if f"input_blocks.{number}.0.op.weight" in shapes:
            levels.append([])
        elif f"input_blocks.{number}.0.out_layers.3.weight" in shapes:
            levels[-1].append(number)
        else:
            break
        number += 1
    counts = {len(level) for level in levels}
    if len(counts) != 1 or 0 in counts:
        raise UserError(
            f"the U-Net's levels have {[len(level) for level in levels]} layers; equal numbers are expected"
        )
    in_channels = shapes["input_blocks.0.0.weight"][1]
    middle = "middle_block.1."
    depths = [_depth(shapes, f"input_blocks.{level[0]}.1.") or 1 for level in levels]
    if f"input_blocks.{levels[-1][0]}.1.proj_in.weight" not in shapes:
        depths[-1] = _depth(shapes, middle)  # diffusers gives the middle the depth of the last level
    return UnetShape(
        widths=tuple(shapes[f"input_blocks.{level[0]}.0.out_layers.3.weight"][0] for level in levels),
        layers=counts.pop(),
        attention=tuple(f"input_blocks.{level[0]}.1.proj_in.weight" in shapes for level in levels),
        depths=tuple(depths),
        context=shapes[f"{middle}transformer_blocks.0.attn2.to_k.weight"][1],
        in_channels=in_channels,
        out_channels=shapes["out.2.weight"][0],
        linear_projection=len(shapes[f"{middle}proj_in.weight"]) == 2,
        added=shapes["label_emb.0.0.weight"][-1] if "label_emb.0.0.weight" in shapes else None,
    )


def _depth(shapes: Shapes, prefix: str) -> int:
    depth = 0
    while f"{prefix}transformer_blocks.{depth}.norm1.weight" in shapes:
        depth += 1
    return depth


def reads_masks(unet: nn.Module) -> bool:
    """Whether a U-Net is one for inpainting."""
    return unet.config.in_channels == INPAINTING_CHANNELS


def unet_stages(unet: nn.Module) -> tuple[list[list[nn.Module]], list[list[nn.Module]]]:
    """The input and the output blocks of a UNet2DConditionModel as files number them, each as its modules in order.

    A ControlNet of such a U-Net has no output blocks.
    """
    inputs, outputs = [[unet.conv_in]], []
    for level in unet.down_blocks:
        inputs += _layers(level)
        inputs += [[downsampler] for downsampler in level.downsamplers or ()]
    for level in getattr(unet, "up_blocks", ()):
        outputs += _layers(level)
        outputs[-1] += level.upsamplers or ()
    return inputs, outputs


def _layers(level: nn.Module) -> list[list[nn.Module]]:
    """The resnets of a level, each with the transformer behind it, if it has one."""
    attentions = list(getattr(level, "attentions", None) or ())
    return [[resnet, *attentions[number : number + 1]] for number, resnet in enumerate(level.resnets)]


def unet_blocks(unet: nn.Module) -> list[nn.Module]:
    """Resnets and transformer blocks of a UNet2DConditionModel, in the order in which it runs them."""
    order: list[nn.Module] = []
    for level in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        resnets, attentions = list(level.resnets), list(getattr(level, "attentions", []))
        if level is unet.mid_block:
            order.append(resnets.pop(0))  # the middle's attention stands between its resnets
            pairs = zip(attentions, resnets, strict=True)
            order += [module for attention, resnet in pairs for module in (*attention.transformer_blocks, resnet)]
            continue
        for number, resnet in enumerate(resnets):
            order.append(resnet)
            if attentions:
                order += list(attentions[number].transformer_blocks)
    return order


def text_layers(models: Models) -> list[str]:
    """Paths of the cross-attention layers of a diffusers U-Net."""
    return [path for path, _ in models.denoiser.named_modules() if path.endswith(".attn2")]
