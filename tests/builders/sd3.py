"""Tiny Stable Diffusion 3 models with random weights, in the layout of published single files."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from library.families.shared.vae import vae_map
from library.options.base import Options
from tests.builders.options import options_for
from tests.builders.t5 import t5_weights, tiny_t5

WIDTH, DEPTH = 64, 3
TABLE = 12  # positions on a side: images up to 192 pixels
CLIP_L, CLIP_G, T5 = 64, 64, 160  # widths of states; CLIP's rows are filled up with zeros to T5's
PROJECTED_G = 96
POOLED = CLIP_L + PROJECTED_G
DUAL = 2  # blocks of 3.5 medium with a second attention
VARIANTS = ("medium", "5-medium", "5-large")


def mmdit_tensors(variant: str = "medium", seed: int = 0, depth: int = DEPTH) -> dict[str, Tensor]:
    """The denoiser of a variant under a single file's names without prefix, as its authors' code names them."""
    draw = _draws(seed)
    tensors = {"pos_embed": draw(1, TABLE * TABLE, WIDTH)}

    def linear(name: str, inside: int, outside: int) -> None:
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = draw(outside, inside), draw(outside)

    tensors["x_embedder.proj.weight"], tensors["x_embedder.proj.bias"] = draw(WIDTH, 16, 2, 2), draw(WIDTH)
    for name, inside in (("t_embedder", 256), ("y_embedder", POOLED)):
        linear(f"{name}.mlp.0", inside, WIDTH)
        linear(f"{name}.mlp.2", WIDTH, WIDTH)
    linear("context_embedder", T5, WIDTH)
    for block in range(depth):
        dual = variant == "5-medium" and block < DUAL
        for side in ("context_block", "x_block"):
            place, ends = f"joint_blocks.{block}.{side}", side == "context_block" and block == depth - 1
            attentions = ["attn", "attn2"] if dual and side == "x_block" else ["attn"]
            for attention in attentions:
                linear(f"{place}.{attention}.qkv", WIDTH, 3 * WIDTH)
                if variant != "medium":
                    tensors[f"{place}.{attention}.ln_q.weight"] = 1 + draw(64)
                    tensors[f"{place}.{attention}.ln_k.weight"] = 1 + draw(64)
                if not ends:
                    linear(f"{place}.{attention}.proj", WIDTH, WIDTH)
            linear(f"{place}.adaLN_modulation.1", WIDTH, WIDTH * (2 if ends else 9 if len(attentions) == 2 else 6))
            if not ends:
                linear(f"{place}.mlp.fc1", WIDTH, 4 * WIDTH)
                linear(f"{place}.mlp.fc2", 4 * WIDTH, WIDTH)
    linear("final_layer.adaLN_modulation.1", WIDTH, 2 * WIDTH)
    linear("final_layer.linear", WIDTH, 2 * 2 * 16)
    return tensors


@cache
def tiny_vae(seed: int = 0) -> AutoencoderKL:
    """16 channels of latents, no quant_conv, as the published VAE. One for all tests: not to be changed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=(32, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.5305,
            shift_factor=0.0609,
        )
        _shake(vae)
    return vae.requires_grad_(False).eval()


@cache
def tiny_clip(part: str, seed: int = 0) -> CLIPTextModelWithProjection:
    """CLIP-L ("te1") or CLIP-G ("te2"), with the whole vocabulary. One for all tests: not to be changed."""
    is_l = part == "te1"
    with torch.random.fork_rng():
        torch.manual_seed(seed + (1 if is_l else 2))
        config = CLIPTextConfig(
            vocab_size=49408,
            hidden_size=CLIP_L if is_l else CLIP_G,
            intermediate_size=96,
            projection_dim=CLIP_L if is_l else PROJECTED_G,
            num_hidden_layers=3,
            num_attention_heads=1,
            hidden_act="quick_gelu" if is_l else "gelu",
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=49407 if is_l else 0,
        )
        model = CLIPTextModelWithProjection(config)
        _shake(model)
    return model.requires_grad_(False).eval()


def clip_tensors(model: CLIPTextModelWithProjection, projection: bool = True) -> dict[str, Tensor]:
    """A CLIP text encoder under the names of published files."""
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("position_ids")}
    assert "text_model.encoder.layers.0.mlp.fc1.weight" in kept
    return {name: tensor.clone() for name, tensor in kept.items() if projection or name != "text_projection.weight"}


def sd3_tensors(
    variant: str = "medium",
    *,
    vae: bool = True,
    encoders: tuple[str, ...] = (),
    projection: bool = True,
    depth: int = DEPTH,
) -> dict[str, Tensor]:
    """A whole single file. `encoders`: names of the text encoders that it bundles."""
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in mmdit_tensors(variant, depth=depth).items()}
    if vae:
        tensors |= {name: tensor.clone() for name, tensor in vae_map(4).to_file(tiny_vae().state_dict()).items()}
    for part in encoders:
        prefix = {"te1": "clip_l", "te2": "clip_g", "te3": "t5xxl"}[part]
        inside = t5_weights(tiny_t5(T5)) if part == "te3" else clip_tensors(tiny_clip(part), projection)
        tensors |= {f"text_encoders.{prefix}.transformer.{name}": tensor for name, tensor in inside.items()}
    return tensors


def write_tiny_sd3(path: str | Path, variant: str = "medium", dtype: torch.dtype | None = None, **what: Any) -> Path:
    """Writes a tiny single file, see `sd3_tensors`."""
    path = Path(path)
    tensors = sd3_tensors(variant, **what)
    save_file({name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in tensors.items()}, path)
    return path


def write_encoder_file(path: str | Path, part: str, projection: bool = True, vocabulary: int = 64) -> Path:
    """Writes a text encoder to a file of its own; `vocabulary` is that of T5."""
    tensors = (
        t5_weights(tiny_t5(T5, vocabulary=vocabulary)) if part == "te3" else clip_tensors(tiny_clip(part), projection)
    )
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, Path(path))
    return Path(path)


def sd3_options(model: str | Path, *, cache: str | None = None, mapless: bool = False, **values: Any) -> Options:
    """All options of the family's network script, with their defaults but for `values`; paths become strings.

    `cache`: of tokenizers. `mapless`: no memory maps.
    """
    values = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    values |= {"tokenizer_cache_dir": cache, "disable_mmap_load_safetensors": mapless}
    return options_for("sd3", "network", pretrained_model_name_or_path=str(model), **values)


def _draws(seed: int) -> Any:
    rng = torch.Generator().manual_seed(seed)
    return lambda *shape: 0.1 * torch.randn(*shape, generator=rng)


def _shake(model: torch.nn.Module) -> None:
    """Fresh biases and norms are all zeros and ones, so that mixed-up names would not show."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
