"""`run(family, method)`: what every training script does. The only module that knows both sides.

The order is: parse, check everything that can be checked without torch, read the data set, load the model, train.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.options.sharding import USE_DEEPSPEED, USE_FSDP, sharding_of
from library.runtime import logs
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.families.base import Family, FamilyTraits
    from library.methods.base import Method
    from library.options.base import Options
    from library.options.sharding import Sharding
    from library.runtime.processes import Processes
    from library.training.plan import RunPlan
    from library.training.sharding import Shards
    from library.types import Models

# name -> (package of the family, its adapter class in `<package>.adapter`); `<package>.options` holds TRAITS and
# `<package>.variants` `check_paths(opts)`, and `missing_encoders(opts)` where models may lack some; without torch
FAMILIES = {
    "sd": ("library.families.sd", "SdFamily"),
    "sdxl": ("library.families.sdxl", "SdxlFamily"),
    "sd3": ("library.families.sd3", "Sd3Family"),
    "flux": ("library.families.flux", "FluxFamily"),
}
# name -> (module, its class); `<module>_args` holds `check_options(opts, traits)`, without torch
METHODS = {
    "network": ("library.methods.network", "NetworkMethod"),
    "finetune": ("library.methods.finetune", "FinetuneMethod"),
    "dreambooth": ("library.methods.finetune", "FinetuneMethod"),
}
TITLES = {
    "network": "Trains a LoRA-type network.",
    "finetune": "Fine-tunes a whole model on pictures that a metadata file lists.",
    "dreambooth": "Trains a whole model on folders of pictures of a concept (DreamBooth).",
}
TRACKERS = {"network": "network_train", "finetune": "finetuning", "dreambooth": "dreambooth"}  # where logs go


def build_parser(family: str, method: str) -> argparse.ArgumentParser:
    """The argument parser of a script, as GUIs and documentation tools want it."""
    from library.options import parsing, scripts

    return parsing.build_parser(scripts.groups_for(family, method), prog=_script_name(), description=TITLES[method])


def run(family: str, method: str, argv: Sequence[str] | None = None) -> None:
    """Runs one script and exits: 0 done, 2 the user has something to mend, 130 interrupted."""
    logs.quiet_third_parties()
    try:
        _train(family, method, sys.argv[1:] if argv is None else argv)
    except UserError as error:
        logs.end_progress()
        print(error.render(), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        logs.end_progress()
        print("interrupted; what was saved before is whole", file=sys.stderr)
        raise SystemExit(130) from None


def load_family(family: str, argv: Sequence[str]) -> tuple[Family, Models]:
    """A family's adapter and its loaded model, for tools and tests that look at a model without training it.

    `argv` holds the options of a training script that concern the model. Raises: UserError.
    """
    from library.options import parsing, scripts

    logs.quiet_third_parties()
    opts = parsing.parse_options(scripts.groups_for(family, "network"), argv)
    adapter = _make(FAMILIES[family], opts, "adapter")
    return adapter, adapter.load()


def _script_name() -> str:
    return os.path.basename(sys.argv[0] or "train")


def _train(family_name: str, method_name: str, argv: Sequence[str]) -> None:
    opts, specs, traits = _check(family_name, method_name, argv)
    if opts.saving.resume_from_huggingface:
        from library.training.hub import fetch_state

        opts = fetch_state(opts)
    sharding = sharding_of(opts)
    accelerator = _make_accelerator(opts, sharding)
    shards = _make_shards(opts, sharding, accelerator)
    _rehearse(opts, accelerator, shards)
    opts = opts.replaced(seed=_agreed_seed(opts, accelerator))

    from library.runtime.processes import Processes
    from library.training import lr_schedules

    processes = Processes(accelerator.process_index, accelerator.num_processes)
    data = read_data(specs, opts, traits, processes)
    run_plan = _plan_run(opts, data, accelerator)
    if opts.data.debug_dataset:
        _show_data(data, opts, accelerator)
        processes.leave()
        return
    lr_schedules.rehearse(opts.optimizer, run_plan.total_steps)  # now that it is known how long the run is

    from library.assembly import assemble
    from library.training.loop import train

    prepared = assemble(
        opts,
        _make(FAMILIES[family_name], opts, "adapter"),
        _make(METHODS[method_name], opts),
        data,
        run_plan,
        accelerator,
        shards,
        missing_encoders=_missing_encoders(family_name, opts),
        tracker=TRACKERS[method_name],
    )
    with prepared.tracker, prepared.hub:
        train(prepared)
    processes.leave()


def _check(family_name: str, method_name: str, argv: Sequence[str]) -> tuple[Options, list[Any], FamilyTraits]:
    """Everything that can be wrong and is cheap to know, all at once, before torch is imported."""
    from library.data.blueprint import build_specs
    from library.options import parsing, scripts, validation
    from library.options.logging import absolute_paths

    groups = scripts.groups_for(family_name, method_name)
    opts = parsing.parse_options(groups, argv, prog=_script_name(), description=TITLES[method_name])
    main = int(os.environ.get("RANK", "0")) == 0  # the other processes report errors only
    level = opts.logging.console_log_level if main else "ERROR"
    logs.setup_logging(level, opts.logging.console_log_file, opts.logging.console_log_simple)
    package, _ = FAMILIES[family_name]
    traits = importlib.import_module(f"{package}.options").TRAITS
    problems = list(validation.problems(opts, traits))
    specs: list[Any] = []
    if not problems:  # the options make sense: now the files that they name
        problems += importlib.import_module(f"{METHODS[method_name][0]}_args").check_options(opts, traits)
        problems += importlib.import_module(f"{package}.variants").check_paths(opts)
        for look in (lambda: specs.extend(build_specs(opts, traits)), lambda: _seed_of_state(opts)):
            try:
                look()
            except UserError as error:
                problems += error.problems
    if problems:
        raise UserError(*problems)
    for line in validation.warnings(opts, traits):
        LOGGER.warning("%s", line)
    for line in absolute_paths(opts):
        LOGGER.info("%s", line)
    return opts, specs, traits


def read_data(specs: list[Any], opts: Options, traits: FamilyTraits, processes: Processes) -> Any:
    """The data of a run, whose seed is known by now; what was found is told in the log.

    Raises: UserError: it cannot be used.
    """
    main = processes.rank == 0
    if not main:
        processes.wait()  # and find in the index what the first process has seen
    data = _data_builder(opts.data.dataset_class)(specs, opts, traits, opts.training.seed, main=main)
    if main:
        processes.wait()
    for line in data.report():
        LOGGER.info("%s", line)
    return data


def _plan_run(opts: Options, data: Any, accelerator: Accelerator) -> RunPlan:
    from library.training.plan import make_plan

    run_plan = make_plan(
        data.batches_per_epoch,
        accelerator.num_processes,
        opts.training.gradient_accumulation_steps,
        steps=opts.training.max_train_steps,
        epochs=opts.training.max_train_epochs,
        by_default="max_train_steps" not in opts.explicit,
    )
    data.set_total_steps(run_plan.total_steps)
    return run_plan


def _missing_encoders(family_name: str, opts: Options) -> list[str]:
    """A line for each text encoder that is not given, with families that can do without."""
    variants = importlib.import_module(f"{FAMILIES[family_name][0]}.variants")
    return variants.missing_encoders(opts) if hasattr(variants, "missing_encoders") else []


def _make(place: tuple[str, str], opts: Options, module: str | None = None) -> Family | Method:
    package, name = place
    return getattr(importlib.import_module(f"{package}.{module}" if module else package), name)(opts)


def join_processes(precision: str, minutes: int | None) -> Accelerator:
    """Joins the processes that were launched together, and knows this one's device.

    Args:
        precision: as --mixed_precision.
        minutes: as --ddp_timeout.
    Raises: UserError: fp16 without a GPU.
    """
    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed_precision fp16 needs a GPU, and torch finds none; use bf16 or no")
    for engine in (USE_FSDP, USE_DEEPSPEED):  # what they stand for is known; accelerate's own part in it is not wanted
        os.environ.pop(engine, None)
    patience = [InitProcessGroupKwargs(timeout=timedelta(minutes=minutes))] if minutes else []
    # Told so, accelerate also joins several processes on CPUs; left to itself it would take each for the only one.
    return Accelerator(mixed_precision=precision, cpu=not torch.accelerator.is_available(), kwargs_handlers=patience)


def _make_accelerator(opts: Options, sharding: Sharding | None) -> Accelerator:
    import torch

    chosen = opts.memory.mixed_precision
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", chosen)
    if launched not in (chosen, "no"):
        LOGGER.warning(
            "accelerate was launched with mixed precision %s; --mixed_precision %s is used", launched, chosen
        )
    minutes = opts.distributed.ddp_timeout
    if sharding is not None and sharding.offload and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=timedelta(minutes=minutes or 10))
    made = join_processes(chosen, minutes)
    fused = opts.optimizer.fused_backward_pass or (getattr(opts, "fused", None) is not None and opts.fused.in_use)
    if fused and made.num_processes > 1:
        raise UserError("steps inside the backward pass cannot be used with several processes; leave them out")
    if opts.memory.full_fp16:
        from library.training.precision import HalfGradScaler

        made.scaler = HalfGradScaler()
    return made


def _make_shards(opts: Options, sharding: Sharding | None, accelerator: Accelerator) -> Shards | None:
    """What spreads the trained model over the processes; None: every process keeps all of it."""
    if sharding is None or opts.data.debug_dataset:
        return None
    if accelerator.num_processes == 1:
        LOGGER.warning("%s: no effect with one process, there is nothing to spread over", sharding.asked_by)
        return None
    from library.training.sharding import Shards

    return Shards(sharding, accelerator.device, accelerator.num_processes, first=accelerator.is_main_process)


def _rehearse(opts: Options, accelerator: Accelerator, shards: Shards | None) -> None:
    """What only the classes themselves can say about their arguments, while nothing large is loaded yet."""
    from library.training import lr_schedules, optimizers

    if not opts.data.debug_dataset:
        optimizers.rehearse(opts.optimizer, accelerator.device, None if shards is None else shards.mesh)
        lr_schedules.rehearse(opts.optimizer)


def _agreed_seed(opts: Options, accelerator: Accelerator) -> int:
    """--seed, or one that the first process draws for all of them."""
    saved = _seed_of_state(opts)
    if opts.training.seed is not None:
        if saved not in (None, opts.training.seed):
            LOGGER.warning(
                "--seed %d is not that of the resumed run, %d: the data comes in another order",
                opts.training.seed,
                saved,
            )
        return opts.training.seed
    if saved is not None:
        return saved
    from accelerate.utils import broadcast_object_list

    (seed,) = broadcast_object_list([random.SystemRandom().randrange(2**32)])
    LOGGER.info("--seed was not given; this run's is %d", seed)
    return seed


def _seed_of_state(opts: Options) -> int | None:
    from library.training.state import read_progress

    if not opts.saving.resume or opts.saving.resume_from_huggingface:  # or not fetched yet
        return None
    progress = read_progress(Path(opts.saving.resume))
    return progress.seed if progress is not None else None


def _data_builder(name: str | None) -> Any:
    """`build_training_data`, or what --dataset_class names in its place.

    Raises: UserError: there is no such thing.
    """
    if name is None:
        from library.data.dataset import build_training_data

        return build_training_data
    module, _, attribute = name.rpartition(".")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--dataset_class: {name} cannot be imported ({error})") from None
    finally:
        sys.path.remove(os.getcwd())


def _show_data(data: Any, opts: Options, accelerator: Accelerator) -> None:
    """--debug_dataset."""
    if not accelerator.is_main_process:
        return
    from library.data.contact_sheet import show, write_sheets

    folder = Path(opts.saving.output_dir or ".") / "debug_dataset"
    sheets = write_sheets(data, folder)
    count = f"{len(sheets)} contact sheet{'' if len(sheets) == 1 else 's'}"
    LOGGER.info("%s in %s; nothing was trained (--debug_dataset)", count, folder)
    show(sheets)
