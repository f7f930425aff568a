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
        None, "length of the run in epochs; wins over --max_train_steps", at_least=1, off=0
    )
    seed: int | None = opt(
        None,
        "start of every random stream; equal seeds give equal runs. Chosen at random if not given",
        at_least=0,
        at_most=2**32 - 1,
    )
    gradient_accumulation_steps: int = opt(
        1, "batches per optimizer step; more of them act like a larger batch in little memory", at_least=1
    )
    ema: bool = opt(False, "average the trained weights over time; what is saved, sampled and validated is the average")
    ema_decay: float = opt(0.999, "share of the average that each step keeps", above=0, below=1, only_with=("ema",))
    skip_until_initial_step: bool = opt(
        False,
        "with --initial_step or --initial_epoch, go on in the data as if the steps before had been done; a run that "
        "--resume continues always does",
        only_with=("initial_step", "initial_epoch", "resume"),
    )
    initial_epoch: int | None = opt(None, "epoch to start counting from, 1 is the first", at_least=1, off=0)
    initial_step: int | None = opt(None, "optimizer steps that count as done; wins over --initial_epoch", at_least=0)

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.max_train_epochs is not None and "max_train_steps" in opts.explicit:
            yield f"--max_train_steps {self.max_train_steps}: has no effect, --max_train_epochs decides the length"
