"""Options that have changed since a state was saved, and the settings that a state keeps to find them.

A rate, a setting of the optimizer (decay, betas, eps) and a schedule that have changed are applied: the run continues
at its step of the new schedule, with the rate that a run with these options has at that step. Another optimizer is
refused. Other data is reported. Where nothing differs, everything is loaded as it was saved, bit for bit.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    import torch

    from library.data.types import RunData
    from library.options.base import Options
    from library.options.optimizer import OptimizerOptions
    from library.training.plan import RunPlan

_NOT_SETTINGS = ("params", "lr", "initial_lr", "name")
_COMMON = ("betas", "weight_decay", "eps", "momentum", "dampening", "alpha", "rho")  # settings that no step changes
_OF_A_PLATEAU = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch", "_last_lr", "_sum", "_count")
# beginnings of the names of schedules that know how long the run is
_OVER_THE_RUN = ("linear", "cosine", "polynomial", "warmup_stable")
_DATA = {"images": "images", "reg_images": "regularisation images", "batches_per_epoch": "batches per epoch"}


@dataclass
class RunSettings:
    """The settings of a run that its states keep, as JSON values."""

    optimizer: str  # the class with its module
    groups: list[dict[str, Any]]  # of the optimizer as it was made: name, lr and the other settings
    schedule: dict[str, Any]
    data: dict[str, Any]
    rates_given: list[bool] = field(default_factory=list)  # by group: whether the user chose its rate; not saved

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        del values["rates_given"]
        return values


def settings_of(optimizer: torch.optim.Optimizer, opts: Options, run_plan: RunPlan, data: RunData) -> RunSettings:
    """The settings of a run. Call it when optimizer and schedule are built and nothing is loaded or trained yet."""
    options = opts.optimizer
    by_default = "learning_rate" not in opts.explicit
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        values = {name: _plain(value) for name, value in group.items() if name not in _NOT_SETTINGS}
        simple = {name: value for name, value in values.items() if isinstance(value, str | int | float | list | None)}
        rate = _plain(group.get("initial_lr", group.get("lr")))
        groups.append({"name": group.get("name", ""), "lr": rate, **simple})
    given = [not (by_default and group["lr"] == options.learning_rate) for group in groups]
    schedule = _schedule_of(options, run_plan.total_steps)
    lines = data.content()
    digest = hashlib.sha256(b"".join(line.encode("utf-8", "surrogatepass") + b"\n" for line in lines))
    counts = {
        "images": data.num_train_images,
        "reg_images": data.num_reg_images,
        "batches_per_epoch": run_plan.batches_per_epoch,
        "files": digest.hexdigest(),
    }
    return RunSettings(class_name(type(optimizer)), groups, schedule, counts, given)


def class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def require_optimizer(folder: Path, settings: Mapping[str, Any], cls: type) -> None:
    """Raises: UserError: another class of optimizer saved the state."""
    before = settings.get("optimizer")
    if isinstance(before, str) and _short(before) != _short(class_name(cls)):
        raise UserError(
            f"--resume: {folder} was saved with the optimizer {before[:100]}, and --optimizer_type now says "
            f"{class_name(cls)}; give that of the state, or start again from the saved weights"
        )


def _short(name: str) -> tuple[str, str]:
    """Package and class: modules inside a package may move from version to version."""
    return name.partition(".")[0], name.rpartition(".")[2]


def _plain(value: Any) -> Any:
    if hasattr(value, "item") and getattr(value, "numel", lambda: 1)() == 1:
        return value.item()
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _schedule_of(options: OptimizerOptions, total_steps: int) -> dict[str, Any]:
    from library.options.optimizer import is_schedule_free, schedule_args, schedule_name, sets_own_rate
    from library.training.lr_schedules import as_steps

    if sets_own_rate(options) or is_schedule_free(options):
        return {"lr_scheduler": "by the optimizer"}
    if options.lr_scheduler_type:
        values: dict[str, Any] = {"lr_scheduler": options.lr_scheduler_type}
    else:
        name = schedule_name(options)
        values = {
            "lr_scheduler": name,
            "lr_warmup_steps": as_steps(options.lr_warmup_steps, total_steps),
            "lr_decay_steps": as_steps(options.lr_decay_steps, total_steps),
            "lr_scheduler_num_cycles": options.lr_scheduler_num_cycles,
            "lr_scheduler_power": options.lr_scheduler_power,
            "lr_scheduler_timescale": options.lr_scheduler_timescale,
            "lr_scheduler_min_lr_ratio": options.lr_scheduler_min_lr_ratio,
        }
        if name.startswith(_OVER_THE_RUN):
            values["steps"] = total_steps
    return values | {f"lr_scheduler_args {name}": _plain(value) for name, value in schedule_args(options).items()}


# ---- what differs


def report_data(before: Any, now: Mapping[str, Any]) -> None:
    """Warns where the data differs from that of the state."""
    if not isinstance(before, dict) or not before or before == now:
        return
    other = [key for key in _DATA if before.get(key) != now[key]]
    counts = [f"{_text(before.get(key))} {_DATA[key]} then, {now[key]} now" for key in other]
    same_number = "other files, sizes or repeats in as many images" if now["images"] else "other prompts"
    what = "; ".join(counts) or same_number
    LOGGER.warning(
        "the data is not that of the resumed run (%s): the run continues at its step of an epoch of the new data", what
    )


class SettingChanges:
    """Settings, rates and schedule of a resumed run: those of the state, except where options have changed.

    Args:
        optimizer: newly built from the options; so is `schedule`.
        now: the settings of this run.
        before: those of the state, as JSON; empty where it has none.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        now: RunSettings,
        before: Mapping[str, Any],
    ):
        self._optimizer, self._schedule, self._now, self._before = optimizer, schedule, now, before
        skipped = ("params",)
        self._fresh = [
            {name: copy.deepcopy(value) for name, value in group.items() if name not in skipped}
            for group in optimizer.param_groups
        ]

    def to_groups(self) -> None:
        """Gives the groups of the optimizer, whose state is loaded, the settings that the options changed."""
        changed: dict[tuple[str, str], list[str]] = {}
        for number, (group, fresh) in enumerate(zip(self._optimizer.param_groups, self._fresh, strict=True)):
            for name, value in fresh.items():
                group.setdefault(name, value)  # a version that knows more settings than the one that saved
            for name, was in self._settings_before(number, group).items():
                given = self._now.groups[number].get(name, was)
                if name not in ("name", "lr") and given != was and _plain(group[name]) == was:  # else it is no setting
                    group[name] = fresh[name]
                    changed.setdefault((name, f"{_text(was)} -> {_text(given)}"), []).append(str(fresh.get("name", "")))
        for (name, change), parts in changed.items():
            LOGGER.info("--optimizer_args: %s of %s: %s (the former is the state's)", name, ", ".join(parts), change)

    def to_schedule(self, saved: Mapping[str, Any], step: int) -> bool:
        """Advances the schedule to `step` with the current rates and options, if any of these have changed.

        Args:
            saved: the schedule's state; it is to be loaded where nothing has changed.
            step: optimizer steps done.
        Returns: whether anything has changed.
        """
        from library.training.lr_schedules import AdafactorRates, wants_loss

        bases = [self._base(number, group) for number, group in enumerate(self._optimizer.param_groups)]
        was_plateau = "num_bad_epochs" in saved
        other = self._other_schedule(saved)
        changed = [old for old, new in bases if old != new]
        self._log_rates(bases)
        if isinstance(self._schedule, AdafactorRates) or not (other or changed):
            return False
        position = step if was_plateau or not isinstance(saved.get("last_epoch"), int) else saved["last_epoch"]
        if other:
            LOGGER.info("the schedule continues at step %d with other options: %s", position, "; ".join(other))
        if wants_loss(self._schedule):
            self._to_plateau(saved if was_plateau else {}, bases)
        else:
            self._move_to(position, [new for _, new in bases])
        return True

    def _settings_before(self, number: int, group: Mapping[str, Any]) -> Mapping[str, Any]:
        groups = self._before.get("groups")
        if isinstance(groups, list) and number < len(groups) and isinstance(groups[number], dict):
            return groups[number]
        return {name: _plain(group[name]) for name in _COMMON if name in self._fresh[number] and name in group}

    def _base(self, number: int, group: Mapping[str, Any]) -> tuple[Any, Any]:
        """The rates that a group's schedule starts from: that of the state, and the current one."""
        values, now = self._settings_before(number, group), self._now.groups[number]["lr"]
        if "lr" not in values and "initial_lr" not in group:  # not known, so it is taken for the same
            return now, now
        before = _plain(values["lr"] if "lr" in values else group["initial_lr"])
        if now is None or before is None:  # the optimizer found or finds it
            return (before, before) if now is None else (None, now)
        if not self._now.rates_given[number]:
            self._now.groups[number]["lr"] = before
            return before, before
        return before, now

    def _log_rates(self, bases: Sequence[tuple[Any, Any]]) -> None:
        named: dict[str, list[str]] = {}
        for (old, new), fresh in zip(bases, self._fresh, strict=True):
            if old != new:
                named.setdefault(f"{_text(old)} -> {_text(new)}", []).append(str(fresh.get("name") or "all parts"))
        for change, parts in named.items():
            LOGGER.info("the learning rate of %s: %s (the former is the state's)", ", ".join(parts), change)
        both = zip(bases, self._now.rates_given, strict=True)
        kept = {old for (old, _), given in both if not given and old is not None}
        if kept:
            rates = ", ".join(map(_text, sorted(kept)))
            LOGGER.info("--learning_rate was not given: that of the resumed run stays (%s)", rates)

    def _other_schedule(self, saved: Mapping[str, Any]) -> list[str]:
        before, now = self._before.get("schedule"), self._now.schedule
        if not isinstance(before, dict):  # only the class is known, by what it keeps
            ours = vars(self._schedule)
            other = any((kind in saved) != (kind in ours) for kind in ("lr_lambdas", "num_bad_epochs"))
            return [f"--lr_scheduler is now {now['lr_scheduler']}"] if other else []
        # What one of two schedules does not have says nothing beside their names; of one, arguments come and go.
        same = before.get("lr_scheduler") == now["lr_scheduler"]
        names = {**before, **now} if same else [name for name in before if name in now]
        names = [name for name in names if before.get(name) != now.get(name)]
        flags = {name: name if name == "steps" else f"--{name}" for name in names}
        return [f"{flags[name]} {_text(before.get(name))} -> {_text(now.get(name))}" for name in names]

    def _move_to(self, position: int, bases: Sequence[Any]) -> None:
        """Sets the schedule to where `position` steps with these rates leave it."""
        schedule = self._schedule
        for group, fresh, base, first in zip(
            self._optimizer.param_groups, self._fresh, bases, schedule.base_lrs, strict=True
        ):
            group["initial_lr"] = base
            group["lr"] = fresh["lr"] if base == first or not first else fresh["lr"] * (base / first)
        schedule.base_lrs = list(bases)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch misses the optimizer's steps, which another run has done
            if hasattr(schedule, "lr_lambdas"):  # a function of the step alone
                schedule.last_epoch = position - 1
                schedule.step()
            else:
                for _ in range(position):
                    schedule.step()

    def _to_plateau(self, saved: Mapping[str, Any], bases: Iterable[tuple[Any, Any]]) -> None:
        """Carries the reductions so far over to the current rates, as factors."""
        schedule = self._schedule
        vars(schedule).update({name: saved[name] for name in _OF_A_PLATEAU if name in saved})
        for group, fresh, (old, new), floor in zip(
            self._optimizer.param_groups, self._fresh, bases, schedule.min_lrs, strict=True
        ):
            group["initial_lr"] = new
            group["lr"] = max(group["lr"] * new / old, floor) if saved and old else fresh["lr"]
        schedule._last_lr = [group["lr"] for group in self._optimizer.param_groups]


def _text(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
