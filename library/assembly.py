"""From options, data and processes to a run that is ready for its first step.

Needs torch from the start: what can be checked without it, `library.cli` has checked before.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library import encoding
from library.checkpoints import metadata
from library.errors import UserError
from library.inference.preview import Preview
from library.memory.attention import set_attention
from library.memory.compiling import compile_blocks
from library.options.optimizer import sets_own_rate
from library.runtime.logs import LOGGER
from library.training import placement, plan, state, state_notes
from library.training.ema import Average
from library.training.hub import Hub
from library.training.loop import Run, RunFacts
from library.training.lr_schedules import make_schedule, wants_loss
from library.training.optimizers import describe_optimizer, make_optimizer
from library.training.resuming import making_of
from library.training.saving import check_space, make_save_plan
from library.training.stepping import Stepper, equal_parts, parts_by_block
from library.training.tracking import make_tracker
from library.training.validation import Validation
from library.types import Size

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.families.base import Family
    from library.methods.base import Method
    from library.options.base import Options
    from library.training.plan import RunPlan, Start
    from library.training.sharding import Shards
    from library.types import Models

SAVE_DTYPES = {None: None, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def assemble(
    opts: Options,
    family: Family,
    method: Method,
    data: Any,
    run_plan: RunPlan,
    accelerator: Accelerator,
    shards: Shards | None,
    *,
    missing_encoders: Sequence[str],
    tracker: str,
) -> Run:
    """Loads the model and puts the run together, up to the last thing before the first step.

    Args:
        shards: what spreads the trained model over the processes; None: every process keeps all of it.
        missing_encoders: a line for each text encoder that the options do not give.
        tracker: name of the folder or project that logs go to.
    Raises: UserError: something that only the loaded model, or the whole plan of the run, can tell.
    """
    start = _choose_start(opts, run_plan)
    preview = Preview.from_options(opts, family)
    encoding.require_texts(opts, family, missing_encoders, data, samples=bool(preview.prompts))
    started = time.time()
    with placement.loading(opts, accelerator.device):
        models = family.load()
    LOGGER.info("loaded %s in %.1f s", opts.model.pretrained_model_name_or_path, time.time() - started)
    _check_sizes(models, data, preview)
    placement.swapped_blocks(family, models, opts, accelerator.device)  # too many are told before anything is encoded
    _encode(opts, family, method, models, preview, data, accelerator, shards)
    placement.place_denoiser(models, opts, accelerator.device, spread=shards is not None)
    attention = set_attention(models.denoiser, opts.memory)
    if opts.memory.compiles:
        compile_blocks(family.blocks(models), opts.memory.dynamo_backend, accelerator.device)
    if shards is not None:
        placement.spread_denoiser(family, models, opts, shards)
    swap = placement.swap_blocks(family, models, opts, accelerator.device)
    optimizer = make_optimizer(method.parameter_groups(), opts.optimizer)
    if swap is not None:
        swap.serve(optimizer)
    schedule = make_schedule(optimizer, opts.optimizer, run_plan.total_steps)
    if not opts.saving.resume and not wants_loss(schedule):  # a state brings the schedule where it was
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch misses the optimizer's steps, which another run has done
            for _ in range(start.step):
                schedule.step()
    for line in plan.describe(run_plan, data.num_train_images, data.num_reg_images):
        LOGGER.info("%s", line)
    LOGGER.info(
        "device %s, mixed precision %s, attention %s", accelerator.device, opts.memory.mixed_precision, attention
    )
    making = making_of(optimizer, opts, run_plan, data)
    prepared = accelerator.prepare_optimizer(optimizer)
    saves = make_save_plan(opts.saving, method.file_suffix(), run_plan.epochs)
    check_space(saves.final_path().parent, state.size_of(method.trainable().state_dict()), "what is to be saved")
    return Run(
        opts=opts,
        seed=opts.training.seed,
        family=family,
        method=method,
        models=models,
        denoise=method.denoise(family, models),
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
        tracker=make_tracker(opts, tracker, enabled=accelerator.is_main_process),
        hub=Hub(opts.saving, enabled=accelerator.is_main_process),
        make_metadata=_metadata_maker(opts, family, method, models, data, run_plan, optimizer),
        save_dtype=SAVE_DTYPES[opts.saving.save_precision],
        start=start,
        making=making,
        resume=Path(opts.saving.resume) if opts.saving.resume else None,
        average=_average(opts, optimizer),
        shards=shards,
    )


def _check_sizes(models: Models, data: Any, preview: Preview) -> None:
    """Raises: UserError: images to train on, or to make, are larger than the model can take."""
    most = models.longest_side
    if most is None:
        return
    sizes = {Size(*record.bucket): "a bucket of" for record in data.all_records}
    sizes |= {Size(prompt.width, prompt.height): "--sample_prompts: an image of" for prompt in preview.prompts}
    large = [f"{what} {size.width}x{size.height}" for size, what in sizes.items() if max(size) > most]
    if large:
        raise UserError(*(f"{place} is too large: this model takes {most} pixels on a side" for place in large))


def _encode(
    opts: Options,
    family: Family,
    method: Method,
    models: Models,
    preview: Preview,
    data: Any,
    accelerator: Accelerator,
    shards: Shards | None,
) -> None:
    """Attaches what is trained, and does all for which the text encoders and the VAE are needed once.

    One part comes to the device after the other, so that a large model's need not be there together.
    """
    cache_latents = encoding.latent_cache(opts, family, models, data)
    method.attach(family, models)
    cache_text = encoding.text_cache(opts, family, method, models, data)  # knows what was merged into the encoders
    grad_text = bool(method.trained_text_encoders())
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


def _stepped_together(opts: Options, family: Family, models: Models, optimizer: Any) -> Any:
    """The weights by the parts that are stepped inside the backward pass; None: they are not, or each by itself."""
    fused = getattr(opts, "fused", None)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    if fused is None or not fused.in_use:
        return None
    if fused.blockwise_fused_optimizers:
        return parts_by_block(weights, family.blocks(models))
    return equal_parts(weights, fused.fused_optimizer_groups)


def _average(opts: Options, optimizer: Any) -> Average | None:
    """--ema."""
    if not opts.training.ema:
        return None
    return Average([p for group in optimizer.param_groups for p in group["params"]], opts.training.ema_decay)


def _choose_start(opts: Options, run_plan: RunPlan) -> Start:
    """Where the run begins; a state at the planned end has only its end to do. Raises: UserError: no step is left."""
    progress = state_notes.read_progress(Path(opts.saving.resume)) if opts.saving.resume else None
    step, ended = (progress.step, progress.epoch_ended) if progress is not None else (None, True)
    start = plan.choose_start(run_plan, opts.training, step, epoch_ended=ended)
    if start.step >= run_plan.total_steps:
        over = f"{start.step} steps are done already, and the run has {run_plan.total_steps}"
        more = "raise --max_train_steps or --max_train_epochs, which count from the very beginning"
        if progress is None or start.step != progress.step:
            raise UserError(f"{over}; {more}")
        LOGGER.warning("%s: nothing is trained, and the final files are written; to train on, %s", over, more)
    if opts.saving.resume and progress is None and not start.step:
        LOGGER.warning("%s does not tell its step, so it counts from 0; --initial_step tells it", opts.saving.resume)
    return start


def _metadata_maker(
    opts: Options, family: Family, method: Method, models: Models, data: Any, run_plan: RunPlan, optimizer: Any
) -> Callable[[RunFacts], dict[str, str]]:
    """What makes a file's metadata at any point of the run."""
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
