"""LoRA on linear layers and 1x1 convolutions (LoRA-LierLa), with conv_dim also on larger ones (LoRA-C3Lier, LoCon)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.errors import UserError
from library.runtime.seeds import generator
from networks import functional
from networks.base import AdapterLayer, Network, add_to_weights, live_modules
from networks.lora_args import UNET_25, BlockLayout, LoraArgs, parse, rank_and_alpha
from networks.lora_files import read as read

if TYPE_CHECKING:
    from library.types import LoraTarget, Models
    from networks.lora_files import Entry, LoraFile


class LoraLayer(AdapterLayer):
    """``output + multiplier * alpha / r * up(down(x))`` for one linear layer, convolution, or several fused linears.

    Fused linears share the down matrix; each takes its rows of the up matrix, in their order (and its own dropouts).
    All is tensor arithmetic on the layer's device: nothing waits, and torch.compile sees one graph.
    """

    def __init__(self, modules: Sequence[nn.Module], rank: int, alpha: float | None, args: LoraArgs):
        super().__init__()
        self.rows = [module.weight.shape[0] for module in modules]
        self.lora_down, self.lora_up = matrices(modules, rank, sum(self.rows))
        self.register_buffer("alpha", torch.tensor(functional.effective_alpha(alpha, rank)))
        self.scale = float(self.alpha) / rank
        self.dropout, self.rank_dropout, self.module_dropout = args.dropout, args.rank_dropout, args.module_dropout
        self.register_load_state_dict_post_hook(_refresh_scale)

    @property
    def rank(self) -> int:
        return self.lora_down.weight.shape[0]

    def initialise(self, rng: torch.Generator) -> None:
        """Down kaiming-uniform with a = sqrt(5), up zero: the network starts as the bare model."""
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5), generator=rng)
        nn.init.zeros_(self.lora_up.weight)

    def load(self, key: str, entry: Entry) -> None:
        """Takes over a file's values. Raises: UserError: another rank, or a layer of another size."""
        for matrix, stored in ((self.lora_down, entry.down), (self.lora_up, entry.up)):
            try:
                fitted = functional.fit_kernel(stored, matrix.weight.data)
            except ValueError as error:
                hint = "give that --network_dim, or --dim_from_weights" if entry.rank != self.rank else None
                raise UserError(f"{key}: {error}; the file's rank is {entry.rank}", hint=hint) from error
            matrix.weight.data.copy_(fitted)
        self.alpha.fill_(entry.alpha)
        self.scale = entry.alpha / self.rank

    def adapt(self, index: int, x: Tensor, output: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_down.weight.dtype)  # the base may be stored in fewer bits than what is trained
        hidden, factor = self.lora_down(x), self.multiplier * self.scale
        if self.training:
            hidden, factor = self._drop(hidden, factor)
        if factor != 1:
            hidden = hidden * factor  # and not the output, nor its gradient, which are many times as large
        return output + self._up(index, hidden).to(output.dtype)

    def _up(self, index: int, hidden: Tensor) -> Tensor:
        if len(self.rows) == 1:
            return self.lora_up(hidden)
        start = sum(self.rows[:index])
        return F.linear(hidden, self.lora_up.weight[start : start + self.rows[index]])

    def _drop(self, hidden: Tensor, factor: float) -> tuple[Tensor, float]:
        if self.dropout:
            hidden = F.dropout(hidden, self.dropout)
        if self.rank_dropout:
            axes = [1] * (hidden.dim() - 2)
            shape = (len(hidden), self.rank, *axes) if hidden.dim() == 4 else (len(hidden), *axes, self.rank)
            hidden = hidden * (torch.rand(shape, device=hidden.device) >= self.rank_dropout)
            factor /= 1 - self.rank_dropout
        if self.module_dropout:  # a mask rather than an early return: no graph break, and no rank waits for another
            hidden = hidden * (torch.rand((), device=hidden.device) >= self.module_dropout)
        return hidden, factor

    @torch.no_grad()
    def limit_norm(self, limit: float) -> None:
        down, up = self.lora_down.weight, self.lora_up.weight
        factor = functional.max_norm_factor(down, up, self.scale, limit)
        down.mul_(factor.to(down.dtype))
        up.mul_(factor.to(up.dtype))

    def fast_parameters(self) -> list[nn.Parameter]:
        return [self.lora_up.weight]


