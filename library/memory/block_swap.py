"""Block swap: some of the denoiser's blocks live in CPU memory and are copied to the device when they are needed.

The device keeps a ring of two places. While one block computes, the next one is copied into the other place: forwards
in the forward pass, backwards in the backward pass. Frozen weights are only ever copied to the device. Weights that
are trained inside the backward pass go back to CPU memory as soon as they are stepped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from library.errors import UserError
from library.memory.copying import CopyEvent, host_buffer, make_copy_stream, release_host_buffer

NUM_BUFFERS = 2  # blocks on the device of those that take turns: one computes, one arrives
_ALIGNMENT = 256  # bytes; what the devices' own allocators give

_FORWARD, _ONLY_FORWARD, _BACKWARD = "forward", "forward without gradients", "backward"


class BlockSwap:
    """Keeps `count` of a model's blocks off the device. Results are the same to the bit.

    `count` + 2 blocks, at even distances, share two buffers as large as the largest of them; the others stay on the
    device. Each pass then copies `count` blocks, because the last two of one pass are the first two of the next.

    Outside of a block's call its parameters and buffers are those in CPU memory, at all times: saving, averaging and
    loading see true weights. In place changes of them (`copy_`, `load_state_dict`) are noticed. Do not assign `.data`.

    Trained weights must be stepped inside the backward pass (`stepping.step_in_backward`): then a weight, its gradient
    and the optimizer's numbers for it meet on the device. Gradients are never copied.

    Where to put it: cast the model and, for --torch_compile, compile its blocks first; then `attach`; then
    ``model.to(device)`` moves the rest. Make the optimizer after that and give it to `manage_optimizer`.
    """

    def __init__(self, blocks: Sequence[nn.Module], count: int, device: torch.device, *, simulate: bool = False):
        """`blocks`: in the order in which the model runs them. `count`: 0 does nothing.

        `simulate`: plays the device within CPU memory, copying as late as possible, for tests.

        Raises: UserError: fewer than two blocks would be left.
        """
        count = count or 0
        most = max(len(blocks) - NUM_BUFFERS, 0)
        if not 0 <= count <= most:
            raise UserError(f"--blocks_to_swap: {count} of {len(blocks)} blocks; give a number from 0 to {most}")
        self.device = device
        self.bytes_moved = 0  # to the device
        self.bytes_written_back = 0
        chosen = set(_spread(len(blocks), count + NUM_BUFFERS)) if count else set()
        shared = _shared_tensors(blocks)
        self._resident = [block for place, block in enumerate(blocks) if place not in chosen] if count else []
        modules = [block for place, block in enumerate(blocks) if place in chosen]
        self._blocks = [_Block(place, module, shared) for place, module in enumerate(modules)]
        self._slots: list[_Buffer] = []
        self._homes: list[tuple[Tensor, torch.device]] = []  # where everything was before `attach`
        self._hooks: list[Any] = []
        self._reading, self._writing = (make_copy_stream(device, simulate=simulate) for _ in range(2))
        self._at: tuple[int, str] | None = None  # block and pass
        self._stepped: tuple[_Block, _SwappedTensor, _Buffer] | None = None  # the weight whose gradient has just come
        self._backward: int | None = None  # the backward pass that will end with `_end_of_backward`

    # ---- on and off

    def attach(self) -> None:
        """Moves the blocks to where they shall live, and makes their calls fetch what they need."""
        if self._slots or not self._blocks:
            return
        for module in self._resident:
            self._homes += [(tensor, tensor.device) for tensor in _tensors(module)]
            module.to(self.device)
        for block in self._blocks:
            self._homes += [(tensor, tensor.device) for tensor in _tensors(block.module)]
            block.leave_device(self.device)
            self._wrap(block)
            for piece in block.pieces:
                if piece.tensor.requires_grad:
                    self._hooks.append(piece.tensor.register_hook(partial(self._before_gradient, block, piece)))
        size = max(block.size for block in self._blocks)
        self._slots = [_Buffer(torch.empty(size, dtype=torch.uint8, device=self.device)) for _ in range(NUM_BUFFERS)]

    def detach(self) -> None:
        """Everything is back where it was before `attach`, with the weights as they are now."""
        if not self._slots:
            return
        self._complete()
        self._settle()
        for hook in self._hooks:
            hook.remove()
        for block in self._blocks:
            del block.module._apply
            if block.compiled is None:
                del block.module._compiled_call_impl
            else:
                block.module._compiled_call_impl = block.compiled
        for slot in self._slots:
            if slot.arrived is not None:
                slot.arrived.wait()
        for tensor, home in self._homes:
            tensor.data = tensor.data.to(home)
        for block in self._blocks:
            block.unpin(self.device)
        self._slots, self._homes, self._hooks, self._at = [], [], [], None

    def manage_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Keeps the optimizer's numbers for swapped weights on the device, also those that a state brings.

        Optimizers put what they load beside the weight, which is in CPU memory then.
        """
        swapped = {id(piece.tensor) for block in self._blocks for piece in block.pieces if piece.tensor.requires_grad}

        def to_device(loaded: torch.optim.Optimizer) -> None:
            for group in loaded.param_groups:
                # Counts are kept in CPU memory on purpose, but for kernels that read them on the device.
                counts_too = group.get("fused") or group.get("capturable")
                for weight in group["params"]:
                    state = loaded.state.get(weight, {}) if id(weight) in swapped else {}
                    for name, value in state.items():
                        if isinstance(value, Tensor) and (name != "step" or counts_too):
                            state[name] = value.to(self.device)

        self._hooks.append(optimizer.register_load_state_dict_post_hook(to_device))
        to_device(optimizer)

    @property
    def bytes_saved(self) -> int:
        """How much less the device holds than without swapping."""
        size = max((block.size for block in self._blocks), default=0)
        return sum(block.size for block in self._blocks) - NUM_BUFFERS * size

    def _wrap(self, block: _Block) -> None:
        module = block.module
        block.compiled = module.__dict__.get("_compiled_call_impl")
        # The one place around a call that neither hooks nor the compiler get to see: a forward hook would be compiled
        # into the block, copies and all. It is where `Module.compile` keeps its own.
        module._compiled_call_impl = partial(self._call, block, block.compiled or module._call_impl)
        module._apply = partial(_stay, block)

    # ---- a block's call

    def _call(self, block: _Block, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        again = torch._C._current_graph_task_id() != -1  # checkpointing computes the block once more
        grad = torch.is_grad_enabled()
        way = _BACKWARD if again else _FORWARD if grad else _ONLY_FORWARD
        slot = self._need(block, way)
        slot.busy = True
        block.point_to_device(slot)
        try:
            with self._remembering() if grad else _nothing(), _uncached_casts() if block.trained else _nothing():
                return run(*args, **kwargs)
        finally:
            block.point_to_cpu()
            slot.busy = False
            if not again:
                self._fetch_ahead(self._ahead(block.place, way)[1:])

    def _remembering(self) -> saved_tensors_hooks:
        """Within it autograd keeps the address of a swapped weight, not the weight.

        What it would keep otherwise is memory of the ring, which the next block overwrites. Its own check for that, the
        version counter, does not help: `.data` leaves the counter alone, and checkpointing keeps tensors past it.
        """
        outer = _outer_hooks()

        def pack(tensor: Tensor) -> Any:
            address = self._address(tensor)
            return address if address is not None else outer.pack(tensor)

        def unpack(kept: Any) -> Tensor:
            return self._weight_at(kept) if type(kept) is _SavedWeightRef else outer.unpack(kept)

        hooks = saved_tensors_hooks(pack, unpack)
        outer.inner = hooks
        return hooks

    def _address(self, tensor: Tensor) -> _SavedWeightRef | None:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            return None
        memory = tensor.untyped_storage().data_ptr()
        for slot in self._slots:
            if slot.memory == memory and slot.block is not None:
                block = slot.block
                shape = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
                return _SavedWeightRef(block.place, block.changes, tensor.dtype, *shape)
        return None

    def _weight_at(self, address: _SavedWeightRef) -> Tensor:
        block = self._blocks[address.place]
        slot = self._need(block, _BACKWARD)
        if block.changes != address.changes:
            raise RuntimeError("the weights of a swapped block were changed between its forward and its backward pass")
        typed = slot.buffer.view(address.dtype)
        return typed.as_strided(address.shape, address.stride, address.offset)

    # ---- the ring

    def _need(self, block: _Block, way: str) -> _Buffer:
        """The block's place on the device; all that is computed from now on finds its weights there."""
        self._complete()
        slot = self._slot_of(block)
        if slot is None:
            slot = self._free_slot(self._ahead(block.place, way))
            self._fetch(block, slot)
        elif slot.versions != block.versions():
            self._fetch(block, slot)
        if self._at != (block.place, way):
            self._at = block.place, way
            self._fetch_ahead(self._ahead(block.place, way)[:NUM_BUFFERS], but=slot)
        if slot.arrived is not None:
            slot.arrived.before_use()
        return slot

    def _ahead(self, place: int, way: str) -> list[_Block]:
        """The block at hand, then the next ones that are not among those before, as far as the ring reaches."""
        up, down = range(place + 1, len(self._blocks)), range(len(self._blocks) - 1, -1, -1)
        turns: Iterable[int] = itertools.chain(up, range(len(self._blocks)) if way == _ONLY_FORWARD else down)
        if way == _BACKWARD:
            turns = itertools.chain(range(place - 1, -1, -1), range(len(self._blocks)))
        # The block at hand may come up again at the very end of the pass, where it must not be let go.
        first = list(itertools.islice(dict.fromkeys(turns), NUM_BUFFERS))
        return [self._blocks[place], *(self._blocks[turn] for turn in first)]

    def _fetch_ahead(self, wanted: Sequence[_Block], but: _Buffer | None = None) -> None:
        for block in wanted:
            if self._slot_of(block) is not None:
                continue
            kept = (slot.busy or slot is but or slot.block in wanted for slot in self._slots)
            free = [slot for slot, keep in zip(self._slots, kept, strict=True) if not keep]
            if not free:
                return
            self._fetch(block, free[0])

    def _fetch(self, block: _Block, slot: _Buffer) -> None:
        slot.versions = block.versions()
        if block.seen != slot.versions:
            block.changes += block.seen is not None
            block.seen = slot.versions
        # What was written back from this place, or to this block, must be there first.
        after = (slot.written, block.written)
        slot.block = block
        slot.arrived = self._reading.copy(slot.buffer[: block.size], block.host[: block.size], after)
        self.bytes_moved += block.size

    def _slot_of(self, block: _Block) -> _Buffer | None:
        return next((slot for slot in self._slots if slot.block is block), None)

    def _free_slot(self, wanted: Sequence[_Block]) -> _Buffer:
        free = [slot for slot in self._slots if not slot.busy]
        if not free:
            raise RuntimeError("swapped blocks call one another; they must run one after another")
        return next((slot for slot in free if slot.block not in wanted), free[0])

    # ---- trained weights

    def _before_gradient(self, block: _Block, piece: _SwappedTensor, gradient: Tensor) -> None:
        """A weight's gradient is there: until `_complete` the weight is on the device, where it is stepped."""
        slot = self._need(block, _BACKWARD)
        piece.tensor.data = block.views(slot)[piece.place]
        self._stepped = block, piece, slot
        task = torch._C._current_graph_task_id()
        if self._backward != task:
            self._backward = task
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)

    def _complete(self) -> None:
        """The weight whose gradient came last has been stepped: writes it back."""
        if self._stepped is None:
            return
        (block, piece, slot), self._stepped = self._stepped, None
        weight, given = piece.tensor, piece.tensor.data
        weight.data = piece.host
        if weight.grad is not None:
            raise UserError(
                "--blocks_to_swap: swapped weights are trained only with --fused_backward_pass; add it, or do not swap"
            )
        stepped = block.views(slot)[piece.place]
        if given.data_ptr() != stepped.data_ptr():  # some optimizers put the new values elsewhere
            stepped.copy_(given)
        block.written = slot.written = self._writing.copy(piece.host, stepped)
        self.bytes_written_back += stepped.nbytes
        slot.versions = block.seen = block.versions()

    def _end_of_backward(self) -> None:
        # The only wait: after it CPU memory holds the true weights, whoever reads them and however.
        self._complete()
        self._settle()
        self._backward = None

    def _settle(self) -> None:
        for slot in self._slots:
            if slot.written is not None:
                slot.written.wait()


