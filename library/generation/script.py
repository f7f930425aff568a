"""gen_img.py and its relatives: from a command line to files of images."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from library.checkpoints.embeddings import has_bundled
from library.checkpoints.reading import require_weights
from library.errors import UserError
from library.families.shared.control_inputs import reads_control
from library.generation.control import Guides, check_control_nets
from library.generation.files import Names, require_folder, write
from library.generation.grid import WEIGHTS, axes_of, cells_of, grid_requests
from library.generation.model_options import CheckpointOptions, OneFamilyOptions, family_spec, training_options
from library.generation.parameters import PARAMETERS, Made, model_name, texts_of
from library.generation.prompters import interactive_lines, lines_of_module
from library.generation.requests import Entry, Request, Requests, base_prompt, entries_of
from library.generation.sources import Sources
from library.inference.prompt_lines import GENERATION, PromptOption
from library.options.inference import ANY_MODEL_GROUPS, OLD_GROUPS
from library.preparation.common.script import run_script
from library.preparation.common.summary import Outcome
from library.runtime import logs
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    from library.families.spec import FamilySpec
    from library.generation.drawing import Drawn, HowToDraw
    from library.generation.model import Model
    from library.options.base import OptionGroup, Options
    from library.types import FamilyTraits

ALL_FAMILIES = (CheckpointOptions, *ANY_MODEL_GROUPS)
ONE_FAMILY = (OneFamilyOptions, *ANY_MODEL_GROUPS)
OLD = (CheckpointOptions, *OLD_GROUPS)


def run(
    description: str,
    groups: Sequence[type[OptionGroup]],
    *,
    fixed: str | None = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Runs a script and exits: 0 done, 1 a prompt could not be used, 2 a user error, 130 interrupted.

    Args: fixed: the only family that the script is for.
    """

    def traits(opts: Options) -> FamilyTraits | None:
        return family_spec(opts.checkpoint, fixed)[0].traits if opts.checkpoint.ckpt else None

    def work(opts: Options) -> Outcome:
        return generate(opts, fixed)

    run_script(work, groups, argv, description=description, traits=traits)


@dataclass(frozen=True)
class Start:
    """What a script has beside the options of gen_img.py."""

    entry: Entry | None = None  # the prompt, in place of the options'
    syntax: Sequence[PromptOption] = GENERATION
    negative_prompt: str = ""  # of prompts without their own
    training: Mapping[str, Any] = field(default_factory=dict)  # options of training, and "offload"
    keeps_surroundings: bool = False  # see `SourceImage.pinned`
    second_text: str | None = None  # what all text encoders but the first read in place of the prompt


def generate(opts: Options, fixed: str | None = None, start: Start | None = None) -> Outcome:
    """Makes the images that the options ask for. Raises: UserError."""
    start = start or Start()
    check_control_nets(opts.control)
    spec, of_kind = family_spec(opts.checkpoint, fixed)
    training = training_options(opts, spec, of_kind).replaced(
        **{name: value for name, value in start.training.items() if name != "offload"}
    )
    outcome = Outcome()
    sources = Sources.of(opts.source, pinned=start.keeps_surroundings)
    guides = _guides_of(opts, spec)
    if opts.grid.grid:  # what is compared begins with the same noise
        seed = secrets.randbits(32) if opts.prompts.seed is None else opts.prompts.seed
        opts = opts.replaced(iter_same_seed=True, seed=seed)
    base = replace(base_prompt(opts, spec.traits), negative_prompt=start.negative_prompt)
    requests = Requests(opts, spec.traits, base, outcome.fail, sources, guides, start.syntax)
    require_folder(Path(opts.output.outdir), "--outdir")
    if opts.prompts.interactive or opts.prompts.from_module:
        studio = Studio.of(opts, spec, training, outcome, start)
        if opts.prompts.interactive:
            _ask(opts, studio, requests, outcome)
        else:
            lines = lines_of_module(opts, studio.model)
            studio.make_all(requests.of([(f"{opts.prompts.from_module}, prompt {n}", line)]) for n, line in lines)
        return outcome
    if opts.grid.grid:
        _make_grid(opts, spec, training, outcome, start, requests)
        return outcome
    prompts = entries_of(opts, sources) if start.entry is None else [("--prompt", start.entry)]
    iterations = [requests.of(prompts) for _ in range(opts.prompts.n_iter)]
    if any(iterations):
        Studio.of(opts, spec, training, outcome, start).make(*iterations)
    return outcome