def _refresh_scale(layer: LoraLayer, _keys: Any) -> None:
    layer.scale = float(layer.alpha) / layer.rank


def matrices(modules: Sequence[nn.Module], rank: int, rows: int) -> tuple[nn.Module, nn.Module]:
    """Down and up without values; drawing them must not touch the global random stream."""
    first = modules[0]
    if isinstance(first, nn.Linear):
        down = nn.utils.skip_init(nn.Linear, first.in_features, rank, bias=False)
        return down, nn.utils.skip_init(nn.Linear, rank, rows, bias=False)
    if isinstance(first, nn.Conv2d) and len(modules) == 1 and first.groups == 1:
        geometry = {name: getattr(first, name) for name in ("stride", "padding", "dilation", "padding_mode")}
        down = nn.utils.skip_init(nn.Conv2d, first.in_channels, rank, first.kernel_size, bias=False, **geometry)
        return down, nn.utils.skip_init(nn.Conv2d, rank, rows, 1, bias=False)
    raise TypeError(f"LoRA cannot adapt {len(modules)} module(s) like {first}")


# ---- building networks

LayerKind = Callable[[Sequence[nn.Module], int, float | None, LoraArgs], Any]


class LoraNetwork(Network):
    """A network of LoRA layers and what its arguments say about rates."""

    def __init__(self, layers: dict[str, LoraLayer], targets: Sequence[LoraTarget], args: LoraArgs):
        super().__init__(layers, {target.key: target for target in targets})
        self.args = args

    def ranks(self) -> set[int]:
        return {layer.rank for layer in self.layers().values()}

    def parameter_groups(self, rates: Mapping[str, float]) -> list[dict[str, Any]]:
        """Optimizer groups, one for each rate and side. A part missing in `rates` or with rate 0 has none.

        Args: rates: learning rate of each part, text encoders in the order in which --text_encoder_lr counts them.
        """
        text_parts = [part for part in self.parts() if part != "denoiser"]
        numbers = {part: number for number, part in enumerate((part for part in rates if part != "denoiser"), 1)}
        groups: dict[str, dict[str, Any]] = {}
        for key, layer in self.layers().items():
            target = self.targets[key]
            if not rates.get(target.part):
                continue
            name, block = "unet", target.block if self.args.block_weights else None
            if target.part != "denoiser":
                name = "textencoder" if len(text_parts) == 1 else f"textencoder {numbers[target.part]}"
                block = None
            lr = rates[target.part] * self.args.block_weight(block)
            own = self.args.own_lr(key)
            if own is not None:
                name, block, lr = f"{name} reg {own[0]}", None, own[1]
            if not lr:
                continue
            name += "" if block is None else f" block {block}"
            ratio = self.args.denoiser_plus if target.part == "denoiser" else self.args.text_plus
            fast = {id(parameter) for parameter in layer.fast_parameters()} if ratio else set()
            for parameter in layer.trained_parameters():
                plus = id(parameter) in fast
                label = f"{name} plus" if plus else name
                group = groups.setdefault(label, {"params": [], "lr": lr * ratio if plus else lr, "name": label})
                group["params"].append(parameter)
        return list(groups.values())


def create(
    targets: Sequence[LoraTarget],
    models: Models,
    *,
    dim: int,
    alpha: float | None,
    dropout: float | None,
    args: Mapping[str, str],
    seed: int,
    layout: BlockLayout = UNET_25,
) -> LoraNetwork:
    """A new network on `targets`, which adds nothing yet to the model's outputs.

    The weights of a layer depend on `seed` and its key only.

    Args:
        alpha: None or 0 mean the rank.
        dropout: of `down(x)`, in [0, 1]; the argument `dropout` has precedence.
        args: as `--network_args` gives them, see `lora_args.parse`.
        layout: how block-wise lists are divided.
    Raises: UserError: wrong arguments, or block-wise ones for a model without blocks.
    """
    return build(targets, models, _parsed(args, dropout, layout), LoraLayer, dim=dim, alpha=alpha, seed=seed)


