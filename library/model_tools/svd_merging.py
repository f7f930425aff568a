"""Network files of any ranks added up at a new rank: networks/svd_merge_lora.py."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from library.model_tools.block_weights import parse_all
from library.model_tools.network_io import in_own_names, write_network
from library.model_tools.network_merging import Share, approximated, merged, read_sources, require_products
from library.model_tools.network_metadata import is_plain, merged_metadata, recipe
from library.model_tools.output import require_output
from library.model_tools.weights import dtype_of, require_device
from library.options.base import Options
from library.options.model_tools import WEIGHT_ENDINGS
from library.options.network_tools import SvdMergeOptions
from library.runtime.logs import LOGGER
from networks.layers.locon import DOWN


def svd_merge(opts: Options) -> None:
    """Writes the best approximation, at the new ranks, of the sum of --models by --ratios.

    Raises: UserError: files that cannot be added up, or a place that cannot be written to.
    """
    own: SvdMergeOptions = opts.svd_merge
    device = require_device(own.device or "cpu")
    require_output("--save_to", own.save_to, own.models, WEIGHT_ENDINGS)
    weights = parse_all(own.lbws, len(own.models))
    sources = read_sources(own.models, own.ratios, weights)

    def combine(shares: Sequence[Share]) -> dict[str, Tensor]:
        require_products(shares)
        rank = own.new_rank if is_plain(shares[0].plain[DOWN]) else own.new_conv_rank or own.new_rank
        return approximated(shares, rank, clamp=own.clamp_quantile, device=device)

    entries = merged(sources, own.ratios, weights, combine, dtype_of(own.precision))
    made = recipe("svd", own.models, own.ratios, weights)
    metadata = merged_metadata(sources, entries, made, own.save_to, no_metadata=own.no_metadata)
    dtype = dtype_of(own.save_precision or own.precision)
    write_network(own.save_to, in_own_names(entries, sources), metadata, dtype)
    LOGGER.info("%s: %d layers of %d files", own.save_to, len(entries), len(sources))
