"""`run(family, method)`: what every training script does: parse, check, train; errors become an exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING

from library import registry
from library.errors import UserError
from library.runtime import libraries, limits, logs
from library.runtime.logs import LOGGER
from library.runtime.paths import require_here

if TYPE_CHECKING:
    from library.families.base import Family
    from library.families.spec import FamilySpec
    from library.options.base import Options
    from library.types import Models


def build_parser(family: str, method: str) -> argparse.ArgumentParser:
    """The argument parser of a script, as GUIs and documentation tools want it."""
    from library.options import parsing

    groups = registry.groups_for(family, method)
    parser = parsing.build_parser(groups, prog=_script_name(), description=_description(family, method))
    parser.scripts = registry.scripts_of(family, method)
    return parser


def run(family: str, method: str, argv: Sequence[str] | None = None, *, options: Options | None = None) -> None:
    """Runs one script and exits: 0 done, 2 wrong options or data, 3 planned and too large, 130 stopped by Ctrl-C.

    Args:
        argv: without the script's name; None: this process's own.
        options: in place of a command line.
    """
    logs.quiet_third_parties()
    with ending_as_a_script():
        _train(family, method, argv, options)


@contextmanager
def ending_as_a_script() -> Iterator[None]:
    """Turns a user error and Ctrl-C into one line and the exit status."""
    try:
        require_here()
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
    spec = registry.FAMILIES[family]
    adapter = spec.adapter(spec.complete_options(parsing.parse_options(registry.groups_for(family, "network"), argv)))
    return adapter, adapter.loader.load()


def _script_name() -> str:
    return os.path.basename(sys.argv[0] or "train")


def _description(family: str, method: str) -> str:
    return registry.METHODS[method].title.format(model=registry.FAMILIES[family].traits.label)


def _train(family_name: str, method_name: str, argv: Sequence[str] | None, options: Options | None) -> None:
    from library import checking
    from library.options import parsing

    opts = options
    if opts is None:
        groups = registry.groups_for(family_name, method_name)
        description = _description(family_name, method_name)
        opts = parsing.parse_options(
            groups,
            argv,
            prog=_script_name(),
            description=description,
            elsewhere=registry.options_elsewhere,
            scripts=registry.scripts_of(family_name, method_name),
        )
    level = opts.logging.console_log_level if checking.is_first_process() else "ERROR"  # the others report errors only
    logs.setup_logging(level, opts.logging.console_log_file, opts.logging.console_log_simple)
    family, method = registry.FAMILIES[family_name], registry.METHODS[method_name]
    opts = method.complete_options(family.complete_options(opts))
    if opts.noise.show_timesteps:
        _show_timesteps(opts, family)
        return
    specs = checking.check(opts, family, method)
    opts = checking.check_resumed(opts)
    if argv is None and options is None:  # the process is the script's own
        # Optional packages that diffusers must import: xformers for its attention, scipy for its sampler lms.
        wanted = {"xformers": opts.memory.xformers, "scipy": opts.sampling.sample_prompts}
        libraries.import_libraries({name for name, use in wanted.items() if use})

    if opts.planning.wanted:
        from library.planning.command import plan_wanted, run_plan

        if plan_wanted(opts):
            run_plan(opts, family, method, specs, script=options is None)

    from library.session import run_session

    try:
        status = run_session(opts, family, method, specs)
    except (MemoryError, RuntimeError) as error:
        problem = limits.out_of_memory(error)
        if problem is None and opts.memory.compile_fullgraph:
            from library.memory.compiling import not_one_graph

            line = not_one_graph(error)
            if line is not None:
                raise UserError(line) from error
        if problem is None:
            raise
        LOGGER.debug("where it was raised:", exc_info=error)
        raise UserError(f"{problem}; {_against_it(opts, family)}") from error
    if status:
        raise SystemExit(status)


def _show_timesteps(opts: Options, family: FamilySpec) -> None:
    """--show_timesteps, for which neither model nor images need be there."""
    from library import checking

    checking.check_objective(opts, family.traits)
    if not checking.is_first_process():
        return
    from library.training.show_timesteps import show_timesteps

    show_timesteps(opts, family.traits, family.adapter(opts).denoiser.objective())


def _against_it(opts: Options, family: FamilySpec) -> str:
    """What takes less memory than these options, in words."""
    from library.planning.search import suggestions

    found = list(islice(suggestions(opts, family.traits), 3))
    more = "--plan shows how much is needed, and what is enough"
    return f"less memory take {', '.join(found)}; {more}" if found else more
