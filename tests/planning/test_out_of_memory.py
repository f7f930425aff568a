"""Memory that runs out, as torch's allocator reports it: where it may happen without harm, and where it ends a run."""

from __future__ import annotations

import pytest

from library.runtime.limits import during, out_of_memory
from tests.scripts.conftest import small_model, train_arguments  # noqa: F401  # fixtures

FULL = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.25 GiB is "
    "free. Process 1 has 22.00 GiB memory in use."
)
# A run in which the allocator fails inside one function, from its n-th call on.
FAILING = """
import sys, torch
from library import cli
from library.training import {module} as place
real, calls = place.{function}, []
def failing(*args):
    calls.append(1)
    if len(calls) >= {first}:
        raise torch.OutOfMemoryError({text!r})
    return real(*args)
place.{function} = failing
cli.run(family="sd", method="network")
"""


def code(module: str, function: str, first: int) -> str:
    return FAILING.format(module=module, function=function, first=first, text=FULL)


def test_a_run_that_lacks_memory_names_the_step_the_sizes_and_three_remedies(run_script, train_arguments, tmp_path):  # noqa: F811
    script = run_script("-c", code("loop", "training_step", 2), *train_arguments(tmp_path)[1:])
    assert script.returncode == 2
    assert "Traceback" not in script.stderr
    line = next(line for line in script.stderr.splitlines() if line.startswith("error: "))
    assert "not enough GPU memory during the forward pass of step 2" in line
    assert "2.50 GiB were asked for, 1.25 GiB were free" in line
    assert "--gradient_checkpointing" in line
    assert "--plan shows" in line
    remedies = line.partition("less memory take ")[2].partition(";")[0].split(", ")
    assert len(remedies) == 3
    assert all(remedy.startswith("--") for remedy in remedies)
    assert "--cache_latents" not in line  # it is there already


def test_training_outlives_a_validation_that_lacks_memory(run_script, train_arguments, tmp_path):  # noqa: F811
    options = {"validation_split": 0.25, "validate_every_n_steps": 2, "save_best_validation": True}
    script = run_script("-c", code("validation", "step_losses", 1), *train_arguments(tmp_path, **options)[1:])
    assert script.returncode == 0, script.stderr
    assert "no validation at step 2: not enough GPU memory; training goes on" in script.stderr
    assert (tmp_path / "lora.safetensors").is_file()


def test_only_a_lack_of_memory_gets_a_phase():
    with pytest.raises(RuntimeError) as raised, during("a phase"):
        raise RuntimeError("the shapes do not match")
    assert out_of_memory(raised.value) is None


def test_the_innermost_phase_is_the_one_that_is_named():
    with pytest.raises(RuntimeError) as raised, during("a step"), during("its backward pass"):
        raise RuntimeError(FULL)
    assert out_of_memory(raised.value) == (
        "not enough GPU memory during its backward pass (2.50 GiB were asked for, 1.25 GiB were free)"
    )
