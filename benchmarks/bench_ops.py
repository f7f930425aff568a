"""Operations of a training step and the memory it takes, on models as published, without a GPU and without weights.

    python benchmarks/bench_ops.py
    python benchmarks/bench_ops.py --only flux-lora sdxl-lora --json seen.json
    python benchmarks/bench_ops.py --only flux-lora --full

Models, adapters, methods, optimizers and the step are those of a training script, on tensors that have shapes and no
content (torch's FakeTensorMode), with bf16 autocast and batches of one image. Models of the published widths with one
to three blocks of each kind are run, and what a block adds is multiplied by the published number of blocks; `--full`
runs whole models instead, as does selective checkpointing, which chooses among all blocks.

How to read the table:
- ops: calls of torch's operators in one step, less those that only look at memory or reserve it. On a GPU that is
  about one launch of a kernel each.
- base: forward pass and backward pass to the input, of the model alone. peft: the same step with peft's LoRA on the
  same layers.
- added: what our step has more than the base, for each adapted layer of the live model.
- peak GiB: the most bytes of tensors at any moment, with weights, adapters, optimizer state and gradients. What
  libraries keep for themselves, and what an allocator leaves unused, is not in it.

What a GPU does otherwise: under autocast its layer norms and group norms give float32, and those of a CPU do not; here
they do. The CPU's attention stands for the GPU's.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from architectures import Model
from bench_models import ROWS as TASKS
from bench_models import Row, assemble, build_models, make_batch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from library import registry
from library.options import parsing
from library.planning.watching import Watcher
from library.runtime import logs
from library.training.step import StepParts, training_step
from networks.targets import live_modules

GIB = 2**30
CPU = torch.device("cpu")


# ---- what is measured


@dataclass(frozen=True)
class Case:
    """A row of the table: a task of `bench_models`, and what is added to its command line."""

    task: str
    arguments: tuple[str, ...] = ()
    rivals: bool = True  # whether the base and peft are measured, too
    whole: bool = False  # what is kept depends on all blocks together, so that small models say nothing


_CHECKPOINTING = ("--gradient_checkpointing",)
_SELECTIVE = (*_CHECKPOINTING, "--selective_checkpointing=3")
CASES = {
    "sd15-lora": Case("sd15-lora"),
    "sdxl-lora": Case("sdxl-lora"),
    "sdxl-lora, checkpointing": Case("sdxl-lora", _CHECKPOINTING),
    "sd35-lora": Case("sd35-lora"),
    "sd35-lora, checkpointing": Case("sd35-lora", _CHECKPOINTING),
    "flux-lora": Case("flux-lora"),
    "flux-lora, checkpointing": Case("flux-lora", _CHECKPOINTING),
    **{
        f"{task}, selective": Case(task, _SELECTIVE, rivals=False, whole=True)
        for task in ("sdxl-lora", "sd35-lora", "flux-lora")
    },
    "sdxl-full, checkpointing": Case("sdxl-full", _CHECKPOINTING, rivals=False),
    "flux-full, checkpointing": Case("flux-full", _CHECKPOINTING, rivals=False),
}
FULL_FLUX = Row(TASKS["flux-lora"].model, "finetune", TASKS["sdxl-full"].arguments)


def task(case: Case) -> Row:
    return FULL_FLUX if case.task == "flux-full" else TASKS[case.task]


def small_sizes(model: Model) -> tuple[dict[str, Any], list[tuple[dict[str, Any], int]]]:
    """A small model's configuration, and others with one block more of one kind and how often that is missing."""
    config = model.config
    if model.family == "flux":
        more = {"num_layers": config.get("num_layers", 19), "num_single_layers": config.get("num_single_layers", 38)}
        least = dict.fromkeys(more, 1)
    elif model.family == "sd3":
        more = {"num_layers": config["num_layers"]}
        least = {"num_layers": 2}  # the last block is another than the rest
    elif model.family == "sdxl":
        depths = config["transformer_layers_per_block"]
        small = tuple(1 for _ in depths)
        others = [(*small[:level], 2, *small[level + 1 :]) for level in range(len(depths))]
        name = "transformer_layers_per_block"
        return {name: small}, [({name: o}, d - 1) for o, d in zip(others, depths, strict=True) if d > 1]
    else:
        return {}, []
    return least, [({**least, name: least[name] + 1}, number - least[name]) for name, number in more.items()]


