"""Names of Stable Diffusion 3/3.5 single files against diffusers and transformers."""

from __future__ import annotations

from library.checkpoints.keymap import Each, Fused, KeyMap, Rename, Rule, SwapHalves

MMDIT = "model.diffusion_model."
# Encoders inside a single file; transformers' own names follow.
ENCODERS = {
    "te1": "text_encoders.clip_l.transformer.",
    "te2": "text_encoders.clip_g.transformer.",
    "te3": "text_encoders.t5xxl.transformer.",
}


def _qkv(file: str, parts: tuple[str, str, str]) -> Fused:
    return Fused(f"{file}.qkv.{{p}}", tuple(f"{part}.{{p}}" for part in parts))


X_BLOCK = (
    _qkv("attn", ("attn.to_q", "attn.to_k", "attn.to_v")),
    Rename("attn.proj.{p}", "attn.to_out.0.{p}"),
    Rename("attn.ln_q.{p}", "attn.norm_q.{p}"),
    Rename("attn.ln_k.{p}", "attn.norm_k.{p}"),
    _qkv("attn2", ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
    Rename("attn2.proj.{p}", "attn2.to_out.0.{p}"),
    Rename("attn2.ln_q.{p}", "attn2.norm_q.{p}"),
    Rename("attn2.ln_k.{p}", "attn2.norm_k.{p}"),
    Rename("mlp.fc1.{p}", "ff.net.0.proj.{p}"),
    Rename("mlp.fc2.{p}", "ff.net.2.{p}"),
    Rename("adaLN_modulation.1.{p}", "norm1.linear.{p}"),
)
CONTEXT_BLOCK = (
    _qkv("attn", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    Rename("attn.proj.{p}", "attn.to_add_out.{p}"),
    Rename("attn.ln_q.{p}", "attn.norm_added_q.{p}"),
    Rename("attn.ln_k.{p}", "attn.norm_added_k.{p}"),
    Rename("mlp.fc1.{p}", "ff_context.net.0.proj.{p}"),
    Rename("mlp.fc2.{p}", "ff_context.net.2.{p}"),
    Rename("adaLN_modulation.1.{p}", "norm1_context.linear.{p}"),
)
# Where only a shift and a scale are made, diffusers has the scale first.
SHIFT_AND_SCALE = "adaLN_modulation.1.{p}"


def mmdit_rules(depth: int) -> tuple[Rule, ...]:
    """Rules without prefix, in the file's order. The text's side of the last block ends in its attention.

    Args:
        depth: number of blocks.
    """
    last = depth - 1
    return (
        Rename("pos_embed", "pos_embed.pos_embed"),
        Rename("x_embedder.proj.{p}", "pos_embed.proj.{p}"),
        Rename("t_embedder.mlp.0.{p}", "time_text_embed.timestep_embedder.linear_1.{p}"),
        Rename("t_embedder.mlp.2.{p}", "time_text_embed.timestep_embedder.linear_2.{p}"),
        Rename("y_embedder.mlp.0.{p}", "time_text_embed.text_embedder.linear_1.{p}"),
        Rename("y_embedder.mlp.2.{p}", "time_text_embed.text_embedder.linear_2.{p}"),
        Rename("context_embedder.{p}", "context_embedder.{p}"),
        Each(
            f"joint_blocks.{last}.context_block",
            f"transformer_blocks.{last}",
            SwapHalves(SHIFT_AND_SCALE, "norm1_context.linear.{p}"),
        ),
        Each("joint_blocks.{i}.context_block", "transformer_blocks.{i}", *CONTEXT_BLOCK),
        Each("joint_blocks.{i}.x_block", "transformer_blocks.{i}", *X_BLOCK),
        SwapHalves(f"final_layer.{SHIFT_AND_SCALE}", "norm_out.linear.{p}"),
        Rename("final_layer.linear.{p}", "proj_out.{p}"),
    )


def mmdit_map(depth: int, prefix: str = MMDIT) -> KeyMap:
    """Names of the denoiser in the file against those of SD3Transformer2DModel; files may leave the prefix out."""
    return KeyMap(Each(prefix, "", *mmdit_rules(depth)))
