"""Training steps of the real architectures at full size, with random weights: time, memory, launches. Needs a GPU.

    python benchmarks/bench_models.py
    python benchmarks/bench_models.py --only sdxl-lora sdxl-full --variants plain gc
    python benchmarks/bench_models.py --tiny

Nothing is downloaded and no file is read: each model is built on the device in bf16 from its published configuration,
so the card must hold it at that moment, also where its blocks are swapped afterwards. All else is what a training
script does with cached latents and text: options, network or whole-model method, placement, swapping, compiling,
optimizer, and step. It prints a Markdown table.

`--tiny` runs every row with toy models on the CPU, in four variants, which only shows that the command works: nothing
is swapped there, and one block is compiled by the backend "eager".

How to read the table:
- s/step: the median of steps that follow one another without a wait.
- against: that time over the time of the row's variant named there.
- peak GiB: the most memory in torch's hands on the device during those steps.
- TFLOP: counted in the step as it runs, so checkpointing's second forward pass counts as work.
- of the rate: TFLOP in s/step over what a large bf16 matrix product reaches on this card in the same run.
- host ms: until a step has been handed over to an idle device. Where the device is slower than that, it may include
  waiting for room in its queue.
- launches, busy ms: kernel launches of one step, and the time that kernels and copies take; by torch.profiler, for
  U-Nets only.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from architectures import FLUX_DEV, SD15, SD35_LARGE, SDXL, TINY_SIDE, TINY_TOKENS, Model, build_denoiser
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from library import registry
from library.families.base import Family
from library.memory.attention import set_attention
from library.memory.block_swap import BlockSwap
from library.memory.compiling import compile_blocks
from library.options import parsing
from library.options.base import Options
from library.runtime import logs, seeds
from library.training import placement
from library.training.optimizers import make_optimizer
from library.training.step import StepParts, training_step
from library.training.stepping import OptimizerStepper, parts_inside_backward
from library.types import Batch, Models, TextCond
from networks.layers.copies import weights_in

GIB, TERA = 2**30, 1e12
SEED = 1
LEFT_OVER = 0.25  # GiB that libraries keep for themselves; more is what another row has failed to give back


# ---- what is measured

_LORA = ("--network_dim=16", "--network_alpha=16", "--network_train_unet_only", "--learning_rate=1e-4")
_ADAFACTOR = "--optimizer_args relative_step=False scale_parameter=False warmup_init=False"


@dataclass(frozen=True)
class Row:
    """A training task: a model, and the options of the script that trains it."""

    model: Model
    method: str
    arguments: tuple[str, ...]
    swaps: bool = False
    profiled: bool = False


ROWS = {
    "sd15-lora": Row(SD15, "network", ("--network_module=networks.lora", *_LORA), profiled=True),
    "sdxl-lora": Row(SDXL, "network", ("--network_module=networks.lora", *_LORA), profiled=True),
    "sdxl-full": Row(
        SDXL,
        "finetune",
        (
            *("--learning_rate=1e-5", "--full_bf16", "--optimizer_type=AdaFactor", *_ADAFACTOR.split()),
            "--fused_backward_pass",
        ),
        profiled=True,
    ),
    "sd35-lora": Row(SD35_LARGE, "network", ("--network_module=networks.lora_sd3", *_LORA)),
    "flux-lora": Row(FLUX_DEV, "network", ("--network_module=networks.lora_flux", *_LORA), swaps=True),
    "flux-fp8": Row(FLUX_DEV, "network", ("--network_module=networks.lora_flux", *_LORA, "--fp8_base"), swaps=True),
}


@dataclass(frozen=True)
class Variant:
    arguments: tuple[str, ...]
    base: str | None = None  # the variant that its time is compared with
    needs_swaps: bool = False


_CHECKPOINTING = "--gradient_checkpointing"
VARIANTS = {
    "plain": Variant(()),
    "gc": Variant((_CHECKPOINTING,), "plain"),
    "compile": Variant(("--torch_compile",), "plain"),
    "gc-compile": Variant((_CHECKPOINTING, "--torch_compile"), "gc"),
    # without any it is the variant "gc"
    **{f"swap-{n}": Variant((_CHECKPOINTING, f"--blocks_to_swap={n}"), "gc", True) for n in (10, 20, 28, 35)},
}
TINY_VARIANTS = ("plain", "gc", "compile", "swap-35")


# ---- building


def build_models(model: Model, config: dict[str, Any], device: torch.device) -> Models:
    """The denoiser, and no more than cached latents and text leave a family to ask for."""
    encoders: dict[str, nn.Module] = {}
    if model.family == "sd":  # whose list of targets starts with those of the text encoder
        with torch.device("meta"):
            encoders["te"] = CLIPTextModel(CLIPTextConfig(num_hidden_layers=1))
    source = SimpleNamespace(clip_l=None)  # as of a model without text encoders
    return Models(build_denoiser(model, config, device), encoders, {}, None, source)


def make_batch(model: Model, config: dict[str, Any], channels: int, size: int, tiny: bool) -> Batch:
    """Random latents and text; their values do not matter to the time."""
    rng = torch.Generator().manual_seed(0)
    side = TINY_SIDE if tiny else model.side
    shapes = model.text(config, TINY_TOKENS if tiny else model.t5_tokens)
    text = {name: torch.randn(size, *shape, generator=rng) for name, shape in shapes.items()}
    text |= {name: torch.ones_like(value, dtype=torch.long) for name, value in text.items() if name.endswith("mask")}
    sizes = torch.full((size, 2), side)
    return Batch(
        captions=[""] * size,
        latents=torch.randn(size, channels, side // 8, side // 8, generator=rng),
        pixels=None,
        loss_weights=torch.ones(size),
        masks=None,
        original_sizes=sizes,
        crop_top_lefts=torch.zeros_like(sizes),
        target_sizes=sizes,
        text=TextCond(text),
    )


@dataclass
class Training:
    """A model that is ready to be trained, as the scripts make it ready."""

    step: Callable[[], Tensor]  # gives the loss
    compile: Callable[[], None]
    swap: BlockSwap | None
    family: Family
    method: Any
    models: Models


def assemble(row: Row, arguments: tuple[str, ...], batch_size: int, device: torch.device, tiny: bool) -> Training:
    model = row.model
    argv = ["--mixed_precision=bf16", f"--seed={SEED}", *row.arguments, *arguments]
    opts = parsing.parse_options(registry.groups_for(model.family, row.method), argv)
    family, method = registry.FAMILIES[model.family].adapter(opts), registry.METHODS[row.method].method(opts)
    config = {**model.config, **(model.tiny if tiny else {})}
    models = build_models(model, config, device)
    batch = make_batch(model, config, family.traits.latent_channels, batch_size, tiny).to(device)
    # In the order of the scripts, but for compiling, which waits until the operations have been counted.
    method.attach(family, models)
    models.text_encoders.clear()  # their outputs are cached
    placement.place_denoiser(models, opts, device)
    placement.place_trained(method.trainable(), opts, device)
    placement.keep_less(family, models)
    set_attention(models.denoiser, opts.memory)
    swap = placement.swap_blocks(family, models, opts, device)
    optimizer = make_optimizer(method.parameter_groups(), opts.optimizer)
    if swap is not None:
        swap.manage_optimizer(optimizer)
    placement.training_modes(models, method.trainable(), grad_text=False)

    def compile() -> None:
        if opts.memory.torch_compile:
            blocks = family.denoiser.blocks(models)
            compile_blocks(blocks[:1] if tiny else blocks, opts.memory.dynamo_backend, device)

    step = make_step(opts, family, method, models, optimizer, batch, device, swapped=swap is not None)
    return Training(step, compile, swap, family, method, models)


def make_step(
    opts: Options,
    family: Family,
    method: Any,
    models: Models,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    device: torch.device,
    *,
    swapped: bool = False,
) -> Callable[[], Tensor]:
    """What the training loop does for one batch, but for reports."""
    parts = StepParts(
        family, models, partial(family.denoiser.predict, models), family.denoiser.objective(), grad_text=False
    )
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    parts_of_step = parts_inside_backward(opts, trained, family.denoiser.blocks(models), swapped=swapped)
    stepper = OptimizerStepper(opts, optimizer, optimizer, parts_of_step)
    limit = opts.optimizer.max_grad_norm
    numbers = itertools.count()
    added = method.added()

    def step() -> Tensor:
        number = next(numbers)
        method.start_step(number)
        stepper.start(number)
        torch.manual_seed(seeds.derive(SEED, "layers", number))
        method.set_strength(batch.network_multiplier)
        rng = parts.streams.at(device, SEED, "noise", number)
        with nullcontext() if stepper.inside_backward or added is None else weights_in(added, torch.bfloat16):
            with torch.autocast(device.type, torch.bfloat16):
                loss = training_step(parts, batch, rng).losses.mean()
            loss.backward()
        if limit and not stepper.inside_backward:
            nn.utils.clip_grad_norm_(trained, limit)
        stepper.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step()
        return loss.detach()

    return step


# ---- measuring


@dataclass
class Seen:
    """What one variant of a row gave. Numbers that there are not are None."""

    seconds: float | None = None  # of a step
    host: float | None = None
    flops: int | None = None
    peak: int | None = None  # bytes
    launches: int | None = None
    busy: float | None = None  # seconds of kernels in a step
    notes: list[str] = field(default_factory=list)
    failed: bool = False  # for another reason than memory


def measure(training: Training, steps: int, device: torch.device, *, profiled: bool) -> Seen:
    """Steps, once what happens only at first has happened."""
    gpu, step = device.type == "cuda", training.step
    seen = Seen(flops=count_flops(step))  # before compiling, which hides the operations
    training.compile()
    for _ in range(3 if gpu else 1):
        step()
    wait(device)
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seen.seconds, loss = time_steps(step, steps, device)
    if gpu:
        seen.peak = torch.cuda.max_memory_allocated(device)
        seen.host = statistics.median(host_time(step, device) for _ in range(min(steps, 5)))
    if profiled:
        seen.launches, seen.busy = count_launches(step, device)
    if not torch.isfinite(loss):
        seen.notes.append("the loss is not finite")
    return seen


def count_flops(step: Callable[[], Any]) -> int:
    """Of matrix products, convolutions and attention in one step, forwards and backwards."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def time_steps(step: Callable[[], Tensor], steps: int, device: torch.device) -> tuple[float, Tensor]:
    """Median seconds of steps that follow one another as in training, without waits, and the last loss."""
    wait(device)
    marks = [_mark(device)]
    for _ in range(steps):
        loss = step()
        marks.append(_mark(device))
    wait(device)
    return statistics.median(_between(*pair) for pair in itertools.pairwise(marks)), loss


