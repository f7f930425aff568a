"""Processes that share work and tensors, in real processes over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from library.runtime.processes import Processes

ROOT = Path(__file__).resolve().parents[2]
WORKER = """
from pathlib import Path

import torch
from library.runtime.processes import Processes

torch.distributed.init_process_group("gloo")
ours = Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())
assert list(ours.shard("abcde")) == (["a", "c", "e"], ["b", "d"])[ours.rank]
assert ours.all_max(ours.rank * 7) == 7
assert ours.all_gather({"a": ours.rank}) == [{"a": 0}, {"a": 1}]
ours.barrier()
own = [torch.full((2, n + 1), float(10 * ours.rank + n)) for n in range(2 - ours.rank)]
shapes = [[(2, 1), (2, 2)], [(2, 1)]]
seen = [[tensor[0, 0].item() for tensor in theirs] for theirs in ours.broadcast_all(own, shapes)]
assert seen == [[0.0, 1.0], [10.0]], seen
ours.close()
assert not torch.distributed.is_initialized()
Path(f"fine {ours.rank}").touch()
"""


def test_one_process_waits_for_nobody():
    alone = Processes()
    alone.barrier()
    assert alone.all_max(3) == 3
    assert alone.all_gather("x") == ["x"]
    assert list(alone.shard([1, 2])) == [1, 2]


def test_two_processes(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [sys.executable, *launcher, str(tmp_path / "worker.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.name for path in tmp_path.glob("fine *")) == ["fine 0", "fine 1"]