def build(
    targets: Sequence[LoraTarget],
    models: Models,
    parsed: LoraArgs,
    kind: LayerKind,
    *,
    dim: int,
    alpha: float | None,
    seed: int,
) -> LoraNetwork:
    """`create` for any kind of layer that is saved as LoRA. Leaves optional targets out."""
    if parsed.blocks:
        _check_blocks(targets, parsed.blocks)
    layers = {}
    for target in targets:
        if target.optional:
            continue
        modules = live_modules(models, target)
        chosen = rank_and_alpha(
            parsed,
            dim,
            alpha,
            key=target.key,
            block=target.block,
            kernel=_has_kernel(modules[0]),
            conv_only=target.conv_only,
        )
        if chosen is None:
            continue
        layers[target.key] = kind(modules, *chosen, parsed)
        initialise(layers[target.key], target.key, seed)
    return LoraNetwork(layers, targets, parsed)


def initialise(layer: Any, key: str, seed: int) -> None:
    """Draws a layer's first values: the same for the same seed and key, whatever else is trained."""
    layer.initialise(generator("cpu", seed, "network", key))


def _check_blocks(targets: Sequence[LoraTarget], count: int) -> None:
    numbers = [target.block for target in targets if target.block is not None]
    what = "--network_args: block-wise ranks and rates"
    if not numbers:
        raise UserError(f"{what}: nothing that is trained here has numbered blocks")
    if max(numbers) >= count:
        raise UserError(f"{what}: the lists are for {count} blocks, and this model has {max(numbers) + 1}")


def from_weights(
    targets: Sequence[LoraTarget],
    models: Models,
    file: LoraFile,
    *,
    dropout: float | None,
    args: Mapping[str, str],
    layout: BlockLayout = UNET_25,
) -> LoraNetwork:
    """A network with exactly the file's layers, ranks, alphas and values, as far as `targets` have them.

    Raises: UserError: nothing of the file fits, or a layer is of another size; see also `create`.
    """
    return rebuild(targets, models, file, _parsed(args, dropout, layout), LoraLayer)


def rebuild(
    targets: Sequence[LoraTarget], models: Models, file: LoraFile, parsed: LoraArgs, kind: LayerKind
) -> LoraNetwork:
    """`from_weights` for any kind of layer that is saved as LoRA."""
    entries = file.matching(targets)
    by_key = {target.key: target for target in targets}
    layers = {}
    for key, entry in entries.items():
        layer = kind(live_modules(models, by_key[key]), entry.rank, entry.alpha, parsed)
        layer.load(key, entry)
        layers[key] = layer
    return LoraNetwork(layers, targets, parsed)


def load(network: LoraNetwork, file: LoraFile) -> tuple[int, int, int]:
    """Copies a file's values into `network`; layers that the file lacks keep theirs.

    Returns: layers loaded, layers that the file lacks, layers of the file that are not in the network.
    Raises: UserError: nothing fits, or a layer has another rank or size.
    """
    entries = file.matching(network.targets.values())
    layers = network.layers()
    for key, entry in entries.items():
        layers[key].load(key, entry)
    return len(entries), len(layers) - len(entries), len(file.entries) - len(entries)


def merge(targets: Sequence[LoraTarget], models: Models, file: LoraFile, multiplier: float) -> tuple[int, int]:
    """Adds a file's change to the model's own weights.

    Returns: layers merged, layers of the file that have no target.
    Raises: UserError: nothing fits, or a layer is of another size.
    """
    entries = file.matching(targets)
    by_key = {target.key: target for target in targets}
    for key, entry in entries.items():
        rows = sum(module.weight.shape[0] for module in live_modules(models, by_key[key]))
        shape = torch.Size((rows, *live_modules(models, by_key[key])[0].weight.shape[1:]))
        try:
            change = functional.fit_kernel(entry.change(), shape)
        except ValueError as error:
            raise UserError(f"{file.path}: {key}: {error}; was it made for another model?") from error
        add_to_weights(models, by_key[key], change * multiplier)
    return len(entries), len(file.entries) - len(entries)


def _parsed(args: Mapping[str, str], dropout: float | None, layout: BlockLayout) -> LoraArgs:
    return parse(with_dropout(args, dropout), layout)


def with_dropout(args: Mapping[str, str], dropout: float | None) -> dict[str, str]:
    """The arguments with --network_dropout, unless they have one of their own."""
    return {**({} if dropout is None else {"dropout": str(dropout)}), **args}


def _has_kernel(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and tuple(module.kernel_size) != (1, 1)
