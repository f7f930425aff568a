"""What every preparation script does around its work: options, messages, one summary, an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.options import parsing, validation
from library.options.base import OptionGroup, Options, options_of
from library.options.recipes import Scripts
from library.preparation.common.images import all_gather, is_first, processes
from library.preparation.common.summary import Outcome
from library.registry import options_elsewhere
from library.runtime import logs
from library.runtime.logs import LOGGER
from library.runtime.paths import require_here

if TYPE_CHECKING:
    from library.types import FamilyTraits


def run_script(
    work: Callable[[Options], Outcome | None],
    groups: Sequence[type[OptionGroup]],
    argv: Sequence[str] | None = None,
    *,
    description: str,
    traits: Callable[[Options], FamilyTraits | None] = lambda opts: None,
    recipes: Scripts | None = None,
) -> None:
    """Runs one script. It returns when all went well; else it exits.

    1: images failed, see `Outcome.status`; scripts without --strict are strict. 2: a user error. 130: interrupted.

    Args:
        work: what the script does. What it returns is added up over all processes and reported at the end.
        groups: one of them with the `console_log_...` options, such as `WorkOptions`.
        traits: those of the model family, where option groups of training are among `groups`.
        recipes: the scripts whose recipes --recipe takes, see `parse_options`.
    """
    logs.quiet_third_parties()
    status = 0
    try:
        require_here()
        program = os.path.basename(sys.argv[0])
        opts = parsing.parse_options(
            groups, argv, prog=program, description=description, elsewhere=options_elsewhere, scripts=recipes
        )
        values = opts.flat()
        level = values["console_log_level"] if is_first() else "ERROR"  # the other processes report errors only
        logs.setup_logging(level, values["console_log_file"], values["console_log_simple"])
        known: Any = traits(opts)
        problems = validation.problems(opts, known)
        if problems:
            raise UserError(*problems)
        for line in validation.warnings(opts, known):
            LOGGER.warning("%s", line)
        outcome = work(opts)
        if outcome is not None:
            whole = Outcome.together(all_gather(outcome))
            for line in whole.lines():
                LOGGER.info("%s", line)
            status = whole.status(values.get("strict", True))
        processes().close()
    except UserError as error:
        logs.fail(error)
    except KeyboardInterrupt:
        logs.end_progress()
        names = {option.dest for group in groups for option in options_of(group)}
        more = ", and --skip_existing continues from there" if "skip_existing" in names else ""
        print(f"interrupted; what was written before is whole{more}", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        logs.fail_for_the_machine(error)
    if status:
        raise SystemExit(status)
