"""ControlNets of U-Nets: diffusers' ControlNetModel, made from a U-Net or read, and the names in its files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.keymap import Each, KeyMap, Rename, Rule
from library.checkpoints.reading import open_weights
from library.errors import UserError
from library.families.shared.building import build
from library.families.shared.controlnet import (
    SAME_NAMES,
    ResidualControl,
    hint_rules,
    require_same,
    start_hint,
    write_controlnet,
)
from library.families.shared.reading import error_prefix, from_pretrained
from library.families.shared.unet import unet_rules

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.families.shared.roles import UnetDenoiser
    from library.options.base import Options
    from library.types import Batch, Models, Residuals, TextCond

PREFIX = "control_model."  # before every name in files of the original code
DIFFERENCE = "difference"  # a key of files whose weights are to be added to the U-Net's
EMBEDDING = "controlnet_cond_embedding."  # what turns the control image into something of the latents' size
# Those of the original code are numbered through, the output included; diffusers' conv_in stands before its blocks.
_EMBEDDING_CONVOLUTION = re.compile(
    rf"(input_hint_block\.|{re.escape(EMBEDDING)}blocks\.)(?P<place>\d+)\.weight|{re.escape(EMBEDDING)}conv_in\.weight"
)
_SAME_IN_BOTH = ("block_out_channels", "layers_per_block", "down_block_types", "cross_attention_dim")


class UnetControl(ResidualControl):
    """ControlNets whose residuals go to a U-Net's skip connections and, as the last one, to its middle block.

    Args:
        denoiser: knows what the U-Net takes, which is what a ControlNet takes too.
        original_names: whether files have the names of the original code, without metadata; else those of diffusers.
    """

    def __init__(self, opts: Options, denoiser: UnetDenoiser, *, original_names: bool):
        super().__init__(opts, denoiser)
        self._original_names = original_names

    def build(self, models: Models) -> nn.Module:
        from diffusers import ControlNetModel

        net = ControlNetModel.from_unet(models.denoiser)
        start_hint(net.controlnet_cond_embedding)
        return net

    def load(self, models: Models, name: str) -> nn.Module:
        import torch
        from diffusers import ControlNetModel

        unet = models.denoiser
        if not Path(name).is_file():
            net = from_pretrained(ControlNetModel, name, None)
            require_same(net.config, unet.config, _SAME_IN_BOTH, name)
            return net
        with error_prefix(name):
            weights = open_weights(name)
            tensors = {key.removeprefix(PREFIX): weights[key] for key in weights}
            is_difference = tensors.pop(DIFFERENCE, None) is not None
            widths = {"conditioning_embedding_out_channels": _embedding_widths(tensors)}
            if not any(key.startswith(EMBEDDING) for key in tensors):
                tensors = control_map({**unet.config, **widths}).to_model(tensors)
            tensors = {key: tensor.to(torch.float32) for key, tensor in tensors.items()}
            if is_difference:
                base = unet.state_dict()
                tensors = {key: tensor + base[key] if key in base else tensor for key, tensor in tensors.items()}
            make = partial(ControlNetModel.from_unet, unet, load_weights_from_unet=False, **widths)
            return build(make, tensors, "the ControlNet")

    def residuals(
        self, models: Models, net: nn.Module, noisy: Tensor, timesteps: Tensor, cond: TextCond, batch: Batch
    ) -> Residuals:
        """See `ResidualControl.residuals`: one for each skip connection, shaped like it, then the middle block's."""
        inputs = self._denoiser.inputs(noisy, cond, batch)
        output = net(noisy, timesteps, controlnet_cond=batch.control, **inputs)
        return (*output.down_block_res_samples, output.mid_block_res_sample)

    def save(
        self, net: nn.Module, path: Path, *, save_as: str, dtype: torch.dtype | None, metadata: dict[str, str]
    ) -> None:
        keys = control_map(net.config) if self._original_names else SAME_NAMES
        write_controlnet(
            net, path, keys, save_as=save_as, dtype=dtype, metadata=None if self._original_names else metadata
        )


def control_map(config: Mapping[str, Any]) -> KeyMap:
    """The original code's names, without `PREFIX`, against those of ControlNetModel. Args: config: of the model."""
    attention = tuple("CrossAttn" in block for block in config["down_block_types"])
    layers = config["layers_per_block"]
    steps = 2 * (len(config["conditioning_embedding_out_channels"]) - 1)  # convolutions between the first and the last
    rules: list[Rule] = [
        *unet_rules(layers, attention, added=config.get("addition_embed_type") is not None),
        Rename("zero_convs.{i}.0.{p}", "controlnet_down_blocks.{i}.{p}"),
        Rename("middle_block_out.0.{p}", "controlnet_mid_block.{p}"),
        *hint_rules("input_hint_block", EMBEDDING.removesuffix("."), steps),
    ]
    return KeyMap(Each("", "", *rules))


def _embedding_widths(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Channels of the control image's embedding: after its first convolution, and after each that halves the size.

    Between two of these stands a convolution that keeps the size, and behind the last one the output.
    """
    by_place = {}
    for key, tensor in tensors.items():
        match = _EMBEDDING_CONVOLUTION.fullmatch(key)
        if match:
            by_place[int(match["place"]) if match["place"] else -1] = tensor.shape[0]
    if not by_place:
        raise UserError("this is no ControlNet: it has no embedding of the control image")
    in_order = [by_place[place] for place in sorted(by_place)]
    return tuple((in_order if -1 in by_place else in_order[:-1])[::2])
