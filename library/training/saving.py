"""When a run saves, under which names, and what it deletes afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from library.errors import UserError
from library.options.saving import SavingOptions

_OF_WRITING = ("inline_container", "iostream error", "PytorchStreamWriter")  # in what torch.save says of a full disk


class SaveRequest(NamedTuple):
    """The files to write at one point of the run, and those to delete afterwards."""

    path: Path
    obsolete: Path | None = None
    state: Path | None = None  # None: no state is wanted
    obsolete_state: Path | None = None


@dataclass(frozen=True)
class SavePlan:
    """File names and retention. Epochs count from 1, steps are optimizer steps; `suffix` is empty for folders."""

    folder: Path
    name: str | None  # --output_name
    suffix: str
    every_epochs: int | None
    every_steps: int | None
    last_epochs: int | None
    last_steps: int | None
    states: bool = False  # with every copy and at the end
    final_state: bool = False
    last_epochs_state: int | None = None  # None: as many as copies
    last_steps_state: int | None = None

    def epoch_path(self, epoch: int) -> Path:
        return self.folder / f"{self.name or 'epoch'}-{epoch:06d}{self.suffix}"

    def step_path(self, step: int) -> Path:
        return self.folder / f"{self.name or 'at'}-step{step:08d}{self.suffix}"

    def final_path(self) -> Path:
        return self.folder / f"{self.name or 'last'}{self.suffix}"

    def best_path(self) -> Path:
        """The path of the copy with the lowest validation loss."""
        return self.folder / f"{self.name or 'last'}-best{self.suffix}"

    def state_of(self, path: Path) -> Path:
        """The state folder beside a copy."""
        return path.with_name(f"{path.name.removesuffix(self.suffix)}-state")

    def after_epoch(self, epoch: int, epochs: int) -> SaveRequest | None:
        """The request after `epoch` of `epochs`, or None; after the last epoch it is that of `final`."""
        if not self.every_epochs or epoch % self.every_epochs or epoch >= epochs:
            return None

        def before(kept: int | None) -> Path | None:
            old = epoch - self.every_epochs * kept if kept else -1
            return self.epoch_path(old) if old >= 0 else None

        return self._request(self.epoch_path(epoch), before(self.last_epochs), before(self.last_epochs_state))

    def after_step(self, step: int) -> SaveRequest | None:
        """The request after `step`, or None."""
        if not self.every_steps or step % self.every_steps:
            return None

        def before(kept: int | None) -> Path | None:
            old = step - kept - 1 if kept else -1
            return self.step_path(old - old % self.every_steps) if old >= 0 else None

        return self._request(self.step_path(step), before(self.last_steps), before(self.last_steps_state))

    def final(self) -> SaveRequest:
        """The request at the end."""
        path = self.final_path()
        return SaveRequest(path, None, self.state_of(path) if self.states or self.final_state else None)

    def _request(self, path: Path, old: Path | None, old_by_state: Path | None) -> SaveRequest:
        if not self.states:
            return SaveRequest(path, old)
        by_state = old_by_state or old
        return SaveRequest(path, old, self.state_of(path), self.state_of(by_state) if by_state else None)


def make_save_plan(options: SavingOptions, suffix: str, epochs: int) -> SavePlan:
    every_epochs = options.save_every_n_epochs
    if options.save_n_epoch_ratio:
        every_epochs = max(1, epochs // options.save_n_epoch_ratio)
    return SavePlan(
        folder=Path(options.output_dir),
        name=options.output_name,
        suffix=suffix,
        every_epochs=every_epochs,
        every_steps=options.save_every_n_steps,
        last_epochs=options.save_last_n_epochs,
        last_steps=options.save_last_n_steps,
        states=options.save_state,
        final_state=options.save_state_on_train_end,
        last_epochs_state=options.save_last_n_epochs_state,
        last_steps_state=options.save_last_n_steps_state,
    )


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raises: UserError: less than `needed` bytes are free where `folder` is or will be."""
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{folder}: {what} takes about {needed / 2**20:.0f} MiB, and only {free / 2**20:.0f} MiB are free; "
            "make room, or choose another --output_dir"
        )


@contextmanager
def failing_clearly(path: Path) -> Iterator[None]:
    """Turns what the system says against writing `path` into one line, whoever passes it on. Raises: UserError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in _OF_WRITING):
            raise
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be saved ({reason}); what was saved before is whole") from None
