"""The table of positions, used in other ways than from its middle: drawn places, and places scaled to the image."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import PatchEmbed
from torch import Tensor, nn


class PlacedPatchEmbed(PatchEmbed):
    """diffusers' layer, which gives an image the table's middle, with two more ways to place it.

    Random crop: while gradients are computed in train mode, a share `random_crop_rate` of the calls take a piece of
    the table that lies anywhere, drawn from torch's global stream, which the loop seeds for every batch.

    Scaled: the steps between neighbours are such that an image of any size has the area on the table that one of
    `base_size` x `base_size` patches has with steps of 1. Between the table's entries, values are interpolated.
    """

    random_crop_rate: float = 0.0
    scaled: bool = False

    def cropped_pos_embed(self, height: int, width: int) -> Tensor:
        """Positions of an image with latents of this size, (1, patches, channels)."""
        draws = self._draws()
        if draws is None and not self.scaled:
            return super().cropped_pos_embed(height, width)
        rows, columns = height // self.patch_size, width // self.patch_size
        step = self.base_size / (rows * columns) ** 0.5 if self.scaled else 1.0
        side = self.pos_embed_max_size
        if not self.scaled and max(rows, columns) > side:
            raise ValueError(f"{rows} x {columns} patches do not fit a table of {side} x {side} positions")
        down, right = (None, None) if draws is None else draws
        table = self.pos_embed.reshape(side, side, -1)
        table = _rows_at(table, _first_place(rows, step, side, down), step, rows)
        table = _rows_at(table.transpose(0, 1), _first_place(columns, step, side, right), step, columns)
        return table.transpose(0, 1).reshape(1, rows * columns, -1)

    def _draws(self) -> tuple[float, float] | None:
        """The offset of the image on the table, each in [0, 1), or None for the centre."""
        if not (self.random_crop_rate and self.training and torch.is_grad_enabled()):
            return None
        chance, down, right = torch.rand(3, device="cpu").tolist()  # on the CPU, so that nothing waits for the GPU
        return (down, right) if chance < self.random_crop_rate else None


def place_positions(denoiser: nn.Module, *, random_crop_rate: float, scaled: bool) -> None:
    """Lets the denoiser's table of positions be used as `PlacedPatchEmbed` says. The table itself stays as it is."""
    layer = denoiser.pos_embed
    layer.__class__ = PlacedPatchEmbed  # the object stays, with its hooks and its place in the model
    layer.random_crop_rate, layer.scaled = random_crop_rate, scaled


def _first_place(count: int, step: float, side: int, draw: float | None) -> float:
    """The first of `count` positions, `step` apart, on one axis of a table of `side` entries.

    Args:
        draw: chooses among the beginnings that fit; None is the middle, as diffusers has it at steps of 1.
    """
    if draw is None:
        return (side - count) // 2 - (count - 1) * (step - 1) / 2
    if step == 1:
        return int(draw * (side - count + 1))
    return draw * max(side - 1 - (count - 1) * step, 0.0)


def _rows_at(table: Tensor, first: float, step: float, count: int) -> Tensor:
    """The table's rows at places that may lie between two of them: (side, ...) to (count, ...)."""
    if step == 1:
        return table[int(first) : int(first) + count]
    last = len(table) - 1
    places = (first + step * torch.arange(count, device=table.device)).clamp(0, last)
    low = places.long()
    share = (places - low).to(table.dtype).reshape(-1, *[1] * (table.dim() - 1))
    return torch.lerp(table[low], table[(low + 1).clamp(max=last)], share)