def _guides_of(opts: Options, spec: FamilySpec) -> Guides | None:
    """The control images, where something reads them: networks beside the model, or the model with a control LoRA.

    Raises: UserError: both, or nothing reads those that are given.
    """
    option, control_nets = opts.control.nets
    control_loras = [path for path in opts.networks.network_weights or () if reads_control(spec, path)]
    if control_nets and control_loras:
        raise UserError(
            f"{option}: cannot be used with {control_loras[0]}, with which the model itself reads control images"
        )
    if control_nets or control_loras:
        return Guides.of(opts)
    if opts.source.guide_image_path and opts.source.clip_vision_strength is None:
        raise UserError("--guide_image_path: nothing reads it; give --control_net_models, or a control LoRA")
    return None


def _make_grid(
    opts: Options, spec: FamilySpec, training: Options, outcome: Outcome, start: Start, requests: Requests
) -> None:
    """Makes the images of --grid, one network after the other, and their sheets. Raises: UserError."""
    from library.data.report.contact_sheet import show
    from library.generation.grid_sheets import Shown, write_sheets
    from library.generation.networks import attach_rest, check_files

    axes = axes_of(opts.grid.grid)
    weights = next((axis.values for axis in axes if axis.name == WEIGHTS), ())
    for value in weights:
        require_weights(value.value)
        if has_bundled(value.value):
            raise UserError(
                f"--grid: {value.value} holds embeddings, too, and words cannot change within a grid; draw it with "
                "--network_weights"
            )
    cells = cells_of(axes)
    wanted = grid_requests(requests, axes, cells, opts, spec.traits)
    if outcome.failed:
        raise UserError(*(f"{where}: {why}" for where, why in outcome.failed.items()))
    moment = time.strftime("%Y%m%d%H%M%S")
    folder = Path(opts.output.outdir) / f"grid_{moment}"
    studio = Studio.of(opts, spec, training, outcome, start)
    studio.names = replace(studio.names, folder=folder / "images")
    base, merged = list(opts.networks.network_weights or ()), opts.networks.merged()
    shown: list[Shown] = []
    for value in weights or (None,):
        mine = [place for place, cell in enumerate(cells) if value is None or cell.of(axes, WEIGHTS) == value]
        if value is not None:
            strengths = [*opts.networks.multipliers(), 1.0]
            studio.opts = opts.replaced(
                network_weights=[*base, value.value],
                network_mul=strengths,
                network_merge=False,
                network_merge_n_models=merged,
                network_show_meta=False,
            )
            model, options = studio.model, studio.opts.networks
            model.use_networks(attach_rest(options, check_files(options), model.family, model.models, model.device))
        files = {id(one.request): one for one in studio.make([wanted[place] for place in mine])}
        for place in mine:
            one = files[id(wanted[place])]
            shown.append(Shown(cells[place], one.path, one.texts[PARAMETERS]))
    written = write_sheets(folder, axes, shown)
    for path in written:
        LOGGER.info("wrote %s", path)
    show(written[-1:])


class Written(NamedTuple):
    request: Request
    path: Path
    texts: dict[str, str]