# --- what is swapped --------------------------------------------------------------------------------------------------


class _SavedWeightRef(NamedTuple):
    """Where autograd finds a weight, or a view of one, again."""

    place: int  # of the block
    changes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # numbers of this format from the start of the block


@dataclass(eq=False)
class _Buffer:
    """A place on the device for one block."""

    buffer: Tensor  # uint8
    block: _Block | None = None
    versions: list[int] = field(default_factory=list)  # the block's when it was copied
    busy: bool = False  # its block is being called
    arrived: CopyEvent | None = None
    written: CopyEvent | None = None  # the last thing that was copied from here

    @property
    def memory(self) -> int:
        return self.buffer.untyped_storage().data_ptr()


@dataclass(eq=False)
class _SwappedTensor:
    """A parameter or buffer, and where it is inside its block's memory."""

    place: int
    tensor: Tensor  # the one that the model holds
    start: int  # bytes
    stride: tuple[int, ...]
    host: Tensor | None = None  # its values in CPU memory

    def inside(self, memory: Tensor) -> Tensor:
        like = self.tensor
        typed = memory.view(like.dtype)
        return typed.as_strided(like.shape, self.stride, self.start // like.element_size())


class _Block:
    """A block whose weights live in one piece of CPU memory, every number format in it."""

    def __init__(self, place: int, module: nn.Module, shared: set[int]):
        self.place, self.module = place, module
        self.pieces: list[_SwappedTensor] = []
        self.size = 0  # bytes
        self.host: Tensor | None = None  # uint8
        for tensor in _tensors(module):
            if id(tensor) in shared:
                continue
            stride = tensor.stride() if _dense(tensor) else tensor.contiguous().stride()
            self.pieces.append(_SwappedTensor(len(self.pieces), tensor, self.size, stride))
            self.size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.trained = any(piece.tensor.requires_grad for piece in self.pieces)
        self.compiled: Callable[..., Any] | None = None
        self.written: CopyEvent | None = None  # the last thing that was copied to CPU memory
        self.seen: list[int] | None = None  # versions when it was last copied
        self.changes = 0  # how often it was changed by others between two copies
        self._views: dict[int, list[Tensor]] = {}

    def leave_device(self, device: torch.device) -> None:
        """To CPU memory, wherever it is; but what it shares with other blocks goes to `device` for good."""
        self.host = host_buffer(self.size, device)
        mine = {id(piece.tensor) for piece in self.pieces}
        for piece in self.pieces:
            piece.host = piece.inside(self.host)
            piece.host.copy_(piece.tensor.data)
            piece.tensor.data = piece.host
        for tensor in _tensors(self.module):
            if id(tensor) not in mine:
                tensor.data = tensor.data.to(device)

    def unpin(self, device: torch.device) -> None:
        """Gives its memory back, on both sides."""
        for piece in self.pieces:
            if piece.tensor.data_ptr() == piece.host.data_ptr():
                piece.tensor.data = piece.host.clone()
            piece.host = None
        release_host_buffer(self.host, device)
        self.host = self.written = self.seen = None
        self._views.clear()

    def views(self, slot: _Buffer) -> list[Tensor]:
        if slot.memory not in self._views:
            self._views[slot.memory] = [piece.inside(slot.buffer) for piece in self.pieces]
        return self._views[slot.memory]

    def point_to_device(self, slot: _Buffer) -> None:
        for piece, view in zip(self.pieces, self.views(slot), strict=True):
            piece.tensor.data = view

    def point_to_cpu(self) -> None:
        for piece in self.pieces:
            piece.tensor.data = piece.host

    def versions(self) -> list[int]:
        return [piece.tensor._version for piece in self.pieces]


def _spread(blocks: int, count: int) -> list[int]:
    """`count` of `blocks` places, evenly: what stays on the device gives the copies between time."""
    return [(2 * number + 1) * blocks // (2 * count) for number in range(count)]


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _shared_tensors(blocks: Sequence[nn.Module]) -> set[int]:
    """Of several blocks, by id: they have no turn of their own, and stay on the device."""
    seen: set[int] = set()
    shared: set[int] = set()
    for block in blocks:
        own = {id(tensor) for tensor in _tensors(block)}
        shared |= own & seen
        seen |= own
    return shared


def _dense(tensor: Tensor) -> bool:
    """Whether it fills its memory, in whatever order: channels_last does."""
    dims = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1)
    expected = 1
    for stride, size in dims:
        if stride != expected:
            return False
        expected *= size
    return True


def _stay(block: _Block, move: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """In place of `Module._apply`, by which a model is moved and cast. Raises: RuntimeError: it would be cast."""
    for piece in block.pieces:
        empty = piece.tensor.new_empty(0)
        if move(empty).dtype != empty.dtype:
            raise RuntimeError("a swapped block cannot be cast; cast the model before its blocks are swapped")
    return block.module


# --- autograd ---------------------------------------------------------------------------------------------------------


def _outer_hooks() -> _Outer | _Beneath:
    """What would keep the tensors if we did not: torch asks the innermost hooks alone, and checkpointing is such."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is None:  # torch before 2.8
        return _Beneath()
    hooks = top(True)
    return _Outer() if hooks is None else _Outer(*hooks)


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass
class _Outer:
    pack: Callable[[Tensor], Any] = _same
    unpack: Callable[[Any], Tensor] = _same
    inner: Any = None


class _Beneath:
    """The same where torch does not say which hooks there are: they get the tensor from an operation of its own."""

    inner: saved_tensors_hooks

    def pack(self, tensor: Tensor) -> Any:
        torch._C._autograd._pop_saved_tensors_default_hooks()
        try:
            with torch.enable_grad():
                return _Keep.apply(torch.empty(0, requires_grad=True), tensor).grad_fn
        finally:
            torch._C._autograd._push_saved_tensors_default_hooks(self.inner.pack_hook, self.inner.unpack_hook)

    def unpack(self, kept: Any) -> Tensor:
        return kept.saved_tensors[0]


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _uncached_casts() -> Iterator[None]:
    """Autocast keeps its copies of trained weights until it ends: those of all blocks, on the device."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
