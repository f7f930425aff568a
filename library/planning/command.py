"""--plan and --plan_apply: what a training script does with them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library import session
from library.errors import UserError
from library.planning import report, search
from library.planning.devices import present_device
from library.planning.plan import Plan
from library.planning.simulation import Request, simulate
from library.runtime import durable
from library.runtime.logs import LOGGER
from library.runtime.processes import Processes
from library.screen import shown

if TYPE_CHECKING:
    from library.data.types import DatasetSpec
    from library.families.spec import FamilySpec
    from library.methods.spec import MethodSpec
    from library.options.base import Options

DOES_NOT_FIT = 3  # the exit status
_APPLIED = "TRAINSCRIPTS_PLANNED"  # in the environment of the run that a plan has started


def plan_wanted(opts: Options) -> bool:
    return opts.planning.wanted and _APPLIED not in os.environ


def run_plan(opts: Options, family: FamilySpec, method: MethodSpec, specs: list[DatasetSpec], *, script: bool) -> None:
    """Plans the run that checked options ask for, prints the plan, and ends the process.

    With --plan_apply the process becomes the run, with the first change that makes it fit.

    Args: script: whether the process is the script's own, which can be started again.
    Raises: SystemExit: 0 where the run fits, else 3. UserError: as the run itself.
    """
    if opts.planning.plan_apply and not script:
        raise UserError("--plan_apply: starts the script again, which needs a command line; use --plan")
    device = opts.planning.device() or present_device()
    opts = opts.replaced(seed=opts.training.seed or 0)
    data, length = session.open_data(opts, specs, family.traits, Processes(), method.data, planned=_world())
    request = Request(opts, family, method, data, length, device, specs)
    plan = Plan(request, simulate(request))
    for line in report.lines_of(plan):
        print(shown(line))
    changes: list[search.Change] = []
    if not plan.fits:
        changes = search.find_changes(plan, lambda line: LOGGER.info("tried %s", line))
        for line in report.changes_in_words(changes):
            print(shown(line))
    if opts.planning.plan_json:
        _write(Path(opts.planning.plan_json), plan, changes)
    if opts.planning.plan_apply and (plan.fits or changes):
        _start([] if plan.fits else search.as_flags(changes[0].values))
    raise SystemExit(0 if plan.fits else DOES_NOT_FIT)


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _write(path: Path, plan: Plan, changes: Sequence[search.Change]) -> None:
    """Raises: UserError: the file cannot be written."""
    content = plan.to_json()
    content["changes"] = [
        {"options": change.values, "flags": change.flags, "device_bytes": change.plan.device_bytes,
         "seconds_per_step": change.plan.step_seconds, "images_per_second": change.plan.images_per_second}
        for change in changes
    ]  # fmt: skip
    try:
        with durable.replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--plan_json: {path} cannot be written ({error.strerror})") from None


def _start(flags: list[str]) -> None:
    """Becomes the script without its plan. A fresh process: nothing of the played machine is left in it."""
    words = [*sys.argv[1:], *flags]
    LOGGER.info("training%s", f" with {' '.join(flags)}" if flags else "")
    for handler in LOGGER.handlers:
        handler.flush()
    sys.stdout.flush()
    os.environ[_APPLIED] = "1"
    os.execv(sys.executable, [sys.executable, sys.argv[0], *words])