@dataclass
class Studio:
    """A loaded model, how it draws, and where images are written."""

    opts: Options
    model: Model
    how: HowToDraw
    outcome: Outcome
    names: Names
    _made: int = 0  # images that have a name
    _paths: dict[tuple[int, str], Path] = field(default_factory=dict)  # by request and stage
    written: list[Written] = field(default_factory=list)

    @classmethod
    def of(cls, opts: Options, spec: FamilySpec, training: Options, outcome: Outcome, start: Start) -> Studio:
        """Loads the model. Raises: UserError: a file that cannot be used."""
        from library.generation.drawing import HowToDraw, decoded_at_once
        from library.generation.first_noise import varied_noise
        from library.generation.highres import Highres
        from library.generation.model import load_model

        size = opts.image.batch_size
        how = HowToDraw(
            batch_size=size,
            decoded_at_once=decoded_at_once(opts.precision, size),
            vae_float32=training.model.no_half_vae,
            slices=opts.precision.vae_slices,
            zero_terminal_snr=training.noise.zero_terminal_snr,
            zero_offset=opts.image.force_scheduler_zero_steps_offset,
            noise=varied_noise(opts.image),
            highres=Highres.of(opts.highres),
            keeps_first=opts.highres.highres_fix_save_1st,
        )
        names = Names(Path(opts.output.outdir), f".{opts.output.image_format}", time.strftime("%Y%m%d%H%M%S"))
        model = load_model(opts, spec, training, offload=start.training.get("offload", False))
        model.second_text = start.second_text
        return cls(opts, model, how, outcome, names)

    def make(self, *iterations: Sequence[Request]) -> list[Written]:
        """Makes the images of all iterations, with one progress bar, and returns their files."""
        from library.generation.drawing import draw

        self.written = []
        self._require_possible(iterations)
        with logs.progress(sum(map(self.how.steps, iterations)), "images", unit="steps") as bar:
            for requests in iterations:
                for request in requests:
                    self._name(request)
                strengths = self.opts.networks.multipliers()
                draw(self.model, requests, self.how, strengths, self._receive, bar.update)
        return self.written

    def _require_possible(self, iterations: Sequence[Sequence[Request]]) -> None:
        """Raises: UserError: an image is larger than the model takes, or has regions, and networks know none."""
        most = self.model.models.longest_side
        for request in (request for requests in iterations for request in requests):
            width, height = request.prompt.width, request.prompt.height
            if most is not None and max(width, height) > most:
                raise UserError(f"{width}x{height}: this model draws images of at most {most} pixels on a side")
            if request.prompt.regions is not None:
                self.model.confine_networks()

    def make_all(self, parts: Iterable[Sequence[Request]]) -> None:
        """`make` for one part after the other, each of which is only asked for when the one before is made."""
        for requests in parts:
            self.make(requests)

    def _name(self, request: Request) -> None:
        """Gives the files of a request their names, by its place among all."""
        stages = [""]
        if self.how.highres is not None:
            stages = ["0", "1"] if self.how.keeps_first else ["1"]
        for stage in stages:
            self._paths[id(request), stage] = self._path(request, stage)
        self._made += 1

    def _path(self, request: Request, stage: str) -> Path:
        output, first = self.opts.output, "first_" if stage == "0" else ""
        if request.file_name is not None:
            return self.names.called(first + request.file_name)
        if output.use_original_file_name and request.prompt.source is not None:
            return self.names.called(first + request.prompt.source.path.stem)
        if output.sequential_file_name:
            return self.names.sequential(self._made, stage)
        return self.names.timed(self._made, request.prompt.seed, stage)

    def _receive(self, drawn: Drawn) -> None:
        request, path = drawn.request, self._paths.pop((id(drawn.request), drawn.stage))
        made = Made(
            request.raw,
            model_name(self.opts.checkpoint.ckpt),
            drawn.networks,
            self.opts.texts.clip_skip,
            request.clip_prompt,
        )
        # Of two drawings the second is what was asked for, with the seed that makes both.
        texts = texts_of(drawn.prompt if drawn.stage == "0" else request.prompt, made)
        write(drawn.image, path, texts)
        self.outcome.done += 1
        self.written.append(Written(request, path, texts))
        LOGGER.debug("wrote %s", path)


def _ask(opts: Options, studio: Studio, requests: Requests, outcome: Outcome) -> None:
    """Makes the images of one line after the other; a line that is wrong costs nothing but itself."""
    from library.data.report.contact_sheet import show

    for number, line in enumerate(interactive_lines(), 1):
        entry: tuple[str, Entry] = f"line {number}", line
        try:
            paths = [one.path for one in studio.make(requests.of([entry]))]
        except UserError as error:
            for problem in error.problems:
                outcome.fail(f"line {number}", problem)
            continue
        for path in paths:
            print(path)
        if not opts.prompts.no_preview:
            show(paths)
    outcome.failed.clear()  # each was named when it happened, and could be given again
