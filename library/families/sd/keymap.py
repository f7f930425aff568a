"""Names of Stable Diffusion 1.x/2.x single files (the latent-diffusion layout) against diffusers and transformers."""

from __future__ import annotations

from library.checkpoints.keymap import Each, Fused, KeyMap, Rename, Rule
from library.families.shared.vae import vae_rules

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer."  # SD 1.x: transformers' own names follow
OPEN_CLIP = "cond_stage_model.model."  # SD 2.x: OpenCLIP's names follow

RESNET = (
    Rename("in_layers.0.{p}", "norm1.{p}"),
    Rename("in_layers.2.{p}", "conv1.{p}"),
    Rename("emb_layers.1.{p}", "time_emb_proj.{p}"),
    Rename("out_layers.0.{p}", "norm2.{p}"),
    Rename("out_layers.3.{p}", "conv2.{p}"),
    Rename("skip_connection.{p}", "conv_shortcut.{p}"),
)
SAME = (Rename("{rest}", "{rest}"),)

OPEN_CLIP_RULES = (
    Rename("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    Rename("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    Rename("ln_final.{p}", "text_model.final_layer_norm.{p}"),
    Each(
        "transformer.resblocks.{i}",
        "text_model.encoder.layers.{i}",
        Rename("ln_1.{p}", "layer_norm1.{p}"),
        Rename("ln_2.{p}", "layer_norm2.{p}"),
        Rename("mlp.c_fc.{p}", "mlp.fc1.{p}"),
        Rename("mlp.c_proj.{p}", "mlp.fc2.{p}"),
        Rename("attn.out_proj.{p}", "self_attn.out_proj.{p}"),
        Fused("attn.in_proj_{p}", ("self_attn.q_proj.{p}", "self_attn.k_proj.{p}", "self_attn.v_proj.{p}")),
    ),
)


def unet_rules(levels: int, layers: int, attention: tuple[bool, ...]) -> tuple[Rule, ...]:
    """U-Net rules without the prefix.

    The file numbers its blocks through; which number a block has follows from the shape of the model.

    Args:
        levels: resolutions, 4 in the real models.
        layers: resnets of a level on the way down, 2 in the real models; one more on the way up.
        attention: per level, whether its resnets are followed by transformers.
    """
    rules: list[Rule] = [
        Rename("input_blocks.0.0.{p}", "conv_in.{p}"),
        Rename("time_embed.0.{p}", "time_embedding.linear_1.{p}"),
        Rename("time_embed.2.{p}", "time_embedding.linear_2.{p}"),
        Rename("out.0.{p}", "conv_norm_out.{p}"),
        Rename("out.2.{p}", "conv_out.{p}"),
        Each("middle_block.0", "mid_block.resnets.0", *RESNET),
        Each("middle_block.1", "mid_block.attentions.0", *SAME),
        Each("middle_block.2", "mid_block.resnets.1", *RESNET),
    ]
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
                    rules.append(Each(f"input_blocks.{down_number}.1", name, *SAME))
                rules.append(Each(f"output_blocks.{up_number}.1", f"up_blocks.{up}.attentions.{layer}", *SAME))
        if level < levels - 1:
            number = (layers + 1) * (level + 1)
            rules.append(Rename(f"input_blocks.{number}.0.op.{{p}}", f"down_blocks.{level}.downsamplers.0.conv.{{p}}"))
        if level > 0:
            number, place = (layers + 1) * up + layers, 2 if attention[level] else 1
            file = f"output_blocks.{number}.{place}.conv.{{p}}"
            rules.append(Rename(file, f"up_blocks.{up}.upsamplers.0.conv.{{p}}"))
    return tuple(rules)


def unet_map(levels: int, layers: int, attention: tuple[bool, ...]) -> KeyMap:
    """U-Net names in the file, with their prefix, against those of UNet2DConditionModel."""
    return KeyMap(Each(UNET, "", *unet_rules(levels, layers, attention)))


def vae_map(levels: int, prefix: str = VAE) -> KeyMap:
    """VAE names in the file against those of AutoencoderKL; stand-alone files may have no prefix."""
    return KeyMap(Each(prefix, "", *vae_rules(levels)))


def text_map(v2: bool, text_model_level: bool = True) -> KeyMap:
    """Text encoder names in the file against transformers', which are always written with `text_model.` here.

    Args:
        v2: the OpenCLIP layout of SD 2.x.
        text_model_level: False for the SD 1.x files that leave `text_model.` out.
    """
    if v2:
        return KeyMap(Each(OPEN_CLIP, "", *OPEN_CLIP_RULES))
    return KeyMap(Each(CLIP + ("text_model" if text_model_level else ""), "text_model", *SAME))
