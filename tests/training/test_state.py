"""States are whole or not there, and say what does not fit."""

from __future__ import annotations

import json
import os

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.training import state, state_notes
from library.training.ema import EMA
from library.training.plan import Progress


def make(width=4, optimizer=torch.optim.AdamW):
    torch.manual_seed(0)
    layer = nn.Linear(width, 3)
    adam = optimizer(layer.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 / (1 + step))
    average = EMA(list(layer.parameters()), 0.9)
    return state.StateParts(layer, adam, schedule, None, {"average": average})


def step(parts, count=1):
    for number in range(count):
        parts.optimizer.zero_grad()
        done = parts.schedule.last_epoch
        (parts.trained(torch.full((2, 4), 1.0 + done)) ** 2).mean().backward()
        parts.optimizer.step()
        parts.schedule.step()
        parts.extra["average"].update(done + number)


def test_what_is_loaded_goes_on_as_if_nothing_had_happened(tmp_path):
    whole = make()
    step(whole, 3)
    state.save_state(tmp_path / "s", whole, Progress(3, 2), 7)
    step(whole, 2)
    again = make()
    state.load_state(tmp_path / "s", again)
    step(again, 2)
    assert torch.equal(whole.trained.weight, again.trained.weight)
    assert whole.schedule.get_last_lr() == again.schedule.get_last_lr()
    for left, right in zip(*(p.extra["average"].state_dict().values() for p in (whole, again)), strict=True):
        assert torch.equal(left, right)
    assert state_notes.read_progress(tmp_path / "s") == Progress(3, 2)
    assert state_notes.read_seed(tmp_path / "s") == 7


def test_an_average_that_the_state_lacks_starts_from_its_weights(tmp_path):
    whole = make()
    step(whole, 3)
    state.save_state(
        tmp_path / "s",
        state.StateParts(whole.trained, whole.optimizer, whole.schedule),
        Progress(3, 1),
        0,
    )
    again = make()
    state.load_state(tmp_path / "s", again)
    with again.extra["average"].in_place():
        assert torch.equal(again.trained.weight, whole.trained.weight)


def test_states_of_earlier_trainers_are_read(tmp_path):
    """The layout is accelerate's; their train_state.json has no seed, and whole models' states have none at all."""
    parts = make()
    step(parts, 2)
    state.save_state(tmp_path / "s", parts, Progress(2, 1), 0)
    notes = tmp_path / "s" / "train_state.json"
    notes.write_text(json.dumps({"current_epoch": 3, "current_step": 40}))
    assert state_notes.read_progress(tmp_path / "s") == Progress(40, 3)
    assert state_notes.read_seed(tmp_path / "s") is None
    notes.unlink()
    (tmp_path / "s" / "random_states_0.pkl").write_bytes(b"never opened")
    assert state_notes.read_progress(tmp_path / "s") is None
    state.load_state(tmp_path / "s", make())


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "scheduler.bin"])
def test_a_state_that_lacks_a_file_is_none(tmp_path, name):
    state.save_state(tmp_path / "s", make(), Progress(1, 1), 0)
    (tmp_path / "s" / name).unlink()
    with pytest.raises(UserError, match=f"no whole state, it has no {name}"):
        state_notes.read_progress(tmp_path / "s")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "scheduler.bin", "extra.bin"])
@pytest.mark.parametrize("damage", [b"", b"no such format"])
def test_damaged_files_are_named(tmp_path, name, damage):
    state.save_state(tmp_path / "s", make(), Progress(1, 1), 0)
    (tmp_path / "s" / name).write_bytes(damage)
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        state.load_state(tmp_path / "s", make())


def test_states_of_something_else_are_refused(tmp_path):
    parts = make()
    step(parts)
    state.save_state(tmp_path / "s", parts, Progress(1, 1), 0)
    with pytest.raises(UserError, match=r"the state of another network or model: 1 of 2 tensors.*the first is weight"):
        state.load_state(tmp_path / "s", make(width=5))
    two = make()
    two.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(UserError, match=r"optimizer\.bin does not fit --optimizer_type"):
        state.load_state(tmp_path / "s", two)


@pytest.mark.parametrize("numbers", [1, 2, 100])
def test_optimizer_tensors_of_another_shape_never_reach_a_kernel(tmp_path, numbers):
    """In a state without checksums too: the step of such an optimizer reads beyond them."""
    parts = make()
    step(parts)
    state.save_state(tmp_path / "s", parts, Progress(1, 1), 0)
    (tmp_path / "s" / "train_state.json").unlink()
    saved = torch.load(tmp_path / "s" / "optimizer.bin", weights_only=True)
    saved["state"][0]["exp_avg"] = torch.zeros(numbers)
    torch.save(saved, tmp_path / "s" / "optimizer.bin")
    with pytest.raises(UserError, match=r"optimizer\.bin does not fit .*its exp_avg of tensor 0 has the shape"):
        state.load_state(tmp_path / "s", make())


def test_an_average_of_other_weights_is_refused(tmp_path):
    state.save_state(tmp_path / "s", make(), Progress(1, 1), 0)
    torch.save({"average": {"0": torch.zeros(4), "1": torch.zeros(3)}}, tmp_path / "s" / "extra.bin")
    with pytest.raises(UserError, match=r"extra\.bin does not fit the options \(average 0 has the shape \[4\]\)"):
        state.load_state(tmp_path / "s", make())


def test_a_pickle_that_runs_code_is_not_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    state.save_state(tmp_path / "s", make(), Progress(1, 1), 0)
    torch.save({"state": Evil()}, tmp_path / "s" / "optimizer.bin")
    with pytest.raises(UserError, match=r"optimizer\.bin cannot be read"):
        state.load_state(tmp_path / "s", make())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("fails_at", range(5))
def test_a_failure_while_saving_leaves_the_earlier_state(tmp_path, monkeypatch, fails_at):
    """The disk fills up at each of the files in turn."""
    parts = make()
    step(parts)
    state.save_state(tmp_path / "s", parts, Progress(1, 1), 0)
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    step(parts)
    calls = []

    def fail_in_turn(real):
        def write(*args, **kwargs):
            calls.append(1)
            if len(calls) == fails_at + 1:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        return write

    from pathlib import Path

    from library.checkpoints import writing

    monkeypatch.setattr(writing, "write_torch", fail_in_turn(writing.write_torch))
    monkeypatch.setattr(writing, "write_safetensors", fail_in_turn(writing.write_safetensors))
    monkeypatch.setattr(Path, "write_text", fail_in_turn(Path.write_text))
    with pytest.raises(OSError, match="No space left"):
        state.save_state(tmp_path / "s", parts, Progress(2, 1), 0)
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
