from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from library.errors import UserError
from library.options.base import OptionGroup, opt
from library.options.preparation import WorkOptions
from library.preparation.common.script import run_script
from library.preparation.common.summary import Outcome


@dataclass(frozen=True, kw_only=True)
class TrialOptions(OptionGroup, group="trial", title="Trial"):
    folder: str = opt(None, "where to work", positional=True)
    size: int = opt(1, "how large", at_least=1)
    length: int | None = opt(None, "as --size", deprecated="--size", alias_of="size")

    def check(self, opts, traits):
        if self.size == 13:
            yield "--size: not thirteen"


GROUPS = (TrialOptions, WorkOptions)


def run(work, *line: str) -> int:
    try:
        run_script(work, GROUPS, line, description="A trial.")
    except SystemExit as stop:
        return stop.code
    return 0


def test_the_work_gets_its_options_and_the_summary_is_reported(capsys):
    seen = []

    def work(opts):
        seen.append((opts.trial.folder, opts.trial.size, opts.work.strict))
        return Outcome(done=2, skipped=1)

    assert run(work, "here", "--size=4") == 0
    assert seen == [("here", 4, False)]
    assert capsys.readouterr().err.endswith("2 done, 1 skipped\n")


def test_a_script_without_images_says_nothing(capsys):
    assert run(lambda opts: None, "here") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("done", "flags", "status"), [(1, [], 0), (1, ["--strict"], 1), (0, [], 1)])
def test_failures_decide_the_status(capsys, done, flags, status):
    assert run(lambda opts: Outcome(done=done, failed={Path("a.png"): "broken"}), "here", *flags) == status
    assert "failed: a.png: broken" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([], "error: the following arguments are required: folder\n"),
        (["x", "--size=0"], "error: --size: must be at least 1, got 0\n"),
        (["x", "--size=13"], "error: --size: not thirteen\n"),
        (["x", "--sise=3"], "error: unknown option --sise; did you mean '--size'?\n"),
    ],
)
def test_wrong_options_are_reported_before_the_work(capsys, line, message):
    def work(opts):
        raise AssertionError("must not begin")

    assert run(work, *line) == 2
    assert capsys.readouterr().err == message


def test_an_older_spelling_counts_and_is_reported(capsys):
    sizes = []
    assert run(lambda opts: sizes.append(opts.trial.size), "x", "--length=5") == 0
    assert sizes == [5]
    assert "--length: deprecated; use --size" in capsys.readouterr().err


def test_mistakes_found_on_the_way_are_one_line(capsys):
    def work(opts):
        raise UserError("a.json: no such thing")

    assert run(work, "x") == 2
    assert capsys.readouterr().err == "error: a.json: no such thing\n"


def test_an_interruption_is_no_traceback(capsys):
    def work(opts):
        raise KeyboardInterrupt

    assert run(work, "x") == 130
    assert capsys.readouterr().err == "interrupted; what was written before is whole\n"


def test_an_interruption_shows_of_skip_existing_where_there_is_such_an_option(capsys):
    def work(opts):
        raise KeyboardInterrupt

    @dataclass(frozen=True, kw_only=True)
    class Skipping(OptionGroup, group="skipping", title="Skipping"):
        skip_existing: bool = opt(False, "leave out what is there")

    with pytest.raises(SystemExit):
        run_script(work, (Skipping, WorkOptions), [], description="x")
    assert capsys.readouterr().err.endswith("--skip_existing continues from there\n")


def test_a_bug_keeps_its_traceback():
    def work(opts):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(work, "x")


def test_messages_go_where_they_are_sent(capsys, tmp_path):
    file = tmp_path / "log.txt"
    assert run(lambda opts: Outcome(done=1), "x", f"--console_log_file={file}", "--console_log_simple") == 0
    assert (file.read_text(encoding="utf-8"), capsys.readouterr().err) == ("1 done\n", "")
    assert run(lambda opts: Outcome(done=1), "x", f"--console_log_file={tmp_path / 'none' / 'log.txt'}") == 2
    assert capsys.readouterr().err.startswith("error: --console_log_file: cannot write ")


def test_help_exits_with_0(capsys):
    assert run(lambda opts: None, "--help") == 0
    shown = capsys.readouterr().out
    assert "[options] folder" in shown
    assert "A trial." in shown


WORK_OF_TWO = """
import sys
from pathlib import Path
from library.options.preparation import WorkOptions
from library.preparation.common.summary import Outcome
from library.preparation.common.images import all_gather, is_first, my_share, processes
from library.preparation.common.script import run_script

def work(opts):
    share = my_share([Path(f"{n}.png") for n in range(5)])
    parts = all_gather(share)
    if is_first():
        print(*[path.stem for part in parts for path in part])
    return Outcome(done=len(share) - 1, failed={share[0]: f"no good in {processes().rank}"})

run_script(work, (WorkOptions,), ["--console_log_simple"], description="Two.")
"""


OF_ITS_OWN = """
import os, sys
from pathlib import Path
own = Path(sys.argv[1], os.environ["RANK"])
sys.stdout, sys.stderr = (own.with_suffix(end).open("w", buffering=1) for end in (".out", ".err"))
try:
    exec(sys.argv[2], {"__name__": "__main__"})
    status = 0
except SystemExit as end:
    status = end.code or 0
own.with_suffix(".status").write_text(str(status))
"""


@pytest.fixture
def run_two(run_script, tmp_path):
    """Two processes of a run, and what each of them said. None is ended because the other one has failed."""

    def run(code: str) -> list[subprocess.CompletedProcess]:
        done = run_script("-c", OF_ITS_OWN, tmp_path, code, processes=2, variables={"ACCELERATE_USE_CPU": "true"})
        assert done.returncode == 0, done.stderr
        status, output, errors = (
            [(tmp_path / f"{rank}{end}").read_text() for rank in range(2)] for end in (".status", ".out", ".err")
        )
        return [subprocess.CompletedProcess([], int(status[n]), output[n], errors[n]) for n in range(2)]

    return run


def test_processes_name_one_summary_of_all(run_two):
    first, other = run_two(WORK_OF_TWO)
    assert (first.returncode, other.returncode) == (0, 0), first.stderr + other.stderr
    assert (first.stdout, other.stdout) == ("0 2 4 1 3\n", "")
    assert first.stderr.endswith("3 done, 2 failed\nfailed: 0.png: no good in 0\nfailed: 1.png: no good in 1\n")
    assert "done" not in other.stderr


TROUBLE_OF_TWO = """
from library.errors import UserError
from library.options.preparation import WorkOptions
from library.preparation.common.images import by_the_first, all_gather, is_first
from library.preparation.common.script import run_script

def find():
    raise UserError("no such tagger")

def work(opts):
    {work}

run_script(work, (WorkOptions,), [], description="Two.")
"""


def test_what_the_first_process_cannot_do_is_reported_once(run_two):
    first, other = run_two(TROUBLE_OF_TWO.format(work="by_the_first(find)"))
    assert (first.returncode, other.returncode) == (2, 2)
    assert first.stderr.splitlines()[-1] == "error: no such tagger"
    assert "error" not in first.stderr.replace("error: no such tagger", "") + other.stderr.lower()


def test_a_process_that_waits_for_one_that_has_stopped_says_so(run_two):
    first, other = run_two(TROUBLE_OF_TWO.format(work="all_gather(1); find() if is_first() else all_gather(2)"))
    assert first.returncode == 2
    assert "error: another process of this run has stopped" in other.stderr
    assert "Traceback" not in first.stderr + other.stderr
