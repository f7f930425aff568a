"""ControlNets of Stable Diffusion 3: diffusers' SD3ControlNetModel, which reads latents of the control image."""

from __future__ import annotations

import re
from functools import partial
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.checkpoints.reading import open_weights
from library.errors import UserError
from library.families.sd3 import text
from library.families.sd3.loading import SCALING_FACTOR, SHIFT_FACTOR
from library.families.sd3.variants import HEAD_WIDTH
from library.families.shared.building import build
from library.families.shared.controlnet import (
    SAME_NAMES,
    ResidualControl,
    require_same,
    with_copies,
    write_controlnet,
)
from library.families.shared.reading import error_prefix, from_pretrained
from library.families.shared.vae import encode_mean

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from library.types import Batch, Models, Residuals, TextCond

_WIDTHS = ("in_channels", "num_attention_heads", "attention_head_dim", "pooled_projection_dim")
_COPIED = (
    *_WIDTHS,
    *("sample_size", "patch_size", "out_channels", "joint_attention_dim", "caption_projection_dim"),
    *("pos_embed_max_size", "qk_norm"),
)


class Sd3Control(ResidualControl):
    """ControlNets whose blocks' outputs are added behind the denoiser's blocks, each for its share of them.

    Their files say nothing of two habits, so new ones have those of all programs that read such files: the pooled text
    is replaced by zeros, and latents of the control image are not shifted (`force_zeros_for_pooled_projection`).
    """

    needs_vae = True

    def build(self, models: Models) -> nn.Module:
        """See `Control.build`; half as deep as the denoiser."""
        from diffusers import SD3ControlNetModel

        base = models.denoiser.config
        depth = max(1, base.num_layers // 2)
        config = {word: base[word] for word in _COPIED}
        config |= {
            "num_layers": depth,
            "dual_attention_layers": tuple(n for n in base.dual_attention_layers if n < depth),
        }
        return with_copies(partial(SD3ControlNetModel, **config), models.denoiser)

    def load(self, models: Models, name: str) -> nn.Module:
        from diffusers import SD3ControlNetModel

        if Path(name).is_file():
            with error_prefix(name):
                weights = open_weights(name)
                make = partial(SD3ControlNetModel, **_config_of(weights.shapes, models.denoiser.config))
                tensors = {key: weights[key].to(torch.float32) for key in weights}
                net = build(make, tensors, "the ControlNet")
        else:
            net = from_pretrained(SD3ControlNetModel, name, None)
        require_same(net.config, models.denoiser.config, _WIDTHS, name)
        if net.config.extra_conditioning_channels:
            raise UserError(f"{name}: this ControlNet reads a mask beside the image, which cannot be trained here")
        return net

    def residuals(
        self, models: Models, net: nn.Module, noisy: Tensor, timesteps: Tensor, cond: TextCond, batch: Batch
    ) -> Residuals:
        """See `ResidualControl.residuals`; (B, tokens, width) for each of the ControlNet's blocks."""
        context, pooled = text.context_of(cond, models.denoiser.config.joint_attention_dim, noisy.dtype)
        zeros = net.config.force_zeros_for_pooled_projection
        with torch.no_grad():
            latents = encode_mean(models.vae, batch.control * 2 - 1).to(noisy)
        found = net(
            noisy if net.pos_embed is not None else models.denoiser.pos_embed(noisy),
            controlnet_cond=(latents - (0.0 if zeros else SHIFT_FACTOR)) * SCALING_FACTOR,
            encoder_hidden_states=None if net.context_embedder is None else context,
            pooled_projections=torch.zeros_like(pooled) if zeros else pooled,
            timestep=timesteps,
            return_dict=False,
        )
        return tuple(found[0])

    def save(
        self, net: nn.Module, path: Path, *, save_as: str, dtype: torch.dtype | None, metadata: dict[str, str]
    ) -> None:
        write_controlnet(net, path, SAME_NAMES, save_as=save_as, dtype=dtype, metadata=metadata)


def _config_of(shapes: Mapping[str, tuple[int, ...]], base: Mapping[str, Any]) -> dict[str, Any]:
    """SD3ControlNetModel's arguments, from a file with diffusers' names.

    Args: base: the denoiser's configuration.
    Raises: UserError: the names are not those of such a ControlNet.
    """
    image, pooled = "pos_embed_input.proj.weight", "time_text_embed.text_embedder.linear_1.weight"
    blocks = {int(match[1]) for key in shapes if (match := re.match(r"transformer_blocks\.(\d+)\.", key))}
    if not blocks or image not in shapes or pooled not in shapes:
        raise UserError("this is no ControlNet of Stable Diffusion 3 with the names of diffusers")
    width, channels, patch, _ = shapes[image]
    table = shapes.get("pos_embed.pos_embed", (1, base["pos_embed_max_size"] ** 2))[1]
    context = shapes.get("context_embedder.weight", (width, None))
    positions = "pos_embed.proj.weight" in shapes
    return {
        "sample_size": base["sample_size"],
        "patch_size": patch,
        "in_channels": base["in_channels"],
        "extra_conditioning_channels": channels - base["in_channels"],
        "num_layers": 1 + max(blocks),
        "attention_head_dim": HEAD_WIDTH,
        "num_attention_heads": width // HEAD_WIDTH,
        "joint_attention_dim": context[1],
        "caption_projection_dim": context[0],
        "pooled_projection_dim": shapes[pooled][1],
        "pos_embed_max_size": isqrt(table),
        "dual_attention_layers": tuple(n for n in blocks if f"transformer_blocks.{n}.attn2.to_q.weight" in shapes),
        "qk_norm": "rms_norm" if "transformer_blocks.0.attn.norm_q.weight" in shapes else None,
        "use_pos_embed": positions,
        "force_zeros_for_pooled_projection": positions,  # the only ones without positions want what the denoiser gets
    }
