"""What an image file says about how it was made: keys of its own, and the line that web interfaces read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.inference.images import png_text
from library.inference.prompts import SamplePrompt
from library.runtime.logs import LOGGER

PARAMETERS = "parameters"  # the key of AUTOMATIC1111's line
# Our samplers by the names there; others are written as they are.
_SAMPLERS = {
    "ddim": "DDIM",
    "pndm": "PLMS",
    "lms": "LMS",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm_2": "DPM2",
    "dpm_2_a": "DPM2 a",
    "dpmsolver++": "DPM++ 2M",
}


_NETWORK = re.compile(r" ?<((?:lora|lyco|hypernet):[^<>]+)>")  # a network of web interfaces, in the prompt
_SETTING = re.compile(r"([^,:]+): (\"(?:[^\"\\]|\\.)*\"|[^,]*)(?:, |$)")  # name, and value, which may be quoted
_OURS = {theirs: ours for ours, theirs in _SAMPLERS.items()}
# By their names there: the fields of a prompt, and what turns texts into values.
_SETTINGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "Steps": ("steps", int),
    "Sampler": ("sampler", _OURS.__getitem__),
    "CFG scale": ("scale", float),
    "Distilled CFG Scale": ("guidance", float),
    "Seed": ("seed", int),
}


@dataclass(frozen=True)
class Made:
    """What is known of an image beside its prompt."""

    raw_prompt: str  # as it was given
    model: str  # the name of its file
    networks: Sequence[tuple[str, float]] = ()  # names and strengths
    clip_skip: int | None = None
    clip_prompt: str | None = None


def texts_of(prompt: SamplePrompt, made: Made) -> dict[str, str]:
    """The texts of an image's file by their keys."""
    sizes = prompt.sizes
    given = {
        "negative-scale": prompt.negative_scale,
        "clip-prompt": made.clip_prompt,
        "strength": None if prompt.source is None else prompt.strength,
        "original-width": sizes.original_width,
        "original-height": sizes.original_height,
        "original-width-negative": sizes.negative_width,
        "original-height-negative": sizes.negative_height,
        "crop-top": sizes.crop_top or None,
        "crop-left": sizes.crop_left or None,
    }
    return {
        **png_text(prompt),
        **{name: str(value) for name, value in given.items() if value is not None},
        "raw-prompt": made.raw_prompt,
        PARAMETERS: parameters_of(prompt, made),
    }


def parameters_of(prompt: SamplePrompt, made: Made) -> str:
    """The prompt, the negative prompt and the settings, as AUTOMATIC1111's "PNG info" restores them."""
    networks = "".join(f" <lora:{name}:{strength:g}>" for name, strength in made.networks)
    lines = [f"{prompt.prompt}{networks}"]
    if prompt.negative_prompt:
        lines.append(f"Negative prompt: {prompt.negative_prompt}")
    settings = {
        "Steps": str(prompt.steps),
        "Sampler": _SAMPLERS.get(prompt.sampler.removeprefix("k_"), prompt.sampler),
        "CFG scale": f"{prompt.scale:g}",
        "Distilled CFG Scale": None if prompt.guidance is None else f"{prompt.guidance:g}",
        "Seed": str(prompt.seed),
        "Size": f"{prompt.width}x{prompt.height}",
        "Model": made.model,
        "Denoising strength": None if prompt.source is None else f"{prompt.strength:g}",
        "Clip skip": None if made.clip_skip is None else str(made.clip_skip),
    }
    shown = []
    for name, value in settings.items():
        if value is not None:
            if re.search(r"[,:\n]", value):  # quoted, as the reader of these texts expects
                value = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
            shown.append(f"{name}: {value}")
    lines.append(", ".join(shown))
    return "\n".join(lines)


def said_in(text: str, where: str) -> dict[str, Any]:
    """The fields of a prompt that such a line gives: texts, and those settings that are the same here.

    Args: where: names the file in messages.
    """
    words, _, last = text.rpartition("\nSteps: ")
    words, last = (words, f"Steps: {last}") if words else (text, "")
    prompt, _, negative = f"\n{words}".partition("\nNegative prompt: ")
    networks = _NETWORK.findall(prompt)
    if networks:
        LOGGER.warning(
            "%s: its networks are not used: %s; give them with --network_weights", where, ", ".join(networks)
        )
    found: dict[str, Any] = {"prompt": _NETWORK.sub("", prompt).strip(), "negative_prompt": negative.strip()}
    settings = dict(_SETTING.findall(last))
    for name, (field, kind) in _SETTINGS.items():
        try:
            found[field] = kind(settings[name])
        except (KeyError, ValueError):
            continue
    return found


def model_name(path: str) -> str:
    return Path(path).stem if Path(path).is_file() else Path(path).name
