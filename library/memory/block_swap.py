"""Block swap: some of the denoiser's blocks live in CPU memory and are copied to the device when they are needed.

The device has two buffers. While one block computes, the next one is copied into the other buffer: in the order of the
blocks in the forward pass, in reverse in the backward pass. Frozen weights are only copied to the device. Weights that
are stepped inside the backward pass are written back to CPU memory at once.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from library.errors import UserError
from library.memory.copying import CopyEvent, host_buffer, make_copy_stream, release_host_buffer

NUM_BUFFERS = 2  # on the device: one holds the block that computes, one receives the next
_ALIGNMENT = 256  # bytes; that of the devices' own allocators
PLAIN = (Tensor, nn.Parameter)  # what is no class of its own, and has one storage

_FORWARD, _ONLY_FORWARD, _BACKWARD = "forward", "forward without gradients", "backward"


class BlockSwap:
    """Keeps `count` of a model's blocks in CPU memory. Results are the same to the bit.

    `count` + 2 blocks, at even distances, share two buffers as large as the largest of them; the others stay on the
    device. Each pass then copies `count` blocks, because the last two of one pass are the first two of the next.

    Outside of a block's call its parameters and buffers are those in CPU memory, at all times: saving, averaging and
    loading see true weights. In place changes of them (`copy_`, `load_state_dict`) are noticed. Do not assign `.data`.

    Trained weights must be stepped inside the backward pass (`stepping.step_in_backward`): then a weight, its gradient
    and its optimizer state are on the device together. Gradients are never copied.

    Where to put it: cast the model and, for --torch_compile, compile its blocks first; then `attach`; then
    ``model.to(device)`` moves the rest. Make the optimizer after that and give it to `manage_optimizer`.
    """

    def __init__(self, blocks: Sequence[nn.Module], count: int, device: torch.device, *, simulate: bool = False):
        """`blocks`: in the order in which the model runs them. `count`: 0 does nothing.

        `simulate`: simulates the device in CPU memory, copying as late as possible, for tests.

        Raises: UserError: fewer than two blocks would be left.
        """
        count = count or 0
        most = max(len(blocks) - NUM_BUFFERS, 0)
        if not 0 <= count <= most:
            raise UserError(f"--blocks_to_swap: {count} of {len(blocks)} blocks; give a number from 0 to {most}")
        self.device = device
        self.bytes_moved = 0  # to the device
        self.bytes_written_back = 0
        total = count + NUM_BUFFERS if count else 0
        # At even distances: blocks that stay on the device give the copies time.
        chosen = {(2 * number + 1) * len(blocks) // (2 * total) for number in range(total)}
        having = Counter(one for block in blocks for one in {id(tensor) for tensor in _tensors(block)})
        shared = {one for one, number in having.items() if number > 1}  # these stay on the device
        self._resident = [block for index, block in enumerate(blocks) if index not in chosen] if count else []
        modules = [block for index, block in enumerate(blocks) if index in chosen]
        self._blocks = [_Block(index, module, shared) for index, module in enumerate(modules)]
        self._buffers: list[_Buffer] = []
        self._homes: list[tuple[Tensor, torch.device]] = []  # where everything was before `attach`
        self._hooks: list[Any] = []
        self._to_device, self._to_cpu = (make_copy_stream(device, simulate=simulate) for _ in range(2))
        self._position: tuple[int, str] | None = None  # block and pass
        self._stepped: tuple[_Block, _SwappedTensor, _Buffer] | None = None  # the weight whose gradient has just come
        self._backward: int | None = None  # the backward pass that will end with `_end_of_backward`

    # ---- on and off

    def attach(self) -> None:
        """Moves the blocks to their devices, and makes their calls fetch the weights that they need."""
        if self._buffers or not self._blocks:
            return
        for module in self._resident:
            self._homes += [(tensor, tensor.device) for tensor in _tensors(module)]
            module.to(self.device)
        for block in self._blocks:
            self._homes += [(tensor, tensor.device) for tensor in _tensors(block.module)]
            block.move_to_cpu(self.device)
            self._wrap(block)
            for swapped in block.tensors:
                if swapped.tensor.requires_grad:
                    self._hooks.append(swapped.tensor.register_hook(partial(self._before_gradient, block, swapped)))
        size = max(block.size for block in self._blocks)
        self._buffers = [_Buffer(torch.empty(size, dtype=torch.uint8, device=self.device)) for _ in range(NUM_BUFFERS)]

    def detach(self) -> None:
        """Moves everything back to where it was before `attach`, with the weights as they are now."""
        if not self._buffers:
            return
        self._write_back()
        self._wait_for_writes()
        for hook in self._hooks:
            hook.remove()
        for block in self._blocks:
            del block.module._apply
            if block.compiled is None:
                del block.module._compiled_call_impl
            else:
                block.module._compiled_call_impl = block.compiled
        for buffer in self._buffers:
            if buffer.arrived is not None:
                buffer.arrived.wait()
        for tensor, home in self._homes:
            tensor.data = tensor.data.to(home)
        for block in self._blocks:
            block.unpin(self.device)
        self._buffers, self._homes, self._hooks, self._position = [], [], [], None

    def manage_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Keeps the optimizer state of swapped weights on the device, also when a state is loaded.

        Optimizers move what they load to the weight's device, which is the CPU then.
        """
        tensors = [swapped.tensor for block in self._blocks for swapped in block.tensors]
        swapped_ids = {id(tensor) for tensor in tensors if tensor.requires_grad}

        def to_device(loaded: torch.optim.Optimizer) -> None:
            for group in loaded.param_groups:
                # Counts are kept in CPU memory on purpose, but for kernels that read them on the device.
                counts_too = group.get("fused") or group.get("capturable")
                for weight in group["params"]:
                    state = loaded.state.get(weight, {}) if id(weight) in swapped_ids else {}
                    for name, value in state.items():
                        if isinstance(value, Tensor) and (name != "step" or counts_too):
                            state[name] = value.to(self.device)

        self._hooks.append(optimizer.register_load_state_dict_post_hook(to_device))
        to_device(optimizer)

    @property
    def bytes_saved(self) -> int:
        """Bytes of device memory that swapping saves."""
        size = max((block.size for block in self._blocks), default=0)
        return sum(block.size for block in self._blocks) - NUM_BUFFERS * size

    def _wrap(self, block: _Block) -> None:
        module = block.module
        block.compiled = module.__dict__.get("_compiled_call_impl")
        # The only wrapper of a call that neither hooks nor the compiler see: a forward hook would be compiled into
        # the block, copies and all. `Module.compile` keeps its own function here.
        module._compiled_call_impl = partial(self._call, block, block.compiled or module._call_impl)
        module._apply = partial(_apply_without_moving, block)

    # ---- a block's call

    def _call(self, block: _Block, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        recomputing = torch._C._current_graph_task_id() != -1  # checkpointing computes the block once more
        grad = torch.is_grad_enabled()
        direction = _BACKWARD if recomputing else _FORWARD if grad else _ONLY_FORWARD
        buffer = self._acquire(block, direction)
        buffer.busy = True
        block.point_to_device(buffer)
        try:
            with (
                self._saved_weight_hooks() if grad else nullcontext(),
                _uncached_casts() if block.trained else nullcontext(),
            ):
                return run(*args, **kwargs)
        finally:
            block.point_to_cpu()
            buffer.busy = False
            if not recomputing:
                self._prefetch(self._upcoming(block.index, direction)[1:])

    @contextmanager
    def _saved_weight_hooks(self) -> Iterator[None]:
        """A context in which autograd saves a reference to a swapped weight, not the weight.

        It would save the memory of a buffer, which the next block overwrites. Its own check for that, the version
        counter, does not help: `.data` leaves the counter alone, and checkpointing keeps tensors past it.
        """
        outer = _outer_hooks()

        def pack(tensor: Tensor) -> Any:
            ref = self._reference(tensor)
            return ref if ref is not None else outer.pack(tensor)

        def unpack(kept: Any) -> Tensor:
            return self._resolve(kept) if type(kept) is _SavedWeightRef else outer.unpack(kept)

        outer.inner = saved_tensors_hooks(pack, unpack)
        with outer.inner:
            try:
                yield
            finally:
                # A circle of references would keep what checkpointing has saved until Python's collector comes by.
                outer.inner = None

    def _reference(self, tensor: Tensor) -> _SavedWeightRef | None:
        if type(tensor) not in PLAIN or tensor.layout != torch.strided:
            return None
        memory = tensor.untyped_storage().data_ptr()
        for buffer in self._buffers:
            if buffer.pointer == memory and buffer.block is not None:
                block = buffer.block
                shape = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
                return _SavedWeightRef(block.index, block.changes, tensor.dtype, *shape)
        return None

    def _resolve(self, ref: _SavedWeightRef) -> Tensor:
        block = self._blocks[ref.index]
        buffer = self._acquire(block, _BACKWARD)
        if block.changes != ref.changes:
            raise RuntimeError("the weights of a swapped block were changed between its forward and its backward pass")
        typed = buffer.storage.view(ref.dtype)
        return typed.as_strided(ref.shape, ref.stride, ref.offset)

    # ---- the buffers

    def _acquire(self, block: _Block, direction: str) -> _Buffer:
        """The buffer with the block's weights, for all that is computed from now on."""
        self._write_back()
        buffer = self._buffer_of(block)
        if buffer is None:
            buffer = self._free_buffer(self._upcoming(block.index, direction))
            self._fetch(block, buffer)
        elif buffer.versions != block.versions():
            self._fetch(block, buffer)
        if self._position != (block.index, direction):
            self._position = block.index, direction
            self._prefetch(self._upcoming(block.index, direction)[:NUM_BUFFERS], but=buffer)
        if buffer.arrived is not None:
            buffer.arrived.before_use()
        return buffer

    def _upcoming(self, index: int, direction: str) -> list[_Block]:
        """The current block, then the next ones without repetition, one for each buffer."""
        up, down = range(index + 1, len(self._blocks)), range(len(self._blocks) - 1, -1, -1)
        turns: Iterable[int] = itertools.chain(up, range(len(self._blocks)) if direction == _ONLY_FORWARD else down)
        if direction == _BACKWARD:
            turns = itertools.chain(range(index - 1, -1, -1), range(len(self._blocks)))
        # The current block may come up again at the very end of the pass, where it must not be dropped.
        first = list(itertools.islice(dict.fromkeys(turns), NUM_BUFFERS))
        return [self._blocks[index], *(self._blocks[turn] for turn in first)]

    def _prefetch(self, wanted: Sequence[_Block], but: _Buffer | None = None) -> None:
        for block in wanted:
            if self._buffer_of(block) is not None:
                continue
            kept = (buffer.busy or buffer is but or buffer.block in wanted for buffer in self._buffers)
            free = [buffer for buffer, keep in zip(self._buffers, kept, strict=True) if not keep]
            if not free:
                return
            self._fetch(block, free[0])

    def _fetch(self, block: _Block, buffer: _Buffer) -> None:
        buffer.versions = block.versions()
        if block.copied_versions != buffer.versions:
            block.changes += block.copied_versions is not None
            block.copied_versions = buffer.versions
        # What was written back from this buffer, or to this block, must have arrived first.
        after = (buffer.written, block.written)
        buffer.block = block
        buffer.arrived = self._to_device.copy(buffer.storage[: block.size], block.host[: block.size], after)
        self.bytes_moved += block.size

    def _buffer_of(self, block: _Block) -> _Buffer | None:
        return next((buffer for buffer in self._buffers if buffer.block is block), None)

    def _free_buffer(self, wanted: Sequence[_Block]) -> _Buffer:
        free = [buffer for buffer in self._buffers if not buffer.busy]
        if not free:
            raise RuntimeError("swapped blocks call one another; they must run one after another")
        return next((buffer for buffer in free if buffer.block not in wanted), free[0])

    # ---- trained weights

    def _before_gradient(self, block: _Block, swapped: _SwappedTensor, gradient: Tensor) -> None:
        """A weight's gradient is there: until `_write_back` the weight is on the device, where it is stepped."""
        buffer = self._acquire(block, _BACKWARD)
        swapped.tensor.data = block.views(buffer)[swapped.index]
        self._stepped = block, swapped, buffer
        task = torch._C._current_graph_task_id()
        if self._backward != task:
            self._backward = task
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)

    def _write_back(self) -> None:
        """The weight whose gradient came last has been stepped: writes it back."""
        if self._stepped is None:
            return
        (block, swapped, buffer), self._stepped = self._stepped, None
        weight, given = swapped.tensor, swapped.tensor.data
        weight.data = swapped.host
        if weight.grad is not None:
            raise UserError(
                "--blocks_to_swap: swapped weights are trained only with --fused_backward_pass; add it, or do not swap"
            )
        stepped = block.views(buffer)[swapped.index]
        if given.data_ptr() != stepped.data_ptr():  # some optimizers put the new values elsewhere
            stepped.copy_(given)
        block.written = buffer.written = self._to_cpu.copy(swapped.host, stepped)
        self.bytes_written_back += stepped.nbytes
        buffer.versions = block.copied_versions = block.versions()

    def _end_of_backward(self) -> None:
        # The only wait: after it CPU memory holds the true weights, whoever reads them and however.
        self._write_back()
        self._wait_for_writes()
        self._backward = None

    def _wait_for_writes(self) -> None:
        for buffer in self._buffers:
            if buffer.written is not None:
                buffer.written.wait()


