"""Names of FLUX.1 single files, as its authors' code gives them, against diffusers'."""

from __future__ import annotations

from library.checkpoints.keymap import Each, Fused, KeyMap, Rename, Rule, SwapHalves

PREFIX = "model.diffusion_model."  # in some files before the denoiser's names
# What files that bundle everything have before the other parts' own names.
ENCODERS = {"te1": "text_encoders.clip_l.transformer.", "te3": "text_encoders.t5xxl.transformer."}
AE = "vae."

EMBEDDERS = {
    "time_in": "time_text_embed.timestep_embedder",
    "vector_in": "time_text_embed.text_embedder",
    "guidance_in": "time_text_embed.guidance_embedder",  # of dev only
}


def _qkv(file: str, parts: tuple[str, ...], rows: tuple[int, ...] = ()) -> Fused:
    return Fused(f"{file}.{{p}}", tuple(f"{part}.{{p}}" for part in parts), rows)


DOUBLE = (
    Rename("img_mod.lin.{p}", "norm1.linear.{p}"),
    _qkv("img_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    Rename("img_attn.norm.query_norm.scale", "attn.norm_q.weight"),
    Rename("img_attn.norm.key_norm.scale", "attn.norm_k.weight"),
    Rename("img_attn.proj.{p}", "attn.to_out.0.{p}"),
    Rename("img_mlp.0.{p}", "ff.net.0.proj.{p}"),
    Rename("img_mlp.2.{p}", "ff.net.2.{p}"),
    Rename("txt_mod.lin.{p}", "norm1_context.linear.{p}"),
    _qkv("txt_attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    Rename("txt_attn.norm.query_norm.scale", "attn.norm_added_q.weight"),
    Rename("txt_attn.norm.key_norm.scale", "attn.norm_added_k.weight"),
    Rename("txt_attn.proj.{p}", "attn.to_add_out.{p}"),
    Rename("txt_mlp.0.{p}", "ff_context.net.0.proj.{p}"),
    Rename("txt_mlp.2.{p}", "ff_context.net.2.{p}"),
)
SINGLE = (
    _qkv("linear1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), rows=(1, 1, 1, 4)),
    Rename("linear2.{p}", "proj_out.{p}"),
    Rename("norm.query_norm.scale", "attn.norm_q.weight"),
    Rename("norm.key_norm.scale", "attn.norm_k.weight"),
    Rename("modulation.lin.{p}", "norm.linear.{p}"),
)
RULES: tuple[Rule, ...] = (
    Rename("img_in.{p}", "x_embedder.{p}"),
    *(Rename(f"{file}.in_layer.{{p}}", f"{model}.linear_1.{{p}}") for file, model in EMBEDDERS.items()),
    *(Rename(f"{file}.out_layer.{{p}}", f"{model}.linear_2.{{p}}") for file, model in EMBEDDERS.items()),
    Rename("txt_in.{p}", "context_embedder.{p}"),
    Each("double_blocks.{i}", "transformer_blocks.{i}", *DOUBLE),
    Each("single_blocks.{i}", "single_transformer_blocks.{i}", *SINGLE),
    Rename("final_layer.linear.{p}", "proj_out.{p}"),
    SwapHalves("final_layer.adaLN_modulation.1.{p}", "norm_out.linear.{p}"),  # diffusers has the scale first
)


def flux_map(prefix: str = "", *, diffusers: bool = False) -> KeyMap:
    """The denoiser's names in a file against those of FluxTransformer2DModel.

    Args:
        prefix: before every name in the file.
        diffusers: the file has diffusers' own names.
    """
    return KeyMap(Each(prefix, "", *((Rename("{rest}", "{rest}"),) if diffusers else RULES)))
