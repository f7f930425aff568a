"""Extracting networks: the difference of two models as a network file, by the extract_lora scripts of all families.

Both models are read layer by layer. A difference is decomposed at the rank that is asked for, not whole.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from library.checkpoints.metadata import minimal
from library.checkpoints.scaled import is_scale
from library.errors import UserError
from library.model_tools import low_rank
from library.model_tools.low_rank import Svd
from library.model_tools.model_layers import ModelFile, open_given
from library.model_tools.network_io import ALPHA, DOWN, UP, write_network
from library.model_tools.network_metadata import RECIPE, rank_metadata
from library.model_tools.output import require_output
from library.model_tools.recipes import file_hashes, modelspec
from library.model_tools.weights import dtype_of, require_device
from library.options.base import Options
from library.options.model_tools import WEIGHT_ENDINGS, ExtractOptions
from library.runtime.logs import LOGGER, progress
from networks.factors import factors
from networks.targets import live_modules

if TYPE_CHECKING:
    from library.types import LoraTarget
    from networks.files import Entries

Decompose = Callable[[Tensor, int], Svd]  # a matrix and a rank -> its largest singular values


@dataclass
class Kept:
    """How much of a part's change the network holds, as squared Frobenius norms."""

    layers: int = 0
    held: float = 0.0
    whole: float = 0.0


@dataclass(frozen=True)
class Pair:
    """Two models of one architecture."""

    original: ModelFile
    tuned: ModelFile
    device: torch.device
    dtype: torch.dtype | None  # to which weights are rounded first

    @property
    def parts(self) -> list[str]:
        """The parts that both files have."""
        return [part for part in self.original.parts if part in self.tuned.parts]

    def change(self, target: LoraTarget) -> Tensor:
        """What the tuned model adds to a layer's weight, float32: rows in the order of network files."""
        weights = (file.weight(target).to(self.device) for file in (self.tuned, self.original))
        tuned, original = (weight.to(self.dtype).float() if self.dtype else weight for weight in weights)
        return tuned.sub_(original)


def extract(opts: Options) -> None:
    """Writes the difference of --model_tuned from --model_org as a network.

    Raises: UserError: files that cannot be read or do not fit together, or a result that cannot be written.
    """
    own: ExtractOptions = opts.extract
    path = require_output("--save_to", str(own.save_to), [own.model_org, own.model_tuned], WEIGHT_ENDINGS)
    device = require_device(own.device or "cpu")
    names = ("model_org", "model_tuned")
    files = [open_given(name, getattr(own, name), own.FAMILIES) for name in names]
    pair = Pair(*files, device, dtype_of(getattr(own, "load_precision", None)))
    _require_one_architecture(pair)
    entries = extracted(pair, own)
    _report_others(pair, entries)
    metadata = _metadata(path, pair, entries, own)
    tensors = {f"{layer}.{name}": tensor for layer, entry in entries.items() for name, tensor in entry.items()}
    write_network(path, tensors, metadata, dtype_of(own.save_precision or "float"))
    LOGGER.info("wrote %s: %d layers", path, len(entries))


def _require_one_architecture(pair: Pair) -> None:
    """Raises: UserError: a layer of a part that both files have is missing in one, or of another size."""
    original, tuned = pair.original, pair.tuned
    if original.family != tuned.family:
        raise UserError(f"{original.path} and {tuned.path} are models of different families")
    sizes = {target.key: tuple(tuned.shape(target)) for target in tuned.targets}
    for target in original.targets:
        own, other = tuple(original.shape(target)), sizes.get(target.key)
        if target.part in pair.parts and other != own:
            found = f"is {other}" if other else "is missing"
            raise UserError(
                f"{tuned.path}: {target.key} {found}, in {original.path} it is {own}; give two models of one "
                "architecture"
            )


# ---- layers


def extracted(pair: Pair, own: ExtractOptions) -> Entries:
    """The network's entries. Layers that are the same in both models have none.

    Raises: UserError: there is no difference, or one of values that are no numbers.
    """
    ranks = {target.key: rank for target in pair.original.targets if (rank := rank_of(pair, target, own))}
    targets = [target for target in pair.original.targets if target.key in ranks]
    for part in pair.parts:
        changes = (pair.change(target) for target in targets if target.part == part)
        if part != "denoiser" and not any((change.abs() > own.least_change).any() for change in changes):
            LOGGER.info("text encoder %s: no weight differs by more than %g; left out", part, own.least_change)
            targets = [target for target in targets if target.part != part]
    decompose = low_rank.exact_svd if own.exact else low_rank.truncated_svd
    is_lokr = own.type == "lokr"
    make = partial(lokr_entry, factor=own.factor) if is_lokr else partial(lora_entry, clamp=own.clamp_quantile)
    entries: Entries = {}
    kept: dict[str, Kept] = defaultdict(Kept)
    with progress(sum(_size(pair, target) for target in targets), "extracting", "weights", unit_scale=True) as bar:
        for target in targets:
            change = pair.change(target)
            energy = float(torch.linalg.vector_norm(change)) ** 2
            if not math.isfinite(energy):
                raise UserError(f"{target.key}: the models' difference has values that are no numbers")
            if energy:
                entry, held = make(change, ranks[target.key], decompose)
                entries[target.key] = {name: tensor.cpu() for name, tensor in entry.items()}
                part = kept[target.part]
                part.layers, part.held, part.whole = part.layers + 1, part.held + held, part.whole + energy
            bar.update(_size(pair, target))
    if not entries:
        raise UserError(f"{pair.original.path} and {pair.tuned.path} do not differ in any layer that networks adapt")
    for name, part in kept.items():
        LOGGER.info("%s: %d layers, which hold %.2f%% of the change", name, part.layers, 100 * part.held / part.whole)
    if not own.exact:
        shortfall = 100 * low_rank.TOLERANCE
        LOGGER.info("the best possible at these ranks is at most %g%% of that more (--exact finds it)", shortfall)
    return entries


