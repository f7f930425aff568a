"""Sample prompts: one line, or a .txt, .toml or .json file, to `SamplePrompt`s. Nothing heavy is imported here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.runtime.documents import parse_json, parse_toml, read_text
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from library.types import FamilyTraits

SAMPLERS = (
    "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle",
    "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
)  # fmt: skip
FLOW_SAMPLER = "euler"  # the only one for flow models
MIN_SIDE = 64  # pixels
MAX_SIDE = 8192  # pixels; larger images fit into no memory
MAX_STEPS = 1000
RANDOM_SEED = -1  # as in web interfaces: another one each time
MAX_SEED = 2**64 - 1  # what torch's generators take


@dataclass(frozen=True)
class ControlImage:
    """The image of --cn; `control_images.with_control` reads it."""

    path: Path
    pixels: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)  # (height, width, 3), as sampled


@dataclass(frozen=True)
class SamplePrompt:
    """The prompt and settings of one image."""

    prompt: str
    negative_prompt: str
    width: int  # pixels, a multiple of the family's pixel_multiple
    height: int
    seed: int | None  # None: the caller chooses one
    steps: int  # denoising steps, 1..1000
    scale: float  # classifier-free guidance; 1 = none
    sampler: str  # one of SAMPLERS
    guidance: float | None = None  # guidance value fed to distilled flow models
    flow_shift: float | None = None  # shift of a flow model's noise levels, above 0; None: the family's own
    control: ControlImage | None = None  # what a ControlNet reads


@dataclass(frozen=True)
class _Option:
    """An option of a prompt line and the same thing's key in .toml and .json files."""

    letter: str
    key: str  # in files
    field: str | None  # of SamplePrompt; None: not available yet
    kind: Callable[[str], Any] = str


_OPTIONS = (
    _Option("n", "negative_prompt", "negative_prompt"),
    _Option("w", "width", "width", int),
    _Option("h", "height", "height", int),
    _Option("d", "seed", "seed", int),
    _Option("s", "sample_steps", "steps", int),
    _Option("l", "scale", "scale", float),
    _Option("g", "guidance_scale", "guidance", float),
    _Option("ss", "sample_sampler", "sampler"),
    _Option("cn", "controlnet_image", "control"),
    _Option("ctr", "cfg_trunc_ratio", None),
    _Option("rcfg", "renorm_cfg", None),
    _Option("fs", "flow_shift", "flow_shift", float),
)
_BY_LETTER = {option.letter: option for option in _OPTIONS}
_BY_KEY = {option.key: option for option in _OPTIONS}
_KIND_NAMES = {int: "a whole number", float: "a number", str: "a text"}


def default_prompt(traits: FamilyTraits, sampler: str) -> SamplePrompt:
    """The defaults of a prompt: the family's size, steps and scale, and --sample_sampler.

    Flow models have a sampler of their own, whatever `sampler` is.
    """
    side = traits.default_resolution
    sampler = FLOW_SAMPLER if traits.objective == "flow" else sampler
    return SamplePrompt("", "", side, side, None, traits.sample_steps, traits.sample_scale, sampler)


def flow_sampler_note(traits: FamilyTraits) -> str:
    """Why a flow model does not take another sampler, to end a message with."""
    return f"images of {traits.label} are always made with {FLOW_SAMPLER}"


def load_prompts(path: str | Path, traits: FamilyTraits, sampler: str) -> list[SamplePrompt]:
    """The prompts of a file, in its order.

    .txt: one prompt line each; blank lines and lines that start with # are skipped. .toml: a [prompt] table of shared
    keys with [[prompt.subset]] tables. .json: a list of prompt lines or tables.

    Raises: UserError: an unreadable file, another type, or a bad entry, with the file and the line or entry.
    """
    path = Path(path)
    if path.suffix.lower() not in (".txt", ".toml", ".json"):
        raise UserError(f"{path}: a prompt file must be .txt, .toml or .json")
    base = default_prompt(traits, sampler)
    prompts = []
    for where, entry in _entries(path, read_text(path, "the prompt file")):
        changes = _parse_line(entry, where) if isinstance(entry, str) else _parse_table(entry, where)
        prompts.append(_finish(base, changes, traits, where))
    if not prompts:
        raise UserError(f"{path}: the file holds no prompt")
    return prompts


def parse_prompt(line: str, traits: FamilyTraits, sampler: str, where: str = "prompt") -> SamplePrompt:
    """One prompt line, e.g. ``a cat --n blurry --w 768 --h 512 --d 1 --s 28 --l 7.5``.

    An option starts at `` --`` and extends to the next one; its letters may be of either case. Dashes with a blank
    behind them are part of the text before them. Options that are not known are left out, with a warning.

    Args:
        where: names the line in messages, e.g. "prompts.txt, line 3".
    Raises: UserError: a bad value, or an option that is not available yet.
    """
    return _finish(default_prompt(traits, sampler), _parse_line(line, where), traits, where)


