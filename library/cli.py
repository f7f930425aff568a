"""`run(family, method)`: what every training script does. The only module that knows both sides.

The order is: parse, check everything that can be checked without torch, read the data set, load the model, train.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.options.sharding import USE_DEEPSPEED, USE_FSDP, sharding_of
from library.runtime import logs
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from library.families.base import Family, FamilyTraits
    from library.methods.base import Method
    from library.options.base import Options
    from library.options.sharding import Sharding
    from library.runtime.processes import Processes
    from library.training.loop import Run, RunFacts
    from library.training.plan import RunPlan, Start
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

    from library.training.loop import train

    prepared = _assemble(opts, family_name, method_name, data, run_plan, accelerator, shards)
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


def _assemble(
    opts: Options,
    family_name: str,
    method_name: str,
    data: Any,
    run_plan: RunPlan,
    accelerator: Accelerator,
    shards: Shards | None,
) -> Run:
    """Loads the model and puts the run together, up to the last thing before the first step."""
    from library import encoding
    from library.inference.preview import Preview
    from library.memory.attention import set_attention
    from library.memory.compiling import compile_blocks
    from library.training import placement, plan
    from library.training.hub import Hub
    from library.training.loop import Run
    from library.training.lr_schedules import make_schedule
    from library.training.optimizers import make_optimizer
    from library.training.saving import make_save_plan
    from library.training.stepping import Stepper
    from library.training.tracking import make_tracker
    from library.training.validation import Validation

    family, method = _make(FAMILIES[family_name], opts, "adapter"), _make(METHODS[method_name], opts)
    preview = Preview.from_options(opts, family)
    encoding.require_texts(opts, family, _missing_encoders(family_name, opts), data, samples=bool(preview.prompts))
    started = time.time()
    with placement.loading(opts, accelerator.device):
        models = family.load()
    LOGGER.info("loaded %s in %.1f s", opts.model.pretrained_model_name_or_path, time.time() - started)
    cache_latents = encoding.latent_cache(opts, family, models, data)
    method.attach(family, models)
    cache_text = encoding.text_cache(opts, family, method, models, data)  # knows what was merged into the encoders
    grad_text = method.trains_text_encoder()
    # One part after the other, so that a large model's need not be on the device together.
    placement.place_text_encoders(models, opts, accelerator.device, grad_text=grad_text, shards=shards)
    added = method.added()
    if added is not None:
        placement.place_trained(added.eval(), opts, accelerator.device)
    if cache_text is not None:
        cache_text(accelerator)
        preview.remember_texts(models, accelerator.device)
        placement.release_text_encoders(models, keep=method.working_text_encoders())
    placement.place_vae(models, opts, accelerator.device)
    if cache_latents is not None:
        cache_latents(encoding.latent_encoder(opts, family, models, accelerator))
        if accelerator.is_main_process:
            data.index.save()
        placement.release(models.vae, opts)
    placement.place_denoiser(models, opts, accelerator.device, spread=shards is not None)
    attention = set_attention(models.denoiser, opts.memory)
    if opts.memory.torch_compile:
        compile_blocks(family.blocks(models), opts.memory.dynamo_backend, accelerator.device)
    if shards is not None:
        placement.spread_denoiser(family, models, opts, shards)
    swap = placement.swap_blocks(family, models, opts, accelerator.device)
    optimizer = make_optimizer(method.parameter_groups(), opts.optimizer)
    if swap is not None:
        swap.serve(optimizer)
    schedule = make_schedule(optimizer, opts.optimizer, run_plan.total_steps)
    start = _choose_start(opts, run_plan, schedule)
    for line in plan.describe(run_plan, data.num_train_images, data.num_reg_images):
        LOGGER.info("%s", line)
    LOGGER.info(
        "device %s, mixed precision %s, attention %s", accelerator.device, opts.memory.mixed_precision, attention
    )
    prepared = accelerator.prepare_optimizer(optimizer)
    saves = make_save_plan(opts.saving, method.file_suffix(), run_plan.epochs)
    return Run(
        opts=opts,
        seed=opts.training.seed,
        family=family,
        method=method,
        models=models,
        objective=family.objective(),
        data=data,
        plan=run_plan,
        accelerator=accelerator,
        optimizer=prepared,
        stepper=Stepper(opts, optimizer, prepared, _stepped_together(opts, family, models, optimizer)),
        schedule=schedule,
        saves=saves,
        preview=preview,
        validation=Validation(opts, data.held_out, opts.training.seed),
        tracker=make_tracker(opts, TRACKERS[method_name], enabled=accelerator.is_main_process),
        hub=Hub(opts.saving, enabled=accelerator.is_main_process),
        make_metadata=_metadata_maker(opts, family, method, models, data, run_plan, optimizer),
        save_dtype=_save_dtype(opts),
        start=start,
        resume=Path(opts.saving.resume) if opts.saving.resume else None,
        average=_average(opts, optimizer),
        shards=shards,
    )


def _missing_encoders(family_name: str, opts: Options) -> list[str]:
    """A line for each text encoder that is not given, with families that can do without."""
    variants = importlib.import_module(f"{FAMILIES[family_name][0]}.variants")
    return variants.missing_encoders(opts) if hasattr(variants, "missing_encoders") else []


def _stepped_together(opts: Options, family: Family, models: Models, optimizer: Any) -> Any:
    """The weights by the parts that are stepped inside the backward pass; None: they are not, or each by itself."""
    from library.training.stepping import equal_parts, parts_by_block

    fused = getattr(opts, "fused", None)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    if fused is None or not fused.in_use:
        return None
    if fused.blockwise_fused_optimizers:
        return parts_by_block(weights, family.blocks(models))
    return equal_parts(weights, fused.fused_optimizer_groups)


def _average(opts: Options, optimizer: Any) -> Any:
    from library.training.ema import Average

    if not opts.training.ema:
        return None
    return Average([p for group in optimizer.param_groups for p in group["params"]], opts.training.ema_decay)


def _choose_start(opts: Options, run_plan: RunPlan, schedule: Any) -> Start:
    """Where the run begins; brings the schedule there where no state does that.

    Raises: UserError: the run is over already.
    """
    from library.training import plan, state
    from library.training.lr_schedules import wants_loss

    progress = state.read_progress(Path(opts.saving.resume)) if opts.saving.resume else None
    step, ended = (progress.step, progress.epoch_ended) if progress is not None else (None, True)
    start = plan.choose_start(run_plan, opts.training, step, epoch_ended=ended)
    if start.step >= run_plan.total_steps:
        raise UserError(
            f"{start.step} steps are done already, and the run has {run_plan.total_steps}; "
            "raise --max_train_steps or --max_train_epochs, which count from the very beginning"
        )
    if opts.saving.resume and progress is None and not start.step:
        LOGGER.warning("%s does not tell its step, so it counts from 0; --initial_step tells it", opts.saving.resume)
    if not opts.saving.resume and start.step:
        for _ in range(0 if wants_loss(schedule) else start.step):
            schedule.step()
    return start


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


def _save_dtype(opts: Options) -> torch.dtype | None:
    import torch

    names = {None: None, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return names[opts.saving.save_precision]


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


def _metadata_maker(
    opts: Options, family: Family, method: Method, models: Any, data: Any, run_plan: Any, optimizer: Any
) -> Any:
    from library.checkpoints import metadata
    from library.options.optimizer import sets_own_rate
    from library.training.optimizers import describe_optimizer

    own_rate = {"ss_lr_scheduler": f"adafactor:{opts.optimizer.learning_rate}"} if sets_own_rate(opts.optimizer) else {}
    fixed = {
        **own_rate,
        "ss_session_id": random.SystemRandom().randrange(2**32),
        "ss_optimizer": describe_optimizer(optimizer, opts.optimizer),
        "ss_max_train_steps": run_plan.total_steps,
        "ss_num_epochs": run_plan.epochs,
        "ss_num_batches_per_epoch": run_plan.batches_per_epoch,
        "ss_num_train_images": data.num_train_images,
        "ss_num_reg_images": data.num_reg_images,
    }

    def make(facts: RunFacts) -> dict[str, str]:
        run_facts = {
            **fixed,
            "ss_training_started_at": facts.started,
            "ss_training_finished_at": time.time(),
            "ss_steps": facts.step,
            "ss_epoch": facts.epoch,
        }
        return metadata.training_metadata(
            opts, family.model_metadata(models), method.metadata(), data.metadata(run_plan.processes), run_facts
        )

    return make
