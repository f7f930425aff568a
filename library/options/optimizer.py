"""The optimizer, its rate, and how the rate changes. Nothing here imports an optimizer's package."""

from __future__ import annotations

import ast
import importlib.util
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.options.base import OptionGroup, Options, opt
from library.options.nearest import did_you_mean
from library.runtime.packages import remedy

if TYPE_CHECKING:
    from library.types import FamilyTraits

# short name, taken in any case of letters -> class
OPTIMIZERS = {
    "AdamW": "torch.optim.AdamW",
    "AdamW8bit": "bitsandbytes.optim.AdamW8bit",
    "PagedAdamW": "bitsandbytes.optim.PagedAdamW",
    "PagedAdamW8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "PagedAdamW32bit": "bitsandbytes.optim.PagedAdamW32bit",
    "Lion": "lion_pytorch.Lion",
    "Lion8bit": "bitsandbytes.optim.Lion8bit",
    "PagedLion8bit": "bitsandbytes.optim.PagedLion8bit",
    "SGDNesterov": "torch.optim.SGD",
    "SGDNesterov8bit": "bitsandbytes.optim.SGD8bit",
    "DAdaptation": "dadaptation.experimental.DAdaptAdamPreprint",
    "DAdaptAdamPreprint": "dadaptation.experimental.DAdaptAdamPreprint",
    "DAdaptAdaGrad": "dadaptation.DAdaptAdaGrad",
    "DAdaptAdam": "dadaptation.DAdaptAdam",
    "DAdaptAdan": "dadaptation.DAdaptAdan",
    "DAdaptAdanIP": "dadaptation.experimental.DAdaptAdanIP",
    "DAdaptLion": "dadaptation.DAdaptLion",
    "DAdaptSGD": "dadaptation.DAdaptSGD",
    "Prodigy": "prodigyopt.Prodigy",
    "AdaFactor": "transformers.optimization.Adafactor",
    "RAdamScheduleFree": "schedulefree.RAdamScheduleFree",
    "AdamWScheduleFree": "schedulefree.AdamWScheduleFree",
    "SGDScheduleFree": "schedulefree.SGDScheduleFree",
}
_PATHS = {name.lower(): path for name, path in OPTIMIZERS.items()}
# by their class names, as torch.optim has them up to 2.13
TORCH_OPTIMIZERS = (
    "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
)  # fmt: skip
UNUSABLE_OPTIMIZERS = {
    "LBFGS": "computes the loss several times in each step",
    "SparseAdam": "takes sparse gradients only",
}
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "piecewise_constant",
    "reduce_lr_on_plateau", "adafactor",
)  # fmt: skip
# likewise of torch.optim.lr_scheduler
TORCH_SCHEDULES = (
    "ConstantLR", "CosineAnnealingLR", "CosineAnnealingWarmRestarts", "CyclicLR", "ExponentialLR", "LinearLR",
    "MultiStepLR", "OneCycleLR", "PolynomialLR", "ReduceLROnPlateau", "StepLR",
)  # fmt: skip
UNUSABLE_SCHEDULES = ("ChainedScheduler", "LambdaLR", "MultiplicativeLR", "SequentialLR")
_FLOORS = ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay")
_CYCLIC = tuple(f"lr_scheduler={name}" for name in ("cosine_with_restarts", *_FLOORS))
_WITHOUT_ARGS = ("constant", "constant_with_warmup")
_RULES = re.compile(r"(-?[\d.]+(e-?\d+)?:\d+,)*-?[\d.]+(e-?\d+)?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(OptionGroup, group="optimizer", title="Optimizer and learning rate"):
    optimizer_type: str = opt(
        "",
        f"AdamW (used if nothing is given), {', '.join(n for n in OPTIMIZERS if n != 'AdamW')}, "
        "the name of a class of torch.optim, or the full import path of a class",
    )
    use_8bit_adam: bool = opt(False, "8-bit AdamW: less memory", deprecated="--optimizer_type AdamW8bit")
    use_lion_optimizer: bool = opt(False, "the Lion optimizer", deprecated="--optimizer_type Lion")
    learning_rate: float = opt(2e-6, "learning rate of every part that has none of its own")
    max_grad_norm: float = opt(1.0, "clip the gradient norm to this; 0 = off", at_least=0)
    optimizer_args: list[str] | None = opt(
        None, 'arguments of the optimizer as name=value, e.g. weight_decay=0.01 "betas=0.9,0.99"'
    )
    lr_scheduler_type: str = opt(
        "", "in place of --lr_scheduler: a class of torch.optim.lr_scheduler, or the full import path of a class"
    )
    lr_scheduler_args: list[str] | None = opt(
        None, "arguments of the schedule as name=value, e.g. T_max=1000 or step_rules=1:500,0.1"
    )
    lr_scheduler: str = opt("constant", f"learning rate schedule: {', '.join(SCHEDULES)}")
    lr_warmup_steps: int | float = opt(
        0, "steps over which the rate rises from 0, or a share such as 0.1 or 10%", at_least=0
    )
    lr_decay_steps: int | float = opt(
        0, "steps of the final decay of warmup_stable_decay, or a share such as 0.1 or 10%", at_least=0
    )
    lr_scheduler_num_cycles: int = opt(
        1,
        "number of cycles of cosine_with_restarts, or of half waves of the other cosine schedules",
        at_least=1,
        only_with=_CYCLIC,
    )
    lr_scheduler_power: float = opt(
        1, "exponent of the polynomial schedule", at_least=0, only_with=("lr_scheduler=polynomial",)
    )
    fused_backward_pass: bool = opt(
        False, "step each weight inside the backward pass, as soon as its gradient is computed: less memory"
    )
    lr_scheduler_timescale: int | None = opt(
        None, "time scale of inverse_sqrt in steps; the warm-up's length if not given", at_least=1, off=0
    )
    lr_scheduler_min_lr_ratio: float | None = opt(
        None,
        "lowest rate of cosine_with_min_lr, cosine_warmup_with_min_lr and warmup_stable_decay, as a share of the rate",
        at_least=0,
        at_most=1,
    )

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        chosen = {"--optimizer_type": self.optimizer_type}
        chosen["--use_8bit_adam"] = "AdamW8bit" if self.use_8bit_adam else ""
        chosen["--use_lion_optimizer"] = "Lion" if self.use_lion_optimizer else ""
        chosen = {flag: name for flag, name in chosen.items() if name}
        if len({_PATHS.get(name.lower(), name) for name in chosen.values()}) > 1:
            first, *others = chosen
            yield f"{first}: cannot be used with {' and '.join(others)}; choose one optimizer"
        yield from self._check_optimizer()
        yield from not_pairs("--optimizer_args", self.optimizer_args, literals=True)
        yield from not_pairs("--lr_scheduler_args", _without_rules(self), literals=True)
        if is_schedule_free(self):
            yield from self._check_no_schedule()
        elif not sets_own_rate(self):
            yield from self._check_type() if self.lr_scheduler_type else self._check_schedule()
        elif schedule_name(self) not in SCHEDULES:
            yield self._unknown_schedule()
        yield from self._check_initial_rate()
        if self.fused_backward_pass:
            yield from self._check_fused(opts)

    def _check_fused(self, opts: Options) -> Iterator[str]:
        flag = "--fused_backward_pass"
        if not steps_each_weight_independently(self):
            yield f"{flag}: {optimizer_name(self)} cannot step weights one by one; use AdaFactor or one of torch.optim"
        if opts.training.gradient_accumulation_steps > 1:
            yield f"{flag}: cannot be used with --gradient_accumulation_steps; gradients are gone after each batch"
        if opts.memory.mixed_precision == "fp16":
            yield f"{flag}: cannot be used with --mixed_precision fp16, whose steps wait for all gradients; use bf16"

    def _check_optimizer(self) -> Iterator[str]:
        name, path = optimizer_name(self), optimizer_path(self)
        package = path.split(".")[0]
        last = path.rpartition(".")[2]
        if path.startswith("torch.optim.") and last in UNUSABLE_OPTIMIZERS:
            yield f"--optimizer_type: {last} cannot train here: it {UNUSABLE_OPTIMIZERS[last]}"
        elif "." not in name and name.lower() not in _PATHS and name not in TORCH_OPTIMIZERS:
            near = did_you_mean(name, (*OPTIMIZERS, *TORCH_OPTIMIZERS))
            yield f"--optimizer_type: unknown optimizer {name!r}; names of torch.optim are case-sensitive{near}"
        elif not _installed(package):
            what_to_do = remedy(package) or "check the path, or install what it comes from"
            yield f"--optimizer_type: {name} needs the package {package}, which is not installed; {what_to_do}"

    def _check_no_schedule(self) -> Iterator[str]:
        why = f"{optimizer_name(self)} needs no schedule and no warm-up"
        if schedule_name(self) != "constant":
            yield f"--lr_scheduler: {why}; leave it out"
        for flag, value in (
            ("--lr_scheduler_type", self.lr_scheduler_type),
            ("--lr_scheduler_args", self.lr_scheduler_args),
            ("--lr_warmup_steps", self.lr_warmup_steps),
            ("--lr_decay_steps", self.lr_decay_steps),
        ):
            if value:
                yield f"{flag}: {why}; leave it out"

    def _check_type(self) -> Iterator[str]:
        name = self.lr_scheduler_type
        package = name.split(".")[0]
        if name.removeprefix("torch.optim.lr_scheduler.") in UNUSABLE_SCHEDULES:
            yield f"--lr_scheduler_type: {name} cannot be used: it takes functions or other schedules as arguments"
        elif "." in name and not _installed(package):
            yield f"--lr_scheduler_type: {name} needs the package {package}, which is not installed; check the path"
        elif "." not in name and name not in TORCH_SCHEDULES:
            near = did_you_mean(name, TORCH_SCHEDULES)
            yield f"--lr_scheduler_type: torch.optim.lr_scheduler has no class {name!r}{near}"
        if self.lr_warmup_steps:
            yield "--lr_warmup_steps: --lr_scheduler_type has no warm-up; leave it out"

    def _check_schedule(self) -> Iterator[str]:
        name = schedule_name(self)
        if name not in SCHEDULES:
            yield self._unknown_schedule()
        elif name == "adafactor":
            yield "--lr_scheduler: adafactor needs --optimizer_type AdaFactor with its relative_step"
        if self.lr_warmup_steps and name == "constant":
            yield "--lr_warmup_steps: a constant rate has no warm-up; use --lr_scheduler constant_with_warmup"
        if self.lr_warmup_steps and name == "reduce_lr_on_plateau":
            yield "--lr_warmup_steps: reduce_lr_on_plateau has no warm-up; leave it out"
        if self.lr_scheduler_args and name in _WITHOUT_ARGS:
            yield f"--lr_scheduler_args: --lr_scheduler {name} takes none"
        if name == "piecewise_constant":
            rules = _rules(self)
            factors = [] if rules is None else [part.partition(":")[0] for part in rules.split(",")]
            if rules is None or not _RULES.fullmatch(rules) or not all(map(_is_number, factors)):
                yield (
                    "--lr_scheduler_args: piecewise_constant needs step_rules=factor:step,...,factor, "
                    f"e.g. step_rules=1:500,0.1:800,0.01{'' if rules is None else f'; got {rules!r}'}"
                )

    def _check_initial_rate(self) -> Iterator[str]:
        name, colon, rate = self.lr_scheduler.partition(":")
        if not colon or name.lower() not in SCHEDULES:
            return
        if name.lower() != "adafactor":
            yield f"--lr_scheduler: only adafactor takes a rate after a colon, got {self.lr_scheduler!r}"
        elif not _is_number(rate):
            yield f"--lr_scheduler: adafactor:rate needs a number as its rate, got {self.lr_scheduler!r}"

    def _unknown_schedule(self) -> str:
        near = did_you_mean(schedule_name(self), SCHEDULES)
        return f"--lr_scheduler: must be one of {', '.join(SCHEDULES)}; got {self.lr_scheduler!r}{near}"

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        name = schedule_name(self)
        yield from repeated("--optimizer_args", self.optimizer_args)
        yield from repeated("--lr_scheduler_args", self.lr_scheduler_args)
        if self.fused_backward_pass and self.max_grad_norm:
            yield "--max_grad_norm: not applied with --fused_backward_pass, which never has all gradients at once"
        if is_adafactor(self):
            yield from self._adafactor_warnings(opts)
        if sets_own_rate(self):
            return
        typed = bool(self.lr_scheduler_type)
        if typed and "lr_scheduler" in opts.explicit:
            yield "--lr_scheduler: has no effect with --lr_scheduler_type"
        if self.lr_decay_steps and (typed or name != "warmup_stable_decay"):
            yield "--lr_decay_steps: has no effect without --lr_scheduler warmup_stable_decay"
        if self.lr_scheduler_min_lr_ratio and (typed or name not in _FLOORS):
            yield f"--lr_scheduler_min_lr_ratio: has no effect without {', '.join(_FLOORS[:-1])} or {_FLOORS[-1]}"
        if self.lr_warmup_steps and name == "piecewise_constant" and not typed:
            yield "--lr_warmup_steps: has no effect with --lr_scheduler piecewise_constant; write it into step_rules"

    def _adafactor_warnings(self, opts: Options) -> Iterator[str]:
        given = literal_args("--optimizer_args", self.optimizer_args)
        if self.max_grad_norm and not self.fused_backward_pass:
            yield "--max_grad_norm: AdaFactor limits its steps itself; 0 is the usual value with it"
        if not sets_own_rate(self):
            return
        if given.get("warmup_init") and not given.get("relative_step", True):
            yield "--optimizer_args: warmup_init=True needs relative_step=True, which is used"
        own = "AdaFactor with relative_step sets the rate itself"
        if "lr_scheduler" in opts.explicit and schedule_name(self) != "adafactor":
            yield f"--lr_scheduler: has no effect; {own}"
        for dest in ("lr_scheduler_type", "lr_scheduler_args", "lr_warmup_steps", "lr_decay_steps"):
            if getattr(self, dest):
                yield f"--{dest}: has no effect; {own}"


# ---- what was chosen


def optimizer_name(options: OptimizerOptions) -> str:
    """The optimizer as the user calls it."""
    if options.use_8bit_adam:
        return "AdamW8bit"
    if options.use_lion_optimizer:
        return "Lion"
    return options.optimizer_type or "AdamW"


def optimizer_path(options: OptimizerOptions) -> str:
    """The optimizer's class with its full import path."""
    name = optimizer_name(options)
    return name if "." in name else _PATHS.get(name.lower(), f"torch.optim.{name}")


def is_schedule_free(options: OptimizerOptions) -> bool:
    """Whether the optimizer averages its weights and so takes no schedule."""
    return optimizer_path(options).endswith("ScheduleFree")


def is_adafactor(options: OptimizerOptions) -> bool:
    """Whether the optimizer is AdaFactor as transformers has it."""
    return optimizer_path(options) in (_PATHS["adafactor"], "transformers.Adafactor")


def steps_each_weight_independently(options: OptimizerOptions) -> bool:
    """Whether the optimizer updates each weight independently, so that weights may be stepped in any order."""
    return is_adafactor(options) or optimizer_path(options).startswith("torch.optim.")


def has_global_state(options: OptimizerOptions) -> bool:
    """Whether the optimizer keeps state that belongs to all weights together, such as an estimated learning rate."""
    return optimizer_path(options).split(".")[0] in ("dadaptation", "prodigyopt", "prodigyplus", "schedulefree")


def sets_own_rate(options: OptimizerOptions) -> bool:
    """Whether AdaFactor computes its rate from the number of steps, which is its default."""
    if not is_adafactor(options) or any(not_pairs("", options.optimizer_args, literals=True)):
        return False
    given = literal_args("--optimizer_args", options.optimizer_args)
    return bool(given.get("relative_step", True) or given.get("warmup_init"))


def schedule_name(options: OptimizerOptions) -> str:
    """--lr_scheduler in small letters, without the rate of ``adafactor:1e-4``."""
    return options.lr_scheduler.partition(":")[0].lower()


def initial_rate(options: OptimizerOptions) -> float:
    """The rate before the first step where AdaFactor sets it: from ``adafactor:1e-4``, else --learning_rate."""
    name, _, rate = options.lr_scheduler.partition(":")
    return float(rate) if name.lower() == "adafactor" and rate else options.learning_rate


def default_rate(opts: Options) -> str | None:
    """A line about --learning_rate where it was not given and some part is trained with it; it suits whole models."""
    options: OptimizerOptions = opts.optimizer
    if "learning_rate" in opts.explicit or sets_own_rate(options) or not opts.method.needs_common_rate:
        return None
    usual = opts.method.usual_rate
    if optimizer_path(options).split(".")[0] in ("dadaptation", "prodigyopt", "prodigyplus"):
        usual = f"{optimizer_name(options)} finds the rate itself and wants 1"
    return f"learning rate: {options.learning_rate:g}, the default{f'; {usual} (--learning_rate)' if usual else ''}"


def schedule_args(options: OptimizerOptions) -> dict[str, Any]:
    """--lr_scheduler_args; step_rules is text, in quotes or not. Raises: UserError."""
    values = literal_args("--lr_scheduler_args", _without_rules(options))
    rules = _rules(options)
    return values if rules is None else {**values, "step_rules": rules}


def _rules(options: OptimizerOptions) -> str | None:
    for entry in options.lr_scheduler_args or ():
        name, _, text = entry.partition("=")
        if name.strip() == "step_rules":
            return text.strip().strip("'\"").replace(" ", "")
    return None


def _without_rules(options: OptimizerOptions) -> list[str]:
    entries = options.lr_scheduler_args or []
    return [entry for entry in entries if entry.partition("=")[0].strip() != "step_rules"]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _installed(package: str) -> bool:
    """Whether a top-level package is there; nothing is imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


# ---- name=value


def literal_args(flag: str, entries: Sequence[str] | None) -> dict[str, Any]:
    """``["weight_decay=0.1", "betas=0.9,0.99"]`` to a dict; values are Python literals.

    Raises: UserError: an entry without "=", or a value that is no literal.
    """
    problems = list(not_pairs(flag, entries, literals=True))
    if problems:
        raise UserError(*problems)
    pairs = (entry.partition("=") for entry in entries or ())
    return {name.strip(): ast.literal_eval(text.strip()) for name, _, text in pairs}


def repeated(flag: str, entries: Sequence[str] | None) -> Iterator[str]:
    """One line for each name that is given several values, of which the last one counts."""
    values: dict[str, set[str]] = {}
    for entry in entries or ():
        name, _, text = entry.partition("=")
        values.setdefault(name.strip(), set()).add(text.strip())
    for name in (name for name, given in values.items() if len(given) > 1):
        yield f"{flag}: {name} is given several times; the last one is used"


def not_pairs(flag: str, entries: Sequence[str] | None, *, literals: bool = False) -> Iterator[str]:
    """One line for each entry that is not name=value, or whose value is no Python literal where it must be one."""
    for entry in entries or ():
        name, equals, text = entry.partition("=")
        if not equals or not name.strip():
            yield f"{flag}: {entry!r} is not name=value"
        elif literals:
            try:
                ast.literal_eval(text.strip())
            except (ValueError, SyntaxError):
                yield f"{flag}: the value in {entry!r} must be a number, True, False, None, a list or text in quotes"
