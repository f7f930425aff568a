"""The smaller networks inside a DyLoRA file, one file each: networks/extract_lora_from_dylora.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from library.errors import UserError
from library.model_tools.network_io import in_own_names, read_network, scale_of, write_network
from library.model_tools.network_metadata import rank_metadata
from library.model_tools.output import require_output
from library.options.base import Options
from library.options.model_tools import WEIGHT_ENDINGS
from library.options.network_tools import DyLoraOptions
from library.runtime.logs import LOGGER
from networks.fused import ALPHA, alpha_like
from networks.layers.locon import DOWN, UP
from networks.registry import LORA


def cut_dylora(opts: Options) -> None:
    """Writes the first --unit, 2 * --unit, ... ranks of --model, below its own. Raises: UserError."""
    own: DyLoraOptions = opts.dylora
    target = Path(own.save_to)
    source = read_network(own.model, [LORA])
    largest = max(len(entry[DOWN]) for entry in source.entries.values())
    if own.unit >= largest:
        raise UserError(f"--unit={own.unit}: must be below the rank of {own.model}, {largest}")
    for rank in range(own.unit, largest, own.unit):
        path = target.with_name(f"{target.stem}-{rank:04d}{target.suffix}")
        require_output("--save_to", path, [own.model], WEIGHT_ENDINGS)
        entries = {layer: first_ranks(entry, rank) for layer, entry in source.entries.items()}
        comment = f"first {rank} of {largest} ranks of a DyLoRA; {source.metadata.get('ss_training_comment', '')}"
        metadata = {**source.metadata, **rank_metadata(entries), "ss_training_comment": comment.removesuffix("; ")}
        write_network(path, in_own_names(entries, [source]), metadata, None)
        LOGGER.info("%s", path)


def first_ranks(entry: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The first ranks of a layer, with the strength at which they were trained.

    In training, n of r ranks are multiplied by ``alpha / r * sqrt(r / n)``, see `networks.layers.dylora`; readers
    divide alpha by n, so that it is ``alpha * sqrt(n / r)`` here.
    """
    whole = len(entry[DOWN])
    rank = min(rank, whole)
    alpha = scale_of(entry) * whole * math.sqrt(rank / whole)
    return {DOWN: entry[DOWN][:rank], UP: entry[UP][:, :rank], ALPHA: alpha_like(alpha, entry.get(ALPHA))}
