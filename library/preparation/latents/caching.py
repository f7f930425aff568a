"""cache_latents.py and cache_text_encoder_outputs.py: fill the caches that training with the same options reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.families.registry import FAMILIES
from library.families.shared.every_family import group_with, options_of_families, switches
from library.methods.registry import METHODS
from library.options import caching as groups
from library.options.base import OptionGroup, Options, build_options, options_of
from library.options.recipes import Scripts
from library.preparation.common.images import all_gather, is_first, require_room_beside
from library.preparation.common.summary import Outcome
from library.preparation.latents import encoders as parts
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    from library.families.spec import FamilySpec
    from library.types import FamilyTraits


def _others() -> dict[str, FamilySpec]:
    """All families but the one that is meant where no option names one."""
    return dict(list(FAMILIES.items())[1:])


@dataclass(frozen=True, kw_only=True)
class _AnyFamily(OptionGroup, group="family", title="Model families"):
    """The family's own checks come once it is known which one it is."""


# A training command line may be used as it is.
FamiliesOptions = group_with(_AnyFamily, chain(switches(), options_of_families()), "FamiliesOptions", __name__)
GROUPS = (*groups.BEFORE_FAMILIES, FamiliesOptions, *groups.AFTER_FAMILIES)


# The training scripts that read caches; each says which family is meant.
RECIPES: Scripts = {
    script: {name: name == family for name in _others()}
    for family, spec in FAMILIES.items()
    for script, method in spec.scripts.items()
    if METHODS[method].data is None
}


def _family(opts: Options) -> FamilySpec:
    chosen = [name for name in _others() if getattr(opts.family, name)]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(f'--{name}' for name in chosen)} exclude each other; choose one family")
    return FAMILIES[chosen[0]] if chosen else next(iter(FAMILIES.values()))


def traits_of(opts: Options) -> FamilyTraits:
    """The traits of the family that the options choose. Raises: UserError: they choose several."""
    return _family(opts).traits


def _of_family(opts: Options, family: FamilySpec, **changed: Any) -> Options:
    """The options as a training script of the family would have them; what is of another family does nothing.

    Images that cannot be used are left out, whatever --strict says: it decides over the exit status here.
    """
    own = family.options
    others = {option.dest for option in options_of(FamiliesOptions)} - {option.dest for option in options_of(own)}
    given = {name: value for name, value in opts.given.items() if name not in others}
    for name in (others & opts.given.keys()) - FAMILIES.keys():
        LOGGER.warning("--%s: has no effect on %s", name, family.traits.label)
    kinds = [own if isinstance(group, FamiliesOptions) else type(group) for group in opts.groups]
    return build_options(kinds, given).replaced(strict=False, seed=opts.training.seed or 0, **changed)


def _check(opts: Options, family: FamilySpec, problems: Sequence[str] = ()) -> list[Any]:
    """The specs of the data sets. Raises: UserError: with `problems` and all others that can be seen at once."""
    from library.data.config.blueprint import build_specs

    traits = family.traits
    role = "mask" if opts.loss.masked_loss else None  # control images have no part in what is cached
    found, specs = [*opts.family.check(opts, traits), *problems], []
    try:
        specs = build_specs(opts, traits, role)
    except UserError as error:
        found += error.problems
    if found:
        raise UserError(*found)
    return specs


# ---- latents


def cache_latents(opts: Options) -> Outcome:
    """Encodes the images of a data set into the files that training reads with --cache_latents_to_disk.

    Raises: UserError: options, data set or VAE cannot be used, or a file cannot be written.
    """
    from library import encoding
    from library.caching import latents
    from library.checkpoints.hashes import weights_fingerprint
    from library.data.load import read_data
    from library.data.sample.opencv import opencv
    from library.runtime.processes import Processes
    from library.training import placement

    opencv()
    family = _family(opts)
    # Texts and training do not matter here, so neither does what speaks against caching texts.
    opts = _of_family(
        opts,
        family,
        cache_latents_to_disk=True,
        cache_text_encoder_outputs=False,
        cache_text_encoder_outputs_to_disk=False,
    )
    specs = _check(opts, family)
    accelerator = parts.make_accelerator(opts)
    models, adapter = parts.load_vae(family, opts), family.adapter(opts)
    data = read_data(specs, opts, adapter.traits, Processes(accelerator.process_index, accelerator.num_processes))
    outcome = Outcome(failed=dict(data.scan.dropped))
    records, layout = data.all_records, encoding.latent_layout(adapter.traits)
    require_room_beside(latents.without_files(records, data.index, layout), "latents")
    fingerprint = weights_fingerprint(models.vae)
    placement.place_vae(models, opts, accelerator.device)
    result = latents.cache_on_disk(
        records,
        data.index,
        encoding.latent_encoder(opts, adapter, models, accelerator),
        layout,
        fingerprint,
        check=not opts.data.skip_cache_check,
        on_error=outcome.fail,
    )
    failed = {path for one in all_gather(set(outcome.failed)) for path in one}
    if is_first():
        data.index.save()
        outcome.skipped = result.kept
        outcome.done = sum(record.path not in failed for record in records) - result.kept
    return outcome


# ---- text-encoder outputs


class _NothingTrained:
    """The members of a method that `encoding` uses, for a script that trains nothing."""

    def text_fingerprint(self) -> dict[str, str]:
        return {}

    def live_text_encoders(self) -> tuple[str, ...]:
        return ()


def cache_texts(opts: Options) -> Outcome:
    """Encodes the captions of a data set into the files that --cache_text_encoder_outputs_to_disk makes training read.

    Raises: UserError: options, data set or model cannot be used, or a file cannot be written.
    """
    from library import encoding
    from library.caching import text
    from library.data.load import read_data
    from library.runtime.processes import Processes
    from library.training import placement

    family = _family(opts)
    opts = _of_family(opts, family, cache_latents=False, cache_text_encoder_outputs_to_disk=True)
    adapter = family.adapter(opts)
    layout = adapter.text.layout()
    if layout is None:
        others = ", ".join(f"--{name}" for name in _others())
        raise UserError(f"{adapter.traits.label} has no files of text encoder outputs; say what the model is: {others}")
    specs = _check(opts, family, family.check_text_paths(opts))
    accelerator = parts.make_accelerator(opts)
    processes = Processes(accelerator.process_index, accelerator.num_processes)
    data = read_data(specs, opts, adapter.traits, processes)
    encoding.require_texts(opts, adapter, family.missing_encoders(opts), data, samples=False)
    files = {text.cache_file(one, layout): one.image for one in text.requests_of(data.all_records)}
    before = {file: _stamp(file) for file in files}
    require_room_beside((file for file, stamp in before.items() if stamp is None), "text encoder outputs")
    with placement.loading(opts, accelerator.device):
        models = adapter.loader.load(texts_only=True)
    processes.barrier()  # no process writes while others still look
    outcome = Outcome(failed=dict(data.scan.dropped))
    fill = encoding.text_cache(opts, adapter, _NothingTrained(), models, data, outcome.fail)
    placement.place_text_encoders(models, opts, accelerator.device, grad_text=False)
    fill(accelerator)
    failed = {path for one in all_gather(set(outcome.failed)) for path in one}
    if is_first():
        data.index.save()
        usable = [file for file, image in files.items() if image not in failed]
        outcome.done = sum(_stamp(file) != before[file] for file in usable)
        outcome.skipped = len(usable) - outcome.done
    return outcome


def _stamp(file: Path) -> int | None:
    try:
        return file.stat().st_mtime_ns
    except OSError:  # not there, or with a name that no file can have
        return None
