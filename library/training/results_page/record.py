"""What a results page remembers of a run: curves, sample images and saved files. It travels as JSON in the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_POINTS = 2000  # of a curve; of a longer one each point is the mean of several values
MOST_IMAGE_BYTES = 16 << 20  # of all sample images of a page; beyond it, those in between are left out


@dataclass
class Curve:
    """Values by step. `per` values make one point: their mean, at the last one's step."""

    points: list[list[float]] = field(default_factory=list)  # [step, value]
    per: int = 1
    _sum: float = 0.0  # of the values that are no point yet
    _waiting: int = 0
    _step: int = 0

    def add(self, step: int, value: float) -> None:
        if not math.isfinite(value):  # such as the gradient's norm in a step that the fp16 scaler leaves out
            return
        self._sum, self._waiting, self._step = self._sum + value, self._waiting + 1, step
        if self._waiting < self.per:
            return
        self.points.append([step, self._sum / self._waiting])
        self._sum, self._waiting = 0.0, 0
        if len(self.points) >= MOST_POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=False)
            self.points = [[later[0], (one[1] + later[1]) / 2] for one, later in pairs]
            self.per *= 2

    def to_json(self) -> dict[str, Any]:
        rest = [[self._step, self._sum / self._waiting]] if self._waiting else []
        return {"per": self.per, "points": [[step, float(f"{value:.6g}")] for step, value in (*self.points, *rest)]}


@dataclass
class Record:
    """Steps are optimizer steps done. Samples and files are as the page's script wants them."""

    curves: dict[str, Curve] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)  # step, epoch, number, prompt, href, src
    samples_left_out: int = 0
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # by name: name, href, step, epoch, size, time
    resumed: list[int] = field(default_factory=list)  # the steps after which the run was resumed
    seconds: float = 0.0  # that earlier parts of the run took

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.curves.setdefault(name, Curve()).add(step, value)

    def sample(self, step: int, epoch: int, number: int, prompt: str, href: str, src: str) -> None:
        """A sample image: `number` is its prompt's, `href` leads to its file, `src` is what to embed."""
        self.samples = [one for one in self.samples if (one["step"], one["number"]) != (step, number)]
        self.samples.append(
            {"step": step, "epoch": epoch, "number": number, "prompt": prompt, "href": href, "src": src}
        )
        self._limit_samples()

    def saved(self, name: str, href: str, step: int, epoch: int, size: int, time: float) -> None:
        self.files.pop(name, None)  # one that is saved again stands last
        self.files[name] = {"name": name, "href": href, "step": step, "epoch": epoch, "size": size, "time": time}

    def _limit_samples(self) -> None:
        """Leaves out the occasion that lies closest between its neighbours; of two only, the last prompt."""
        while sum(len(one["src"]) for one in self.samples) > MOST_IMAGE_BYTES and len(self.samples) > 1:
            steps = sorted({one["step"] for one in self.samples})
            if len(steps) > 2:
                closest = min(range(1, len(steps) - 1), key=lambda at: steps[at + 1] - steps[at - 1])
                kept = [one for one in self.samples if one["step"] != steps[closest]]
            else:
                last = max(one["number"] for one in self.samples)
                kept = [one for one in self.samples if one["number"] != last] or self.samples[-1:]
            self.samples_left_out += len(self.samples) - len(kept)
            self.samples = kept

    def to_json(self, there: Iterable[str]) -> dict[str, Any]:
        """Args: there: the names of the files that still are."""
        names = set(there)
        return {
            "series": {name: curve.to_json() for name, curve in self.curves.items()},
            "samples": self.samples,
            "samples_left_out": self.samples_left_out,
            "files": [file for name, file in self.files.items() if name in names],
            "resumed": self.resumed,
        }

    @classmethod
    def resumed_from(cls, data: Mapping[str, Any], step: int) -> Record:
        """The record of a page, without what came after `step`, from which the run is done again.

        Files stay: they are there until they are written again. Raises: KeyError, TypeError, ValueError: another page.
        """
        found = cls(samples_left_out=int(data["samples_left_out"]), seconds=float(data["progress"]["seconds"]))
        for name, curve in data["series"].items():
            points = [[int(at), float(value)] for at, value in curve["points"] if at <= step]
            found.curves[name] = Curve(points, int(curve["per"]))
        found.samples = [one for one in data["samples"] if one["step"] <= step]
        found.files = {file["name"]: file for file in data["files"]}
        found.resumed = [*(at for at in data["resumed"] if at < step), step]
        return found
