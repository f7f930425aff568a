"""Models whose weights are sharded over all processes by torch's FSDP2.

Sharded weights are DTensors. What touches them outside the step must be done by all processes together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from library.errors import UserError
from library.runtime.logs import LOGGER
from library.training.stepping import listed_blocks

if TYPE_CHECKING:
    from library.options.sharding import Sharding

_TOLERANCE = 1e-6


class Shards:
    """The sharded modules. Every method must be called by all processes alike."""

    def __init__(self, sharding: Sharding, device: torch.device, world: int, *, first: bool):
        self._sharding, self._device, self._first = sharding, device, first
        self.mesh = init_device_mesh(device.type, (world,))
        self._modules: list[nn.Module] = []

    def shard(
        self, module: nn.Module, blocks: Sequence[nn.Module] | None, dtype: torch.dtype, compute: torch.dtype | None
    ) -> None:
        """Shards `module`, block after block, so that no device ever holds all of it.

        Args:
            blocks: its repeated blocks; None: the members of its outermost lists. The rest is gathered together.
            dtype: of the weights and their gradients.
            compute: the dtype in which gathered weights are sent and used; None: `dtype`.
        """
        name = type(module).__name__  # before it becomes a class of FSDP's
        how: dict[str, Any] = {
            "mesh": self.mesh,
            "reshard_after_forward": self._sharding.reshard,
            # Inputs are not cast: timesteps would lose digits. Autocast casts where it is safe.
            "mp_policy": MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False),
            "offload_policy": CPUOffloadPolicy() if self._offloads else OffloadPolicy(),
        }
        for part in (*(listed_blocks(module) if blocks is None else blocks), module):
            for weight in part.parameters():
                if not isinstance(weight, DTensor):
                    weight.data = weight.data.to(self._device, dtype)
            for owner, name, buffer in _buffers(part):
                owner._buffers[name] = buffer.to(self._device)
            fully_shard(part, **how)
        self._modules.append(module)
        weights = [weight for weight in module.parameters() if isinstance(weight, DTensor)]
        full_size = sum(weight.numel() * weight.itemsize for weight in weights) / 2**20
        own_size = sum(weight.to_local().nbytes for weight in weights) / 2**20
        LOGGER.info(
            "%s: %s over %d processes, %.1f of %.1f MiB in this one",
            *(name, self._sharding.asked_by, self.mesh.size(), own_size, full_size),
        )

    @property
    def _offloads(self) -> bool:
        return self._sharding.offload and self._device.type != "cpu"

    def refresh(self) -> None:
        """Frees gathered weights. To be called where weights change outside the optimizer's step."""
        for module in self._modules:
            for part in module.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()

    @contextmanager
    def unshard(self) -> Iterator[None]:
        """Within the block, the modules of the first process hold full weights in CPU memory, to be saved."""
        self.refresh()
        found: dict[int, nn.Parameter] = {}  # several modules may share one
        put: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for module in self._modules:
                for part in module.modules():
                    for name, weight in part._parameters.items():
                        if not isinstance(weight, DTensor):
                            continue
                        if id(weight) not in found:
                            full = full_tensors(weight.detach(), keep=self._first)
                            found[id(weight)] = weight if full is None else nn.Parameter(full, weight.requires_grad)
                        put.append((part, name, weight))
            for part, name, weight in put:
                part._parameters[name] = found[id(weight)]
            yield
        finally:
            for part, name, weight in put:
                part._parameters[name] = weight


def full_tensors(value: Any, *, keep: bool = True) -> Any:
    """`value`, nested containers, with every sharded tensor gathered in CPU memory.

    All processes must call this. Args: keep: False gives None for these tensors, on processes that do not need them.
    """
    if isinstance(value, DTensor):
        full = value.full_tensor()
        return full.cpu() if keep else None
    if isinstance(value, Mapping):
        return {name: full_tensors(one, keep=keep) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(full_tensors(one, keep=keep) for one in value)
    return value


def shard_like(value: Any, like: Any) -> Any:
    """`value` with the tensors sharded that are sharded in `like`, a container of the same kind."""
    if isinstance(like, DTensor) and isinstance(value, Tensor) and not isinstance(value, DTensor):
        full = value.to(like.device, like.dtype).contiguous()
        return distribute_tensor(full, like.device_mesh, like.placements)
    if isinstance(like, Mapping) and isinstance(value, Mapping):
        return {name: shard_like(one, like.get(name)) for name, one in value.items()}
    return value


def shard_optimizer_state(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Mapping[str, Any]:
    """An optimizer's state of full tensors, sharded like the weights they belong to."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    if not any(isinstance(weight, DTensor) for weight in weights) or "state" not in state:
        return state
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    by_number = dict(zip(numbers, weights, strict=False))

    def of_weight(number: Any, entries: Mapping[str, Any]) -> dict[str, Any]:
        weight = by_number.get(number)
        same = isinstance(weight, DTensor) and {
            name: weight
            for name, one in entries.items()
            if isinstance(one, Tensor) and one.shape == weight.shape and one.dim()
        }
        # The optimizer keeps some of them in another dtype than the weight.
        return {
            name: shard_like(one, weight.detach().to(one.dtype)) if same and name in same else one
            for name, one in entries.items()
        }

    return {**state, "state": {number: of_weight(number, entries) for number, entries in state["state"].items()}}


def check_optimizer(make: Callable[[list[Tensor]], torch.optim.Optimizer], name: str, mesh: DeviceMesh) -> None:
    """Compares an optimizer's steps of sharded weights with those of full ones, before anything large is loaded.

    Args: make: from weights to the optimizer over them.
    Raises: UserError: they differ.
    """
    numbers = torch.arange(65 * 8, dtype=torch.float32, device=mesh.device_type).view(65, 8)
    values, gradient = torch.sin(numbers), torch.cos(numbers)
    full_weight = nn.Parameter(values.clone())
    sharded_weight = nn.Parameter(distribute_tensor(values.clone(), mesh, [Shard(0)]))
    try:
        for weight in (full_weight, sharded_weight):
            optimizer = make([weight])
            for _ in range(2):
                weight.grad = shard_like(gradient.clone(), weight.detach())
                optimizer.step()
        off = (sharded_weight.detach().full_tensor() - full_weight.detach()).abs().max().item()
        reason = "" if off <= _TOLERANCE else f"its result is off by {off:.1g}"
        for key, one in optimizer.state[sharded_weight].items():
            if isinstance(one, DTensor) and one.shape != sharded_weight.shape:
                reason = f"it keeps {key!r} in a shape of its own"  # and could not put it back where it was
    except Exception as error:  # kernels for full tensors only fail in many ways
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if reason:
        raise UserError(f"--optimizer_type: {name} cannot step sharded weights ({reason}); AdamW and SGD can")


def _buffers(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for part in module.modules():
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                yield part, name, buffer
