"""LoRA of layers that are one in some layouts of files and several in others, such as query, key and value.

Cutting and joining undo each other, to the bit: parts that share a down matrix become one layer with that matrix, and
parts that have their own become one whose ranks lie side by side, with an up matrix that is zero outside the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from library.errors import UserError
from networks.layers.change import BIAS
from networks.layers.locon import DOWN, UP
from networks.layers.lora import Entry

ALPHA, DORA = "alpha", "dora_scale"
ROWS = "rows"  # of a piece, in an entry that `stacked` makes
Piece = dict[str, Tensor]


def rows_by_share(rows: int, shares: Sequence[int]) -> list[int]:
    """So many rows in these proportions. Raises: UserError: they cannot be cut so."""
    unit, rest = divmod(rows, sum(shares))
    if rest:
        raise UserError(f"{rows} outputs cannot be cut {':'.join(map(str, shares))}")
    return [unit * share for share in shares]


def cut(entry: Mapping[str, Tensor], rows: Sequence[int]) -> list[Piece | None]:
    """A layer as one piece for each number of output rows; None for a piece that does nothing where others do.

    Raises: UserError: it is no LoRA or DoRA, or has other rows.
    """
    _require_lora(entry)
    whole = Entry.of(entry)
    if len(whole.up) != sum(rows):
        raise UserError(f"has {len(whole.up)} outputs where {sum(rows)} are expected")
    scale = whole.alpha / whole.rank
    ups = whole.up.split(list(rows))
    columns = [None] * len(ups) if BIAS in entry else _columns(ups, whole.rank)
    pieces: list[Piece | None] = []
    start = 0
    for up, own in zip(ups, columns, strict=True):
        piece = None
        if own is None:
            piece = {DOWN: whole.down.clone(), UP: up.clone()}
        elif len(own):
            piece = {DOWN: whole.down[own], UP: up[:, own].contiguous()}
        if piece is not None:
            if ALPHA in entry:
                piece[ALPHA] = alpha_like(scale * len(piece[DOWN]), entry[ALPHA])
            for name in (DORA, BIAS):
                if name in entry:
                    piece[name] = entry[name][start : start + len(up)].clone()
        pieces.append(piece)
        start += len(up)
    return pieces


def can_join(pieces: Sequence[Mapping[str, Tensor] | None]) -> bool:
    """Whether `join` can put these pieces together: LoRA, or DoRA of rows in all of them."""
    known = [piece for piece in pieces if piece is not None]
    if not known or any(piece.keys() - {ALPHA, DORA, BIAS} != {DOWN, UP} or piece[DOWN].dim() != 2 for piece in known):
        return False
    dora = [piece[DORA] for piece in known if DORA in piece]
    return not dora or (len(dora) == len(pieces) and all(len(scales) > 1 for scales in dora))


def join(pieces: Sequence[Mapping[str, Tensor] | None], rows: Sequence[int], *, share: bool = True) -> Piece:
    """The inverse of `cut`; a change of the rows that a missing piece has is zero.

    Args: share: parts with equal down matrices share it; else each part always has ranks of its own.
    Raises: UserError: a piece is no LoRA or DoRA, or only some are DoRA.
    """
    present = [piece for piece in pieces if piece is not None]
    for piece in present:
        _require_lora(piece)
    if any(DORA in piece for piece in present) and not all(piece is not None and DORA in piece for piece in pieces):
        raise UserError("only some of its parts have a dora_scale")
    read = [None if piece is None else Entry.of(piece) for piece in pieces]
    known = [entry for entry in read if entry is not None]
    scale = known[0].alpha / known[0].rank
    same_scale = all(math.isclose(entry.alpha / entry.rank, scale, rel_tol=1e-6) for entry in known)
    ups = []
    for entry, count in zip(read, rows, strict=True):
        if entry is None:
            ups.append(known[0].up.new_zeros(count, 0))
        elif len(entry.up) != count:
            raise UserError(f"a part has {len(entry.up)} outputs where {count} are expected")
        else:
            ups.append(entry.up if same_scale else entry.up.float() * (entry.alpha / entry.rank / scale))
    shared = (
        share
        and len(known) == len(read)
        and all(torch.equal(entry.down.float(), known[0].down.float()) for entry in known)
    )
    down = known[0].down if shared else torch.cat([entry.down for entry in known])
    joined = {DOWN: down, UP: torch.cat(ups) if shared else torch.block_diag(*ups)}
    if not same_scale or any(ALPHA in piece for piece in present):
        joined[ALPHA] = alpha_like(scale * len(down), present[0].get(ALPHA))
    if DORA in present[0]:
        joined[DORA] = torch.cat([piece[DORA] for piece in present])
    if any(BIAS in piece for piece in present):
        own = zip(pieces, rows, strict=True)
        joined[BIAS] = torch.cat([piece[BIAS] if piece and BIAS in piece else torch.zeros(n) for piece, n in own])
    return joined


def stacked(pieces: Sequence[Mapping[str, Tensor] | None], rows: Sequence[int]) -> Piece:
    """Pieces of any types as one entry, which `unstacked` takes apart: ``0/rows``, ``0/<tensor>``, ``1/rows``, ..."""
    whole: Piece = {}
    for place, (piece, count) in enumerate(zip(pieces, rows, strict=True)):
        whole[f"{place}/{ROWS}"] = torch.tensor(count)
        whole |= {f"{place}/{name}": tensor for name, tensor in (piece or {}).items()}
    return whole


def unstacked(entry: Mapping[str, Tensor]) -> list[tuple[int, Piece]]:
    """(output rows, tensors) of each module of a fused layer; no tensors where the file has nothing of it."""
    pieces: dict[int, Piece] = {}
    for name, tensor in entry.items():
        place, _, own = name.partition("/")
        pieces.setdefault(int(place), {})[own] = tensor
    return [(int(pieces[place].pop(ROWS)), pieces[place]) for place in sorted(pieces)]


def _require_lora(entry: Mapping[str, Tensor]) -> None:
    if entry.keys() - {ALPHA, DORA, BIAS} != {DOWN, UP}:
        raise UserError(f"only LoRA can be cut or joined, and it has {', '.join(sorted(entry))}")
    if entry[DOWN].dim() != 2 or (DORA in entry and len(entry[DORA]) == 1):
        raise UserError("is of a shape that cannot be cut or joined")


def _columns(ups: Sequence[Tensor], rank: int) -> list[Tensor | None]:
    """The ranks of each part; None: those of the whole, which parts share.

    Parts of equal rank lie side by side in their order. Of others, a rank belongs to the part that uses it.
    """
    used = torch.stack([up.ne(0).any(0) for up in ups])  # (parts, rank)
    each, rest = divmod(rank, len(ups))
    blocks = torch.arange(rank).split(each) if not rest else ()
    if blocks and all(not used[part].index_fill(0, block, False).any() for part, block in enumerate(blocks)):
        return list(blocks)
    if (used.sum(0) > 1).any() or not used.any():
        return [None] * len(ups)
    return [own.nonzero().flatten() for own in used]


def alpha_like(value: float, like: Tensor | None) -> Tensor:
    """Alpha in the dtype of another where that holds it exactly, else in float32."""
    alpha = torch.tensor(value)
    if like is None or not like.is_floating_point() or float(alpha.to(like.dtype)) != float(alpha):
        return alpha
    return alpha.to(like.dtype)
