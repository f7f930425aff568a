"""When a run saves, under which names, and what it deletes afterwards."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from library.options.saving import SavingOptions


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

    def epoch_path(self, epoch: int) -> Path:
        return self.folder / f"{self.name or 'epoch'}-{epoch:06d}{self.suffix}"

    def step_path(self, step: int) -> Path:
        return self.folder / f"{self.name or 'at'}-step{step:08d}{self.suffix}"

    def final_path(self) -> Path:
        return self.folder / f"{self.name or 'last'}{self.suffix}"

    def after_epoch(self, epoch: int, epochs: int) -> tuple[Path, Path | None] | None:
        """What to save after `epoch` of `epochs` and what to delete then; the last epoch is the final model's."""
        if not self.every_epochs or epoch % self.every_epochs or epoch >= epochs:
            return None
        old = epoch - self.every_epochs * self.last_epochs if self.last_epochs else -1
        return self.epoch_path(epoch), self.epoch_path(old) if old >= 0 else None

    def after_step(self, step: int) -> tuple[Path, Path | None] | None:
        """What to save after `step` and what to delete then."""
        if not self.every_steps or step % self.every_steps:
            return None
        old = -1
        if self.last_steps:
            old = step - self.last_steps - 1
            old -= old % self.every_steps
        return self.step_path(step), self.step_path(old) if old >= 0 else None


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
    )


def remove(path: Path) -> None:
    """Deletes exactly this file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
