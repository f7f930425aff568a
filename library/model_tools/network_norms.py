"""How much a layer of a network file changes: norms of products, from their factors where that is less work.

All norms are Frobenius norms in float64, at multiplier 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from networks.layer import AdapterLayer
from networks.layers.change import ChangeLayer
from networks.layers.functional import effective_alpha
from networks.layers.locon import DOWN, MID, UP
from networks.layers.lokr import both
from networks.registry import FULL, LOCON, LOHA, LOKR, LORA, NORM, type_of

if TYPE_CHECKING:
    from collections.abc import Callable

_WHOLE = {FULL.label: "diff", NORM.label: "w_norm"}


def change_norm(entry: Mapping[str, Tensor]) -> float | None:
    """The norm of the change of a weight by a file's entry; None where it depends on the weight.

    Source: ``|U D|^2 = tr((U^T U)(D D^T))`` for LoRA; ``|A (x) B| = |A| |B|`` for LoKr; LoHa's
    ``(A1 B1) * (A2 B2)`` is the product of the row-wise Khatri-Rao product of A1 and A2, and that of the B's columns.
    """
    kind = type_of(entry)
    if kind is None or "dora_scale" in entry:
        return None
    wide = {name: tensor.double() for name, tensor in entry.items()}
    if kind.label in _WHOLE:
        return float(wide[_WHOLE[kind.label]].norm())
    if kind in (LORA, LOCON):
        down, up = wide[DOWN], wide[UP].flatten(1)
        if MID in wide:
            down = torch.einsum("rskl,si->rikl", wide[MID], down.flatten(1))
        alpha = wide.get("alpha")
        scale = effective_alpha(None if alpha is None else float(alpha), len(down)) / len(down)
        return abs(scale) * product_norm(up, down.flatten(1))
    if kind == LOKR:
        first, second = both(wide)
        return abs(_change_layer(entry).scale_of(wide)) * float(first.norm() * second.norm())
    if kind == LOHA:
        layer = _change_layer(entry)
        a1, b1, a2, b2 = (wide[f"hada_w{half}_{side}"] for half in "12" for side in "ab")
        if "hada_t1" in wide or b1.shape[0] * b2.shape[0] * b2.shape[0] > b1.shape[1]:
            return abs(layer.scale_of(wide)) * float(layer.product(wide).norm())
        left = (a1[:, :, None] * a2[:, None, :]).flatten(1)
        right = (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)
        return abs(layer.scale_of(wide)) * product_norm(left, right)
    return None


def full_change_norm(entry: Mapping[str, Tensor], shape: torch.Size, weight: Callable[[], Tensor]) -> float:
    """The same for every type, with the weight that is changed. Raises: UserError: the entry does not fit it."""
    return norm(_layer(entry).weight_change(entry, shape, weight))


def norm(tensor: Tensor) -> float:
    """The norm of a tensor of any float dtype."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def require_shape(entry: Mapping[str, Tensor], shape: torch.Size) -> None:
    """Computes with shapes alone. Raises: UserError: an entry does not fit a weight of this shape."""
    there = {name: tensor if tensor.dim() == 0 else tensor.to("meta") for name, tensor in entry.items()}
    _layer(entry).weight_change(there, shape, lambda: torch.empty(shape, device="meta"))


def product_norm(left: Tensor, right: Tensor) -> float:
    """The norm of ``left @ right``, (a, r) and (r, b), by two r x r products."""
    return float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())


def _layer(entry: Mapping[str, Tensor]) -> type[AdapterLayer]:
    kind = type_of(entry)
    assert kind is not None
    return kind.layer.load()


def _change_layer(entry: Mapping[str, Tensor]) -> type[ChangeLayer]:
    layer = _layer(entry)
    assert issubclass(layer, ChangeLayer)
    return layer