# ---- counting

_RESERVING = ("empty", "new_empty")  # they reserve memory and launch nothing
_FREE = ("_unsafe_view", "detach", "lift_fresh", "_local_scalar_dense", "is_same_size", "set_")


def launches(function: Any) -> bool:
    """Whether an operator does something with numbers."""
    kind, _, name = function._schema.name.partition("::")
    if kind in ("prim", "profiler"):
        return False
    if name.startswith(_RESERVING) or name in _FREE:
        return False
    return not any(one.alias_info is not None and not one.alias_info.is_write for one in function._schema.returns)


@contextmanager
def watched() -> Iterator[tuple[Watcher, Counter[str]]]:
    """Within it storages are watched, and operations counted by their names."""
    ops: Counter[str] = Counter()

    def count(function: Any, *_: Any) -> None:
        if launches(function):
            ops[str(function)] += 1

    with Watcher(count) as watcher:
        yield watcher, ops


@dataclass
class Seen:
    """What one step of one contender took. Numbers may be fractions of blocks before they are put together."""

    ops: float
    peak: float  # bytes
    resident: float  # bytes, before the step
    layers: float = 0  # that are adapted

    def plus(self, other: Seen, base: Seen, times: int) -> Seen:
        """With `times` what `other` has more than `base`."""
        own, more, less = asdict(self), asdict(other), asdict(base)
        return Seen(**{name: own[name] + times * (more[name] - less[name]) for name in own})


