"""Hypernetworks written out by hand: what a file means, without our code. After the description of the file format."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS = {
    "linear": lambda x: x,
    "relu": torch.relu,
    "leakyrelu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "swish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "mish": lambda x: x * torch.tanh(torch.log(1 + torch.exp(x))),
}


def transformed(x: Tensor, state: dict[str, Tensor], content: dict[Any, Any], multiplier: float) -> Tensor:
    """``x + multiplier * linear(x)`` for one of the two networks of a width."""
    weights = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
    linears = [name for name in weights if state[f"{name}.weight"].dim() == 2]
    hidden = x
    for name in weights:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        if name not in linears:
            centred = hidden - hidden.mean(-1, keepdim=True)
            hidden = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
            continue
        hidden = hidden @ weight.T + bias
        if name != linears[-1] or content["activate_output"]:
            hidden = ACTIVATIONS[content["activation_func"]](hidden)
    return x + multiplier * hidden


class _Attention:
    """Attention whose keys and values come from transformed contexts, as diffusers' processors are called."""

    def __init__(self, content: dict[Any, Any], multiplier: float):
        self.content, self.multiplier = content, multiplier

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        pair = self.content.get(context.shape[-1])
        own = [context, context]
        if pair is not None:
            own = [transformed(context, state, self.content, self.multiplier) for state in pair]
        heads = lambda x: x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # noqa: E731
        q, k, v = heads(attn.to_q(hidden_states)), heads(attn.to_k(own[0])), heads(attn.to_v(own[1]))
        return attn.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def with_hypernetwork(unet: nn.Module, content: dict[Any, Any], multiplier: float = 1.0) -> nn.Module:
    """A copy of a U-Net in which the hypernetwork acts. Args: content: of its file."""
    changed = copy.deepcopy(unet)
    changed.set_attn_processor(_Attention(content, multiplier))
    return changed
