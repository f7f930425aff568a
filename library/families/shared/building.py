"""Builds a diffusers or transformers model around weights that are already in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from library.checkpoints.keymap import require_same_keys

if TYPE_CHECKING:
    from torch import Tensor, nn


def build(make: Callable[[], nn.Module], tensors: Mapping[str, Tensor], what: str) -> nn.Module:
    """Makes a model without memory of its own and gives it `tensors` as its weights; frozen, in eval mode.

    Args:
        make: the class called with its configuration.
        tensors: every tensor of the model's state dict under its live name; taken over, not copied. They may be on
            the meta device, as then the model is.
        what: the part, for messages.
    Raises: UserError: a tensor is missing, is too many or has another shape than the configuration says.
    """
    import torch

    from library.errors import UserError

    model = meta_model(make)
    wanted = model.state_dict()
    require_same_keys(tensors, wanted, what)
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"{what}: {name} has shape {tuple(tensor.shape)}, but the rest of the model needs "
                f"{tuple(wanted[name].shape)}"
            )
    model.load_state_dict(dict(tensors), strict=True, assign=True)
    # CLIP numbers its positions in a buffer that no file holds, so the meta device left it empty.
    for path, module in model.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta and f"{path}.{name}" not in tensors:
                assert name == "position_ids", f"{path}.{name} has no weights"
                ids = torch.arange(buffer.shape[-1]).expand(buffer.shape)
                module.register_buffer(name, ids, persistent=False)
    return freeze(model)


def meta_model(make: Callable[[], nn.Module]) -> nn.Module:
    """A model of which only the configuration and the shapes are there: its weights are on torch's meta device."""
    import torch

    with torch.device("meta"):
        return freeze(make())


def freeze(model: nn.Module) -> nn.Module:
    """Nothing trainable, eval mode: how families hand models over."""
    return model.requires_grad_(False).eval()
