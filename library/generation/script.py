"""gen_img.py and its relatives: from a command line to files of images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError
from library.generation.control import Guides, check_control_nets
from library.generation.files import Names, require_folder, write
from library.generation.model_options import CheckpointOptions, OneFamilyOptions, family_spec, training_options
from library.generation.parameters import Made, model_name, texts_of
from library.generation.requests import Requests, base_prompt, entries_of
from library.generation.sources import Sources
from library.options.inference import ANY_MODEL_GROUPS, OLD_GROUPS, not_available
from library.preparation.common.script import run_script
from library.preparation.common.summary import Outcome
from library.runtime import logs
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    from library.families.spec import FamilySpec
    from library.generation.drawing import Drawn, Receive
    from library.generation.requests import Request
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


def generate(opts: Options, fixed: str | None = None) -> Outcome:
    """Makes the images that the options ask for. Raises: UserError."""
    refused = list(not_available(opts.flat()))
    if refused:
        raise UserError(*refused)
    check_control_nets(opts.control)
    spec, of_kind = family_spec(opts.checkpoint, fixed)
    training = training_options(opts, spec, of_kind)
    outcome = Outcome()
    sources = Sources.of(opts.source)
    guides = Guides.of(opts) if opts.control.control_net_models else None
    requests = Requests(opts, spec.traits, base_prompt(opts, spec.traits), outcome.fail, sources, guides)
    prompts = entries_of(opts, sources)
    iterations = [requests.of(prompts) for _ in range(opts.prompts.n_iter)]
    if any(iterations):
        require_folder(Path(opts.output.outdir), "--outdir")
        _draw_all(opts, spec, training, iterations, outcome)
    return outcome


def _draw_all(
    opts: Options,
    spec: FamilySpec,
    training: Options,
    iterations: Sequence[Sequence[Request]],
    outcome: Outcome,
) -> None:
    from library.generation.drawing import HowToDraw, decoded_at_once, draw
    from library.generation.first_noise import varied_noise
    from library.generation.highres import Highres
    from library.generation.model import load_model

    size = opts.image.batch_size
    how = HowToDraw(
        batch_size=size,
        decoded_at_once=decoded_at_once(opts.precision, size),
        vae_float32=training.model.no_half_vae,
        tiles=opts.precision.vae_slices,
        zero_terminal_snr=training.noise.zero_terminal_snr,
        zero_offset=opts.image.force_scheduler_zero_steps_offset,
        noise=varied_noise(opts.image),
        highres=Highres.of(opts.highres),
        keeps_first=opts.highres.highres_fix_save_1st,
    )
    model = load_model(opts, spec, training)
    receive = _writer(opts, iterations, outcome)
    steps = sum(map(how.steps, iterations))
    with logs.progress(steps, "images", unit="step") as bar:
        for requests in iterations:
            draw(model, requests, how, opts.networks.multipliers(), receive, bar.update)


def _writer(opts: Options, iterations: Sequence[Sequence[Request]], outcome: Outcome) -> Receive:
    """What writes each image, under the name that its place among all gives it."""
    names = Names(Path(opts.output.outdir), f".{opts.output.image_format}", time.strftime("%Y%m%d%H%M%S"))
    everything = [request for requests in iterations for request in requests]
    paths = {
        (id(request), stage): _name(opts, names, number, request, stage)
        for number, request in enumerate(everything)
        for stage in _stages(opts)
    }

    def receive(drawn: Drawn) -> None:
        request = drawn.request
        made = Made(
            request.raw,
            model_name(opts.checkpoint.ckpt),
            drawn.networks,
            opts.texts.clip_skip,
            request.clip_prompt,
        )
        path = paths[id(request), drawn.stage]
        # Of two drawings the second is what was asked for, with the seed that makes both.
        write(drawn.image, path, texts_of(drawn.prompt if drawn.stage == "0" else request.prompt, made))
        outcome.done += 1
        LOGGER.debug("wrote %s", path)

    return receive


def _stages(opts: Options) -> tuple[str, ...]:
    """Those of each image that become files."""
    if opts.highres.highres_fix_scale is None:
        return ("",)
    return ("0", "1") if opts.highres.highres_fix_save_1st else ("1",)


def _name(opts: Options, names: Names, number: int, request: Request, stage: str) -> Path:
    first = "first_" if stage == "0" else ""
    if request.file_name is not None:
        return names.called(first + request.file_name)
    if opts.output.use_original_file_name and request.prompt.source is not None:
        return names.called(first + request.prompt.source.path.stem)
    if opts.output.sequential_file_name:
        return names.sequential(number, stage)
    return names.timed(number, request.prompt.seed, stage)
