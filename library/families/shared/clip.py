"""CLIP text encoders: names, shape, construction, and text to hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.families.shared.building import build
from library.text.tokenizers import check_token_ids

if TYPE_CHECKING:
    from torch import Tensor, nn

HEAD_WIDTH = 64  # of every published CLIP text encoder
LEVEL = "text_model."
BOS_ID, EOS_ID = 49406, 49407
PENULTIMATE = 2  # the layer before the last, counted from the end


def public_name(name: str) -> str:
    """A live tensor or module name as files have it: below `text_model.`, which some transformers versions dropped."""
    inside = name.startswith(("embeddings.", "encoder.", "final_layer_norm"))
    return LEVEL + name if inside else name


def live_name(model: nn.Module, name: str) -> str:
    """The inverse of `public_name` for this model, whatever version of transformers made it."""
    return name if hasattr(model, LEVEL.rstrip(".")) else name.removeprefix(LEVEL)


def public_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict under public names, without `position_ids`, which only old files have."""
    return {public_name(k): v for k, v in model.state_dict().items() if not k.endswith("position_ids")}


def clip_config(shapes: Mapping[str, tuple[int, ...]], hidden_act: str, pad_id: int) -> dict[str, Any]:
    """CLIPTextConfig's arguments, read from shapes under public names.

    Raises: UserError: the width is not made of heads of 64.
    """
    try:
        vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
        positions = shapes["text_model.embeddings.position_embedding.weight"][0]
        intermediate = shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0]
    except KeyError as error:
        raise UserError(f"the text encoder lacks the tensor {error.args[0]}") from None
    if width % HEAD_WIDTH:
        raise UserError(f"the text encoder's width, {width}, is not a multiple of {HEAD_WIDTH}, the width of a head")
    prefix = "text_model.encoder.layers."
    layers = 1 + max(int(name[len(prefix) :].split(".")[0]) for name in shapes if name.startswith(prefix))
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": intermediate,
        "projection_dim": shapes.get("text_projection.weight", (width,))[0],
        "num_hidden_layers": layers,
        "num_attention_heads": width // HEAD_WIDTH,
        "max_position_embeddings": positions,
        "hidden_act": hidden_act,
        "layer_norm_eps": 1e-5,
        "bos_token_id": min(BOS_ID, vocabulary - 2),
        "eos_token_id": min(EOS_ID, vocabulary - 1),
        "pad_token_id": min(pad_id, vocabulary - 1),
    }


def build_clip(tensors: Mapping[str, Tensor], config: Mapping[str, Any], what: str = "text encoder") -> nn.Module:
    """A CLIPTextModel around tensors under public names; one with projection where they hold that.

    Raises: UserError, see `build`.
    """
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    model = CLIPTextModelWithProjection if "text_projection.weight" in tensors else CLIPTextModel
    with torch.device("meta"):
        shell = model(CLIPTextConfig(**config))
    live = {live_name(shell, name): tensor for name, tensor in tensors.items()}
    return build(lambda: model(CLIPTextConfig(**config)), live, what)


def final_layer_norm(text_encoder: nn.Module) -> nn.Module:
    return text_encoder.get_submodule(live_name(text_encoder, "text_model.final_layer_norm"))


def encode_clip(text_encoder: nn.Module, input_ids: Tensor, clip_skip: int | None = None) -> Tensor:
    """Chunks of token ids to one sequence of hidden states.

    Every chunk is encoded by itself. The result is the first chunk's BOS state, the inner states of every chunk, and
    the last chunk's last state.

    Args:
        text_encoder: CLIPTextModel.
        input_ids: (B, n, length), length 77, or less when captions are not padded.
        clip_skip: None or 1: the last layer; k: the k-th layer from the end, followed by the final layer norm.
    Returns: (B, n * (length - 2) + 2, width).
    Raises: UserError: clip_skip is larger than the number of layers.
    """

    def states(flat: Tensor) -> Tensor:
        if clip_skip in (None, 1):
            return text_encoder(flat).last_hidden_state
        layers = _require_layer(text_encoder, clip_skip)
        hidden = text_encoder(flat, output_hidden_states=True).hidden_states  # the embeddings, then every layer
        assert len(hidden) == layers + 1, "transformers changed what hidden_states holds"
        return final_layer_norm(text_encoder)(hidden[layers + 1 - clip_skip])

    return _in_chunks(input_ids, text_encoder, states)


def encode_at_layer(text_encoder: nn.Module, input_ids: Tensor, clip_skip: int = PENULTIMATE) -> tuple[Tensor, Tensor]:
    """Chunks of token ids to the states of one layer, without the final norm.

    Args:
        text_encoder: CLIPTextModel, with projection or without.
        input_ids: (B, n, 77).
        clip_skip: the layer, counted from the end; 1: the last.
    Returns: (B, n * 75 + 2, width), put together as by `encode_clip`; and the first chunk's states after the last
        layer and the final norm, (B, 77, width).
    Raises: UserError: clip_skip is larger than the number of layers.
    """
    last: list[Tensor] = []

    def states(flat: Tensor) -> Tensor:
        found = text_encoder(flat, output_hidden_states=True)
        last.append(found.last_hidden_state)
        return found.hidden_states[-clip_skip]  # the embeddings, then every layer

    _require_layer(text_encoder, clip_skip)
    joined = _in_chunks(input_ids, text_encoder, states)
    return joined, last[0].unflatten(0, input_ids.shape[:2])[:, 0]


def project_first_eos(text_encoder: nn.Module, input_ids: Tensor, states: Tensor, eos: int) -> Tensor:
    """The pooled text: the state at the first EOS, projected; (B, projection).

    Args:
        text_encoder: CLIPTextModelWithProjection.
        input_ids: (B, 77).
        states: after the last layer and the final norm, (B, 77, width).
    """
    import torch

    # Not the model's own pooling: a config from before transformers 4.31 has another id for EOS.
    place = (input_ids == eos).int().argmax(-1).to(states.device)
    return text_encoder.text_projection(states[torch.arange(len(states), device=states.device), place])


def _require_layer(text_encoder: nn.Module, clip_skip: int) -> int:
    """The number of layers. Raises: UserError: there is none so far from the end."""
    layers = text_encoder.config.num_hidden_layers
    if not 1 <= clip_skip <= layers:
        raise UserError(f"--clip_skip {clip_skip}: the text encoder has {layers} layers; give 1 to {layers}")
    return layers


def _in_chunks(input_ids: Tensor, text_encoder: nn.Module, states_of: Callable[[Tensor], Tensor]) -> Tensor:
    import torch

    check_token_ids(input_ids, text_encoder)
    batch, chunks, length = input_ids.shape
    flat = input_ids.reshape(batch * chunks, length).to(text_encoder.device, non_blocking=True)
    states = states_of(flat).reshape(batch, chunks, length, -1)
    inner = states[:, :, 1:-1].flatten(1, 2)
    return torch.cat([states[:, 0, :1], inner, states[:, -1, -1:]], dim=1)
