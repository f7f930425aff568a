"""What a results page says beside the curves: settings, commands, and the data set."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from library.data.sample.images import read_reduced
from library.options.base import Option, Options, options_of
from library.options.logging import secrets
from library.pages.page import data_url
from library.screen import HIDDEN, without_secrets
from library.types import Size

if TYPE_CHECKING:
    from library.data.types import RunData

# Options of training that say which model it is, and mean the same to gen_img.py.
OF_THE_MODEL = ("v2", "v_parameterization", "vae", "clip_l", "clip_g", "t5xxl", "ae")
SHOWN_OF_A_KIND = 12  # images of one kind that are shown
_THUMBNAIL = 160  # pixels
_NOT_REPEATED = ("config_file", "output_config", "recipe")  # what they hold is spelled out


@dataclass(frozen=True)
class Example:
    """What to draw with the result: the first sample prompt, or a caption at the size of the images."""

    prompt: str
    width: int
    height: int


def settings(opts: Options) -> dict[str, list[list[Any]]]:
    """The options that were given, with who gave them, and the others; secrets are hidden."""
    hidden, given, defaults = secrets(opts), [], []
    for group in opts.groups:
        for option in options_of(type(group)):
            value = getattr(group, option.dest)
            shown = HIDDEN if option.dest in hidden else _plain(value)
            if option.dest in opts.explicit:
                given.append([option.flag, shown, opts.origin(option.dest)])
            elif value is not None:
                defaults.append([option.flag, shown])
    return {"given": given, "defaults": defaults}


def repeat_command(opts: Options, script: str, processes: int) -> str:
    """The command line that does the same, without a configuration file and without secrets."""
    words = ["python"] if processes == 1 else ["accelerate", "launch", f"--num_processes={processes}"]
    words.append(script)
    known = {option.dest: option for group in opts.groups for option in options_of(type(group))}
    for dest, given in opts.given.items():
        option = known.get(dest)
        if option is not None and dest not in _NOT_REPEATED and not option.details.secret:
            words += as_flags(option, given.value)
    if "seed" not in opts.given:
        words.append(f"--seed={opts.training.seed}")
    return command_line(words)


def as_flags(option: Option, value: Any) -> list[str]:
    """The words that give an option this value on the command line; none for a switch that is off."""
    if option.kind == "bool":
        return [option.flag] if value else []
    if option.many:
        return [option.flag, *map(str, value)]
    return [f"{option.flag}={value}"]


def command_line(words: Sequence[str]) -> str:
    """The words as this system's shell takes them, an option to a line where it allows that."""
    if os.name == "nt":
        return subprocess.list2cmdline(words)
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--") and lines[0]:
            lines.append([])
        lines[-1].append(word)
    return " \\\n    ".join(shlex.join(line) for line in lines)


def script_name(scripts: Iterable[str]) -> str:
    """The training script as it was started, or, where another program has started the run, the first of these."""
    started = sys.argv[0] if sys.argv else ""
    names = list(scripts)
    return started if Path(started).stem in names else f"{names[0]}.py"


def use_commands(opts: Options, usage: str | None, file: Path, copies: str | None, example: Example) -> list[list[str]]:
    """[title, command] for what can be done with the result.

    Args:
        usage: the options of gen_img.py for a file of this kind, with {file}; None: it does not read them.
        copies: a pattern for the saved copies of a network, if there are several.
    """
    if usage is None:
        return []
    values = opts.flat()
    known = {option.dest: option for group in opts.groups for option in options_of(type(group))}
    model = [word for name in OF_THE_MODEL if values.get(name) for word in as_flags(known[name], values[name])]
    of_the_file = [word.format(file=file, stem=file.name.removesuffix(file.suffix)) for word in usage.split()]
    if not any(word.startswith("--ckpt=") for word in of_the_file):
        model.insert(0, f"--ckpt={opts.model.pretrained_model_name_or_path}")
    drawing = [f"--prompt={example.prompt}", f"--W={example.width}", f"--H={example.height}", "--seed=1"]
    common = ["python", "gen_img.py", *model]
    found = [["Draw images with it", command_line([*common, *of_the_file, *drawing, "--outdir=outputs"])]]
    if copies is not None:
        axes = ["--grid", f"network_weights={copies}", "network_mul=0.6,0.8,1.0"]
        title = "Compare the saved copies, at three strengths"
        found.append([title, command_line([*common, *drawing, "--outdir=outputs", *axes])])
    return found


def data_report(data: RunData) -> dict[str, Any]:
    """The lines of the start-up report, and what was left out or is odd, with small images. Reads files."""
    groups = [
        {
            "title": f"{title} ({len(found)})",
            "images": [_shown(path, why) for path, why in found[:SHOWN_OF_A_KIND]],
            "more": max(0, len(found) - SHOWN_OF_A_KIND),
        }
        for title, found in data.findings()
    ]
    return {"lines": [line.strip() for line in data.report()], "groups": groups}


def without_secrets_in(data: Any) -> Any:
    """The same data with secrets hidden in every text but embedded images."""
    if isinstance(data, str):
        return data if data.startswith("data:image/") else without_secrets(data)
    if isinstance(data, Mapping):
        return {key: without_secrets_in(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [without_secrets_in(value) for value in data]
    return data


def _shown(path: Path, why: str) -> dict[str, str | None]:
    try:
        pixels, _ = read_reduced(path, lambda size: _within(size, _THUMBNAIL))
        source = data_url(Image.fromarray(pixels), _THUMBNAIL, quality=70)
    except (OSError, ValueError, MemoryError):
        source = None
    return {"name": path.name, "why": why, "src": source}


def _within(size: Size, longest: int) -> Size:
    scale = min(1.0, longest / max(size))
    return Size(max(1, round(size.width * scale)), max(1, round(size.height * scale)))


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, list | tuple):
        return [str(item) for item in value]
    return value if isinstance(value, bool | int | str) else str(value)
