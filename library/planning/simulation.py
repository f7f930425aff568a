"""A run without values: the code of the run itself, from loading to saving, on a played machine."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice, repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.checkpoints.reading import shapes_only
from library.checkpoints.writing import sizes_only
from library.planning.accelerator import PlayedAccelerator
from library.planning.data import PlayedCaches, PlayedData
from library.planning.gpu import GPU, register_gpu
from library.planning.played import PlayedWatcher, played_machine
from library.planning.watching import Phase, Watcher
from library.planning.work import Work
from library.runtime.logs import LOGGER
from library.runtime.processes import Processes
from library.session import Session, open_data
from library.training import checkpointing, loop, placement, state
from library.training.ahead import look_ahead
from library.training.notifying import Notifier
from library.training.step import StepParts

if TYPE_CHECKING:
    from library.data.sample.dataset import TrainingData
    from library.data.types import DatasetSpec
    from library.families.spec import FamilySpec
    from library.methods.spec import MethodSpec
    from library.options.base import Options
    from library.options.devices import Device
    from library.training.plan import RunPlan
    from library.training.run import Run
    from library.training.saving import SavePlan
    from library.types import Batch

SAMPLED = 2  # denoising steps of a sample image: each takes the same memory
AHEAD = "modulation ahead"
TIMED = ("caching text", "caching latents", AHEAD, "second step")  # phases whose work is counted
STEPS = 2  # in the second one, the optimizer's state is there before the forward pass
WEIGHTS, ADDED, GRADIENTS, STATE, AVERAGE = (
    *("weights of the {part}", "network", "gradients", "optimizer state", "moving average"),
)


@dataclass
class Simulated:
    """What a simulation has seen."""

    phases: list[Phase]
    work: dict[str, Work]  # by phase, of those that are timed
    files: dict[str, int] = field(default_factory=dict)  # bytes of a saved copy, by the file's name
    state_bytes: int = 0  # of a saved state
    caches_in_files: dict[str, int] = field(default_factory=dict)
    caches_in_memory: dict[str, int] = field(default_factory=dict)
    trained: int = 0  # trained numbers
    pixels: int = 0  # of the largest batch, whose steps were simulated
    mean_pixels: float = 0.0  # of all batches
    images: int = 0  # of the largest step
    blocks: int = 0  # of the denoiser
    saves: SavePlan | None = None
    modulation_seconds: float = 0.0  # of a step's share in what is computed for several, beside the second step's own
    cached_batches: dict[str, int] = field(default_factory=dict)  # by the phase that has encoded one

    def peak(self, kind: str) -> tuple[int, Phase | None]:
        """The most bytes that are in use on a device, and the phase."""
        found = max(self.phases, key=lambda phase: phase.peaks[kind].size if kind in phase.peaks else 0, default=None)
        if found is None or kind not in found.peaks:
            return 0, None
        return found.peaks[kind].size, found


@dataclass(frozen=True)
class Request:
    """What is simulated: a run's parts before its model is read."""

    opts: Options
    family: FamilySpec
    method: MethodSpec
    data: TrainingData
    run_plan: RunPlan
    device: Device
    specs: list[DatasetSpec] = field(default_factory=list)

    def with_batch_size(self, size: int) -> Request:
        """The same with other batches. Raises: UserError: the data cannot be read."""
        specs = [replace(spec, batch_size=size) for spec in self.specs]
        opts = self.opts.replaced(train_batch_size=size)
        processes, own_data = self.run_plan.processes, self.method.data
        data, run_plan = open_data(opts, specs, self.family.traits, Processes(), own_data, planned=processes)
        return replace(self, opts=opts, data=data, run_plan=run_plan, specs=specs)


def simulate(request: Request, *, whole: bool = True) -> Simulated:
    """Runs the code of a run on a played device.

    Args: whole: also what happens but now and then: sample images, validation, saving.
    Raises: UserError: as the run itself.
    """
    opts, kind = quietly(request.opts), request.device.kind
    work: dict[str, Work] = {}
    counting: list[Work | None] = [None]

    def count(*operation: Any) -> None:
        if counting[-1] is not None:
            counting[-1].count(*operation)

    device = register_gpu() if kind == GPU else torch.device(kind)
    watcher = PlayedWatcher(count)

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        counting.append(work.setdefault(name, Work(request.device)) if name in TIMED else None)
        with watcher.phase(name):
            yield
        counting.pop()

    with ExitStack() as stack:
        stack.enter_context(_quick_collections())
        stack.enter_context(_without_messages())
        stack.enter_context(played_machine(watcher, gpu=kind == GPU))
        stack.enter_context(shapes_only())
        files = stack.enter_context(sizes_only())
        # Data without images is its own: what it is given here stays in the copy.
        data = PlayedData(request.data) if opts.data.of_images else copy.copy(request.data)
        caches = PlayedCaches(phase)
        accelerator = PlayedAccelerator(opts, device)
        family, method = request.family.adapter(opts), request.method.method(opts)
        session = Session(opts, family, method, data, request.run_plan, accelerator, caches=caches)
        session.check(request.family.missing_encoders(opts), takes_control=request.method.image_role == "control")
        run = built(session, watcher, phase, replace(request.method, draw=request.method.planned_draw))
        batch = data.largest_batch()
        steps(run, batch, watcher, phase)
        found = Simulated(watcher.phases, work)
        if whole:
            _now_and_then(run, phase)
            found.files = {path.name: size for path, size in files.items()}
            found.state_bytes = state.needed_bytes(checkpointing.state_parts(run))
        found.saves, found.cached_batches = run.saves, caches.batches
        found.images = len(batch.captions) * run.plan.accumulation * run.plan.processes
        found.caches_in_files, found.caches_in_memory = caches.bytes_in_files, caches.bytes_in_memory
        found.trained = sum(weight.numel() for group in run.optimizer.param_groups for weight in group["params"])
        found.blocks = len(family.denoiser.blocks(session.models))
        sizes = data.batch_pixels()
        found.pixels, found.mean_pixels = max(sizes), sum(sizes) / len(sizes)
        if run.modulation is not None:
            found.modulation_seconds = work[AHEAD].time * _missing(opts.modulation.count, run.plan.accumulation)
        if session.swap is not None:
            session.swap.detach()
        return found


