"""ControlNets of FLUX.1: diffusers' FluxControlNetModel in the form that reads the control image itself."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.keymap import Each, KeyMap, Rename
from library.checkpoints.reading import open_weights
from library.errors import UserError
from library.families.flux.keymap import RULES
from library.families.flux.prediction import T5_MASK, asked_guidance, attention_mask, model_inputs, unrounded_timesteps
from library.families.flux.variants import flux_shape
from library.families.shared.building import build
from library.families.shared.controlnet import (
    SAME_NAMES,
    ResidualControl,
    hint_rules,
    require_same,
    start_hint,
    with_copies,
    write_controlnet,
)
from library.families.shared.reading import error_prefix, from_pretrained

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.types import Batch, Models, Residuals, TextCond

DOUBLE, SINGLE = 2, 0  # blocks of a new one
HINT_CHANNELS = 16  # that a new one makes of the control image
HINT = "input_hint_block"
HINT_STEPS = 6  # convolutions between the first and the last
_WIDTHS = ("in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim", "pooled_projection_dim")
_READS_LATENTS = (
    f"this ControlNet reads latents of the control image; one with an {HINT}, which reads the image, is needed here"
)
_MODES = "controlnet_mode_embedder"
_UNION = "this ControlNet is for several kinds of images (Union), which cannot be trained here; give one for one kind"
_NO_DOUBLE = "this ControlNet has no blocks with two streams, which cannot be trained here"
CONTROL_MAP = KeyMap(
    Each(
        "",
        "",
        *RULES,
        Rename("controlnet_blocks.{i}.{p}", "controlnet_blocks.{i}.{p}"),
        Rename("controlnet_blocks_for_single.{i}.{p}", "controlnet_single_blocks.{i}.{p}"),
        Rename("pos_embed_input.{p}", "controlnet_x_embedder.{p}"),
        *hint_rules(HINT, HINT, HINT_STEPS),
    )
)


class FluxControl(ResidualControl):
    """ControlNets whose blocks' outputs are added behind the denoiser's blocks, over and over where they are fewer."""

    def build(self, models: Models) -> nn.Module:
        from diffusers import FluxControlNetModel

        base = models.denoiser.config
        config = {
            **{word: base[word] for word in (*_WIDTHS, "guidance_embeds", "axes_dims_rope")},
            "num_layers": min(DOUBLE, base.num_layers),
            "num_single_layers": SINGLE,
            **_hint_config(HINT_CHANNELS, base.in_channels),
        }
        net = with_copies(partial(FluxControlNetModel, **config), models.denoiser)
        start_hint(net.input_hint_block)
        return self._masked(net)

    def load(self, models: Models, name: str) -> nn.Module:
        import torch
        from diffusers import FluxControlNetModel

        if Path(name).is_file():
            with error_prefix(name):
                weights = open_weights(name)
                shape = flux_shape(weights.shapes)
                last = f"{shape.prefix}{HINT}.{'conv_out' if shape.diffusers else 2 * HINT_STEPS + 2}.weight"
                if any(key.startswith(f"{shape.prefix}{_MODES}") for key in weights):
                    raise UserError(_UNION)
                if last not in weights:
                    raise UserError(_READS_LATENTS)
                tensors = {key.removeprefix(shape.prefix): weights[key].to(torch.float32) for key in weights}
                keys = SAME_NAMES if shape.diffusers else CONTROL_MAP
                config = {**shape.diffusers_config(), **_hint_config(weights.shapes[last][0], shape.in_channels)}
                net = build(partial(FluxControlNetModel, **config), keys.to_model(tensors), "the ControlNet")
        else:
            net = from_pretrained(FluxControlNetModel, name, None)
            if net.union or net.input_hint_block is None:
                raise UserError(f"{name}: {_UNION if net.union else _READS_LATENTS}")
        if not net.config.num_layers:
            raise UserError(f"{name}: {_NO_DOUBLE}")
        require_same(net.config, models.denoiser.config, _WIDTHS, name)
        return self._masked(net)

    def _masked(self, net: nn.Module) -> nn.Module:
        """With --apply_t5_attn_mask, blocks that see what `net.attention_mask` says; diffusers gives them no mask."""
        net.attention_mask = None
        if self.opts.family.apply_t5_attn_mask:

            def add(_block: nn.Module, args: Any, words: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
                return args, {**words, "joint_attention_kwargs": {"attention_mask": net.attention_mask}}

            for block in (*net.transformer_blocks, *net.single_transformer_blocks):
                block.register_forward_pre_hook(add, with_kwargs=True)
        return net

    def residuals(
        self, models: Models, net: nn.Module, noisy: Tensor, timesteps: Tensor, cond: TextCond, batch: Batch
    ) -> Residuals:
        """See `ResidualControl.residuals`; one for every block of the denoiser, as `FluxDenoiser.predict` takes them.

        The control image is read in [-1, 1].
        """
        inputs = model_inputs(net, noisy, timesteps, cond, asked_guidance(self.opts.family, batch))
        if self.opts.family.apply_t5_attn_mask:  # it stays until the backward pass, which may run blocks once more
            net.attention_mask = attention_mask(cond.tensors[T5_MASK], inputs["hidden_states"].shape[1])
        with unrounded_timesteps(net, timesteps.to(noisy.device), inputs["guidance"]):
            double, single = net(controlnet_cond=batch.control * 2 - 1, return_dict=False, **inputs)
        blocks, single_blocks = models.denoiser.transformer_blocks, models.denoiser.single_transformer_blocks
        found = [double[number % len(double)] for number in range(len(blocks))]
        if single is not None:  # each for its share of the blocks
            share = math.ceil(len(single_blocks) / len(single))
            found += [single[number // share] for number in range(len(single_blocks))]
        return tuple(found)

    def save(
        self, net: nn.Module, path: Path, *, save_as: str, dtype: torch.dtype | None, metadata: dict[str, str]
    ) -> None:
        write_controlnet(net, path, CONTROL_MAP, save_as=save_as, dtype=dtype, metadata=metadata)


def _hint_config(channels: int, in_channels: int) -> dict[str, int]:
    """The arguments that say how the control image is read. Args: in_channels: of a token."""
    return {"conditioning_embedding_channels": channels, "patch_size": math.isqrt(in_channels // channels)}