def host_time(step: Callable[[], Any], device: torch.device) -> float:
    """Seconds until the step has been handed over to an idle device."""
    wait(device)
    start = time.perf_counter()
    step()
    taken = time.perf_counter() - start
    wait(device)
    return taken


def count_launches(step: Callable[[], Any], device: torch.device) -> tuple[int | None, float | None]:
    """Kernels that one step launches, and the seconds that they run; None where there is no GPU."""
    from torch.profiler import ProfilerActivity, profile

    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    wait(device)
    with profile(activities=activities) as profiler:
        step()
        wait(device)
    events = profiler.events()
    # One call may launch a whole graph of kernels; both are one launch to the host.
    launches = sum(event.name.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch")) for event in events)
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    busy = sum(event.time_range.elapsed_us() for event in on_device) / 1e6
    return (launches, busy) if launches else (None, None)


def matrix_rate(device: torch.device, side: int) -> float:
    """Operations per second of a bf16 product of two matrices of `side` x `side`: the best of five rounds."""
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    repeats, best = 20, 0.0
    for _ in range(5 + 1):  # the first one wakes the card up
        wait(device)
        start = _mark(device)
        for _ in range(repeats):
            torch.mm(a, b)
        end = _mark(device)
        wait(device)
        best = max(best, 2 * side**3 * repeats / _between(start, end))
    return best


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _mark(device: torch.device) -> Any:
    """A point in the device's time."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    """Seconds; both points are past."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def attempt(run: Callable[[], Seen]) -> Seen:
    """What `run` gives, or why it gives nothing: one row must not end all of them."""
    try:
        return run()
    except torch.cuda.OutOfMemoryError:
        return Seen(notes=["out of memory"])
    except Exception as error:
        lines = str(error).strip().splitlines()
        return Seen(notes=[f"{type(error).__name__}: {lines[0] if lines else ''}"], failed=True)


def run_variant(row: Row, variant: Variant, args: argparse.Namespace, device: torch.device) -> Seen:
    arguments = variant.arguments
    if args.tiny and "--torch_compile" in arguments:
        arguments = (*arguments, "--dynamo_backend=eager")  # others take a compiler, and a while
    training = assemble(row, arguments, args.batch, device, args.tiny)
    try:
        profiled = row.profiled and not (args.tiny and variant.base)
        return measure(training, args.steps, device, profiled=profiled)
    finally:
        if training.swap is not None:
            training.swap.detach()  # or its memory stays registered with the driver


def clean_up(device: torch.device) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- the table

COLUMNS = (
    *("row", "variant", "s/step", "against", "peak GiB", "TFLOP", "TFLOP/s", "of the rate"),
    *("host ms", "launches", "busy ms", "note"),
)
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def line(name: str, variant: str, seen: Seen, base: tuple[str, float | None] | None, rate: float) -> str:
    """A line of the table. Args: base: name and seconds of the variant that this one is compared with."""
    speed = seen.flops / seen.seconds if seen.seconds else None
    against = f"{seen.seconds / base[1]:.2f} x {base[0]}" if base and base[1] and seen.seconds else "-"
    cells = (
        name,
        variant,
        _shown(seen.seconds, "{:.4f}"),
        against,
        _shown(seen.peak, "{:.2f}", 1 / GIB),
        _shown(seen.flops if seen.seconds else None, "{:.4g}", 1 / TERA),
        _shown(speed, "{:.4g}", 1 / TERA),
        _shown(speed, "{:.1%}", 1 / rate),
        _shown(seen.host, "{:.1f}", 1e3),
        _shown(seen.launches, "{:.0f}"),
        _shown(seen.busy, "{:.1f}", 1e3),
        "; ".join(seen.notes).replace("|", "/"),
    )
    return f"| {' | '.join(cells)} |"


def _shown(value: float | None, form: str, factor: float = 1) -> str:
    return "-" if value is None else form.format(value * factor)


def chosen_variants(row: Row, asked: Sequence[str]) -> Iterator[tuple[str, Variant]]:
    for name, variant in VARIANTS.items():
        if name in asked and (row.swaps or not variant.needs_swaps):
            yield name, variant


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, help="rows to run; by default all")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, help="variants to run; by default all, or four if tiny"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, help="timed steps; by default 10, with --tiny 1")
    parser.add_argument("--tiny", action="store_true", help="toy models on the CPU: shows that the command works")
    args = parser.parse_args(argv)
    args.steps = args.steps or (1 if args.tiny else 10)
    args.variants = args.variants or (TINY_VARIANTS if args.tiny else tuple(VARIANTS))
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("no GPU was found, and models of this size need one; --tiny shows that the command works")
    device = torch.device("cpu" if args.tiny else "cuda")
    logs.quiet_third_parties()
    logs.LOGGER.setLevel(logging.ERROR)
    rate = matrix_rate(device, 64 if args.tiny else 8192)
    card = "CPU, toy models" if args.tiny else torch.cuda.get_device_name(device)
    facts = f"{card}, torch {torch.__version__}, batch {args.batch}, median of {args.steps} steps"
    print(f"{time.strftime('%Y-%m-%d')}, {facts}; large bf16 matrix product: {rate / TERA:.4g} TFLOP/s\n\n{HEAD}")
    failed = False
    gc.freeze()  # what the imports have made stays, so that nobody need look through it after each variant
    for name in args.only or ROWS:
        row, seconds = ROWS[name], {}
        for label, variant in chosen_variants(row, args.variants):
            left = 0 if args.tiny else torch.cuda.memory_allocated(device) / GIB
            seen = attempt(partial(run_variant, row, variant, args, device))
            if left > LEFT_OVER:
                seen.notes.append(f"peak has {left:.1f} GiB of earlier rows")
            clean_up(device)
            seconds[label], failed = seen.seconds, failed or seen.failed
            base = (variant.base, seconds.get(variant.base)) if variant.base else None
            print(line(name, label, seen, base, rate), flush=True)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