def _missing(count: int, accumulation: int) -> float:
    """How much of the work that was done before the first step a step takes on average, beside what the second did.

    Args: count: of batches whose modulation is computed at a time.
    """
    first = math.ceil(accumulation / count)
    second = math.ceil(2 * accumulation / count) - first
    return (accumulation / count - second) / first


def quietly(opts: Options) -> Options:
    """The options of the same run without what leaves the machine or is not simulated: logs, uploads, compiling."""
    return opts.replaced(
        log_with=None,
        notify=None,
        no_results_page=True,
        logging_dir=None,
        huggingface_repo_id=None,
        torch_compile=False,
        compile=False,
        xformers=False,  # torch's own kernels take as much
        seed=opts.training.seed or 0,
        resume=None,
    )


def built(session: Session, watcher: Watcher, phase: Callable[[str], Any], method: MethodSpec) -> Run:
    """The run, ready for its first step, with all its memory named."""
    with phase("loading the model"):
        session.load()
        name_weights(session, watcher)
    with phase("encoding"):
        session.encode()
        name_weights(session, watcher)
    with phase("placing the denoiser"):
        session.place()
        name_weights(session, watcher)
        run = session.build(method, {}, Notifier(session.opts, enabled=False))
    parameters = [weight for group in run.optimizer.param_groups for weight in group["params"]]
    for weight in parameters:
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(lambda w: watcher.name(GRADIENTS, [w.grad]))
    name_state(run, watcher)
    return run


def steps(run: Run, batch: Batch, watcher: Watcher, phase: Callable[[str], Any], count: int = STEPS) -> None:
    """Training steps over one batch, each a phase, the first and the second."""
    grad_text = bool(run.method.trained_text_encoders())
    parts = StepParts(run.family, run.models, run.denoise, run.objective, grad_text, run.draw)
    placement.training_modes(run.models, run.method.trainable(), grad_text=grad_text)
    progress = run.start
    batches = look_ahead(run, parts, repeat(batch), progress.micro_step)
    run.method.start_epoch(1)
    for number in range(count):
        gc.collect()  # when Python would do it depends on much else
        ahead = run.modulation is not None and number == 0
        with phase(AHEAD) if ahead else nullcontext():
            next_batches = list(islice(batches, run.plan.accumulation)) if ahead else []
        with phase(("first step", "second step")[min(number, 1)]):
            next_batches = next_batches or list(islice(batches, run.plan.accumulation))
            loop.optimizer_step(run, parts, next_batches, progress)
            name_state(run, watcher)


def name_weights(session: Session, watcher: Watcher) -> None:
    models = session.models
    parts: dict[str, nn.Module | None] = {"denoiser": models.denoiser, "VAE": models.vae}
    parts |= {f"text encoder {name}": encoder for name, encoder in models.text_encoders.items()}
    for part, module in parts.items():
        if module is not None:
            watcher.name(WEIGHTS.format(part=part), [*module.parameters(), *module.buffers()])


def name_state(run: Run, watcher: Watcher) -> None:
    added = run.method.added()
    if added is not None:
        watcher.name(ADDED, [*added.parameters(), *added.buffers()])
    for values in run.optimizer.state.values():
        watcher.name(STATE, [value for value in values.values() if isinstance(value, torch.Tensor)])
    if run.ema is not None:
        watcher.name(AVERAGE, run.ema.state_dict().values())


def _now_and_then(run: Run, phase: Callable[[str], Any]) -> None:
    """What a run does between steps."""
    if run.preview.prompts:
        largest = max(run.preview.prompts, key=lambda prompt: prompt.width * prompt.height)
        run.preview.prompts = [replace(largest, steps=min(largest.steps, SAMPLED))]
        with phase("sample images"), run.as_used():
            run.preview.render(
                run.models,
                1,
                None,
                denoise=run.denoise,
                trained=run.method.trainable(),
                device=run.accelerator.device,
                write=False,
            )
    with phase("saving"), run.as_used():
        run.method.save(run.saves.final_path(), run.save_dtype, None)


@contextmanager
def _quick_collections() -> Iterator[None]:
    """Python's collector looks at nothing that is there already, which is far more than what a simulation makes."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _without_messages() -> Iterator[None]:
    """The log has said, or will say, what the run itself says."""
    level, LOGGER.disabled = LOGGER.disabled, True
    try:
        yield
    finally:
        LOGGER.disabled = level
