"""The options of a prompt line and of the tables of prompt files: their letters, keys and kinds. Nothing heavy here.

An option starts at `` --`` and goes on until the next one; its letters may be of either case.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from library.errors import UserError
from library.runtime.logs import LOGGER

Changes = dict[str, Any]  # fields of a prompt, by name, and the values that they are given


def whole_numbers(text: str) -> tuple[int, ...]:
    """``1,2,3``. Raises: ValueError."""
    return tuple(int(one) for one in text.split(","))


def numbers(text: str) -> tuple[float, ...]:
    """``0.5,1``; finite. Raises: ValueError."""
    found = tuple(float(one) for one in text.split(","))
    if not all(map(math.isfinite, found)):
        raise ValueError(text)
    return found


def number_or_none(text: str) -> float | None:
    """A finite number, or ``none``. Raises: ValueError."""
    if text.lower() == "none":
        return None
    (number,) = numbers(text)
    return number


def text_or_empty(text: str) -> str:
    """A text; a single ``-`` stands for an empty one."""
    return "" if text == "-" else text


_KIND_NAMES: dict[Callable[[str], Any], str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    whole_numbers: "whole numbers with commas between them",
    numbers: "numbers with commas between them",
    number_or_none: "a number or none",
    text_or_empty: "a text",
}


@dataclass(frozen=True)
class PromptOption:
    """An option of a prompt line and the same thing's key in .toml and .json files."""

    letter: str
    key: str  # in files
    field: str | None  # of SamplePrompt; None: not available yet
    kind: Callable[[str], Any] = str


NEGATIVE = "negative_prompt"  # the field that free dashes may be part of, beside the prompt
_COMMON = (
    PromptOption("n", "negative_prompt", NEGATIVE),
    PromptOption("w", "width", "width", int),
    PromptOption("h", "height", "height", int),
)
_SAMPLING = (
    PromptOption("s", "sample_steps", "steps", int),
    PromptOption("l", "scale", "scale", float),
    PromptOption("g", "guidance_scale", "guidance", float),
    PromptOption("ss", "sample_sampler", "sampler"),
    PromptOption("cn", "controlnet_image", "control"),
    PromptOption("ctr", "cfg_trunc_ratio", None),
    PromptOption("rcfg", "renorm_cfg", None),
    PromptOption("fs", "flow_shift", "flow_shift", float),
)
_SOURCE = (PromptOption("i", "image", "source"), PromptOption("img", "image", "source"))  # of models for inpainting
TRAINING = (
    *_COMMON,
    PromptOption("d", "seed", "seed", int),
    *_SAMPLING,
    PromptOption("am", "additional_network_multiplier", "multipliers", numbers),
    *_SOURCE,
)
GENERATION = (
    *_COMMON,
    PromptOption("d", "seed", "seeds", whole_numbers),  # one for each image of the prompt
    *_SAMPLING,
    PromptOption("nl", "negative_scale", "negative_scale", number_or_none),
    PromptOption("t", "strength", "strength", float),
    PromptOption("c", "clip_prompt", "clip_prompt"),
    PromptOption("am", "network_mul", "multipliers", numbers),
    PromptOption("ow", "original_width", "sizes.original_width", int),
    PromptOption("oh", "original_height", "sizes.original_height", int),
    PromptOption("nw", "original_width_negative", "sizes.negative_width", int),
    PromptOption("nh", "original_height_negative", "sizes.negative_height", int),
    PromptOption("ct", "crop_top", "sizes.crop_top", int),
    PromptOption("cl", "crop_left", "sizes.crop_left", int),
    PromptOption("dsd1", "ds_depth_1", "shrink.depth_1", int),
    PromptOption("dst1", "ds_timesteps_1", "shrink.timesteps_1", int),
    PromptOption("dsd2", "ds_depth_2", "shrink.depth_2", int),
    PromptOption("dst2", "ds_timesteps_2", "shrink.timesteps_2", int),
    PromptOption("dsr", "ds_ratio", "shrink.ratio", float),
    PromptOption("glt", "gradual_latent_timesteps", "gradual.timesteps", int),
    PromptOption("glr", "gradual_latent_ratio", "gradual.ratio", float),
    PromptOption("gle", "gradual_latent_every_n_steps", "gradual.every_n_steps", int),
    PromptOption("gls", "gradual_latent_ratio_step", "gradual.ratio_step", float),
    PromptOption("glsn", "gradual_latent_s_noise", "gradual.s_noise", float),
    PromptOption("glus", "gradual_latent_unsharp_params", "gradual.unsharp", numbers),
    PromptOption("f", "file_name", "file_name"),
)
MINIMAL = (
    PromptOption("n", "negative_prompt", "negative_prompt", text_or_empty),
    PromptOption("w", "width", "width", int),
    PromptOption("h", "height", "height", int),
    PromptOption("d", "seed", "seeds", whole_numbers),
    PromptOption("s", "sample_steps", "steps", int),
    PromptOption("g", "guidance_scale", "guidance", float),
    PromptOption("m", "network_mul", "multipliers", numbers),
    PromptOption("c", "scale", "scale", float),
)


