"""Which model generates, and its options as the training scripts of its family would have them. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from library import registry
from library.errors import UserError
from library.families.registry import FAMILIES
from library.families.shared.every_family import group_with, options_of_families, switches
from library.families.shared.finding import family_of, kind_of
from library.options.base import COMMAND_LINE, Given, OptionGroup, Options, build_options, opt, options_of
from library.options.models import ModelOptions

if TYPE_CHECKING:
    from library.families.spec import FamilySpec
    from library.options.sampling import PromptTextOptions
    from library.types import FamilyTraits

_CHUNK = 75  # tokens that --max_embeddings_multiples counts as one
# Options of families that generating has too: files of parts, and how texts and predictions are meant.
_OF_FAMILIES = (
    *("v2", "v_parameterization", "clip_l", "clip_g", "t5xxl", "ae"),
    *("t5xxl_max_token_length", "apply_lg_attn_mask", "apply_t5_attn_mask"),
)
_MODEL = "pretrained_model_name_or_path"
# Generating options with the same name and meaning in training.
_SHARED = (
    *("vae", "tokenizer_cache_dir", "no_half_vae", "zero_terminal_snr", "clip_skip", "emb_normalize_mode"),
    *("xformers", "sdpa", "guidance_scale", *_OF_FAMILIES),
)


@dataclass(frozen=True, kw_only=True)
class _CheckpointOptions(OptionGroup, group="checkpoint", title="Model"):
    ckpt: str | None = opt(None, "model: a checkpoint file, a Diffusers folder, or a hub id such as owner/model")
    vae: str | None = opt(None, "VAE to use in place of the model's own: checkpoint, VAE file, Diffusers VAE or hub id")
    tokenizer_cache_dir: str | None = opt(
        None, "folder in which tokenizers are stored, so that later runs work offline"
    )
    no_half_vae: bool = opt(False, "run the VAE in float32 with --fp16 and --bf16 too, for VAEs that overflow")
    zero_terminal_snr: bool = opt(False, "the model was trained with noise that ends in pure noise")
    v1: bool = opt(False, "has no effect: a model of Stable Diffusion 1.x is recognised")

    def check(self, opts: Options, traits: FamilyTraits | None) -> Iterator[str]:
        if not self.ckpt:
            yield "--ckpt: missing; give a checkpoint file, a Diffusers folder or a hub id"
        if self.v1 and self.v2:
            yield "--v1: cannot be used with --v2; use one of them"


CheckpointOptions = group_with(
    _CheckpointOptions, chain(switches(), options_of_families(_OF_FAMILIES)), "CheckpointOptions", __name__
)


class OneFamilyOptions(CheckpointOptions, without=("v1", "v2", *(name for name, _, _ in switches()))):
    """Of a script that is for one family."""


def family_spec(options: Any, fixed: str | None = None) -> tuple[FamilySpec, Mapping[str, Any]]:
    """The family of --ckpt, and options that go with its kind of model.

    Args:
        options: the group `CheckpointOptions`.
        fixed: the only family that a script is for.
    Raises: UserError: there is no such file, or it does not show its family.
    """
    others = list(FAMILIES)[1:]
    chosen = [fixed] if fixed else [name for name in others if getattr(options, name)]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(f'--{name}' for name in chosen)} exclude each other; choose one family")
    if chosen:
        return FAMILIES[chosen[0]], {}
    if options.v2:
        return next(iter(FAMILIES.values())), {}
    ways = " or ".join(f"--{name}" for name in others)
    with _about_ckpt():
        return FAMILIES[family_of(options.ckpt, ways)], kind_of(options.ckpt, ways).options


def training_options(opts: Options, spec: FamilySpec, of_kind: Mapping[str, Any]) -> Options:
    """The options with which the family's parts are made, completed by what the model's file says.

    Raises: UserError: every problem with the model's files that can be seen without loading them.
    """
    given: dict[str, Any] = {_MODEL: opts.checkpoint.ckpt, **of_kind}
    values = opts.flat()
    given |= {name: values[name] for name in _SHARED if values.get(name) not in (None, False)}
    texts: PromptTextOptions = opts.texts
    given["emb_normalize_mode"] = texts.emb_normalize_mode
    multiples = values.get("max_embeddings_multiples")
    if multiples:
        given["max_token_length"] = multiples * _CHUNK
    given["mixed_precision"] = opts.precision.mixed_precision
    if values.get("diffusers_xformers"):
        given["xformers"] = True
    groups = [_inpainting_too(group) for group in registry.groups_for(spec.name, "network")] + [type(texts)]
    known = {option.dest for group in groups for option in options_of(group)}
    made = build_options(groups, {n: Given(v, COMMAND_LINE) for n, v in given.items() if n in known})
    with _about_ckpt():
        problems = list(dict.fromkeys([*spec.check_paths(made), *spec.missing_encoders(made)]))
        if problems:
            raise UserError(*problems)
        return spec.complete_options(made)


def _inpainting_too(group: type[OptionGroup]) -> type[OptionGroup]:
    """The group, but that the one about the model takes models for inpainting."""
    if not issubclass(group, ModelOptions):
        return group
    return type(group.__name__, (group,), {"takes_inpainting": True})


@contextmanager
def _about_ckpt() -> Iterator[None]:
    """Messages of training about the model name the option that gives it here."""
    try:
        yield
    except UserError as error:
        lines = (problem.replace(f"--{_MODEL}", "--ckpt") for problem in error.problems)
        raise UserError(*lines, hint=error.hint) from None