@contextmanager
def played() -> Iterator[None]:
    """Within it tensors are fakes, and norms and the clipping of gradients do what they do on a GPU."""

    def in_float32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def compute(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not torch.is_autocast_enabled("cpu"):
                return norm(x, *args, **kwargs)
            cast = [one.float() if isinstance(one, Tensor) else one for one in (x, *args)]
            named = {name: one.float() if isinstance(one, Tensor) else one for name, one in kwargs.items()}
            with torch.autocast("cpu", enabled=False):
                return norm(*cast, **named)

        return compute

    def convert(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for part in module.modules() if recurse else [module]:
            for tensor in (*part._parameters.values(), *part._buffers.values()):
                if tensor is not None:
                    tensor.data = change(tensor.data)
        return module

    with ExitStack() as stack:
        for name in ("kaiming_uniform_", "xavier_uniform_", "uniform_", "normal_", "trunc_normal_"):
            stack.enter_context(mock.patch.object(nn.init, name, lambda tensor, *_, **__: tensor))
        for owner, name, value in (
            (F, "layer_norm", in_float32(F.layer_norm)),
            (F, "group_norm", in_float32(F.group_norm)),
            (nn.utils, "clip_grad_norm_", partial(nn.utils.clip_grad_norm_, foreach=True)),
            (nn.Module, "_apply", convert),  # torch's own swaps tensors, which fakes refuse
            (nn.utils, "skip_init", lambda kind, *args, **kwargs: kind(*args, **kwargs)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


# ---- the contenders


def ours(row: Row, arguments: tuple[str, ...]) -> tuple[Callable[[], Any], int]:
    """Our step, and the number of layers that are adapted."""
    made = assemble(row, arguments, 1, CPU, tiny=False)
    network = made.method.added()
    targets = [] if network is None else network.targets.values()
    return made.step, sum(len(live_modules(made.models, target)) for target in targets)


def adapted_modules(row: Row) -> list[str]:
    """The paths of the layers that our network adapts."""
    made = assemble(row, (), 1, CPU, tiny=False)
    return [path for target in made.method.added().targets.values() for path in target.modules]


def with_peft(row: Row, arguments: tuple[str, ...]) -> tuple[Callable[[], Any], int]:
    """The shortest correct step with peft's LoRA on the layers that ours adapts, and their number."""
    from peft import LoraConfig

    paths = adapted_modules(row)
    parts, batch, denoiser = _bare(row, arguments)
    denoiser.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=paths))
    for weight in denoiser.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    trained = [weight for weight in denoiser.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> None:
        rng = torch.Generator().manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = training_step(parts, batch, rng).losses.mean()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, len(paths)


def base(row: Row, arguments: tuple[str, ...]) -> tuple[Callable[[], Any], int]:
    """Forward pass and backward pass to the input."""
    parts, batch, _ = _bare(row, arguments)

    def step() -> None:
        noisy = torch.zeros_like(batch.latents).requires_grad_()
        times = torch.full((len(noisy),), 500.0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = parts.denoise(noisy, times, batch.text, batch).float().mean()
        loss.backward()

    return step, 0


def _bare(row: Row, arguments: tuple[str, ...]) -> tuple[StepParts, Any, nn.Module]:
    model = row.model
    argv = ["--mixed_precision=bf16", *row.arguments]
    opts = parsing.parse_options(registry.groups_for(model.family, row.method), argv)
    family = registry.FAMILIES[model.family].adapter(opts)
    models = build_models(model, model.config, CPU)
    models.freeze()
    models.text_encoders.clear()
    if _CHECKPOINTING[0] in arguments:
        models.denoiser.enable_gradient_checkpointing()
    models.denoiser.train()
    batch = make_batch(model, model.config, family.traits.latent_channels, 1, tiny=False)
    denoise = partial(family.denoiser.predict, models)
    return StepParts(family, models, denoise, family.denoiser.objective(), grad_text=False), batch, models.denoiser


CONTENDERS = {"ours": ours, "peft": with_peft, "base": base}


# ---- measuring


def measure_one(contender: str, row: Row, arguments: tuple[str, ...]) -> Seen:
    """The second step of a contender: the first one makes the optimizer's state."""
    with played(), watched() as (watcher, ops):
        step, layers = CONTENDERS[contender](row, arguments)
        step()
        resident = watcher.in_use("cpu")
        ops.clear()
        with watcher.phase("second step") as phase:
            step()
        return Seen(ops.total(), phase.peaks["cpu"].size, resident, layers)


def measure(contender: str, case: Case, *, full: bool) -> Seen:
    row = task(case)
    if full:
        return measure_one(contender, row, case.arguments)

    def with_config(changes: Mapping[str, Any]) -> Seen:
        model = replace(row.model, config={**row.model.config, **changes})
        return measure_one(contender, replace(row, model=model), case.arguments)

    least, others = small_sizes(row.model)
    small = total = with_config(least)
    for changes, times in others:
        total = total.plus(with_config(changes), small, times)
    return total


# ---- the table

COLUMNS = (
    "case",
    "layers",
    "ops: base",
    "peft",
    "ours",
    "ours/peft",
    "added",
    "peak GiB: base",
    "peft",
    "ours",
    "at rest",
)
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def line(name: str, seen: Mapping[str, Seen]) -> str:
    own, peft, bare = seen["ours"], seen.get("peft"), seen.get("base")

    def shown(one: Seen | None, name: str) -> str:
        if one is None:
            return "-"
        return f"{one.ops:,.0f}" if name == "ops" else f"{getattr(one, name) / GIB:.2f}"

    cells = (
        name,
        f"{own.layers:.0f}",
        *(shown(one, "ops") for one in (bare, peft, own)),
        f"{own.ops / peft.ops:.2f}" if peft else "-",
        f"{(own.ops - bare.ops) / own.layers:.1f}" if bare else "-",
        *(shown(one, "peak") for one in (bare, peft, own)),
        shown(own, "resident"),
    )
    return f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, help="cases to measure; by default all")
    parser.add_argument("--ours", action="store_true", help="leave out peft and the base")
    parser.add_argument("--full", action="store_true", help="whole models in place of an extension from small ones")
    parser.add_argument("--json", type=Path, help="write the numbers to this file, too")
    args = parser.parse_args(argv)
    logs.quiet_third_parties()
    logs.LOGGER.setLevel(logging.ERROR)
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, fake tensors, batch 1\n\n{HEAD}")
    found: dict[str, dict[str, Any]] = {}
    for name in args.only or CASES:
        case = CASES[name]
        contenders = list(CONTENDERS) if case.rivals and not args.ours else ["ours"]
        seen = {contender: measure(contender, case, full=args.full or case.whole) for contender in contenders}
        found[name] = {contender: asdict(one) for contender, one in seen.items()}
        print(line(name, seen), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
