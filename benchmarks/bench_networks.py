"""What a training step costs with each type of network: over plain LoRA of the same size, and over lycoris-lora.

    python benchmarks/bench_networks.py
    python benchmarks/bench_networks.py --only LoHa "DoRA, rows" --blocks flux --rounds 9

A step is one forward and one backward pass of one transformer block with frozen random weights, float32, on one core:
SDXL's block of 640 channels at 32x32 positions, or FLUX.1's single block at half its width. Three networks on copies of
the block take turns: plain LoRA with as many trained parameters as the type has, the type, and the same type of
lycoris-lora with the same arguments. Ratios are medians over rounds.

Times are CPU seconds, which other work on the machine changes less than the clock's. Memory is the peak of what a step
allocates for tensors beyond the model and its networks: activations, rebuilt weights and gradients. It is counted as
bytes of living storages, so it is the same in every run; what kernels use inside themselves is not seen. Without
lycoris-lora its columns are "-".
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from library.runtime import logs
from library.types import LoraTarget, Models
from networks import registry
from networks.layer import AdapterLayer
from networks.layer_args import ChangeArgs, KohyaOftArgs, LayerArgs, LoraArgs, OftArgs
from networks.spec import NetworkType
from networks.targets import file_modules, hook

# ---- the blocks


@dataclass(frozen=True)
class Block:
    """A transformer block, the layers that networks adapt in it, and one forward pass."""

    module: nn.Module
    layers: tuple[tuple[str, ...], ...]  # several modules: one fused layer
    forward: Callable[[], Tensor]


def sdxl_block(tiny: bool) -> Block:
    from diffusers.models.attention import BasicTransformerBlock

    width, tokens, text = (64, 16, 32) if tiny else (640, 1024, 2048)
    block = BasicTransformerBlock(width, width // 64, 64, cross_attention_dim=text, activation_fn="geglu")
    x, states = torch.randn(1, tokens, width, requires_grad=True), torch.randn(1, 77, text)
    layers = tuple((path,) for path, module in block.named_modules() if isinstance(module, nn.Linear))
    return Block(block, layers, lambda: block(x, encoder_hidden_states=states))


def flux_block(tiny: bool) -> Block:
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

    width, tokens, heads = (64, 16, 2) if tiny else (1536, 512, 12)
    block = FluxSingleTransformerBlock(width, heads, width // heads)
    x, words = torch.randn(1, tokens - 8, width, requires_grad=True), torch.randn(1, 8, width)
    time_embedding = torch.randn(1, width)
    layers = (("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), ("proj_out",), ("norm.linear",))
    return Block(block, layers, lambda: torch.cat(block(x, words, time_embedding), 1))


BLOCKS = {"sdxl": sdxl_block, "flux": flux_block}


# ---- the networks


@dataclass(frozen=True)
class Row:
    """A type with its arguments, here and in lycoris-lora."""

    type: NetworkType[Any]
    args: LayerArgs
    rank: int
    theirs: str  # the algorithm's name
    given: Mapping[str, Any] = field(default_factory=dict)


def _dora(kind: NetworkType[Any], rank: int, name: str, *, rows: bool = True, **given: Any) -> Row:
    args = ChangeArgs(dora_wd=True, wd_on_output=rows, **given)
    return Row(kind, args, rank, name, {"weight_decompose": True, "wd_on_out": rows, **given})


ROWS = {
    "LoRA of networks.lycoris": Row(registry.LOCON, ChangeArgs(), 16, "locon"),
    "LoHa": Row(registry.LOHA, ChangeArgs(), 8, "loha"),
    "LoKr": Row(registry.LOKR, ChangeArgs(factor=8), 16, "lokr", {"factor": 8}),
    "LoKr, full_matrix": Row(
        registry.LOKR, ChangeArgs(factor=8, full_matrix=True), 16, "lokr", {"factor": 8, "full_matrix": True}
    ),
    "DoRA, rows": _dora(registry.LOCON, 16, "locon"),
    "DoRA, columns": _dora(registry.LOCON, 16, "locon", rows=False),
    "LoHa, DoRA of rows": _dora(registry.LOHA, 8, "loha"),
    "LoKr, DoRA of rows": _dora(registry.LOKR, 16, "lokr", factor=8),
    "OFT, 4 blocks": Row(registry.KOHYA_OFT, KohyaOftArgs(), 4, "diag-oft", {"constraint": 1e-3}),
    "Diag-OFT": Row(registry.OFT, OftArgs(), 16, "diag-oft"),
    "BOFT": Row(registry.BOFT, OftArgs(), 48, "boft"),
    "GLoRA": Row(registry.GLORA, ChangeArgs(), 16, "glora"),
    "(IA)^3": Row(registry.IA3, ChangeArgs(), 1, "ia3"),
    "full": Row(registry.FULL, ChangeArgs(), 1, "full"),
}


@dataclass
class Contender:
    """A network on a block of its own."""

    block: Block
    layers: list[nn.Module]

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for layer in self.layers for parameter in layer.parameters()]

    def size(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def step(self) -> None:
        self.block.forward().square().mean().backward()
        for layer in self.layers:
            if isinstance(layer, AdapterLayer):
                layer.before_step()

    def forget(self) -> None:
        """Drops the gradients, as an optimizer's zero_grad does."""
        for parameter in self.parameters():
            parameter.grad = None


