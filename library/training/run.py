"""A run that is ready for its first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.runtime.processes import Processes
from library.training import saving
from library.training.ema import EMA
from library.training.optimizers import averaged_weights
from library.training.paired import Comparison

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.data.types import RunData
    from library.families.base import Family
    from library.inference.preview import Preview
    from library.memory.modulation import EvictedModulation
    from library.methods.base import Method
    from library.objectives.objective import Objective
    from library.options.base import Options
    from library.training.hub import Hub
    from library.training.plan import Progress, RunPlan
    from library.training.resuming import RunSettings
    from library.training.sharding import Shards
    from library.training.stepping import OptimizerStepper
    from library.training.tracking import Tracker
    from library.training.validation import Validation
    from library.types import Denoise, Draw, Models


@dataclass
class Run:
    """The parts of a run, built by `library.session`."""

    opts: Options
    seed: int
    family: Family
    method: Method
    models: Models
    denoise: Denoise
    objective: Objective
    data: RunData
    plan: RunPlan
    accelerator: Accelerator
    optimizer: torch.optim.Optimizer
    stepper: OptimizerStepper
    schedule: torch.optim.lr_scheduler.LRScheduler
    saves: saving.SavePlan
    preview: Preview
    validation: Validation
    tracker: Tracker
    hub: Hub
    make_metadata: Callable[[Progress], dict[str, str] | None]
    save_dtype: torch.dtype | None
    start: Progress
    settings: RunSettings  # to be saved in its states
    resume: Path | None = None  # state folder
    ema: EMA | None = None  # of the trained weights
    draw: Draw | None = None  # of a method that trains without images
    modulation: EvictedModulation | None = None  # where it is in CPU memory
    shards: Shards | None = None  # where the trained weights are sharded over the processes
    comparison: Comparison = field(default_factory=Comparison)  # by validation

    @contextmanager
    def as_used(self) -> Iterator[None]:
        """A context in which the trained module holds the weights that are saved, sampled and validated."""
        self._refresh()
        with averaged_weights(self.optimizer), nullcontext() if self.ema is None else self.ema.in_place():
            yield
            self._refresh()

    def _refresh(self) -> None:
        if self.shards is not None:  # weights gathered before know nothing of what changes now
            self.shards.refresh()

    @property
    def writes(self) -> bool:
        """Whether this process is the one that saves and samples."""
        return self.accelerator.is_main_process

    @property
    def takes_part(self) -> bool:
        """Whether this process is needed for it: sharded weights are gathered by all together."""
        return self.writes or self.shards is not None

    @property
    def processes(self) -> Processes:
        return Processes(self.accelerator.process_index, self.accelerator.num_processes)
