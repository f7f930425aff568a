"""The smoke command: what it tries exists, and a failure is shown and ends it with status 1."""

from __future__ import annotations

import sys
from pathlib import Path

from tools import smoke

ROOT = Path(__file__).resolve().parent.parent


def test_what_it_tries_is_there(tmp_path):
    assert all((ROOT / name).is_file() for name in (*smoke.TESTS, smoke.TRAINING[0]))
    tried = smoke.jobs(tmp_path)
    assert list(tried) == ["structure and options", "one training step"]
    assert tried["one training step"][-1] == f"--output_dir={tmp_path}"


def test_a_failure_is_shown(capsys):
    good, bad = ([sys.executable, "-c", code] for code in ("print('fine')", "raise SystemExit('no')"))
    commands = {"good": good, "bad": bad}
    assert smoke.run(commands) == 1
    said = capsys.readouterr().out
    assert "good: ok" in said
    assert "bad: failed\nno" in said
    assert "fine" not in said
    assert smoke.run({"good": good}) == 0
