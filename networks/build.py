"""Makes networks of any type, gives them a file's values, and merges files into models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError
from library.runtime.logs import LOGGER
from library.runtime.seeds import generator
from networks.builder import NetworkBuilder
from networks.file_names import require_types
from networks.files import Entries, NetworkFile, read
from networks.network import Network
from networks.registry import STACK, type_of
from networks.targets import add_to_weights, file_modules, has_bias, layer_of, rows_of, weight_of, weight_shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.types import BlockLayout, LoraTarget, Models
    from networks.layer import AdapterLayer
    from networks.spec import NetworkArgs, NetworkModule


class DeclaredBuilder(NetworkBuilder):
    """Makes networks of a declared module. The weights of a layer depend on the seed and its key only."""

    def __init__(self, module: NetworkModule):
        self.module, self.usual_dim = module, module.usual_dim

    def read(self, path: str | Path) -> NetworkFile:
        file = read(path)
        require_types(file.path, file.flat(), self.module.types)
        return file

    def create(
        self,
        targets: Sequence[LoraTarget],
        models: Models,
        *,
        dim: int,
        alpha: float | None,
        args: Mapping[str, str],
        seed: int,
        dropout: float | None = None,
        layout: BlockLayout | None = None,
    ) -> Network:
        parsed = self.module.parse(args, dropout, layout)
        parsed.selection.check_rank(dim, self.module.name)
        parsed.selection.check_targets(targets, self.module.name)
        layers: dict[str, AdapterLayer] = {}
        for target in targets:
            chosen = parsed.selection.choose(layer_of(models, target), dim, alpha)
            if chosen is None:
                continue
            own = self.module.parse({**args, **chosen.overrides}, dropout, layout) if chosen.overrides else parsed
            with _named(target.key):
                layer = own.type.layer.load().build(file_modules(models, target), chosen.rank, chosen.alpha, own.layer)
            layer.init_weights(generator("cpu", seed, "network", target.key))
            layers[target.key] = layer
        if not layers:
            raise UserError("--network_args: these arguments leave no layer to train")
        return _made(layers, targets, parsed)

    def from_weights(
        self,
        targets: Sequence[LoraTarget],
        models: Models,
        file: NetworkFile,
        *,
        args: Mapping[str, str],
        dropout: float | None = None,
        layout: BlockLayout | None = None,
    ) -> Network:
        parsed = self.module.parse(args, dropout, layout)
        parsed.selection.check_targets(targets, self.module.name)
        by_key = {target.key: target for target in targets}
        layers: dict[str, AdapterLayer] = {}
        for key, entry in self._entries(file, targets, parsed, partial(rows_of, models)).items():
            with _named(key):
                kind = STACK if STACK.reads(frozenset(entry)) else self.module.type_of_entry(entry, parsed)
                modules, own = file_modules(models, by_key[key]), kind.args.like(parsed.layer)
                layers[key] = kind.layer.load().rebuild(modules, entry, own)
        return _made(layers, targets, parsed)

    def load(self, network: Network, file: NetworkFile) -> tuple[int, int, int]:
        layers = network.layers()
        sizes = {key: layer.rows for key, layer in layers.items()}
        entries = self._entries(file, list(network.targets.values()), network.args, lambda target: sizes[target.key])
        for key, entry in entries.items():
            with _named(key):
                if STACK.reads(frozenset(entry)) and STACK.layer.load() is not type(layers[key]):
                    hint = "--dim_from_weights continues with them so"
                    raise UserError(
                        "the file has the modules of this layer one by one, with changes of their own", hint=hint
                    )
                layers[key].load(entry)
        return len(entries), len(layers) - len(entries), len(file.unused(network.targets.values()))

    def _entries(
        self,
        file: NetworkFile,
        targets: Sequence[LoraTarget],
        args: NetworkArgs,
        rows: Callable[[LoraTarget], Sequence[int]],
    ) -> Entries:
        """The file's entries that have a target, as this type of network reads them."""
        entries, correct = file.matching(targets, rows), self.module.type.correct
        return correct(entries, targets, args.layer) if correct else entries


def merge(targets: Sequence[LoraTarget], models: Models, file: NetworkFile, multiplier: float) -> tuple[int, int]:
    """Adds a file's change to the model's own weights, whatever types its layers have.

    Returns: layers merged, layers of the file that have no target.
    Raises: UserError: nothing fits, a layer is of no known type, or of another size.
    """
    entries = file.matching(targets, partial(rows_of, models))
    by_key = {target.key: target for target in targets}
    for key, entry in entries.items():
        with _named(f"{file.path}: {key}"):
            shape, weight = weight_shape(models, by_key[key]), partial(weight_of, models, by_key[key])
            change, bias = change_of(entry, shape, weight, multiplier)
            if bias is not None and not has_bias(models, by_key[key], len(bias)):
                raise UserError(
                    f"it changes a bias of {len(bias)} entries, which the layer does not have here",
                    hint="was it made for another model?",
                )
        add_to_weights(models, by_key[key], change)
        if bias is not None:
            add_to_weights(models, by_key[key], bias, name="bias")
    return len(entries), len(file.unused(targets))


def change_of(
    entry: Mapping[str, Tensor], shape: torch.Size, weight: Callable[[], Tensor], multiplier: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """What a file's entry of any type adds to a layer's weight and bias at a multiplier, float32.

    Args: shape, weight: as `AdapterLayer.weight_change` takes them.
    Raises: UserError: the entry is of no known type, or does not fit that weight.
    """
    kind = type_of(entry)
    if kind is None:
        raise UserError(f"{', '.join(sorted(entry))} are of no type that is known here")
    layer = kind.layer.load()
    try:
        change, bias = layer.merged_change(entry, shape, weight, multiplier), layer.bias_change(entry)
        return change, None if bias is None else bias * multiplier
    except UserError as error:
        raise UserError(*error.problems, hint="was it made for another model?") from error


def _made(layers: dict[str, AdapterLayer], targets: Sequence[LoraTarget], args: NetworkArgs) -> Network:
    if args.selection.verbose:
        for key, layer in layers.items():
            LOGGER.info("%s: rank %d", key, layer.rank)
    return Network(layers, targets, args)


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Problems of a layer begin with its name."""
    try:
        yield
    except UserError as error:
        raise UserError(*(f"{key}: {problem}" for problem in error.problems), hint=error.hint) from error
