"""OFT and BOFT: rotations of blocks of output rows (arXiv:2306.07280), in the layouts of sd-scripts and LyCORIS."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from networks.factors import power_of_two_factors
from networks.layer import AdapterLayer
from networks.layer_args import OftArgs
from networks.layers.butterfly import turn_in_stages
from networks.layers.functional import cayley
from networks.layers.outputs import OncePerInput

TINY = 1e-8  # keeps the norm of a rotation that has not begun from being divided by


class OftLayer(AdapterLayer):
    """``bias + rescale * R^T (output - bias)`` with R of blocks ``(I + Q) (I - Q)^-1``, ``Q = B - B^T``.

    Q is scaled down so that its norm over all blocks is at most ``alpha * rows``; an alpha of 0 limits nothing. Several
    fused linear layers have blocks of their own, named by number. At a multiplier m the rotation is ``I + m (R - I)``.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        rank: int,
        alpha: float | None,
        args: OftArgs,
        sizes: Sequence[tuple[int, int]] | None = None,
    ):
        """`rank`: see `OftArgs.cut`; `sizes`: number and size of blocks, for each module, or for all."""
        super().__init__()
        self._live = list(modules)  # a list, so that they are not part of this layer
        self.rows = [module.weight.shape[0] for module in modules]
        self.axis = 1 if isinstance(modules[0], nn.Conv2d) else -1
        sizes = sizes or [args.cut(count, rank) for count in self.rows]
        self._rank = args.rank_of(*sizes[0])
        self.listed = args.listed or len(sizes) > 1
        self.blocks = nn.ParameterList(torch.zeros(count, size, size) for count, size in sizes)
        self.rescale = nn.Parameter(torch.ones(sum(self.rows))) if args.rescaled else None
        self.register_buffer("alpha", torch.tensor(float(args.alpha_of(alpha))))
        self._constraint = float(self.alpha)
        self._module_dropout = args.module_dropout
        self._rotations: dict[int, Tensor] = {}
        self._change_of_all = OncePerInput(len(modules))
        self.register_load_state_dict_post_hook(_refresh)

    @classmethod
    def rebuild(cls, modules: Sequence[nn.Module], tensors: Mapping[str, Tensor], args: OftArgs) -> OftLayer:
        blocks = _blocks(tensors)
        if blocks[0].dim() == 4:
            return BoftLayer.rebuild(modules, tensors, args)
        rows = [module.weight.shape[0] for module in modules]
        if [each.shape[0] * each.shape[1] for each in blocks] not in (rows, [sum(rows)]):
            raise UserError(f"shape {[tuple(each.shape) for each in blocks]} does not fit {sum(rows)} rows")
        args = args.of_file(tensors)
        layer = cls(modules, len(blocks[0]), 0.0, args, [tuple(each.shape[:2]) for each in blocks])
        layer.load(tensors)
        return layer

    @property
    def rank(self) -> int:
        return self._rank

    def init_weights(self, rng: torch.Generator) -> None:
        """Zeros, which rotate nothing."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        blocks = _blocks(tensors)
        shapes = [tuple(each.shape) for each in blocks]
        own = [tuple(each.shape) for each in self.blocks]
        if shapes != own or ("rescale" in tensors) != (self.rescale is not None):
            hint = "give the --network_args and --network_dim of its training, or --dim_from_weights"
            raise UserError(f"shape {shapes} does not fit {own}; the file has {len(blocks[0])} blocks", hint=hint)
        for parameter, tensor in zip(self.blocks, blocks, strict=True):
            parameter.data.copy_(tensor)
        if self.rescale is not None:
            self.rescale.data.copy_(tensors["rescale"].flatten())
        self.alpha.fill_(float(tensors.get("alpha", 0.0)))
        _refresh(self, None)

    def file_state(self) -> dict[str, Tensor]:
        names = [f"oft_blocks.{i}" for i in range(len(self.blocks))] if self.listed else ["oft_blocks"]
        state = {"alpha": self.alpha, **dict(zip(names, (b.detach() for b in self.blocks), strict=True))}
        if self.rescale is not None:
            axes = [1] * (self._live[0].weight.dim() - 1)
            state["rescale"] = self.rescale.detach().reshape(-1, *axes)
        return state

    # ---- the rotation

    def adapt(self, index: int, x: Tensor, output: Tensor) -> Tensor:
        channels = output.movedim(self.axis, -1)
        if len(self.blocks) == len(self.rows):
            change = self._changed(index, channels, self._live[index].bias)
        else:  # blocks of all modules together: they may lie across modules
            change = self._change_of_all.of(x, lambda: self._changed_together(x))[..., self.rows_of(index)]
        if self.training and self._module_dropout:
            change = change * (torch.rand((), device=change.device) >= self._module_dropout)
        return output + change.movedim(-1, self.axis).to(output.dtype)

    def _changed_together(self, x: Tensor) -> Tensor:
        outputs = torch.cat([module.forward(x) for module in self._live], -1)
        biases = [module.bias for module in self._live if module.bias is not None]
        return self._changed(0, outputs, torch.cat(biases) if biases else None)

    def _changed(self, number: int, outputs: Tensor, bias: Tensor | None) -> Tensor:
        """The change of outputs, (..., rows), by one group of blocks. A bias, which they include, is not rotated."""
        if not torch.is_autocast_enabled(outputs.device.type):
            outputs = outputs.to(self.alpha.dtype)
        rescale = self.rescale
        if rescale is not None and len(self.blocks) > 1:
            rescale = rescale[self.rows_of(number)]
        turn = self.turning(self._rotation(number), rescale)
        change = turn(outputs)
        return change if bias is None else change - turn(bias.detach().to(self.alpha.dtype))

    def turning(self, rotation: Tensor, rescale: Tensor | None) -> Callable[[Tensor], Tensor]:
        """A function that gives the change of vectors, (..., rows), by a rotation and a factor for each row."""
        if rescale is not None:
            rotation = rotation * rescale.reshape(len(rotation), 1, -1)
        # Less the identity, so that fewer bits than float32 have the change itself, and not its sum with the vector.
        identity = torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
        small = rotation - identity
        if self.multiplier != 1:
            small = small * self.multiplier
        return lambda vectors: _turn(vectors, small)

    def _rotation(self, number: int) -> Tensor:
        """R of one group of blocks, (count, size, size): solved once for all forward passes between two steps."""
        skew = limited(self.blocks[number], self._constraint)
        if torch.compiler.is_compiling():
            return cayley(skew)
        if number not in self._rotations:
            with torch.no_grad():
                self._rotations[number] = cayley(skew.float()).to(skew.dtype)
        return Cayley.apply(skew, self._rotations[number])

    def before_step(self) -> None:
        self._rotations.clear()

    def train(self, mode: bool = True) -> OftLayer:
        self._rotations.clear()  # around it, weights may be exchanged
        return super().train(mode)

    @classmethod
    def weight_change(cls, tensors: Mapping[str, Tensor], shape: torch.Size, weight: Callable[[], Tensor]) -> Tensor:
        blocks, base, constraint = _blocks(tensors), weight(), float(tensors.get("alpha", 0.0))
        if blocks[0].dim() == 4:
            return BoftLayer.weight_change(tensors, shape, weight)
        square = all(each.dim() == 3 and each.shape[1] == each.shape[2] for each in blocks)
        if not square or sum(each.shape[0] * each.shape[1] for each in blocks) != shape[0]:
            raise UserError(f"shape {[tuple(each.shape) for each in blocks]} does not fit {tuple(shape)}")
        columns = base.flatten(1).T  # (in, out): rows are rotated as outputs are
        parts = columns.split([each.shape[0] * each.shape[1] for each in blocks], -1)
        turned = torch.cat(
            [_turn(part, cayley(limited(each.float(), constraint))) for part, each in zip(parts, blocks, strict=True)],
            -1,
        )
        if "rescale" in tensors:
            turned = turned * tensors["rescale"].float().flatten()
        return turned.T.reshape(shape) - base

    @classmethod
    def merged_change(
        cls, tensors: Mapping[str, Tensor], shape: torch.Size, weight: Callable[[], Tensor], multiplier: float
    ) -> Tensor:
        if _blocks(tensors)[0].dim() == 4:
            return BoftLayer.merged_change(tensors, shape, weight, multiplier)
        return super().merged_change(tensors, shape, weight, multiplier)

    @torch.no_grad()
    def limit_norm(self, limit: float) -> None:
        for blocks in self.blocks:
            norm = blocks.float().norm()
            blocks.mul_((limit / norm).clamp(max=1))
        self._rotations.clear()


class BoftLayer(OftLayer):
    """A chain of rotations of n blocks of an even size b: stage i mixes rows that are ``2^i b / 2`` apart.

    At a multiplier m every stage is ``I + m (R - I)``, and factors of rows are ``1 + m (rescale - 1)``.

    Source: arXiv:2311.06243, in the layout of LyCORIS.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        rank: int,
        alpha: float | None,
        args: OftArgs,
        sizes: Sequence[tuple[int, int]] | None = None,
    ):
        rows = sum(module.weight.shape[0] for module in modules)
        try:
            size, count = power_of_two_factors(rows, rank)
        except ValueError as error:
            raise UserError(f"{error}; give another --network_dim") from error
        super().__init__(modules, rank, alpha, args, [(count, size)])
        stages = (count - 1).bit_count() + 1
        self.blocks = nn.ParameterList([torch.zeros(stages, count, size, size)])

    @classmethod
    def rebuild(cls, modules: Sequence[nn.Module], tensors: Mapping[str, Tensor], args: OftArgs) -> BoftLayer:
        blocks = tensors["oft_blocks"]
        layer = cls(modules, blocks.shape[-1], 0.0, args.of_file(tensors))
        layer.load(tensors)
        return layer

    def turning(self, rotation: Tensor, rescale: Tensor | None) -> Callable[[Tensor], Tensor]:
        return partial(_turned_by, rotation=rotation, rescale=rescale, multiplier=self.multiplier)

    @classmethod
    def weight_change(cls, tensors: Mapping[str, Tensor], shape: torch.Size, weight: Callable[[], Tensor]) -> Tensor:
        return cls.merged_change(tensors, shape, weight, 1.0)

    @classmethod
    def merged_change(
        cls, tensors: Mapping[str, Tensor], shape: torch.Size, weight: Callable[[], Tensor], multiplier: float
    ) -> Tensor:
        blocks, base = tensors["oft_blocks"].float(), weight()
        stages, count, size, width = blocks.shape
        whole = size == width and size % 2 == 0 and count.bit_count() == 1 and stages <= count.bit_length()
        if not whole or count * size != shape[0]:
            raise UserError(f"shape {tuple(blocks.shape)} does not fit {tuple(shape)}")
        rescale = tensors["rescale"].float().flatten() if "rescale" in tensors else None
        rotation = cayley(limited(blocks, float(tensors.get("alpha", 0.0))))
        return _turned_by(base.flatten(1).T, rotation, rescale, multiplier).T.reshape(shape)