def new_block(name: str, tiny: bool) -> Block:
    torch.manual_seed(0)
    block = BLOCKS[name](tiny)
    block.module.requires_grad_(False)
    return block


def ours(block: Block, kind: NetworkType[Any], rank: int, args: LayerArgs) -> Contender:
    models, layers = Models(block.module, {}, {}, None), []
    for modules in block.layers:
        target = LoraTarget("_".join(modules), "denoiser", modules)
        layer = kind.layer.load().build(file_modules(models, target), rank, None, args)
        layer.init_weights(torch.Generator().manual_seed(1))
        hook(models, target, layer)
        layers.append(layer)
    return Contender(block, layers)


def theirs(block: Block, row: Row) -> Contender | None:
    """lycoris-lora on each module, since it has no fused layers; None: not installed, or it cannot cut the rows."""
    try:
        from lycoris.wrapper import network_module_dict
    except ImportError:
        return None
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)  # it says something of every layer
    layers = []
    for path in (path for modules in block.layers for path in modules):
        module = block.module.get_submodule(path)
        layer = network_module_dict[row.theirs](path, module, 1.0, row.rank, row.rank, **row.given)
        if row.type is registry.KOHYA_OFT:  # it has no argument for few large blocks, and takes them where they are set
            layer.block_num, layer.block_size = row.rank, len(module.weight) // row.rank
            layer.oft_blocks = nn.Parameter(torch.zeros(row.rank, layer.block_size, layer.block_size))
        layer.apply_to()
        layers.append(layer)
    return Contender(block, layers)


def equal_lora(name: str, tiny: bool, size: int) -> tuple[Contender, int]:
    """Plain LoRA with about `size` trained parameters, and its rank."""
    one = ours(new_block(name, tiny), registry.LORA, 1, LoraArgs())
    rank = max(1, round(size / one.size()))
    return ours(new_block(name, tiny), registry.LORA, rank, LoraArgs()), rank


# ---- measuring


class LiveBytes(TorchDispatchMode):
    """The bytes of storages that were made since it was entered and are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in self._seen | given:
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def peak_bytes(contender: Contender) -> int:
    contender.forget()
    with LiveBytes() as live:
        contender.step()
    contender.forget()
    return live.peak


def seconds(contender: Contender) -> float:
    start = time.process_time()
    contender.step()
    taken = time.process_time() - start
    contender.forget()
    return taken


@dataclass(frozen=True)
class Seen:
    """One row's figures: of LoRA, of the type, and of lycoris-lora where it is there."""

    rank: int  # of the LoRA
    sizes: tuple[int, ...]  # trained parameters
    times: tuple[tuple[float, ...], ...]  # of each, by rounds
    peaks: tuple[int, ...]

    def time_over(self, other: int) -> float:
        """The median of the rounds' ratios."""
        return statistics.median(a / b for a, b in zip(self.times[1], self.times[other], strict=True))

    def memory_over(self, other: int) -> float:
        return self.peaks[1] / self.peaks[other]


def measure(name: str, row: Row, rounds: int, tiny: bool) -> Seen:
    own = ours(new_block(name, tiny), row.type, row.rank, row.args)
    lora, rank = equal_lora(name, tiny, own.size())
    other = theirs(new_block(name, tiny), row)
    contenders = [lora, own] + ([] if other is None else [other])
    peaks = tuple(peak_bytes(contender) for contender in contenders)  # the first step warms up, too
    times = [tuple(seconds(contender) for contender in contenders) for _ in range(rounds)]
    return Seen(rank, tuple(c.size() for c in contenders), tuple(zip(*times, strict=True)), peaks)


# ---- the table

COLUMNS = (
    *("block", "type", "trained", "ms", "MiB", "LoRA's rank", "time / LoRA", "memory / LoRA"),
    *("time / lycoris", "memory / lycoris", "trained by lycoris"),
)


def cells(name: str, label: str, seen: Seen) -> Iterator[str]:
    yield from (name, label, f"{seen.sizes[1]:,}", f"{statistics.median(seen.times[1]) * 1e3:.0f}")
    yield from (
        f"{seen.peaks[1] / 2**20:.1f}",
        str(seen.rank),
        f"{seen.time_over(0):.2f}",
        f"{seen.memory_over(0):.2f}",
    )
    if len(seen.peaks) < 3:
        yield from "---"
        return
    yield from (f"{seen.time_over(2):.2f}", f"{seen.memory_over(2):.2f}", f"{seen.sizes[2]:,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="TYPE", help="types to run")
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS), help="blocks to run")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each network (default: 5)")
    parser.add_argument("--tiny", action="store_true", help="toy blocks: shows that the command works")
    args = parser.parse_args()
    logs.quiet_third_parties()
    torch.set_num_threads(1)
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, CPU, one core, {args.rounds} rounds\n")
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for name in args.blocks:
        for label in args.only:
            seen = measure(name, ROWS[label], args.rounds, args.tiny)
            print(f"| {' | '.join(cells(name, label, seen))} |", flush=True)


if __name__ == "__main__":
    main()
