"""Makes the results page of a run from the parts of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.runtime.durable import fitting
from library.training.results_page import facts
from library.training.results_page.page import Course, ResultsPage

if TYPE_CHECKING:
    from library.data.types import RunData
    from library.options.base import Options
    from library.training.saving import SavePlan

NAME = "the results page"
_NOTE = (
    "Run it in the folder where this run was started. {seed}Keys and tokens are left out of it, and a configuration "
    "file is spelled out."
)


@dataclass(frozen=True)
class Origin:
    """The script of a run, and what its files are to gen_img.py, see `MethodSpec.usage`."""

    scripts: tuple[str, ...]  # the names, without .py, of those that do the same
    usage: str | None = None


def page_path(saves: SavePlan) -> Path:
    return saves.folder / fitting(saves.name or "last", ".html")


def make_page(
    opts: Options,
    origin: Origin,
    course: Course,
    saves: SavePlan,
    data: RunData,
    about: Sequence[tuple[str, str]],
    example: facts.Example | None,
) -> ResultsPage:
    """The page. Args: example: the first sample prompt; None: the first caption is drawn."""
    saving, final = opts.saving, saves.final_path()
    several = saves.every_epochs or saves.every_steps
    pattern = str(final.with_name(f"{final.stem}*{saves.suffix}")) if several and saves.suffix else None

    def make() -> Mapping[str, Any]:
        compared = pattern if (origin.usage or "").startswith("--network_weights") else None
        drawn = example or _from_captions(data)
        processes = course.plan.processes
        seed = "" if "seed" in opts.given else "Its seed was drawn for this run. "
        return {
            "about": [["model", opts.model.pretrained_model_name_or_path], *map(list, about)],
            "settings": facts.settings(opts),
            "use": facts.use_commands(opts, origin.usage, final, compared, drawn),
            "command": facts.repeat_command(opts, facts.script_name(origin.scripts), processes),
            "command_note": _NOTE.format(seed=seed),
            "data": facts.data_report(data),
        }

    return ResultsPage(page_path(saves), Path(saving.output_name or "last").name, course, make)


def _from_captions(data: RunData) -> facts.Example:
    text, size = data.example()
    return facts.Example(text, *size)