class Cayley(torch.autograd.Function):
    """A rotation that is known already, with its gradient: ``dR = (I + R) dQ (I + R) / 2``."""

    @staticmethod
    def forward(ctx: Any, skew: Tensor, rotation: Tensor) -> Tensor:
        ctx.save_for_backward(rotation)
        return rotation.view_as(rotation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rotation,) = ctx.saved_tensors
        turned = rotation.mT.flatten(0, -3)
        gradient = gradient.flatten(0, -3)
        half = torch.baddbmm(gradient, turned, gradient)  # (I + R)^T g, without another matrix of that size
        return torch.baddbmm(half, half, turned).div_(2).reshape(rotation.shape), None


def limited(blocks: Tensor, constraint: float) -> Tensor:
    """Q = B - B^T, scaled to a norm of at most ``constraint * rows``; a constraint of 0 scales nothing."""
    skew = blocks - blocks.mT
    if constraint <= 0:
        return skew
    rows = blocks[..., 0].numel() if blocks.dim() == 3 else blocks[0, ..., 0].numel()
    norm = torch.linalg.vector_norm(skew)
    return skew * ((norm.clamp(max=constraint * rows) + TINY) / (norm + TINY))


def _turned_by(vectors: Tensor, rotation: Tensor, rescale: Tensor | None, multiplier: float) -> Tensor:
    """The change of vectors, (..., rows), by a chain of rotations at a multiplier, and a factor for each row."""
    if multiplier != 1:
        identity = torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
        rotation = rotation * multiplier + identity * (1 - multiplier)
        rescale = None if rescale is None else 1 + multiplier * (rescale - 1)
    turned = turn_in_stages(vectors, rotation, orthogonal=multiplier == 1)
    return (turned if rescale is None else turned * rescale) - vectors


def _turn(outputs: Tensor, rotation: Tensor) -> Tensor:
    """(..., count * size) times blocks (count, size, size)."""
    blocks = outputs.unflatten(-1, rotation.shape[:2])
    return torch.einsum("...kn,knm->...km", blocks, rotation).flatten(-2)


def _blocks(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Each group of blocks of a file's entry."""
    if "oft_blocks" in tensors:
        return [tensors["oft_blocks"]]
    return [tensors[f"oft_blocks.{i}"] for i in range(sum(name.startswith("oft_blocks.") for name in tensors))]


def _refresh(layer: OftLayer, _keys: Any) -> None:
    layer._constraint = float(layer.alpha)
    layer._rotations.clear()
