"""Everything that can be wrong with a run and is cheap to know, found before torch is imported."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.reading import read_names
from library.data.config.blueprint import build_specs
from library.data.sample.opencv import opencv
from library.errors import UserError
from library.families.registry import FAMILIES
from library.families.shared.control_inputs import reads_control
from library.options import validation
from library.options.base import options_of
from library.options.logging import absolute_paths
from library.options.optimizer import default_rate
from library.runtime.logs import LOGGER
from library.training import distributed, leftovers, output_checks, state_notes
from networks.layouts import kohya_name

if TYPE_CHECKING:
    from library.data.types import DatasetSpec
    from library.families.spec import FamilySpec
    from library.methods.spec import MethodSpec
    from library.options.base import Options
    from library.types import FamilyTraits


def check(opts: Options, family: FamilySpec, method: MethodSpec) -> list[DatasetSpec]:
    """The datasets that the options describe, and in the log what the user should know about the options.

    Raises: UserError: everything that is wrong with the options, and with the files as far as names and headers show.
    """
    traits = family.traits
    writes = is_first_process() and not opts.data.debug_dataset
    problems = list(validation.problems(opts, traits))
    specs: list[DatasetSpec] = []
    if not problems:  # the options make sense: now the files that they name
        if writes:
            leftovers.clear(opts.saving)
        problems += method.check(opts, traits) or _networks_of_others(opts, family)
        problems += family.check_paths(opts)
        images = (lambda: specs.extend(build_specs(opts, traits, method.image_role)), opencv)
        for look in (*(images if method.data is None else ()), lambda: distributed.seed_of_state(opts)):
            try:
                look()
            except UserError as error:
                problems += error.problems
    if not problems and writes:
        problems += output_checks.problems(opts)
    if problems:
        raise UserError(*problems)
    for line in (*validation.warnings(opts, traits), *_offsets_without_effect(opts, specs, traits)):
        LOGGER.warning("%s", line)
    for line in filter(None, (default_rate(opts), *absolute_paths(opts))):
        LOGGER.info("%s", line)
    return specs


def check_objective(opts: Options, traits: FamilyTraits) -> None:
    """Checks what decides noise and loss, and nothing of files. Raises: UserError: what is wrong with it."""
    groups = (opts.noise, opts.loss, opts.family)
    names = {option.dest for group in groups for option in options_of(type(group))}
    problems = [line for line in validation.problems(opts, traits) if validation.option_of(line) in names]
    if problems:
        raise UserError(*problems)
    for line in validation.warnings(opts, traits):
        if validation.option_of(line) in names:
            LOGGER.warning("%s", line)
    without_effect = opts.family.ignores_timestep_offset(traits)
    if opts.noise.show_timesteps_offset and without_effect:
        LOGGER.warning("--show_timesteps_offset: has no effect %s", without_effect)


def _offsets_without_effect(opts: Options, specs: Sequence[DatasetSpec], traits: FamilyTraits) -> list[str]:
    """A line for the first subset whose offset of timesteps has no effect."""
    subsets = [subset for spec in specs for subset in spec.subsets if subset.timestep_offset]
    why = opts.family.ignores_timestep_offset(traits)
    if not subsets or why is None:
        return []
    return [f"{subsets[0].place}: custom_attributes.timestep_sampling.offset has no effect {why}"]


def _networks_of_others(opts: Options, family: FamilySpec) -> list[str]:
    """One line for each network file that is given and was made for another family, by the names of its layers."""
    given = [getattr(opts.method, "network_weights", None), *(getattr(opts.method, "base_weights", None) or [])]
    found = []
    if given[0] and reads_control(family, given[0]):
        found.append(
            f"--network_weights: {given[0]}: is a control LoRA, by which the model reads a control image; training "
            "gives it none. gen_img.py generates with it, and --base_weights merges it for a network beside it"
        )
    for path in filter(None, given):
        layers = {kohya_name(name).partition(".")[0] for name in read_names(path) or ()}
        fitting = [spec for spec in FAMILIES.values() if any(re.search(spec.network_layers, layer) for layer in layers)]
        if fitting and family not in fitting:
            other = fitting[0]
            scripts = " or ".join(f"{name}.py" for name, method in other.scripts.items() if method == "network")
            found.append(
                f"{path}: is a network for {other.traits.label}, and the model here is {family.traits.label}; use "
                f"{scripts}, or another file"
            )
    return found


def is_first_process() -> bool:
    """Whether this is the first process by torch's launcher, before the processes have joined."""
    return int(os.environ.get("RANK", "0")) == 0


def check_resumed(opts: Options) -> Options:
    """Fetches the state of --resume_from_huggingface and compares the state's files with their checksums.

    Returns the options with --resume as a local folder. Raises: UserError: no state, or a damaged one.
    """
    if opts.saving.resume_from_huggingface:
        from library.training.hub import fetch_state

        opts = fetch_state(opts)
    if opts.saving.resume and is_first_process():
        state_notes.verify(Path(opts.saving.resume))
    return opts
