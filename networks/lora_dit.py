"""LoRA for diffusion transformers: choice of layers and ranks for networks.lora_flux and networks.lora_sd3."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from library.errors import UserError
from library.runtime.logs import LOGGER
from networks import lora
from networks.base import live_modules
from networks.lora_dit_args import T5, DitArgs, Layout, parse, rank_of
from networks.lora_ggpo import PerturbedLoraLayer
from networks.lora_split import SplitLoraLayer, with_trained_scales

if TYPE_CHECKING:
    from library.types import LoraTarget, Models
    from networks.lora_files import LoraFile

DENOISER = "denoiser"
MODULES = {  # what --network_module should say, by the layers that a model has
    r"^lora_unet_(double|single)_\D*\d": "networks.lora_flux",
    r"^lora_unet_joint_\D*\d": "networks.lora_sd3",
}


def create(
    layout: Layout,
    targets: Sequence[LoraTarget],
    models: Models,
    *,
    dim: int,
    alpha: float | None,
    dropout: float | None,
    args: Mapping[str, str],
    seed: int,
) -> lora.LoraNetwork:
    """A new network on those of `targets` that `args` choose, which adds nothing yet to the model's outputs.

    Otherwise as `networks.lora.create`.

    Raises: UserError: wrong arguments, ones that leave nothing, blocks that the model lacks, or another kind of model.
    """
    parsed = parse(lora.with_dropout(args, dropout), layout)
    _require_kind(layout, targets)
    for selection in parsed.selections:
        selection.check([target.key for target in targets])
    if parsed.train_t5xxl and all(target.part != T5 for target in targets):
        LOGGER.warning("--network_args: train_t5xxl has no effect: T5 is not given, or not trained")
    layers = {}
    for target in targets:
        rank = rank_of(parsed, dim, target.key, outer=target.optional and target.part == DENOISER)
        if rank and (target.part != T5 or parsed.train_t5xxl):
            layers[target.key] = _layer(live_modules(models, target), rank, alpha, parsed)
            lora.initialise(layers[target.key], target.key, seed)
    if not layers:
        raise UserError("--network_args: these arguments leave no layer to train")
    return _shown(lora.LoraNetwork(layers, targets, parsed))


def from_weights(
    layout: Layout,
    targets: Sequence[LoraTarget],
    models: Models,
    file: LoraFile,
    *,
    dropout: float | None,
    args: Mapping[str, str],
) -> lora.LoraNetwork:
    """A network with exactly the file's layers, as `networks.lora.from_weights`; T5's too where the file has some.

    With split_qkv the file must be of a training with split_qkv, too. Without it such a file is an ordinary one.
    """
    parsed = parse(lora.with_dropout(args, dropout), layout)
    _require_kind(layout, targets)
    if parsed.split_qkv:
        file = with_trained_scales(file, _fused(targets))
    return _shown(lora.rebuild(targets, models, file, parsed, _layer_of_file))


def load(network: lora.LoraNetwork, file: LoraFile) -> tuple[int, int, int]:
    """As `networks.lora.load`, also for split layers."""
    split = [key for key, layer in network.layers().items() if isinstance(layer, SplitLoraLayer)]
    return lora.load(network, with_trained_scales(file, _fused(network.targets[key] for key in split)))


def _fused(targets: Iterable[LoraTarget]) -> dict[str, int]:
    """How many live modules a fused layer of files has."""
    return {target.key: len(target.modules) for target in targets if len(target.modules) > 1}


def _layer(
    modules: Sequence[nn.Module], rank: int, alpha: float | None, args: DitArgs
) -> lora.LoraLayer | SplitLoraLayer:
    kind = lora.LoraLayer if args.ggpo_sigma is None else PerturbedLoraLayer
    if args.split_qkv and len(modules) > 1:
        return SplitLoraLayer(modules, rank, alpha, args, kind)
    return kind(modules, rank, alpha, args)


def _layer_of_file(
    modules: Sequence[nn.Module], rank: int, alpha: float | None, args: DitArgs
) -> lora.LoraLayer | SplitLoraLayer:
    """`rank` is that of the file, which has the ranks of all parts of a split layer."""
    return _layer(modules, max(rank // len(modules), 1) if args.split_qkv else rank, alpha, args)


def _shown(network: lora.LoraNetwork) -> lora.LoraNetwork:
    if network.args.verbose:
        for key, layer in network.layers().items():
            LOGGER.info("%s: rank %d", key, layer.rank)
    return network


def _require_kind(layout: Layout, targets: Sequence[LoraTarget]) -> None:
    """Raises: UserError: the denoiser has none of the blocks that the arguments speak of."""
    keys = [target.key for target in targets if target.part == DENOISER]
    if not keys or any(re.search(kind.pattern, key) for kind in layout.blocks.values() for key in keys):
        return
    fitting = (name for pattern, name in MODULES.items() if any(re.search(pattern, key) for key in keys))
    right = next(fitting, "networks.lora")
    raise UserError(f"--network_module: {layout.module} is for another kind of model; for this one it is {right}")
