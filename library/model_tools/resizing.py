"""Network files at another rank: networks/resize_lora.py.

A layer's change is the product of two thin matrices, whose singular values cost two thin QR decompositions and an SVD
of the rank's size. A layer at a new rank is the best approximation of that rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from library.errors import UserError
from library.model_tools import low_rank
from library.model_tools.network_io import in_own_names, named, read_network, scale_of, without_core, write_network
from library.model_tools.network_metadata import DYNAMIC, is_plain, rank_metadata
from library.model_tools.output import require_output
from library.model_tools.weights import dtype_of, require_device
from library.options.base import Options
from library.options.model_tools import WEIGHT_ENDINGS
from library.options.network_tools import ResizeOptions
from library.runtime.logs import LOGGER, progress
from networks.files import ADAPTER_METADATA, Entries
from networks.fused import ALPHA
from networks.layers.locon import DOWN, UP
from networks.registry import FULL, LOCON, LORA, NORM

TYPES = (LORA, LOCON, FULL, NORM)  # the last two have no rank, and are kept as they are
NOTHING = 1e-6  # largest singular value of a layer that does nothing


@dataclass(frozen=True)
class Report:
    """What became of a layer."""

    old_rank: int
    new_rank: int
    kept_norm: float  # share of the Frobenius norm
    kept_sum: float  # share of the sum of singular values

    def __str__(self) -> str:
        return (
            f"rank {self.old_rank} -> {self.new_rank}, Frobenius norm kept {self.kept_norm:.1%}, "
            f"sum of singular values kept {self.kept_sum:.1%}"
        )


def resize_lora(opts: Options) -> None:
    """Writes --model at the ranks of the options to --save_to. Raises: UserError: a file that cannot be resized."""
    own: ResizeOptions = opts.resize
    device = require_device(own.device or "cpu")
    require_output("--save_to", own.save_to, [own.model], WEIGHT_ENDINGS)
    source = read_network(own.model, TYPES)
    if not any(DOWN in entry for entry in source.entries.values()):
        raise UserError(f"{own.model}: none of its layers has a rank; there is nothing to resize")
    entries, reports = resized(source.entries, own, device)
    for layer, report in reports.items():
        (LOGGER.info if own.verbose else LOGGER.debug)("%s: %s", layer, report)
    if len(reports) < len(entries):
        LOGGER.info("%d layers have no rank and stay as they were", len(entries) - len(reports))
    metadata = _metadata(source.metadata, source.entries, entries, own)
    write_network(own.save_to, in_own_names(entries, [source]), metadata, dtype_of(own.save_precision or "float"))
    kept = [report.kept_norm for report in reports.values()]
    ranks = sorted({report.new_rank for report in reports.values()})
    shown = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(*ranks)
    LOGGER.info(
        "%s: %d layers of rank %s; Frobenius norm kept %.1f%% on average, %.1f%% at least",
        own.save_to,
        len(reports),
        shown,
        100 * sum(kept) / len(kept),
        100 * min(kept),
    )


def resized(
    entries: Entries, own: ResizeOptions, device: torch.device | str = "cpu"
) -> tuple[Entries, dict[str, Report]]:
    """Every layer at its new rank, and what became of those that have one. Alpha / rank stays."""
    found: Entries = {}
    reports: dict[str, Report] = {}
    with progress(len(entries), "resizing", " layers") as bar:
        for layer, entry in entries.items():
            if DOWN in entry:
                with named(layer):
                    found[layer], reports[layer] = _layer(entry, own, device)
            else:
                found[layer] = entry
            bar.update()
    return found, reports


def _layer(
    entry: Mapping[str, Tensor], own: ResizeOptions, device: torch.device | str
) -> tuple[dict[str, Tensor], Report]:
    entry = without_core(entry)
    shape = (len(entry[UP]), *entry[DOWN].shape[1:])
    svd = low_rank.svd_of_product(*low_rank.flattened(entry[UP].to(device), entry[DOWN].to(device)))
    limit = own.new_rank if is_plain(entry[DOWN]) else own.new_conv_rank or own.new_rank
    rank = min(limit, len(svd.u), svd.vh.shape[1])
    if own.dynamic_method is not None:
        rank = min(rank, DYNAMIC_METHODS[own.dynamic_method](svd.s, own.dynamic_param))
    up, down = low_rank.restored(*svd.factors(rank), shape)
    total = float(svd.s.sum())
    report = Report(len(entry[DOWN]), rank, svd.kept(rank) ** 0.5, float(svd.s[:rank].sum()) / total if total else 1.0)
    scale = scale_of(entry)
    return {**entry, UP: up.cpu(), DOWN: down.cpu(), ALPHA: torch.tensor(scale * rank)}, report


# ---- ranks by what singular values there are: (values from the largest, parameter) -> how many to keep, at least 1


def by_ratio(s: Tensor, ratio: float) -> int:
    """Those above the largest one divided by `ratio`."""
    return 1 if float(s[0]) <= NOTHING else max(int((s > s[0] / ratio).sum()), 1)


def by_sum(s: Tensor, share: float) -> int:
    """The fewest whose sum is at least a share of the sum of all."""
    return _first_to_reach(s, share)


def by_norm(s: Tensor, share: float) -> int:
    """The fewest whose product has at least a share of the Frobenius norm of the whole."""
    return _first_to_reach(s.double().square(), share**2)


def _first_to_reach(values: Tensor, share: float) -> int:
    reached = values.double().cumsum(0)
    if float(values[0]) <= 0:
        return 1
    return min(int((reached < share * reached[-1] * (1 - 1e-9)).sum()) + 1, len(values))


DYNAMIC_METHODS: dict[str, Callable[[Tensor, float], int]] = {
    "sv_ratio": by_ratio,
    "sv_cumulative": by_sum,
    "sv_fro": by_norm,
}


def _metadata(metadata: Mapping[str, str], old: Entries, new: Entries, own: ResizeOptions) -> dict[str, str]:
    """The file's own metadata with its new ranks, and a note in the comment."""
    ranks, before = rank_metadata(new), rank_metadata(old).get("ss_network_dim", DYNAMIC)
    what = f"resized from rank {before} to {ranks['ss_network_dim']}"
    if own.dynamic_method is not None:
        ranks = {"ss_network_dim": DYNAMIC, "ss_network_alpha": DYNAMIC}
        what = f"resized from rank {before} by {own.dynamic_method} {own.dynamic_param:g}, at most {own.new_rank}"
    comment = metadata.get("ss_training_comment")
    found = {
        **metadata,
        **ranks,
        "ss_training_comment": what + (f"; {comment}" if comment not in (None, "None") else ""),
    }
    found.pop(ADAPTER_METADATA, None)  # it has the old ranks; the scale is in the matrices now
    try:
        arguments = json.loads(found.get("ss_network_args") or "{}")
    except ValueError:
        arguments = None
    if isinstance(arguments, dict) and "conv_dim" in arguments:
        kernels = {name: entry for name, entry in new.items() if DOWN in entry and not is_plain(entry[DOWN])}
        if kernels:
            values = rank_metadata(kernels)
            arguments |= {"conv_dim": values["ss_network_dim"], "conv_alpha": values["ss_network_alpha"]}
            found["ss_network_args"] = json.dumps(arguments)
    return found
