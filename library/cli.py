"""`run(family, method)`: what every training script does.

The order is: parse, check everything that can be checked without torch, read the data set, load the model, train.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library import registry
from library.errors import UserError
from library.options.sharding import sharding_of
from library.runtime import logs
from library.runtime.logs import LOGGER
from library.training import joining

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.data.blueprint import DatasetSpec
    from library.families.base import Family, FamilyTraits
    from library.options.base import Options
    from library.options.sharding import Sharding
    from library.training.plan import RunPlan
    from library.training.sharding import Shards
    from library.types import Models

TITLES = {
    "network": "Trains a LoRA-type network on {model}.",
    "finetune": "Trains a whole model: {model}.",
    "dreambooth": "Trains a whole model, {model}, on folders of images of a concept (DreamBooth).",
}
TRACKERS = {"network": "network_train", "finetune": "finetuning", "dreambooth": "dreambooth"}  # where logs go


def build_parser(family: str, method: str) -> argparse.ArgumentParser:
    """The argument parser of a script, as GUIs and documentation tools want it."""
    from library.options import parsing

    groups = registry.groups_for(family, method)
    return parsing.build_parser(groups, prog=_script_name(), description=_description(family, method))


def run(family: str, method: str, argv: Sequence[str] | None = None, *, options: Options | None = None) -> None:
    """Runs one script and exits: 0 done, 2 the user has something to mend, 130 interrupted.

    Args:
        options: in place of a command line.
    """
    logs.quiet_third_parties()
    with ending_as_a_script():
        _train(family, method, sys.argv[1:] if argv is None else argv, options)


@contextmanager
def ending_as_a_script() -> Iterator[None]:
    """What a user's mistake and Ctrl-C become: one line, and the exit status."""
    try:
        yield
    except UserError as error:
        logs.fail(error)
    except KeyboardInterrupt:
        logs.end_progress()
        print("interrupted; what was saved before is whole", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        logs.fail_for_the_machine(error)


def load_family(family: str, argv: Sequence[str]) -> tuple[Family, Models]:
    """A family's adapter and its loaded model, for tools and tests that look at a model without training it.

    `argv` holds the options of a training script that concern the model. Raises: UserError.
    """
    from library.options import parsing

    logs.quiet_third_parties()
    opts = registry.FAMILIES[family].complete_options(
        parsing.parse_options(registry.groups_for(family, "network"), argv)
    )
    adapter = registry.FAMILIES[family].adapter(opts)
    return adapter, adapter.loader.load()


def _script_name() -> str:
    return os.path.basename(sys.argv[0] or "train")


def _description(family: str, method: str) -> str:

    return TITLES[method].format(model=registry.FAMILIES[family].traits.label)


def _train(family_name: str, method_name: str, argv: Sequence[str], options: Options | None = None) -> None:
    opts, specs, traits = _check(family_name, method_name, argv, options)
    if opts.saving.resume_from_huggingface:
        from library.training.hub import fetch_state

        opts = fetch_state(opts)
    if opts.saving.resume and _is_first_process():
        from library.training.state_notes import verify

        verify(Path(opts.saving.resume))
    sharding = sharding_of(opts)
    accelerator = joining.join_for_training(opts, sharding)
    shards = _make_shards(opts, sharding, accelerator)
    _rehearse(opts, accelerator, shards)
    opts = opts.replaced(seed=joining.agreed_seed(opts, accelerator))

    from library.data.reading import read_data
    from library.runtime.processes import Processes
    from library.training import lr_schedules

    processes = Processes(accelerator.process_index, accelerator.num_processes)
    data = read_data(specs, opts, traits, processes)
    run_plan = _plan_run(opts, data, accelerator)
    if opts.data.debug_dataset:
        _show_data(data, opts, accelerator)
        processes.leave()
        return
    lr_schedules.rehearse(opts.optimizer, run_plan.total_steps)  # now that it is known how long the run is

    from library.assembly import assemble
    from library.training.loop import train

    prepared = assemble(
        opts,
        registry.FAMILIES[family_name].adapter(opts),
        registry.make_method(method_name, opts),
        data,
        run_plan,
        accelerator,
        shards,
        missing_encoders=registry.FAMILIES[family_name].missing_encoders(opts),
        tracker=TRACKERS[method_name],
    )
    with prepared.tracker, prepared.hub:
        train(prepared)
    processes.leave()


def _check(
    family_name: str, method_name: str, argv: Sequence[str], opts: Options | None
) -> tuple[Options, list[Any], FamilyTraits]:
    """The options, with everything that can be wrong and is cheap to know told at once, before torch is imported."""
    from library.options import parsing

    if opts is None:
        groups = registry.groups_for(family_name, method_name)
        description = _description(family_name, method_name)
        opts = parsing.parse_options(
            groups, argv, prog=_script_name(), description=description, elsewhere=registry.options_elsewhere
        )
    level = opts.logging.console_log_level if _is_first_process() else "ERROR"  # the others report errors only
    logs.setup_logging(level, opts.logging.console_log_file, opts.logging.console_log_simple)
    traits = registry.FAMILIES[family_name].traits
    opts = registry.FAMILIES[family_name].complete_options(opts)
    return opts, checked(opts, family_name, method_name, traits), traits


def checked(opts: Options, family_name: str, method_name: str, traits: FamilyTraits) -> list[DatasetSpec]:
    """The datasets that the options describe, and in the log what the user should know about the options.

    Raises: UserError: everything that is wrong with the options, and with the files as far as names and headers tell.
    """
    from library.data.blueprint import build_specs
    from library.data.opencv import opencv
    from library.options import validation
    from library.options.logging import absolute_paths
    from library.options.optimizer import default_rate
    from library.training import leftovers, rehearsal

    writes = _is_first_process() and not opts.data.debug_dataset
    problems = list(validation.problems(opts, traits))
    specs: list[DatasetSpec] = []
    if not problems:  # the options make sense: now the files that they name
        if writes:
            leftovers.clear(opts.saving)
        problems += registry.method_problems(method_name, opts, traits)
        problems += registry.FAMILIES[family_name].check_paths(opts)
        for look in (lambda: specs.extend(build_specs(opts, traits)), lambda: joining.seed_of_state(opts), opencv):
            try:
                look()
            except UserError as error:
                problems += error.problems
    if not problems and writes:
        problems += rehearsal.problems(opts)
    if problems:
        raise UserError(*problems)
    for line in validation.warnings(opts, traits):
        LOGGER.warning("%s", line)
    for line in filter(None, (default_rate(opts), *absolute_paths(opts))):
        LOGGER.info("%s", line)
    return specs


def _is_first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _plan_run(opts: Options, data: Any, accelerator: Accelerator) -> RunPlan:
    from library.training.plan import make_plan

    run_plan = make_plan(
        data.batches_per_epoch,
        accelerator.num_processes,
        opts.training.gradient_accumulation_steps,
        steps=opts.training.max_train_steps,
        epochs=opts.training.max_train_epochs,
        by_default="max_train_steps" not in opts.explicit,
    )
    data.set_total_steps(run_plan.total_steps)
    return run_plan


def _make_shards(opts: Options, sharding: Sharding | None, accelerator: Accelerator) -> Shards | None:
    """What spreads the trained model over the processes; None: every process keeps all of it."""
    if sharding is None or opts.data.debug_dataset:
        return None
    if accelerator.num_processes == 1:
        LOGGER.warning("%s: no effect with one process, there is nothing to spread over", sharding.asked_by)
        return None
    from library.training.sharding import Shards

    return Shards(sharding, accelerator.device, accelerator.num_processes, first=accelerator.is_main_process)


def _rehearse(opts: Options, accelerator: Accelerator, shards: Shards | None) -> None:
    """What only the classes themselves can say about their arguments, while nothing large is loaded yet."""
    from library.training import lr_schedules, optimizers, resuming, state_notes

    if not opts.data.debug_dataset:
        if opts.saving.resume:
            folder = Path(opts.saving.resume)
            resuming.require_optimizer(
                folder, state_notes.read_making(folder), optimizers.optimizer_class(opts.optimizer)
            )
        optimizers.rehearse(opts.optimizer, accelerator.device, None if shards is None else shards.mesh)
        lr_schedules.rehearse(opts.optimizer)


def _show_data(data: Any, opts: Options, accelerator: Accelerator) -> None:
    """--debug_dataset."""
    if not accelerator.is_main_process:
        return
    from library.data.contact_sheet import show, write_sheets

    folder = Path(opts.saving.output_dir or ".") / "debug_dataset"
    sheets = write_sheets(data, folder)
    count = f"{len(sheets)} contact sheet{'' if len(sheets) == 1 else 's'}"
    LOGGER.info("%s in %s; nothing was trained (--debug_dataset)", count, folder)
    show(sheets)
