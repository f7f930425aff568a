"""Diffusion transformers a few thousand parameters small, and the LoRA targets that files have of them."""

from __future__ import annotations

import re

import torch
from torch import nn

from library.types import LoraTarget, Models

TEXT_LAYERS = re.compile(r".*(self_attn|mlp|SelfAttention|DenseReluDense)\.\w+")


def clip(width=8):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    return CLIPTextModel(config)


def t5():
    from transformers import T5Config, T5EncoderModel

    sizes = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    return T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu", dropout_rate=0.0))


def text_targets(encoder, part):
    targets = []
    for path, module in encoder.named_modules():
        if isinstance(module, nn.Linear) and TEXT_LAYERS.fullmatch(path):
            public = path if part == "te3" or path.startswith("text_model.") else f"text_model.{path}"
            key = f"lora_{part}_{public.replace('.', '_')}"
            targets.append(LoraTarget(key, part, (path,), optional=part == "te3"))
    return targets


def frozen(denoiser, encoders):
    for part in (denoiser, *encoders.values()):
        part.requires_grad_(False).eval()
    return Models(denoiser, encoders, {}, None)


def flux_transformer(double=2, single=3, **sizes):
    from diffusers import FluxTransformer2DModel

    small = {"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 6, "in_channels": 4}
    small |= {"pooled_projection_dim": 5, "axes_dims_rope": (2, 2, 4)}
    return FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True, **(sizes or small))


@torch.no_grad()
def flux_output(denoiser):
    return flux_forward(denoiser)


def flux_forward(denoiser):
    rng = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(shape, generator=rng)  # noqa: E731
    return denoiser(
        hidden_states=draw(2, 6, 4),
        encoder_hidden_states=draw(2, 3, 6),
        pooled_projections=draw(2, 5),
        timestep=torch.tensor([0.1, 0.7]),
        guidance=torch.ones(2),
        img_ids=draw(6, 3),
        txt_ids=draw(3, 3),
    ).sample


FLUX_OUTER = {
    "img_in": "x_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "txt_in": "context_embedder",
}
FLUX_DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn_proj": ("attn.to_out.0",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn_proj": ("attn.to_add_out",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "txt_mod_lin": ("norm1_context.linear",),
}
FLUX_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}


def flux_targets(models):
    """Text encoders first, then layers outside the blocks, double blocks and single blocks."""
    targets = [target for part, encoder in models.text_encoders.items() for target in text_targets(encoder, part)]
    targets += [LoraTarget(f"lora_unet_{k}", "denoiser", (path,), optional=True) for k, path in FLUX_OUTER.items()]
    stacks = (("double_blocks", "transformer_blocks", FLUX_DOUBLE),)
    stacks += (("single_blocks", "single_transformer_blocks", FLUX_SINGLE),)
    for name, stack, layers in stacks:
        for i in range(len(getattr(models.denoiser, stack))):
            for layer, paths in layers.items():
                modules = tuple(f"{stack}.{i}.{path}" for path in paths)
                targets.append(LoraTarget(f"lora_unet_{name}_{i}_{layer}", "denoiser", modules))
    return targets


def flux():
    return frozen(flux_transformer(), {"te1": clip(), "te3": t5()})


def sd3_transformer(layers=3, dual=(0, 1), **sizes):
    from diffusers import SD3Transformer2DModel

    small = {"sample_size": 8, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 6}
    small |= {"caption_projection_dim": 16, "pooled_projection_dim": 5, "in_channels": 4, "out_channels": 4}
    small |= {"pos_embed_max_size": 8}
    return SD3Transformer2DModel(num_layers=layers, dual_attention_layers=dual, **(sizes or small))


@torch.no_grad()
def sd3_output(denoiser):
    return sd3_forward(denoiser)


def sd3_forward(denoiser):
    rng = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(shape, generator=rng)  # noqa: E731
    return denoiser(
        hidden_states=draw(2, 4, 8, 8),
        encoder_hidden_states=draw(2, 3, 6),
        pooled_projections=draw(2, 5),
        timestep=torch.tensor([100.0, 700.0]),
    ).sample


SD3_OUTER = {
    "context_embedder": "context_embedder",
    "t_embedder_mlp_0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder_mlp_2": "time_text_embed.timestep_embedder.linear_2",
    "x_embedder_proj": "pos_embed.proj",
    "y_embedder_mlp_0": "time_text_embed.text_embedder.linear_1",
    "y_embedder_mlp_2": "time_text_embed.text_embedder.linear_2",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
    "final_layer_linear": "proj_out",
}
SD3_BLOCK = {
    "context_block_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block_attn_proj": ("attn.to_add_out",),
    "context_block_mlp_fc1": ("ff_context.net.0.proj",),
    "context_block_mlp_fc2": ("ff_context.net.2",),
    "context_block_adaLN_modulation_1": ("norm1_context.linear",),
    "x_block_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block_attn_proj": ("attn.to_out.0",),
    "x_block_attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block_attn2_proj": ("attn2.to_out.0",),
    "x_block_mlp_fc1": ("ff.net.0.proj",),
    "x_block_mlp_fc2": ("ff.net.2",),
    "x_block_adaLN_modulation_1": ("norm1.linear",),
}


def sd3_targets(models):
    """Text encoders first, then layers outside the blocks, then blocks; of the last, the text's side is cut short."""
    targets = [target for part, encoder in models.text_encoders.items() for target in text_targets(encoder, part)]
    for name, path in SD3_OUTER.items():
        swap = "adaLN" in name
        targets.append(LoraTarget(f"lora_unet_{name}", "denoiser", (path,), swap_halves=swap, optional=True))
    blocks = models.denoiser.transformer_blocks
    for i, block in enumerate(blocks):
        present = dict(block.named_modules())
        for layer, paths in SD3_BLOCK.items():
            if not isinstance(present.get(paths[0]), nn.Linear):
                continue
            modules = tuple(f"transformer_blocks.{i}.{path}" for path in paths)
            swap = i == len(blocks) - 1 and layer.startswith("context_block_adaLN")
            key = f"lora_unet_joint_blocks_{i}_{layer}"
            targets.append(LoraTarget(key, "denoiser", modules, block=i, swap_halves=swap))
    return targets


def sd3():
    return frozen(sd3_transformer(), {"te1": clip(), "te2": clip(12), "te3": t5()})
