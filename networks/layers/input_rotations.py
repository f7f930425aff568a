"""Rotations of blocks of inputs, in PEFT's layouts: OFT of `networks.oft_v2`, BOFT of `networks.boft`.

A weight W, (out, in) or a convolution's flattened to that, becomes ``W R^T``, so that a linear layer's input x becomes
``x R``. Modules of a fused layer, which have one input, share R.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.errors import UserError
from networks.layer import AdapterLayer
from networks.layer_args import InputBoftArgs, InputOftArgs
from networks.layers.functional import cayley
from networks.layers.oft import Cayley
from networks.layers.outputs import OncePerInput

OFT, OFT_OF_PEFT = "oft_R.weight", "peft_R.weight"  # the second is what `layouts` calls it in files that PEFT wrote
HINT = "give the --network_args and --network_dim of its training, or --dim_from_weights"


class InputRotation(AdapterLayer):
    """What both types share: how a rotation acts on live modules. A multiplier scales the change of the weight."""

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__()
        self._live = list(modules)  # a list, so that they are not part of this layer
        self.rows = [module.weight.shape[0] for module in modules]
        self.width = math.prod(modules[0].weight.shape[1:])
        self.geometry: dict[str, Any] | None = None
        if isinstance(modules[0], nn.Conv2d):
            if len(modules) > 1 or modules[0].groups > 1 or modules[0].padding_mode != "zeros":
                raise TypeError(f"cannot rotate the inputs of {len(modules)} module(s) like {modules[0]}")
            self.geometry = {name: getattr(modules[0], name) for name in ("stride", "padding", "dilation")}
        self._small = OncePerInput(len(modules))

    @abstractmethod
    def changed(self, vectors: Tensor, *, of_weight: bool) -> Tensor:
        """Vectors (..., in) times R, less these vectors. Args: of_weight: rows of a weight, times R^T."""

    def factors(self, index: int) -> Tensor | None:
        """What the rows of the `index`-th module are multiplied by, (rows); None: nothing."""
        return None

    def init_weights(self, rng: torch.Generator) -> None:
        """Zeros, which rotate nothing."""

    def adapt(self, index: int, x: Tensor, output: Tensor) -> Tensor:
        if self.multiplier == 0:
            return output
        if self.geometry is not None:
            change = F.conv2d(x, self._weight_change(index).to(x.dtype), **self.geometry)
        else:
            bias, factors = self._live[index].bias, self.factors(index)
            change = self._live[index].forward(self._changed_input(x))
            change = change if bias is None else change - bias
            if factors is not None:
                bare = output if bias is None else output - bias
                change = change * factors + bare * (factors - 1)
        return output + (change * self.multiplier).to(output.dtype)

    def instead(self, index: int, x: Tensor) -> Tensor | None:
        """Without the bare output: a linear live module gets the turned input.

        Not in fewer bits than float32, in which the turned input would lose what is small beside the input.
        """
        narrow = torch.is_autocast_enabled(x.device.type) or x.dtype != torch.float32
        alone = self.training and self.multiplier == 1 and self.geometry is None
        if narrow or not alone or torch.compiler.is_compiling():
            return None
        module, factors = self._live[index], self.factors(index)
        turned = module.forward(x + self._changed_input(x))
        if factors is None:
            return turned
        return turned * factors if module.bias is None else (turned - module.bias) * factors + module.bias

    def _changed_input(self, x: Tensor) -> Tensor:
        own = x if torch.is_autocast_enabled(x.device.type) else x.to(self._dtype())
        return self._small.of(x, lambda: self.changed(own, of_weight=False).to(x.dtype))

    def _weight_change(self, index: int) -> Tensor:
        weight = self._live[index].weight.detach()
        rows = weight.flatten(1).to(self._dtype())
        change, factors = self.changed(rows, of_weight=True), self.factors(index)
        if factors is not None:
            change = (rows + change) * factors[:, None] - rows
        return change.reshape(weight.shape)

    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


class InputOftLayer(InputRotation):
    """OFT with R of blocks ``I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4``, the first terms of ``(I - Q)^-1 (I + Q)``.

    A file has what stands above the diagonals of the skew Q of all blocks, row by row; of one block for all with
    `block_share`. Convolutions are turned the other way, by R: so do the programs that write these files, but for PEFT.

    Source: arXiv:2506.19847 (OFTv2), PEFT's layout.
    """

    def __init__(self, modules: Sequence[nn.Module], rank: int, alpha: float | None, args: InputOftArgs):
        super().__init__(modules)
        self.args, self.size = args, args.size(self.width, rank)
        self.count = self.width // self.size
        upper = self.size * (self.size - 1) // 2
        self.weight = nn.Parameter(torch.zeros(1 if args.block_share else self.count, upper))

    @classmethod
    def rebuild(cls, modules: Sequence[nn.Module], tensors: Mapping[str, Tensor], args: InputOftArgs) -> InputOftLayer:
        width = math.prod(modules[0].weight.shape[1:])
        size = _size_of(_given(tensors), width)
        layer = cls(modules, size, None, args.of_file(size, shared=len(_given(tensors)) < width // size))
        layer.load(tensors)
        return layer

    @property
    def rank(self) -> int:
        return self.size

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        given = _given(tensors, conv=self.geometry is not None)
        if given.shape != self.weight.shape:
            shapes = f"shape {tuple(given.shape)} does not fit {tuple(self.weight.shape)}"
            raise UserError(f"{shapes}; the file's blocks are of {_size_of(given, self.width)}", hint=HINT)
        self.weight.copy_(given)

    def file_state(self) -> dict[str, Tensor]:
        return {OFT: self._limited().detach()}

    def changed(self, vectors: Tensor, *, of_weight: bool) -> Tensor:
        if self.args.coft:
            with torch.no_grad():
                self.weight.copy_(self._limited())
        small = turning(self.weight.float(), self.size)
        if self.training and self.args.dropout and len(small) > 1:
            small = small * (torch.rand(len(small), 1, 1, device=small.device) >= self.args.dropout)
        # Rows of linear layers' weights never come here.
        return _by_blocks(vectors, small.to(self.weight.dtype), self.count)

    def _limited(self) -> Tensor:
        """The trained values with each block's Q scaled to a norm of at most `coft_eps`, over the root of the count."""
        if not self.args.coft:
            return self.weight
        norms = torch.linalg.vector_norm(self.weight, dim=1, keepdim=True) * math.sqrt(2)
        limit = self.args.coft_eps / math.sqrt(len(self.weight))
        return self.weight * (limit / norms.clamp(min=limit))

    @classmethod
    def weight_change(cls, tensors: Mapping[str, Tensor], shape: torch.Size, weight: Callable[[], Tensor]) -> Tensor:
        given, width = _given(tensors, conv=len(shape) == 4), math.prod(shape[1:])
        size = _size_of(given, width)
        small = turning(given.float(), size)
        rows = weight().flatten(1)
        return _by_blocks(rows, small if len(shape) == 4 else small.mT, width // size).reshape(shape)

    @torch.no_grad()
    def limit_norm(self, limit: float) -> None:
        self.weight.mul_((limit / self.weight.float().norm()).clamp(max=1))


class InputBoftLayer(InputRotation):
    """BOFT: R is a product of stages of blocks ``(I - Q) (I + Q)^-1``, with Q = (B - B^T) / 2; rows have factors too.

    ``R = R_n ... R_1``. Stage i acts between halves of blocks that are 2^i halves long together; see `butterfly_order`.

    Source: arXiv:2311.06243, PEFT's layout.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        rank: int,
        alpha: float | None,
        args: InputBoftArgs,
        shape: tuple[int, int, int] | None = None,
    ):
        """`shape`: stages, blocks and their size; otherwise `rank` and `args` say them."""
        super().__init__(modules)
        self.args, (stages, count, size) = args, shape or args.shape(self.width, rank)
        self.blocks = nn.Parameter(torch.zeros(stages, count, size, size))
        self.scales = nn.Parameter(torch.ones(sum(self.rows), 1))
        self._rotation: Tensor | None = None
        self.register_load_state_dict_post_hook(lambda layer, _keys: layer.before_step())

    @classmethod
    def rebuild(
        cls, modules: Sequence[nn.Module], tensors: Mapping[str, Tensor], args: InputBoftArgs
    ) -> InputBoftLayer:
        shape = tuple(tensors["boft_R"].shape)
        _check_stages(shape, math.prod(modules[0].weight.shape[1:]))
        layer = cls(modules, shape[2], None, args, shape[:3])
        layer.load(tensors)
        return layer

    @property
    def rank(self) -> int:
        return self.blocks.shape[-1]

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        given = {"boft_R": tensors["boft_R"], "boft_s": tensors["boft_s"].reshape(-1, 1)}
        for (name, tensor), own in zip(given.items(), (self.blocks, self.scales), strict=True):
            if tensor.shape != own.shape:
                raise UserError(f"{name}: shape {tuple(tensor.shape)} does not fit {tuple(own.shape)}", hint=HINT)
            own.copy_(tensor)
        self.before_step()

    def file_state(self) -> dict[str, Tensor]:
        return {"boft_R": self.blocks.detach(), "boft_s": self.scales.detach()}

    def factors(self, index: int) -> Tensor:
        return self.scales[self.rows_of(index), 0]

    def changed(self, vectors: Tensor, *, of_weight: bool) -> Tensor:
        rotation = self._rotations()
        if self.training and self.args.dropout:
            rotation = _some_left_out(rotation, self.args.dropout)
        return in_stages(vectors, rotation.to(self.blocks.dtype), transposed=of_weight)

    def _rotations(self) -> Tensor:
        """Of all stages: solved once for all forward passes between two steps."""
        skew = (self.blocks.mT - self.blocks) / 2
        if torch.compiler.is_compiling():
            return cayley(skew)
        if self._rotation is None:
            with torch.no_grad():
                self._rotation = cayley(skew.float()).to(skew.dtype)
        return Cayley.apply(skew, self._rotation)

    def before_step(self) -> None:
        self._rotation = None

    def train(self, mode: bool = True) -> InputBoftLayer:
        self._rotation = None  # around it, weights may be exchanged
        return super().train(mode)

    @classmethod
    def weight_change(cls, tensors: Mapping[str, Tensor], shape: torch.Size, weight: Callable[[], Tensor]) -> Tensor:
        blocks, scales = tensors["boft_R"].float(), tensors["boft_s"].float().reshape(-1, 1)
        _check_stages(tuple(blocks.shape), math.prod(shape[1:]))
        if len(scales) != shape[0]:
            raise UserError(f"boft_s: {len(scales)} factors do not fit {tuple(shape)}")
        rows = weight().flatten(1)
        change = in_stages(rows, cayley((blocks.mT - blocks) / 2), transposed=True)
        return ((rows + change) * scales - rows).reshape(shape)

    @torch.no_grad()
    def limit_norm(self, limit: float) -> None:
        self.blocks.mul_((limit / self.blocks.float().norm()).clamp(max=1))
        self.before_step()


def turning(upper: Tensor, size: int) -> Tensor:
    """R - I of blocks: (count, size (size - 1) / 2) -> (count, size, size). Args: upper: what is above the diagonal."""
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    half = upper.new_zeros(len(upper), size, size).index_put((_each(upper), rows, columns), upper)
    skew = half - half.mT
    squared = skew @ skew
    return 2 * (skew + squared + squared @ skew) + squared @ squared


def _each(upper: Tensor) -> Tensor:
    return torch.arange(len(upper), device=upper.device)[:, None]


def butterfly_order(width: int, size: int, stage: int) -> Tensor:
    """Which element comes to each place before a stage from 1 up, (width): halves of blocks, even ones first."""
    halves = torch.arange(width).reshape(-1, 2 << stage, size // 2)
    return torch.cat([halves[:, ::2], halves[:, 1::2]], 1).flatten()


def in_stages(vectors: Tensor, rotations: Tensor, *, transposed: bool) -> Tensor:
    """Vectors (..., in) times R, or times R^T, less these vectors.

    Args: rotations: (stages, count, size, size), of the stages of R = R_n ... R_1.
    """
    stages, count, size, _ = rotations.shape
    small = rotations - torch.eye(size, dtype=rotations.dtype, device=rotations.device)
    small, change = small.mT if transposed else small, torch.zeros_like(vectors)
    for stage in range(stages) if transposed else reversed(range(stages)):
        turned = vectors + change
        if stage == 0:  # whose order is that of the vectors
            change = change + _by_blocks(turned, small[stage], count)
            continue
        order = butterfly_order(count * size, size, stage).to(vectors.device)
        # x P B P^T, where (x P)[order] = x and (y P^T) = y[order].
        change = change + _by_blocks(turned[..., order.argsort()], small[stage], count)[..., order]
    return change


def _by_blocks(vectors: Tensor, blocks: Tensor, count: int) -> Tensor:
    """(..., count * size) times blocks (count, size, size), or times one for all, (1, size, size)."""
    apart = vectors.unflatten(-1, (count, -1))
    return torch.einsum("...nk,nkm->...nm", apart, blocks.expand(count, -1, -1)).flatten(-2)


def _some_left_out(rotation: Tensor, share: float) -> Tensor:
    """Rotations of which, in one stage that is drawn, a share of the blocks, rounded down, turns nothing."""
    stages, count, size, _ = rotation.shape
    idle = torch.zeros(stages, count, 1, 1, dtype=torch.bool, device=rotation.device)
    chosen = torch.randperm(count, device=rotation.device)[: int(share * count)]
    idle[torch.randint(stages, (1,), device=rotation.device), chosen] = True
    return torch.where(idle, torch.eye(size, dtype=rotation.dtype, device=rotation.device), rotation)


def _given(tensors: Mapping[str, Tensor], *, conv: bool = False) -> Tensor:
    """The values of an OFT entry. PEFT turns convolutions the other way: with -Q, R is transposed."""
    if OFT in tensors:
        return tensors[OFT]
    return -tensors[OFT_OF_PEFT] if conv else tensors[OFT_OF_PEFT]


def _size_of(upper: Tensor, width: int) -> int:
    """The size of a file's blocks. Raises: UserError: they do not fit inputs of that width."""
    size = (1 + math.isqrt(1 + 8 * upper.shape[-1])) // 2
    if size * (size - 1) // 2 != upper.shape[-1] or len(upper) not in (1, width / size) or width % size:
        raise UserError(f"shape {tuple(upper.shape)} does not fit {width} inputs")
    return size


def _check_stages(shape: tuple[int, ...], width: int) -> None:
    fits = len(shape) == 4 and shape[2] == shape[3] and shape[1] * shape[2] == width
    if not fits or (shape[0] > 1 and (shape[2] % 2 or shape[1] % 2 ** (shape[0] - 1))):
        raise UserError(f"boft_R: shape {shape} does not fit {width} inputs")
