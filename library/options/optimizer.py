"""The optimizer, its rate, and how the rate changes."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.options.base import OptionGroup, Options, opt
from library.options.nearest import did_you_mean

if TYPE_CHECKING:
    from library.families.base import FamilyTraits

# by their class names, as torch.optim has them up to 2.13
TORCH_OPTIMIZERS = (
    "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "Muon", "NAdam", "RAdam", "RMSprop", "Rprop",
    "SGD", "SparseAdam",
)  # fmt: skip
OPTIMIZERS = ("AdamW", "AdamW8bit", "SGDNesterov")  # in any case of letters
LATER_OPTIMIZERS = (
    "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit", "Lion", "Lion8bit", "PagedLion8bit", "SGDNesterov8bit",
    "DAdaptation", "DAdaptAdamPreprint", "DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptAdanIP", "DAdaptLion",
    "DAdaptSGD", "Prodigy", "AdaFactor", "RAdamScheduleFree", "AdamWScheduleFree", "SGDScheduleFree",
)  # fmt: skip
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "cosine_with_min_lr", "warmup_stable_decay",
)  # fmt: skip
LATER_SCHEDULES = ("piecewise_constant", "adafactor", "reduce_lr_on_plateau", "cosine_warmup_with_min_lr")


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(OptionGroup, group="optimizer", title="Optimizer and learning rate"):
    optimizer_type: str = opt(
        "", "AdamW (used if nothing is given), AdamW8bit, SGDNesterov, or the name of a class of torch.optim"
    )
    use_8bit_adam: bool = opt(False, "8-bit AdamW: less memory", deprecated="--optimizer_type AdamW8bit")
    use_lion_optimizer: bool = opt(False, "the Lion optimizer", later="the Lion optimizer")
    learning_rate: float = opt(2e-6, "learning rate of every part that has none of its own")
    max_grad_norm: float = opt(1.0, "gradients longer than this are cut to it; 0 = off", at_least=0)
    optimizer_args: list[str] | None = opt(
        None, 'arguments of the optimizer as name=value, e.g. weight_decay=0.01 "betas=0.9,0.99"'
    )
    lr_scheduler_type: str = opt("", "a scheduler class of your own", later="scheduler classes by import path")
    lr_scheduler_args: list[str] | None = opt(
        None, "arguments of that class as name=value", later="scheduler classes by import path"
    )
    lr_scheduler: str = opt("constant", f"how the rate changes during the run: {', '.join(SCHEDULES)}")
    lr_warmup_steps: int | float = opt(
        0, "steps over which the rate rises from 0, or a share such as 0.1 or 10%", at_least=0
    )
    lr_decay_steps: int | float = opt(
        0, "steps of the final decay of warmup_stable_decay, or a share such as 0.1 or 10%", at_least=0
    )
    lr_scheduler_num_cycles: int = opt(
        1, "restarts of cosine_with_restarts; twice the cosine half-waves elsewhere", at_least=1
    )
    lr_scheduler_power: float = opt(1, "exponent of the polynomial schedule", at_least=0)
    fused_backward_pass: bool = opt(False, "step the optimizer inside the backward pass", later="fused backward pass")
    lr_scheduler_timescale: int | None = opt(
        None, "time scale of inverse_sqrt in steps; the warm-up's length if not given", at_least=1
    )
    lr_scheduler_min_lr_ratio: float | None = opt(
        None, "lowest rate of cosine_with_min_lr and warmup_stable_decay, as a share of the rate", at_least=0, at_most=1
    )

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        chosen = [
            flag
            for flag, given in (
                ("--optimizer_type", self.optimizer_type),
                ("--use_8bit_adam", self.use_8bit_adam),
                ("--use_lion_optimizer", self.use_lion_optimizer),
            )
            if given
        ]
        if len(chosen) > 1:
            yield f"{chosen[0]}: cannot be used with {' and '.join(chosen[1:])}; choose one optimizer"
        yield from self._check_optimizer()
        yield from not_pairs("--optimizer_args", self.optimizer_args, literals=True)
        yield from not_pairs("--lr_scheduler_args", self.lr_scheduler_args, literals=True)
        yield from self._check_schedule()

    def _check_optimizer(self) -> Iterator[str]:
        name = self.optimizer_type
        lower = name.lower()
        if not name or name in TORCH_OPTIMIZERS or lower in map(str.lower, OPTIMIZERS):
            return
        if "." in name:
            yield f"--optimizer_type: not available yet (optimizers by import path), got {name!r}"
        elif lower in map(str.lower, LATER_OPTIMIZERS):
            yield f"--optimizer_type: not available yet (the {name} optimizer); use one of {', '.join(OPTIMIZERS)}"
        else:
            near = did_you_mean(name, (*OPTIMIZERS, *TORCH_OPTIMIZERS))
            yield f"--optimizer_type: unknown optimizer {name!r}; names of torch.optim are case-sensitive{near}"

    def _check_schedule(self) -> Iterator[str]:
        name = self.lr_scheduler.lower()
        if name.split(":")[0] in LATER_SCHEDULES:
            yield f"--lr_scheduler: not available yet (the {self.lr_scheduler} schedule)"
        elif name not in SCHEDULES:
            yield f"--lr_scheduler: must be one of {', '.join(SCHEDULES)}; got {self.lr_scheduler!r}"
        if name == "constant" and self.lr_warmup_steps:
            yield "--lr_warmup_steps: a constant rate has no warm-up; use --lr_scheduler constant_with_warmup"

    def advise(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        name = self.lr_scheduler.lower()
        if self.lr_decay_steps and name != "warmup_stable_decay":
            yield "--lr_decay_steps: no effect without --lr_scheduler warmup_stable_decay"
        if self.lr_scheduler_min_lr_ratio and name not in ("cosine_with_min_lr", "warmup_stable_decay"):
            yield "--lr_scheduler_min_lr_ratio: no effect without cosine_with_min_lr or warmup_stable_decay"


def not_pairs(flag: str, entries: Sequence[str] | None, *, literals: bool = False) -> Iterator[str]:
    """One line for each entry that is not name=value, or whose value is no Python literal where it must be one."""
    for entry in entries or ():
        name, equals, text = entry.partition("=")
        if not equals or not name.strip():
            yield f"{flag}: {entry!r} is not name=value"
        elif literals and not _is_literal(text.strip()):
            yield f"{flag}: the value in {entry!r} must be a number, True, False, None, a list or text in quotes"


def _is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return False
    return True
