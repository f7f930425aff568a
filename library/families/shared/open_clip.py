"""Text encoders in OpenCLIP's layout: its names, and what it has beyond what is run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.checkpoints.keymap import Each, Fused, Rename

if TYPE_CHECKING:
    from library.families.shared.writing import FileTensors

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


def unused_layers(tensors: FileTensors, prefix: str, layers: int) -> FileTensors:
    """The parts of OpenCLIP that a model never runs if it reads the layer before the last: last layer, projection.

    Readers count on their presence. The layer is a copy of the one before it.

    Args:
        tensors: the text encoder under the file's names.
        prefix: of these names.
        layers: how many the encoder has.
    """
    import torch

    last, extra = f"{prefix}transformer.resblocks.{layers - 1}.", f"{prefix}transformer.resblocks.{layers}."
    remainder: FileTensors = {
        extra + key.removeprefix(last): value for key, value in tensors.items() if key.startswith(last)
    }
    embedding = tensors[f"{prefix}token_embedding.weight"]
    width = embedding.shape[1]
    remainder[f"{prefix}text_projection"] = torch.ones(width, width, dtype=embedding.dtype)
    remainder[f"{prefix}logit_scale"] = torch.tensor(1.0, dtype=embedding.dtype)
    return remainder
