"""`<output_dir>/<output_name>.html`: a run as a page that needs nothing else, written again as the run goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from library.errors import UserError
from library.pages.page import data_url, read_data, render
from library.runtime.durable import replacing
from library.runtime.logs import LOGGER
from library.training.results_page.facts import without_secrets_in
from library.training.results_page.record import Record
from library.training.tracking import MEMORY, PACE, Sink

if TYPE_CHECKING:
    from PIL import Image

    from library.training.plan import Progress, RunPlan
    from library.training.tracking import Ending

_EVERY = 60.0  # seconds between two versions where nothing is sampled or saved
_SHARE = 0.02  # of the time that writing may take then


@dataclass(frozen=True)
class Course:
    """The part of a run that this process does."""

    plan: RunPlan
    start: Progress
    resumed: bool

    def epoch(self, step: int) -> int:
        return max(1, -(-step // self.plan.steps_per_epoch))


class ResultsPage(Sink):
    """The page as a sink of the tracker, in whose thread it is read, filled and written.

    A resumed run continues the page that is there; any other begins a new one. What is there and is no such page stays.

    Args:
        facts: makes the parts of the page that stay the same: "about", "settings", "use", "command", "data".
    """

    def __init__(self, path: Path, name: str, course: Course, facts: Callable[[], Mapping[str, Any]]):
        self.path, self._name, self._course, self._make_facts = path, name, course, facts
        self._record = Record()
        self._facts: Mapping[str, Any] = {}
        self._started = time.time()
        self._step = course.start.step
        self._pace: float | None = None
        self._memory = 0.0
        self._ending: Ending | None = None
        self._written = self._took = 0.0  # seconds: when it was written last, and how long that took

    def open(self) -> None:
        """Raises: UserError: a file of this name is something else."""
        if self.path.exists():
            self._continue()
        self._facts = self._make_facts()
        self.flush()

    def _continue(self) -> None:
        try:
            data = read_data(self.path)
            found = Record.resumed_from(data, self._course.start.step)
        except (KeyError, TypeError, ValueError, UserError):
            raise UserError(f"{self.path} is there and is no results page; it stays as it is") from None
        if self._course.resumed:
            self._record = found

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._step = max(self._step, step)
        self._pace = values.get(PACE, self._pace)
        self._memory = max(self._memory, values.get(MEMORY, 0.0))
        self._record.scalars(step, {name: value for name, value in values.items() if name != MEMORY})
        since = time.time() - self._written
        if since > _EVERY and since * _SHARE > self._took:
            self.flush()

    def image(self, step: int, name: str, image: Image.Image, caption: str, path: Path) -> None:
        number = int(name.rpartition("/")[2])
        link = quote(os.fsencode(Path(os.path.relpath(path, self.path.parent)).as_posix()))
        self._record.sample(step, self._course.epoch(step), number, caption, link, data_url(image))

    def saved(self, step: int, path: Path) -> None:
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        size = sum(file.stat().st_size for file in files)
        link = quote(os.fsencode(path.name))
        self._record.saved(path.name, link, step, self._course.epoch(step), size, time.time())
        self.flush()

    def ended(self, ending: Ending) -> None:
        self._ending = ending

    def close(self, failed: bool) -> None:
        self.flush()
        LOGGER.info("%s shows this run in a browser", self.path)

    def flush(self) -> None:
        """Writes the page: beside it, then in its place."""
        began = time.time()
        page = render("results.html", self._name, without_secrets_in(self._data(began)))
        with replacing(self.path) as unfinished:
            unfinished.write_text(page, encoding="utf-8")
        self._written, self._took = time.time(), time.time() - began

    def _data(self, now: float) -> dict[str, Any]:
        course, plan = self._course, self._course.plan
        there = [name for name in self._record.files if (self.path.parent / name).exists()]
        return {
            "name": self._name,
            "progress": {
                "state": "running" if self._ending is None else self._ending.kind,
                "text": "" if self._ending is None else self._ending.text,
                "step": self._step,
                "total": plan.total_steps,
                "epoch": course.epoch(self._step),
                "epochs": plan.epochs,
                "seconds": round(self._record.seconds + now - self._started, 1),
                "pace": self._pace,
                "memory": self._memory,
                "written": round(now),
            },
            **self._record.to_json(there),
            **self._facts,
        }
