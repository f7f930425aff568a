"""The T5 text encoder: names, shape, construction, and tokens to hidden states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.writing import materialise, write_safetensors, write_torch
from library.errors import UserError
from library.families.shared.building import build
from library.families.shared.reading import from_pretrained
from library.families.shared.targets import lora_key
from library.types import LoraTarget

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

EMBEDDING = "shared.weight"
COPY = "encoder.embed_tokens.weight"  # of the same tensor; files have one of the two, or both
BLOCK = "encoder.block."
LORA_LAYERS = ("layer.0.SelfAttention.", "layer.1.DenseReluDense.")  # of a block, whose linear layers adapt


def t5_keys(keys: Iterable[str]) -> list[str]:
    """Those of a file's keys that are of the encoder; whole T5 models also bring a decoder."""
    return [key for key in keys if key == EMBEDDING or key.startswith("encoder.")]


def is_t5(keys: Iterable[str]) -> bool:
    """Whether the names are those of a T5 encoder, as transformers gives them."""
    return f"{BLOCK}0.layer.0.SelfAttention.q.weight" in set(keys)


def t5_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """T5Config's arguments, read from the shapes of a T5 v1.1 encoder.

    The number of heads is that of the table of relative positions. There is no dropout, as nothing here draws its own
    random numbers.

    Raises: UserError: a tensor is missing, or the weights are of another kind of T5.
    """
    if f"{BLOCK}0.layer.1.DenseReluDense.wi.weight" in shapes:
        raise UserError("this is an older T5 without gated layers; the encoder of T5 v1.1 is needed")
    try:
        vocabulary, width = shapes[EMBEDDING if EMBEDDING in shapes else COPY]
        buckets, heads = shapes[f"{BLOCK}0.layer.0.SelfAttention.relative_attention_bias.weight"]
        inner = shapes[f"{BLOCK}0.layer.0.SelfAttention.q.weight"][0]
        hidden = shapes[f"{BLOCK}0.layer.1.DenseReluDense.wi_0.weight"][0]
    except KeyError as error:
        raise UserError(f"the T5 encoder lacks the tensor {error.args[0]}") from None
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": hidden,
        "num_layers": 1 + max(int(key[len(BLOCK) :].split(".")[0]) for key in shapes if key.startswith(BLOCK)),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.0,
        "tie_word_embeddings": False,
        "is_encoder_decoder": False,
        "use_cache": False,
    }


def build_t5(tensors: Mapping[str, Tensor], what: str = "the T5 encoder") -> nn.Module:
    """A T5EncoderModel around an encoder's tensors under transformers' names (see `t5_keys`), frozen.

    Raises: UserError: see `t5_config` and `build`.
    """
    from transformers import T5Config, T5EncoderModel

    config = t5_config({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    embedding = tensors[EMBEDDING if EMBEDDING in tensors else COPY]
    model = build(lambda: T5EncoderModel(T5Config(**config)), {**tensors, EMBEDDING: embedding, COPY: embedding}, what)
    model.set_input_embeddings(model.shared)  # one parameter under both names
    return model


def t5_from_folder(folder: str | Path, subfolder: str, dtype: torch.dtype | None) -> nn.Module:
    """The T5EncoderModel of a Diffusers folder, frozen and without dropout.

    Args:
        dtype: of its weights; None means float32.
    Raises: UserError: it is not there, or cannot be read.
    """
    from transformers import T5EncoderModel

    encoder = from_pretrained(T5EncoderModel, str(folder), subfolder, dtype, dropout_rate=0.0)
    encoder.set_input_embeddings(encoder.shared)
    return encoder


def save_t5(text_encoder: nn.Module, folder: Path, *, safe: bool) -> None:
    """Writes T5 by hand, as transformers 5 knows no other form than .safetensors.

    Args:
        safe: a .safetensors file, else a .bin.
    """
    folder.mkdir()
    text_encoder.config.architectures = [type(text_encoder).__name__]
    text_encoder.config.to_json_file(folder / "config.json")
    state = {name: materialise(tensor) for name, tensor in t5_state(text_encoder).items()}
    if safe:
        write_safetensors(folder / "model.safetensors", state, {"format": "pt"})
    else:
        write_torch(folder / "pytorch_model.bin", state)


def t5_state(text_encoder: nn.Module) -> dict[str, Tensor]:
    """The weights under transformers' names, the embedding once, as published files have them."""
    return {key: tensor for key, tensor in text_encoder.state_dict().items() if key != COPY}


def t5_linears(text_encoder: nn.Module) -> list[str]:
    """The paths of the layers that networks may adapt, in order: q, k, v, o, then the feed-forward's, by block."""
    from torch.nn import Linear

    return [
        name
        for name, module in text_encoder.named_modules()
        if isinstance(module, Linear) and name.startswith(BLOCK) and any(part in name for part in LORA_LAYERS)
    ]


def t5_targets(text_encoder: nn.Module) -> list[LoraTarget]:
    """T5's linear layers as entries of LoRA files, under the name "te3"; networks train them only on request."""
    return [LoraTarget(lora_key("te3", path), "te3", (path,), optional=True) for path in t5_linears(text_encoder)]


def encode_t5(text_encoder: nn.Module, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Token ids (B, L) to the last hidden states (B, L, width).

    Args:
        text_encoder: T5EncoderModel.
        mask: (B, L), 1 for tokens and 0 for padding, which is then hidden from attention; None: all is seen.
    """
    device = text_encoder.device
    if mask is not None:
        mask = mask.to(device, non_blocking=True)
    return text_encoder(input_ids.to(device, non_blocking=True), attention_mask=mask).last_hidden_state