def rank_of(pair: Pair, target: LoraTarget, own: ExtractOptions) -> int:
    """The rank of a layer, at most its size; 0: it gets none."""
    if target.norm or target.optional or target.part not in pair.parts:
        return 0
    if target.conv_only and not own.rank_of_kernels:
        return 0
    module = live_modules(pair.original.models, target)[0]
    kernel = isinstance(module, nn.Conv2d) and tuple(module.kernel_size) != (1, 1)
    shape = pair.original.shape(target)
    return min(own.rank_of_kernels if kernel else own.dim, shape[0], math.prod(shape[1:]))


def _size(pair: Pair, target: LoraTarget) -> int:
    return math.prod(pair.original.shape(target))


def lora_entry(change: Tensor, rank: int, decompose: Decompose, *, clamp: float) -> tuple[dict[str, Tensor], float]:
    """LoRA of a change (out, in, ...), with alpha = rank; and the squared Frobenius norm of what it holds of it.

    Args: clamp: quantile at which values are cut off, see `low_rank.clamped`; the norm is that before.
    """
    found = decompose(change.flatten(1), rank)
    up, down = low_rank.restored(*low_rank.clamped(*found.factors(rank), clamp), change.shape)
    held = float(found.s.double().square().sum())
    return {UP: up, DOWN: down, ALPHA: torch.tensor(float(rank))}, held


def lokr_entry(change: Tensor, rank: int, decompose: Decompose, *, factor: int) -> tuple[dict[str, Tensor], float]:
    """LoKr of a change (out, in, ...): the nearest Kronecker product, its second factor cut down to a rank.

    The first singular pair of the change with its blocks as rows (Van Loan, Pitsianis 1993). As in training, the second
    factor stays whole where the rank is at least half its size.

    Args: factor: as of the network type, see `factors`.
    """
    out, width, *kernel = change.shape
    (l, k), (m, n) = factors(out, factor), factors(width, factor)  # noqa: E741
    blocks = change.reshape(l, k, m, n, -1).permute(0, 2, 1, 3, 4).reshape(l * m, -1)
    pair = decompose(blocks, 1)
    root = pair.s[0].sqrt()
    first, second = (pair.u[:, 0] * root).reshape(l, m), (pair.vh[0] * root).reshape(k, -1)
    if rank >= max(k, n) / 2:
        whole = {"lokr_w1": first, "lokr_w2": second.reshape(k, n, *kernel), ALPHA: torch.tensor(float(max(k, n)))}
        return whole, float(pair.s[0].double().square())
    found = decompose(second, rank)
    up, down = found.factors(rank)
    entry = {"lokr_w1": first, "lokr_w2_a": up, "lokr_w2_b": down, ALPHA: torch.tensor(float(rank))}
    return entry, float(first.double().square().sum() * found.s.double().square().sum())


# ---- what is said and written


def _report_others(pair: Pair, entries: Entries) -> None:
    """Says how many tensors differ that are in no layer of the network: norms, biases, embeddings, the VAE."""
    files = (pair.original, pair.tuned)
    inside = {name for file in files for target in file.targets if target.key in entries for name in file.names(target)}
    known = inside | set(filter(is_scale, pair.original.weights))
    shared = [key for key in pair.original.weights if key in pair.tuned.weights and key not in known]
    others = []
    for key in shared:
        first, second = (file.weights[key] for file in files)
        if first.dtype != second.dtype:
            first, second = first.float(), second.float()
        if not torch.equal(first, second):
            others.append(key)
    if others:
        what = "%d other tensors differ, which the network does not hold (such as %s)"
        LOGGER.info(what, len(others), others[0])


def _metadata(path: Path, pair: Pair, entries: Entries, own: ExtractOptions) -> dict[str, str]:
    metadata = {key: str(value) for key, value in pair.original.model.facts.items()}
    metadata.pop("modelspec.whole", None)
    if own.predicts_v:
        metadata["modelspec.prediction_type"] = "v"
    metadata["ss_network_module"] = "networks.lokr" if own.type == "lokr" else own.NETWORK
    metadata |= {"ss_network_dim": str(own.dim), "ss_network_alpha": str(float(own.dim)), **rank_metadata(entries)}
    arguments = {}
    if own.rank_of_kernels:
        arguments |= {"conv_dim": str(own.rank_of_kernels), "conv_alpha": str(float(own.rank_of_kernels))}
    if own.type == "lokr":
        arguments["factor"] = str(own.factor)
    if arguments:
        metadata["ss_network_args"] = json.dumps(arguments)
    files = [pair.original.path, pair.tuned.path]
    models = [{"name": file.name, "sha256": sha256} for file, sha256 in zip(files, file_hashes(files), strict=True)]
    metadata[RECIPE] = json.dumps({"type": f"extract {own.type}", "models": models})
    architecture = f"{metadata['modelspec.architecture']}/lora"
    metadata |= modelspec(path, metadata, {"architecture": architecture})
    return minimal(metadata) if own.no_metadata else metadata
