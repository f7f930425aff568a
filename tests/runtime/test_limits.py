"""What the outermost border of a script turns into one line, and what keeps its traceback."""

from __future__ import annotations

import errno

import pytest
import torch

from library import cli
from library.options.preparation import WorkOptions
from library.preparation.common import script
from library.runtime.limits import as_user_error


def raised(call):
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.empty(1 << 50),
        lambda: torch.nn.Linear(1 << 40, 1 << 10),
        lambda: torch.empty(1 << 62, 1 << 3),
        lambda: bytearray(1 << 60),
        lambda: (_ for _ in ()).throw(MemoryError()),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
    ],
)
def test_failed_allocations_are_one_line(call):
    (line,) = as_user_error(raised(call)).problems
    assert line.startswith("not enough ")
    assert "memory" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/x/model"), "/x/model: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; nothing more can be written"),
        (OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"), "a -> b: Invalid cross-device link"),
        (OSError(errno.ENAMETOOLONG, "File name too long", b"a"), "a: File name too long"),
    ],
)
def test_what_the_system_refuses_is_one_line(error, line):
    assert as_user_error(error).problems == (line,)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"), RuntimeError("shapes differ"), KeyError("x"), RecursionError(), OSError("no errno"),
        ConnectionError(errno.ECONNRESET, "reset"), AssertionError(), OSError(errno.EBADF, "Bad file descriptor", 7),
    ],
)  # fmt: skip
def test_what_may_be_a_fault_of_the_code_is_not_hidden(error):
    assert as_user_error(error) is None


@pytest.mark.parametrize("border", ["training", "preparation"])
@pytest.mark.parametrize(
    "error", [MemoryError("of 9 GB"), PermissionError(13, "Permission denied", "/x"), KeyError("bug")]
)
def test_both_borders(border, error, monkeypatch, capsys):
    def work(*_):
        raise error

    monkeypatch.setattr(cli, "_train", work)

    def run():
        if border == "training":
            cli.run("sd", "network", [])
        else:
            script.run_script(work, (WorkOptions,), [], description="")

    if isinstance(error, KeyError):
        with pytest.raises(KeyError):
            run()
        return
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1


def test_the_traceback_is_in_the_log_with_debug(capsys):
    def work(_):
        raise MemoryError("of 9 GB")

    with pytest.raises(SystemExit):
        script.run_script(work, (WorkOptions,), ["--console_log_level=DEBUG"], description="")
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "border",
    [
        lambda: cli.run("sd", "network", ["--network_module=networks.lora"]),
        lambda: script.run_script(lambda opts: None, (WorkOptions,), [], description=""),
    ],
    ids=["training", "preparation"],
)
def test_a_current_folder_that_is_gone_is_one_line(border, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    with pytest.raises(SystemExit) as end:
        border()
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "error: the current folder is gone (No such file or directory); change into one that exists\n"
    )