class Syntax:
    """The options that may stand in a prompt."""

    def __init__(self, options: Sequence[PromptOption] = TRAINING):
        self._options = tuple(options)
        self._by_letter = {option.letter: option for option in options}
        self._by_key = {option.key: option for option in options}

    def parse(self, entry: str | dict[str, Any], where: str) -> Changes:
        """The fields that a prompt line, or a table of a file, gives a prompt.

        Args: where: names the entry in messages.
        Raises: UserError: a bad value, or an option that is not available yet.
        """
        return self._parse_line(entry, where) if isinstance(entry, str) else self._parse_table(entry, where)

    def _parse_line(self, line: str, where: str) -> Changes:
        # The leading blank lets a line begin with an option.
        prompt, *parts = f" {line.strip()}".split(" --")
        changes: Changes = {"prompt": prompt.strip()}
        text = "prompt"  # the field that free dashes are part of
        for part in parts:
            letters, _, value = re.sub(r"\s", " ", part).partition(" ")
            value = value.strip()
            if not letters:  # dashes with a blank behind them belong to the text
                changes[text] = f"{changes[text]} -- {value}".strip()
                continue
            option = self._by_letter.get(letters.lower())
            if option is None:
                known = " ".join(f"--{o.letter}" for o in self._options)
                LOGGER.warning("%s: ignored: --%s is no option of a prompt; these are %s", where, letters, known)
                continue
            name = f"--{option.letter}"
            text = NEGATIVE if option.field == NEGATIVE else "prompt"
            if not value and option.field != NEGATIVE:
                raise UserError(f"{where}: {name} needs a value")
            try:
                changes[_available(option, name, where)] = option.kind(value)
            except ValueError:
                raise UserError(f"{where}: {name} needs {_KIND_NAMES[option.kind]}, got {value!r}") from None
        return changes

    def _parse_table(self, table: dict[str, Any], where: str) -> Changes:
        if not isinstance(table.get("prompt"), str):
            raise UserError(f"{where}: needs a `prompt` text")
        changes: Changes = {"prompt": table["prompt"]}
        for key, value in table.items():
            if key == "prompt":
                continue
            option = self._by_key.get(key)
            if option is None:
                known = ", ".join(self._by_key)
                LOGGER.warning("%s: ignored: unknown key %r; the keys are prompt, %s", where, key, known)
                continue
            field = _available(option, key, where)
            try:
                changes[field] = _from_value(option, value)
            except OverflowError:
                raise UserError(f"{where}: {key}: the number is too large") from None
            except (TypeError, ValueError):
                raise UserError(f"{where}: {key} needs {_KIND_NAMES[option.kind]}, got {value!r}") from None
        return changes


def _from_value(option: PromptOption, value: Any) -> Any:
    """The value of a file's key. Raises: TypeError, ValueError: of another type; OverflowError: too large."""
    if isinstance(value, bool):
        raise TypeError(value)
    if option.kind in (whole_numbers, numbers, number_or_none):  # as a text, a number, or a list of them
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int | float | str) for item in items):
            raise TypeError(value)
        return option.kind(",".join(map(str, items)))
    accepted = (int, float) if option.kind is float else str if option.kind is text_or_empty else option.kind
    if not isinstance(value, accepted):
        raise TypeError(value)
    return option.kind(value)


def _available(option: PromptOption, name: str, where: str) -> str:
    if option.field is None:
        raise UserError(f"{where}: {name} ({option.key}) is not available yet")
    return option.field
