"""torch.compile over a model's repeated blocks: each kind of block is compiled once for each shape, not each block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.errors import UserError
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    from library.options.memory import MemoryOptions

# Blocks share one function as far as the compiler's count is concerned: kinds of blocks times bucket shapes times
# training, validating and sampling. Its own limit of 8 would quietly leave most of them uncompiled.
_MOST_GRAPHS = 1024


@dataclass(frozen=True)
class Compiling:
    """How blocks are compiled, in the terms of `torch.compile`."""

    mode: str | None = None  # None: the default
    dynamic: bool | None = False  # False: every bucket has a graph; symbolic shapes compile longer and run slower
    fullgraph: bool = False
    most_graphs: int | None = None  # None: enough
    flag: str = "--dynamo_backend"  # that names the backend, for messages

    @staticmethod
    def of(memory: MemoryOptions) -> Compiling:
        """What the options ask for."""
        mode = memory.compile_mode if memory.backend == "inductor" and memory.compile_mode != "default" else None
        dynamic = {None: False, "false": False, "true": True, "auto": None}[memory.compile_dynamic]
        limit = memory.compile_cache_size_limit
        return Compiling(mode, dynamic, memory.compile_fullgraph, limit, memory.backend_flag)


def compile_blocks(
    blocks: Sequence[nn.Module], backend: str, device: torch.device, how: Compiling | None = None
) -> None:
    """Compiles each block's call, hooks of networks included, at the first input of each shape.

    Raises: UserError: the backend is not there, or does not work on this machine.
    """
    how = how or Compiling()
    require_backend(backend, device, how.flag)
    config = torch._dynamo.config
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(config, limit, how.most_graphs or max(getattr(config, limit), _MOST_GRAPHS))
    # Left out by default: a block with an adapter would then run what was compiled for one without, and the reverse.
    config.skip_nnmodule_hook_guards = False
    for block in blocks:
        block.compile(backend=backend, mode=how.mode, dynamic=how.dynamic, fullgraph=how.fullgraph)


def set_cuda_modes(memory: MemoryOptions, device: torch.device) -> None:
    """Sets torch's own switches that --cuda_allow_tf32 and --cuda_cudnn_benchmark turn on, before anything computes."""
    if device.type != "cuda":
        for name in ("cuda_allow_tf32", "cuda_cudnn_benchmark"):
            if getattr(memory, name):
                LOGGER.warning("--%s: has no effect on %s", name, device.type)
        return
    if memory.cuda_allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if memory.cuda_cudnn_benchmark:
        torch.backends.cudnn.benchmark = True


def not_one_graph(error: BaseException) -> str | None:
    """A line where --compile_fullgraph has ended the run; None: the error is another."""
    if not isinstance(error, torch._dynamo.exc.Unsupported):
        return None
    lines = str(error).strip().splitlines()
    why = lines[0] if lines else type(error).__name__
    return f"--compile_fullgraph: a block cannot be compiled as one graph ({why}); leave it out"


def graphs_per_shape(blocks: Sequence[nn.Module], *, input_has_gradient: bool) -> int:
    """How many graphs training makes of the blocks for each shape of a batch: one for each kind of block.

    Args: input_has_gradient: whether something before the blocks is trained. Else the first block's input needs no
        gradient, and those of the others do; so it has a graph of its own.
    """
    kinds = [_kind(block) for block in blocks]
    apart = not input_has_gradient and kinds[0] in kinds[1:]
    return len(set(kinds)) + apart


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """What compiled code depends on, beside the shapes of its inputs."""
    tensors = [*block.named_parameters(), *block.named_buffers()]
    return (
        tuple((name, type(part), bool(part._forward_hooks)) for name, part in block.named_modules()),
        tuple((name, tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in tensors),
    )


def require_backend(backend: str, device: torch.device, flag: str = "--dynamo_backend") -> None:
    """Compiles and runs a small function. Raises: UserError: as above."""
    if backend not in torch._dynamo.list_backends(exclude_tags=()):
        raise UserError(
            f"{flag}: torch {torch.__version__} has no backend {backend} here; "
            "choose inductor, aot_eager, eager or cudagraphs"
        )

    def probe(x: torch.Tensor) -> torch.Tensor:
        return x.sin() * 2 + x

    x = torch.ones(16, device=device, requires_grad=True)
    try:
        torch.compile(probe, backend=backend, dynamic=False)(x).sum().backward()
    except Exception as error:  # what a backend raises where a compiler or package is missing is of any kind
        lines = str(getattr(error, "inner_exception", error)).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise UserError(
            f"{flag}: {backend} does not work on this machine ({reason}); "
            "do not compile, or choose another backend, such as aot_eager"
        ) from None