# --- what is swapped --------------------------------------------------------------------------------------------------


class _SavedWeightRef(NamedTuple):
    """A saved weight, or a view of one: where its values are when the backward pass needs them."""

    index: int  # of the block
    changes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # elements of this dtype from the start of the block


@dataclass(eq=False)
class _Buffer:
    """A buffer on the device for one block."""

    storage: Tensor  # uint8
    block: _Block | None = None
    versions: list[int] = field(default_factory=list)  # the block's when it was copied
    busy: bool = False  # its block is being called
    arrived: CopyEvent | None = None
    written: CopyEvent | None = None  # the last thing that was copied from here

    @property
    def pointer(self) -> int:
        return self.storage.untyped_storage().data_ptr()


@dataclass(eq=False)
class _SwappedTensor:
    """A parameter or buffer, and where it is inside its block's memory."""

    index: int
    tensor: Tensor  # the one that the model holds
    start: int  # bytes
    stride: tuple[int, ...]
    host: Tensor | None = None  # its values in CPU memory

    def view_in(self, memory: Tensor) -> Tensor:
        like = self.tensor
        typed = memory.view(like.dtype)
        return typed.as_strided(like.shape, self.stride, self.start // like.element_size())


class _Block:
    """A block whose weights, of every dtype, are stored in one piece of CPU memory."""

    def __init__(self, index: int, module: nn.Module, shared: set[int]):
        self.index, self.module = index, module
        self.tensors: list[_SwappedTensor] = []
        self.size = 0  # bytes
        self.host: Tensor | None = None  # uint8
        for tensor in _tensors(module):
            if id(tensor) in shared:
                continue
            stride = torch.empty_like(tensor, device="meta").stride()  # without gaps; channels_last stays so
            self.tensors.append(_SwappedTensor(len(self.tensors), tensor, self.size, stride))
            self.size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.trained = any(swapped.tensor.requires_grad for swapped in self.tensors)
        self.compiled: Callable[..., Any] | None = None
        self.written: CopyEvent | None = None  # the last thing that was copied to CPU memory
        self.copied_versions: list[int] | None = None  # versions when it was last copied
        self.changes = 0  # how often it was changed by others between two copies
        self._views: dict[int, list[Tensor]] = {}

    def move_to_cpu(self, device: torch.device) -> None:
        """Moves the block to CPU memory, and what it shares with other blocks to `device`, where that stays."""
        self.host = host_buffer(self.size, device)
        mine = {id(swapped.tensor) for swapped in self.tensors}
        for swapped in self.tensors:
            swapped.host = swapped.view_in(self.host)
            swapped.host.copy_(swapped.tensor.data)
            swapped.tensor.data = swapped.host
        for tensor in _tensors(self.module):
            if id(tensor) not in mine:
                tensor.data = tensor.data.to(device)

    def unpin(self, device: torch.device) -> None:
        """Frees its memory on the CPU and on the device."""
        for swapped in self.tensors:
            if swapped.tensor.data_ptr() == swapped.host.data_ptr():
                swapped.tensor.data = swapped.host.clone()
            swapped.host = None
        release_host_buffer(self.host, device)
        self.host = self.written = self.copied_versions = None
        self._views.clear()

    def views(self, buffer: _Buffer) -> list[Tensor]:
        if buffer.pointer not in self._views:
            self._views[buffer.pointer] = [swapped.view_in(buffer.storage) for swapped in self.tensors]
        return self._views[buffer.pointer]

    def point_to_device(self, buffer: _Buffer) -> None:
        for swapped, view in zip(self.tensors, self.views(buffer), strict=True):
            swapped.tensor.data = view

    def point_to_cpu(self) -> None:
        for swapped in self.tensors:
            swapped.tensor.data = swapped.host

    def versions(self) -> list[int]:
        return [swapped.tensor._version for swapped in self.tensors]


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _apply_without_moving(block: _Block, move: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Replaces `Module._apply`, which moves and casts. Raises: RuntimeError: a cast."""
    for swapped in block.tensors:
        empty = swapped.tensor.new_empty(0)
        if move(empty).dtype != empty.dtype:
            raise RuntimeError("a swapped block cannot be cast; cast the model before its blocks are swapped")
    return block.module


# --- autograd ---------------------------------------------------------------------------------------------------------


def _outer_hooks() -> _OuterHooks | _OuterHooksByAutograd:
    """The hooks that would save tensors without ours, as checkpointing's do: torch calls the innermost only."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is None:  # torch before 2.8
        return _OuterHooksByAutograd()
    hooks = top(True)
    return _OuterHooks() if hooks is None else _OuterHooks(*hooks)


def _identity(tensor: Tensor) -> Tensor:
    return tensor


@dataclass
class _OuterHooks:
    pack: Callable[[Tensor], Any] = _identity
    unpack: Callable[[Any], Tensor] = _identity
    inner: Any = None


class _OuterHooksByAutograd:
    """`_OuterHooks` for torch before 2.8, which does not expose them: an autograd function saves through them."""

    inner: saved_tensors_hooks

    def pack(self, tensor: Tensor) -> Any:
        torch._C._autograd._pop_saved_tensors_default_hooks()
        try:
            with torch.enable_grad():
                return _SaveForBackward.apply(torch.empty(0, requires_grad=True), tensor).grad_fn
        finally:
            torch._C._autograd._push_saved_tensors_default_hooks(self.inner.pack_hook, self.inner.unpack_hook)

    def unpack(self, kept: Any) -> Tensor:
        return kept.saved_tensors[0]


class _SaveForBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@contextmanager
def _uncached_casts() -> Iterator[None]:
    """Autocast keeps its copies of trained weights until it ends: those of all blocks, on the device."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
