"""A training run from checked options to its first step: the one file that shows the order.

    join -> open_data -> load -> encode -> place -> build -> Run

Needs torch from the start: what can be checked without it, `library.checking` has checked before.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library import encoding
from library.checkpoints import metadata
from library.checkpoints.sizes import with_size
from library.checkpoints.writing import bytes_of
from library.data.load import read_data
from library.errors import UserError
from library.inference.preview import Preview
from library.memory.attention import set_attention
from library.memory.compiling import Compiling, compile_blocks, graphs_per_shape, set_cuda_modes
from library.options.optimizer import sets_own_rate
from library.options.sharding import sharding_of
from library.runtime.limits import during
from library.runtime.logs import LOGGER
from library.runtime.processes import Processes
from library.runtime.signals import exit_status
from library.screen import counted
from library.training import distributed, lr_schedules, optimizers, placement, plan, resuming, state_notes
from library.training.ema import EMA
from library.training.evicting import evict_modulation, require_unread
from library.training.hub import Hub
from library.training.loop import train
from library.training.notifying import Notifier
from library.training.opening import describe_run
from library.training.results_page import build as results_page
from library.training.results_page.build import Origin
from library.training.results_page.facts import Example
from library.training.results_page.page import Course
from library.training.run import Run
from library.training.saving import SavePlan, check_space, make_save_plan
from library.training.stepping import OptimizerStepper, listed_blocks, parts_inside_backward
from library.training.tracking import Sink, make_tracker
from library.training.validation import Validation
from library.types import Size

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.data.types import DatasetSpec, RunData
    from library.entry_points import EntryPoint
    from library.families.base import Family
    from library.families.spec import FamilySpec
    from library.memory.block_swap import BlockSwap
    from library.memory.modulation import EvictedModulation
    from library.methods.base import Method
    from library.methods.spec import MethodSpec
    from library.options.base import Options
    from library.training.plan import Progress, RunPlan
    from library.training.sharding import Shards
    from library.types import FamilyTraits, Models

SAVE_DTYPES = {None: None, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def run_session(opts: Options, family: FamilySpec, method: MethodSpec, specs: list[DatasetSpec]) -> int:
    """Trains what checked options ask for. `specs` are the datasets, as `checking.check` gave them.

    Returns: the exit status: 0, or that of a run which a signal has ended.
    Raises: UserError: what only torch, the data, the loaded model or the whole plan of the run can show.
    """
    opts, accelerator, shards = join(opts)
    processes = Processes(accelerator.process_index, accelerator.num_processes)
    progress: Progress | None = None
    with Notifier(opts, enabled=accelerator.is_main_process and not opts.data.debug_dataset) as notifier:
        data, run_plan = open_data(opts, specs, family.traits, processes, method.data)
        if opts.data.debug_dataset:
            show_data(opts, data, accelerator)
        else:
            session = Session(opts, family.adapter(opts), method.method(opts), data, run_plan, accelerator, shards)
            session.check(family.missing_encoders(opts), takes_control=method.image_role == "control")
            with during("loading the model"):
                session.load()
            with during("encoding images and captions before training"):
                session.encode()
            with during("placing the model"):
                session.place()
                run = session.build(method, family.scripts, notifier)
            with run.tracker, run.hub:
                progress = train(run)
    processes.close()
    return exit_status(progress.interrupted) if progress is not None and progress.interrupted else 0


# ---- before the model


def join(opts: Options) -> tuple[Options, Accelerator, Shards | None]:
    """Joins the processes, tries optimizer and schedule while nothing large is loaded, and agrees on the seed.

    Returns the options with that seed, and what shards the trained model; None: every process keeps all of it.
    """
    sharding = sharding_of(opts)
    accelerator = distributed.join_for_training(opts, sharding)
    shards = None
    if not opts.data.debug_dataset:
        if sharding is not None and accelerator.num_processes == 1:
            LOGGER.warning("%s: has no effect with one process", sharding.asked_by)
        elif sharding is not None:
            from library.training.sharding import Shards

            shards = Shards(sharding, accelerator.device, accelerator.num_processes, first=accelerator.is_main_process)
        if opts.saving.resume:
            folder = Path(opts.saving.resume)
            before, chosen = state_notes.read_settings(folder), optimizers.optimizer_class(opts.optimizer)
            resuming.require_optimizer(folder, before, chosen)
        optimizers.dry_run(opts.optimizer, accelerator.device, None if shards is None else shards.mesh)
        lr_schedules.dry_run(opts.optimizer)
    return opts.replaced(seed=distributed.agreed_seed(opts, accelerator)), accelerator, shards


def open_data(
    opts: Options,
    specs: list[DatasetSpec],
    traits: FamilyTraits,
    processes: Processes,
    own_data: EntryPoint[[Options, FamilyTraits, int], RunData] | None = None,
    *,
    planned: int | None = None,
) -> tuple[RunData, RunPlan]:
    """Lists the images and sorts them into batches, from which the length of the run follows.

    Args:
        own_data: makes the data of a method that trains without images.
        planned: how many processes shall train, where these are others than those that are here.
    """
    if own_data is None:
        data = read_data(specs, opts, traits, processes)
    else:
        data = own_data(opts, traits, planned or processes.world)
        for line in data.report():
            LOGGER.info("%s", line)
    run_plan = plan.make_plan(
        data.batches_per_epoch,
        planned or processes.world,
        opts.training.gradient_accumulation_steps,
        steps=opts.training.max_train_steps,
        epochs=opts.training.max_train_epochs,
        by_default="max_train_steps" not in opts.explicit,
    )
    data.set_total_steps(run_plan.total_steps)
    if not opts.data.debug_dataset:
        lr_schedules.dry_run(opts.optimizer, run_plan.total_steps)  # now that it is known how long the run is
    return data, run_plan


def show_data(opts: Options, data: RunData, accelerator: Accelerator) -> None:
    """Writes and shows the contact sheets of --debug_dataset."""
    if not accelerator.is_main_process:
        return
    from library.data.report.contact_sheet import show, write_sheets

    folder = Path(opts.saving.output_dir or ".") / "debug_dataset"
    sheets = write_sheets(data, folder)
    count = f"{len(sheets)} contact sheet{'' if len(sheets) == 1 else 's'}"
    LOGGER.info("%s in %s; nothing was trained (--debug_dataset)", count, folder)
    show(sheets)


# ---- from the model to the run


@dataclass
class Session:
    """Builds a run. Call `check`, `load`, `encode`, `place` and `build` in this order.

    `shards` shards the trained model over the processes; None: every process keeps all of it.
    """

    opts: Options
    family: Family
    method: Method
    data: RunData
    plan: RunPlan
    accelerator: Accelerator
    shards: Shards | None = None
    caches: encoding.Caches = field(default_factory=encoding.Caches)
    start: Progress = field(init=False)
    preview: Preview = field(init=False)
    models: Models = field(init=False)
    swap: BlockSwap | None = field(init=False)
    modulation: EvictedModulation | None = field(init=False)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def check(self, missing_encoders: Sequence[str] = (), *, takes_control: bool = False) -> None:
        """Finds where the run begins and what it samples, and whether it can do so with the given files.

        A state at the planned end has only its end to do.

        Args:
            missing_encoders: a line for each text encoder that the options do not give.
            takes_control: whether what is trained reads control images.
        Raises: UserError: no step is left, or a text encoder is needed and not given.
        """
        resume, steps = self.opts.saving.resume, self.plan.total_steps
        saved = state_notes.read_progress(Path(resume)) if resume else None
        self.start = plan.choose_start(self.plan, self.opts.training, saved)
        if self.start.step >= steps:
            over = f"done already: {counted(self.start.step, 'step')} of {steps}"
            more = "raise --max_train_steps or --max_train_epochs, which count from the very beginning"
            if saved is None or self.start.step != saved.step:
                raise UserError(f"{over}; {more}")
            LOGGER.warning("%s; nothing is trained, and the final files are written; to train on, %s", over, more)
        if resume and saved is None and not self.start.step:
            LOGGER.warning("%s has no step count, so it starts at 0; set --initial_step", resume)
        self.preview = Preview.from_options(self.opts, self.family, takes_control=takes_control)
        samples = bool(self.preview.prompts)
        encoding.require_texts(self.opts, self.family, missing_encoders, self.data, samples=samples)

    def load(self) -> None:
        """Reads the model, and checks what the options ask of it.

        Raises: UserError: the model cannot be read, or images to train on, or to make, are larger than it can take.
        """
        set_cuda_modes(self.opts.memory, self.device)
        started = time.time()
        LOGGER.info("loading %s", with_size(self.opts.model.pretrained_model_name_or_path))
        with placement.loading(self.opts, self.device):
            self.models = self.family.loader.load()
        LOGGER.info("loaded %s in %.1f s", self.opts.model.pretrained_model_name_or_path, time.time() - started)
        most = self.models.longest_side
        sizes = self.data.sizes()
        sizes |= {Size(prompt.width, prompt.height): "--sample_prompts: an image of" for prompt in self.preview.prompts}
        large = [f"{what} {size.width}x{size.height}" for size, what in sizes.items() if most and max(size) > most]
        if large:
            raise UserError(*(f"{place} is too large: this model takes {most} pixels on a side" for place in large))
        placement.swapped_blocks(self.family, self.models, self.opts, self.device)  # too many are refused here

    def encode(self) -> None:
        """Attaches what is trained, and does all for which the text encoders and the VAE are needed once.

        One part comes to the device after the other, so that a large model's need not be there together.

        Raises: UserError: the network reads weights that are not to be on the device.
        """
        opts, family, method, models, data = self.opts, self.family, self.method, self.models, self.data
        cache_latents = self.caches.latents(opts, family, models, data)
        method.attach(family, models)
        require_unread(family, models, opts, method.added())
        cache_text = self.caches.text(opts, family, method, models, data)  # knows what was merged into the encoders
        grad_text = bool(method.trained_text_encoders())
        placement.place_text_encoders(models, opts, self.device, grad_text=grad_text, shards=self.shards)
        added = method.added()
        if added is not None:
            placement.place_trained(added.eval(), opts, self.device, self.shards)
        if cache_text is not None:
            cache_text(self.accelerator)
            self.preview.encode_prompts(models, self.device)
            placement.release_text_encoders(models, keep=method.live_text_encoders())
        if opts.data.of_images or method.needs_vae():
            placement.place_vae(models, opts, self.device)
        if cache_latents is not None:
            cache_latents(encoding.latent_encoder(opts, family, models, self.accelerator))
            if self.accelerator.is_main_process:
                data.index.save()
            if not method.needs_vae() and not models.inpaints:
                placement.offload(models.vae, opts)

    def place(self) -> None:
        """Moves the denoiser to the device; compiles, shards or swaps it as the options say.

        Raises: UserError: a text encoder is trained whose texts have to stay as they are.
        """
        opts, models = self.opts, self.models
        self.modulation = evict_modulation(self.family, models, opts, self.device)
        placement.place_denoiser(models, opts, self.device, sharded=self.shards is not None)
        if self.modulation is not None:
            self.modulation.pin()
        placement.keep_less(self.family, models)
        attention = set_attention(models.denoiser, opts.memory)
        if opts.memory.compiles:
            blocks, how = self.family.denoiser.blocks(models), Compiling.of(opts.memory)
            compile_blocks(blocks, opts.memory.backend, self.device, how)
            self._announce_graphs()
        if self.shards is not None:
            placement.shard_denoiser(self.family, models, opts, self.shards)
        self.swap = placement.swap_blocks(self.family, models, opts, self.device)
        LOGGER.info("device %s, mixed precision %s, attention %s", self.device, opts.memory.mixed_precision, attention)

    def _announce_graphs(self) -> None:
        """Says how often steps will wait for the compiler: in the first ones, and whenever a new shape comes up."""
        if self.opts.memory.compile_dynamic in ("true", "auto"):
            LOGGER.info("--compile_dynamic: graphs are compiled when they are first needed, each for several shapes")
            return
        blocks, shapes = self.family.denoiser.blocks(self.models), self.data.batch_shapes()
        if self.family.traits.tokens_in_a_row:
            distinct = {(count, size.width * size.height) for count, size in shapes}
        else:
            distinct = shapes
        trained = placement.has_trained_weights(self.models.denoiser)
        each = graphs_per_shape(blocks, input_has_gradient=trained) + self.family.traits.extra_graphs
        LOGGER.info(
            "--torch_compile: %d graphs will be compiled in training, each when it is first needed: %d for each of %d "
            "shapes of batches",
            *(each * len(distinct), each, len(distinct)),
        )

    def build(self, spec: MethodSpec, scripts: Mapping[str, str], notifier: Notifier) -> Run:
        """The run, with optimizer and schedule over what is trained; of the method's spec, its logs and its steps.

        Args: scripts: see `FamilySpec.scripts`.
        """
        opts, family, method, models, data = self.opts, self.family, self.method, self.models, self.data
        optimizer = optimizers.make_optimizer(method.parameter_groups(), opts.optimizer)
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        if self.swap is not None:
            self.swap.manage_optimizer(optimizer)
        schedule = lr_schedules.make_schedule(optimizer, opts.optimizer, self.plan.total_steps)
        if not opts.saving.resume:  # a state brings the schedule where it was
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch misses the optimizer's steps, which another run has done
                for _ in range(self.start.step):
                    schedule.step()
        for line in plan.describe(self.plan, data.num_train_images, data.num_reg_images):
            LOGGER.info("%s", line)
        about = describe_run(opts, optimizer, self.plan, data.batch_sizes())
        for pair in about:
            LOGGER.info("%s: %s", *pair)
        settings = resuming.settings_of(optimizer, opts, self.plan, data)
        prepared = self.accelerator.prepare_optimizer(optimizer)
        added = method.added()
        blocks = family.denoiser.blocks(models) if added is None else listed_blocks(added)
        stepped_together = parts_inside_backward(opts, weights, blocks, swapped=self.swap is not None)
        saves = make_save_plan(opts.saving, method.file_suffix(), self.plan.epochs)
        check_space(saves.final_path().parent, bytes_of(method.trainable().state_dict()), "what is to be saved")
        denoise, objective = method.denoise(family, models), family.denoiser.objective()
        origin = Origin(tuple(script for script, name in scripts.items() if name == spec.name), spec.usage)
        sinks = {**self._pages(origin, saves, about), **notifier.sinks()}
        return Run(
            opts=opts,
            seed=opts.training.seed,
            family=family,
            method=method,
            models=models,
            denoise=denoise,
            objective=objective,
            draw=None if spec.draw is None else spec.draw(method, family, objective, denoise),
            data=data,
            plan=self.plan,
            accelerator=self.accelerator,
            optimizer=prepared,
            stepper=OptimizerStepper(opts, optimizer, prepared, stepped_together),
            schedule=schedule,
            saves=saves,
            preview=self.preview,
            validation=Validation(opts, data.held_out, opts.training.seed, objective),
            tracker=make_tracker(opts, spec.tracker, enabled=self.accelerator.is_main_process, others=sinks),
            hub=Hub(opts.saving, enabled=self.accelerator.is_main_process),
            make_metadata=self._metadata_maker(optimizer),
            save_dtype=SAVE_DTYPES[opts.saving.save_precision],
            start=self.start,
            settings=settings,
            resume=Path(opts.saving.resume) if opts.saving.resume else None,
            ema=EMA(weights, opts.training.ema_decay) if opts.training.ema else None,
            modulation=self.modulation,
            shards=self.shards,
        )

    def _pages(self, origin: Origin, saves: SavePlan, about: Sequence[tuple[str, str]]) -> dict[str, Sink]:
        """The results page, if one is wanted, by its name in messages."""
        opts = self.opts
        if opts.logging.no_results_page:
            return {}
        resumed = opts.saving.resume is not None or self.start.step > 0
        first = next(iter(self.preview.prompts), None)
        example = None if first is None else Example(first.prompt, first.width, first.height)
        course = Course(self.plan, self.start, resumed)
        return {results_page.NAME: results_page.make_page(opts, origin, course, saves, self.data, about, example)}

    def _metadata_maker(self, optimizer: torch.optim.Optimizer) -> Callable[[Progress], dict[str, str]]:
        """A function that makes a file's metadata at any point of the run."""
        options, data, run_plan = self.opts.optimizer, self.data, self.plan
        own_rate = {"ss_lr_scheduler": f"adafactor:{options.learning_rate}"} if sets_own_rate(options) else {}
        fixed = {
            **own_rate,
            "ss_session_id": random.SystemRandom().randrange(2**32),
            "ss_optimizer": optimizers.describe_optimizer(optimizer, options),
            "ss_max_train_steps": run_plan.total_steps,
            "ss_num_epochs": run_plan.epochs,
        }

        def make(progress: Progress) -> dict[str, str]:
            of_the_moment = {
                **fixed,
                "ss_training_started_at": progress.started,
                "ss_training_finished_at": time.time(),
                "ss_steps": progress.step,
                "ss_epoch": progress.epoch,
            }
            model, method = self.family.writer.metadata(self.models), self.method.metadata()
            return metadata.training_metadata(
                self.opts, model, method, data.metadata(run_plan.processes), of_the_moment
            )

        return make
