"""BLIP captioning weights in their original .pth layout, as transformers' class."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.keymap import Each, KeyMap, Rename, first_few
from library.checkpoints.reading import file_format, read_state_dict, read_torch, unwrap
from library.errors import UserError
from library.families.shared.building import build

if TYPE_CHECKING:
    from torch import Tensor, nn

HEAD_WIDTH = 64  # of every ViT and BERT that BLIP is built from; not known from shapes
_PARTS = ("visual_encoder.", "text_decoder.")
_TEXT = "text_decoder.bert."
_WORDS = _TEXT + "embeddings.word_embeddings.weight"
_PREDICTED_WORDS = "text_decoder.cls.predictions.decoder.weight"

BLIP_KEYS = KeyMap(
    Rename("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    Rename("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    Rename("visual_encoder.patch_embed.proj.{p}", "vision_model.embeddings.patch_embedding.{p}"),
    Rename("visual_encoder.norm.{p}", "vision_model.post_layernorm.{p}"),
    Each(
        "visual_encoder.blocks.{i}",
        "vision_model.encoder.layers.{i}",
        Rename("norm1.{p}", "layer_norm1.{p}"),
        Rename("attn.qkv.{p}", "self_attn.qkv.{p}"),
        Rename("attn.proj.{p}", "self_attn.projection.{p}"),
        Rename("norm2.{p}", "layer_norm2.{p}"),
        Rename("mlp.fc1.{p}", "mlp.fc1.{p}"),
        Rename("mlp.fc2.{p}", "mlp.fc2.{p}"),
    ),
    Rename("text_decoder.{rest}", "text_decoder.{rest}"),
)


def read_original_blip(path: Path) -> dict[str, Tensor]:
    """The tensors of a captioner in an original BLIP file, under the file's names, float32.

    Pre-training files have further parts, such as a text encoder; those are left out.

    Raises: UserError: damaged, hostile, or no BLIP captioner.
    """
    if file_format(path) == "safetensors":
        tensors = read_state_dict(path)
    else:
        content = read_torch(path)
        inner = content.get("model") if isinstance(content, dict) else None
        tensors = unwrap(inner if isinstance(inner, dict) else content, path)
    numbers = _TEXT + "embeddings.position_ids"  # 0, 1, 2, ...: no weights
    parts = {key: tensor.float() for key, tensor in tensors.items() if key.startswith(_PARTS) and key != numbers}
    wanted = ("visual_encoder.cls_token", _WORDS, _TEXT + "encoder.layer.0.crossattention.self.key.weight")
    missing = [key for key in wanted if key not in parts]
    if missing:
        raise UserError(f"{path}: no BLIP captioning weights; it has no {first_few(missing)}")
    return parts


def blip_config(tensors: Mapping[str, Tensor], special_tokens: Mapping[str, int]) -> Any:
    """The BlipConfig that fits original weights, read from their shapes.

    Args:
        special_tokens: ids by the configuration's names, e.g. "bos_token_id".
    """
    import torch
    from transformers import BlipConfig

    width, patch = tensors["visual_encoder.cls_token"].shape[-1], tensors["visual_encoder.patch_embed.proj.weight"]
    positions = tensors["visual_encoder.pos_embed"].shape[1]
    vocabulary, text_width = tensors[_WORDS].shape
    vision = {
        "hidden_size": width,
        "intermediate_size": tensors["visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _count(tensors, "visual_encoder.blocks."),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "patch_size": patch.shape[-1],
        "image_size": isqrt(positions - 1) * patch.shape[-1],  # one position is for the class token
        "layer_norm_eps": 1e-6,
    }
    text = {
        "vocab_size": vocabulary,
        "hidden_size": text_width,
        "intermediate_size": tensors[_TEXT + "encoder.layer.0.intermediate.dense.weight"].shape[0],
        "num_hidden_layers": _count(tensors, _TEXT + "encoder.layer."),
        "num_attention_heads": max(1, text_width // HEAD_WIDTH),
        "max_position_embeddings": tensors[_TEXT + "embeddings.position_embeddings.weight"].shape[0],
        "layer_norm_eps": 1e-12,
        "tie_word_embeddings": torch.equal(tensors[_WORDS], tensors[_PREDICTED_WORDS]),
        **special_tokens,
    }
    return BlipConfig(vision_config=vision, text_config=text, tie_word_embeddings=text["tie_word_embeddings"])


def build_blip(tensors: Mapping[str, Tensor], special_tokens: Mapping[str, int], what: str) -> nn.Module:
    """BlipForConditionalGeneration with original weights, float32 on the CPU; frozen, in eval mode.

    Args:
        special_tokens: as `blip_config`.
        what: the file, for messages.
    Raises: UserError: tensors are missing, too many or of shapes that do not fit together.
    """
    from transformers import BlipForConditionalGeneration

    try:
        config = blip_config(tensors, special_tokens)
    except KeyError as error:
        raise UserError(f"{what}: no BLIP captioning weights; it has no {error.args[0]}") from None
    return build(lambda: BlipForConditionalGeneration(config), BLIP_KEYS.to_model(tensors), what)


def word_count(tensors: Mapping[str, Tensor]) -> int:
    """The size of the vocabulary of original weights."""
    return tensors[_WORDS].shape[0]


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in tensors if key.startswith(prefix))
