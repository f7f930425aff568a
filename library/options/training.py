"""How long a run is, and where its randomness starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.options.base import OptionGroup, Options, opt

if TYPE_CHECKING:
    from library.types import FamilyTraits


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(OptionGroup, group="training", title="Training"):
    max_train_steps: int = opt(1600, "length of the run in optimizer steps", at_least=1)
    max_train_epochs: int | None = opt(
        None, "length of the run in epochs; takes precedence over --max_train_steps", at_least=1, off=0
    )
    seed: int | None = opt(
        None,
        "seed of all random streams; equal seeds give equal runs. Chosen at random if not given",
        at_least=0,
        at_most=2**32 - 1,
    )
    gradient_accumulation_steps: int = opt(
        1, "batches per optimizer step; more of them act like a larger batch without its memory", at_least=1
    )
    ema: bool = opt(
        False, "keep an exponential moving average of the trained weights; the average is saved, sampled and validated"
    )
    ema_decay: float = opt(0.999, "decay of the average per step", above=0, below=1, only_with=("ema",))
    skip_until_initial_step: bool = opt(
        False,
        "with --initial_step or --initial_epoch, continue in the data as if the earlier steps had been "
        "done; --resume always does",
        only_with=("initial_step", "initial_epoch", "resume"),
    )
    initial_epoch: int | None = opt(None, "epoch to start counting from; 1 is the first", at_least=1, off=0)
    initial_step: int | None = opt(
        None, "number of optimizer steps that count as done; takes precedence over --initial_epoch", at_least=0
    )

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.max_train_epochs is not None and "max_train_steps" in opts.explicit:
            yield f"--max_train_steps {self.max_train_steps}: has no effect with --max_train_epochs"