def _entries(path: Path, text: str) -> Iterator[tuple[str, str | dict[str, Any]]]:
    """(place for messages, prompt line or table) of each prompt in a file."""
    if path.suffix.lower() == ".txt":
        for number, line in enumerate(map(str.strip, text.split("\n")), start=1):
            if line and not line.startswith("#"):
                yield f"{path}, line {number}", line
        return
    if path.suffix.lower() == ".toml":
        shared = parse_toml(text, path).get("prompt")
        if not isinstance(shared, dict):
            raise UserError(f"{path}: needs a [prompt] table, with [[prompt.subset]] tables for several prompts")
        subsets = shared.pop("subset", [{}])
        if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
            raise UserError(f"{path}: `subset` must be [[prompt.subset]] tables")
        entries = [{**shared, **subset} for subset in subsets]
    else:
        entries = parse_json(text, path)
        if not isinstance(entries, list):
            raise UserError(f"{path}: must hold a list of prompt lines or tables")
    for number, entry in enumerate(entries, start=1):
        where = f"{path}, prompt {number}"
        if not isinstance(entry, (str, dict)):
            raise UserError(f"{where}: must be a prompt line or a table, got {entry!r}")
        yield where, entry


def _parse_line(line: str, where: str) -> dict[str, Any]:
    # The leading blank lets a line begin with an option.
    prompt, *parts = f" {line.strip()}".split(" --")
    changes: dict[str, Any] = {"prompt": prompt.strip()}
    text = "prompt"  # the field that free dashes are part of
    for part in parts:
        letters, _, value = re.sub(r"\s", " ", part).partition(" ")
        value = value.strip()
        if not letters:  # dashes with a blank behind them belong to the text
            changes[text] = f"{changes[text]} -- {value}".strip()
            continue
        option = _BY_LETTER.get(letters.lower())
        if option is None:
            known = " ".join(f"--{o.letter}" for o in _OPTIONS)
            LOGGER.warning("%s: ignored: --%s is no option of a prompt; these are %s", where, letters, known)
            continue
        name = f"--{option.letter}"
        text = "negative_prompt" if option.field == "negative_prompt" else "prompt"
        if not value and option.field != "negative_prompt":
            raise UserError(f"{where}: {name} needs a value")
        try:
            changes[_available(option, name, where)] = option.kind(value)
        except ValueError:
            raise UserError(f"{where}: {name} needs {_KIND_NAMES[option.kind]}, got {value!r}") from None
    return changes


def _parse_table(table: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(table.get("prompt"), str):
        raise UserError(f"{where}: needs a `prompt` text")
    changes: dict[str, Any] = {"prompt": table["prompt"]}
    for key, value in table.items():
        if key == "prompt":
            continue
        option = _BY_KEY.get(key)
        if option is None:
            LOGGER.warning("%s: ignored: unknown key %r; the keys are prompt, %s", where, key, ", ".join(_BY_KEY))
            continue
        accepted = (int, float) if option.kind is float else option.kind
        if isinstance(value, bool) or not isinstance(value, accepted):
            raise UserError(f"{where}: {key} needs {_KIND_NAMES[option.kind]}, got {value!r}")
        try:
            changes[_available(option, key, where)] = option.kind(value)
        except OverflowError:
            raise UserError(f"{where}: {key}: the number is too large") from None
    return changes


def _available(option: _Option, name: str, where: str) -> str:
    if option.field is None:
        raise UserError(f"{where}: {name} ({option.key}) is not available yet")
    return option.field


def _finish(base: SamplePrompt, changes: dict[str, Any], traits: FamilyTraits, where: str) -> SamplePrompt:
    if "control" in changes:
        changes = {**changes, "control": ControlImage(Path(changes["control"]).expanduser())}
    prompt = replace(base, **changes)
    if prompt.sampler not in SAMPLERS:
        raise UserError(f"{where}: unknown sampler {prompt.sampler!r}; choose one of {', '.join(SAMPLERS)}")
    if prompt.seed == RANDOM_SEED:
        prompt = replace(prompt, seed=None)
    if prompt.seed is not None and not 0 <= prompt.seed <= MAX_SEED:
        raise UserError(f"{where}: the seed must be from 0 to {MAX_SEED}, got {prompt.seed}")
    for name, value in (("scale", prompt.scale), ("guidance", prompt.guidance)):
        if value is not None and not math.isfinite(value):
            raise UserError(f"{where}: the {name} must be a finite number, got {value}")
    if prompt.flow_shift is not None and not 0 < prompt.flow_shift < math.inf:
        raise UserError(f"{where}: the flow shift must be a finite number above 0, got {prompt.flow_shift}")
    if traits.objective == "flow":
        if prompt.sampler.removeprefix("k_") != FLOW_SAMPLER:
            LOGGER.warning(f"{where}: --ss (sample_sampler) has no effect: {flow_sampler_note(traits)}")
        prompt = replace(prompt, sampler=FLOW_SAMPLER)
    else:
        without_effect = {"--g (guidance_scale)": prompt.guidance, "--fs (flow_shift)": prompt.flow_shift}
        for name, value in without_effect.items():
            if value is not None:
                LOGGER.warning(f"{where}: {name} has no effect with {traits.label}")

    return replace(
        prompt,
        width=_side("width", prompt.width, traits.pixel_multiple, where),
        height=_side("height", prompt.height, traits.pixel_multiple, where),
        steps=min(max(prompt.steps, 1), MAX_STEPS),
    )


def _side(name: str, pixels: int, multiple: int, where: str) -> int:
    """A side as it is drawn: a multiple of what the family needs, and at least `MIN_SIDE`. Raises: UserError."""
    if pixels > MAX_SIDE:
        raise UserError(f"{where}: the {name} must be at most {MAX_SIDE} pixels, got {pixels}")
    if pixels < 0:
        LOGGER.warning("%s: the %s %d is no size; %d is used", where, name, pixels, MIN_SIDE)
    return max(MIN_SIDE, pixels // multiple * multiple)
