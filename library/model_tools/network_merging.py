"""Network files added up into one, without a model: merging of LoRA and what is alike.

The result acts as all files attached together, each with its ratio. With `concat` that is exact: ranks lie side by
side. Without it the result has the rank of the largest file, and is the best approximation of that rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from library.errors import UserError
from library.model_tools import low_rank
from library.model_tools.block_weights import BlockWeights
from library.model_tools.network_io import (
    Source,
    in_own_names,
    named,
    read_network,
    scale_of,
    without_core,
    write_network,
)
from library.model_tools.network_layers import with_one_naming
from library.model_tools.network_metadata import merged_metadata, recipe
from library.model_tools.output import require_output
from library.model_tools.weights import dtype_of
from library.options.model_tools import WEIGHT_ENDINGS
from library.runtime.logs import LOGGER, progress
from networks.files import Entries
from networks.fused import ALPHA, DORA
from networks.layers.locon import DOWN, MID, UP
from networks.registry import FULL, NORM, type_of

Combine = Callable[[Sequence["Share"]], dict[str, Tensor]]  # what several files give to a layer -> the layer
# The tensor of a layer to which its change is proportional.
LINEAR = (UP, "hada_w1_a", "lokr_w1", "lokr_w1_a")
SHUFFLE_SEED = 0


@dataclass(frozen=True)
class Share:
    """One file's part in a layer of the result."""

    source: Source
    entry: Mapping[str, Tensor]
    factor: float

    @property
    def label(self) -> str:
        kind = type_of(self.entry)
        return "DoRA" if DORA in self.entry else kind.label if kind else "of no known type"

    @property
    def is_product(self) -> bool:
        return DOWN in self.entry and DORA not in self.entry

    @property
    def is_sum(self) -> bool:
        """Whether its tensors are the change itself, so that they can be added to others."""
        return type_of(self.entry) in (FULL, NORM)

    @cached_property
    def plain(self) -> dict[str, Tensor]:
        """LoRA matrices without a core."""
        return without_core(self.entry)

    @property
    def rank(self) -> int:
        return len(self.plain[DOWN])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that is changed."""
        return (len(self.plain[UP]), *self.plain[DOWN].shape[1:])

    @property
    def size(self) -> tuple[int, int]:
        """Of the weight as a matrix."""
        return self.shape[0], math.prod(self.shape[1:])

    def product(self, device: str | torch.device = "cpu", *, over: float = 1.0) -> tuple[Tensor, Tensor]:
        """Up with everything in it that multiplies the matrices, divided by `over`; and down. Float32."""
        up, down = low_rank.flattened(self.plain[UP].to(device), self.plain[DOWN].to(device))
        return up * (self.factor * scale_of(self.entry) / over), down


def merge_networks(
    models: Sequence[str],
    ratios: Sequence[float],
    save_to: str,
    *,
    weights: Sequence[BlockWeights | None] | None = None,
    concat: bool = False,
    shuffle: bool = False,
    legacy_ratio: bool = False,
    precision: str = "float",
    save_precision: str | None = None,
    no_metadata: bool = False,
) -> None:
    """Merges network files and writes the result: `--models` and `--ratios` of the merging scripts without a model.

    Args:
        weights: `--lbws`, for each file.
        concat: ranks side by side: exact.
        shuffle: mixes the order of the ranks, the same way in every run. Nothing changes but what a later cut at a
            rank would keep.
        legacy_ratio: strengths as sd-scripts up to 0.10 has them, see `_legacy`.
        precision: of what is read; sums are float32.
        save_precision: of the file; None: `precision`.
    Raises: UserError: numbers of files and ratios differ, files that cannot be added up, or an unusable `save_to`.
    """
    require_output("--save_to", save_to, models, WEIGHT_ENDINGS)
    weights = weights or [None] * len(models)
    sources = read_sources(models, ratios, weights)
    way = f"{'legacy ' if legacy_ratio else ''}{'concat' if concat else 'sum'}"
    combine = partial(_legacy, concat=concat) if legacy_ratio else partial(_combined, concat=concat)
    entries = merged(sources, ratios, weights, combine, dtype_of(precision))
    if shuffle:
        for layer, entry in entries.items():
            if DOWN in entry and MID not in entry:  # other types stay as they are
                order = torch.randperm(len(entry[DOWN]), generator=torch.Generator().manual_seed(SHUFFLE_SEED))
                entries[layer] = {**entry, DOWN: entry[DOWN][order], UP: entry[UP][:, order]}
    made = recipe(way, models, ratios, weights)
    metadata = merged_metadata(sources, entries, made, save_to, no_metadata=no_metadata)
    write_network(save_to, in_own_names(entries, sources), metadata, dtype_of(save_precision or precision))
    LOGGER.info("%s: %d layers of %d files", save_to, len(entries), len(models))


def read_sources(
    models: Sequence[str], ratios: Sequence[float], weights: Sequence[BlockWeights | None]
) -> list[Source]:
    """The files to merge. Raises: UserError: numbers of files and ratios differ, or a file cannot be used."""
    if not models:
        raise UserError("--models: give the network files to merge")
    if len(models) != len(ratios):
        raise UserError(f"--ratios: {len(ratios)} given for {len(models)} --models; give one for each")
    sources = with_one_naming([read_network(path) for path in models])
    for source, weight in zip(sources, weights, strict=True):
        if weight is not None:
            weight.check(source.entries)
    return sources


def shares_by_layer(
    sources: Sequence[Source], ratios: Sequence[float], weights: Sequence[BlockWeights | None]
) -> dict[str, list[Share]]:
    """For each layer of any file, what the files give to it. A share of weight 0 is none.

    Raises: UserError: nothing is left.
    """
    shares: dict[str, list[Share]] = {}
    for source, ratio, weight in zip(sources, ratios, weights, strict=True):
        for layer, entry in source.entries.items():
            factor = ratio * (weight.factor(layer) if weight else 1.0)
            if factor:
                shares.setdefault(layer, []).append(Share(source, entry, factor))
    if not shares:
        raise UserError("--ratios: every layer would have the weight 0; nothing is left to merge")
    return shares


def merged(
    sources: Sequence[Source],
    ratios: Sequence[float],
    weights: Sequence[BlockWeights | None],
    combine: Combine,
    dtype: torch.dtype = torch.float32,
) -> Entries:
    """The layers of the merge; float32 where something was computed. `dtype`: what is read is rounded to it.

    Raises: UserError: layers that cannot be added up.
    """
    shares = shares_by_layer(sources, ratios, weights)
    entries: Entries = {}
    with progress(len(shares), "merging", " layers") as bar:
        for layer, own in shares.items():
            if dtype != torch.float32:
                rounded = ({name: tensor.to(dtype) for name, tensor in share.entry.items()} for share in own)
                own = [replace(share, entry=entry) for share, entry in zip(own, rounded, strict=True)]
            with named(layer):
                if all(share.is_sum for share in own):
                    entries[layer] = {}
                    for name in dict.fromkeys(name for share in own for name in share.entry):
                        changes = [share.entry[name].float() * share.factor for share in own if name in share.entry]
                        entries[layer][name] = sum(changes)
                else:
                    entries[layer] = combine(own)
            bar.update()
    return entries


def _combined(shares: Sequence[Share], *, concat: bool) -> dict[str, Tensor]:
    if len(shares) == 1:
        return _scaled(shares[0])
    require_products(shares)
    if not concat:
        return approximated(shares, max(share.rank for share in shares))
    # Ranks side by side. Alpha / rank is that of the first file, whose matrices stay as they are at a ratio of 1.
    scale = scale_of(shares[0].entry)
    up, down = low_rank.side_by_side([share.product(over=scale) for share in shares])
    alpha = torch.tensor(scale * len(down))
    up, down = low_rank.restored(up, down, shares[0].shape)
    return {UP: up, DOWN: down, ALPHA: alpha}


def require_products(shares: Sequence[Share]) -> None:
    """Raises: UserError: a change is no product of matrices, and so cannot be added to others; or sizes differ."""
    for share in shares:
        if not share.is_product:
            raise UserError(
                f"is {share.label} in {share.source.path}, which cannot be added up in a file of its own",
                hint="merge the files into a model instead: give the model too",
            )
    sizes = {share.size: share.source.path for share in shares}
    if len(sizes) > 1:
        shown = ", ".join(f"{out}x{width} in {path}" for (out, width), path in sizes.items())
        raise UserError(f"sizes differ: {shown}; were the files made for different models?")


def approximated(
    shares: Sequence[Share], rank: int, *, clamp: float = 1.0, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """The best approximation of a sum by a rank, or by the layer's own size where that is less; alpha is the rank.

    Args: clamp: quantile at which the values are cut off, see `low_rank.clamped`.
    """
    rank = min(rank, *shares[0].size)
    found = low_rank.svd_of_sum([share.product(device) for share in shares])
    up, down = low_rank.restored(*low_rank.clamped(*found.factors(rank), clamp), shares[0].shape)
    return {UP: up.cpu(), DOWN: down.cpu(), ALPHA: torch.tensor(float(rank))}


def _legacy(shares: Sequence[Share], *, concat: bool) -> dict[str, Tensor]:
    """The merge of sd-scripts up to 0.10: the ratio is in both matrices, and alpha is the first file's.

    A file acts with the square of its ratio, divided by the growth of the rank where ranks are concatenated. Otherwise
    matrices are added up before they are multiplied, so that there are products of one file with another.
    """
    require_products(shares)
    if not concat and len({share.rank for share in shares}) > 1:
        ranks = ", ".join(f"{share.rank} in {share.source.path}" for share in shares)
        raise UserError(f"ranks differ: {ranks}; give --concat, or leave out --legacy_ratio")
    alpha = scale_of(shares[0].entry) * shares[0].rank
    pairs = []
    for share in shares:
        scale = math.sqrt(scale_of(share.entry) * share.rank / alpha) * share.factor
        up, down = low_rank.flattened(share.plain[UP], share.plain[DOWN])
        pairs.append((up * abs(scale), down * scale))
    up, down = low_rank.side_by_side(pairs) if concat else tuple(map(sum, zip(*pairs, strict=True)))
    up, down = low_rank.restored(up, down, shares[0].shape)
    return {UP: up, DOWN: down, ALPHA: torch.tensor(alpha)}


def _scaled(share: Share) -> dict[str, Tensor]:
    """The only share of a layer, of any type: at a factor of 1 as it is in the file. Raises: UserError."""
    entry, factor = dict(share.entry), share.factor
    if factor == 1:
        return entry
    linear = next((name for name in LINEAR if name in entry), None)
    if linear is None or DORA in entry:
        raise UserError(
            f"is {share.label} in {share.source.path}, which can only have the ratio 1 in a file of its own, got "
            f"{factor:g}",
            hint="merge it into a model instead: give the model too",
        )
    return {**entry, linear: entry[linear].float() * factor}
