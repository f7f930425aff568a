"""What a results page remembers: curves that stay short, samples that stay small, and what a resumed run keeps."""

from __future__ import annotations

import itertools
import json
import math

import pytest

from library.training.results_page import record
from library.training.results_page.record import MOST_POINTS, Curve, Record


def test_a_short_curve_has_every_value():
    curve = Curve()
    for step in range(1, 6):
        curve.add(step, step / 4)
    assert curve.to_json() == {"per": 1, "points": [[step, step / 4] for step in range(1, 6)]}


@pytest.mark.parametrize("count", [MOST_POINTS, 3 * MOST_POINTS + 7, 50_000])
def test_a_long_curve_keeps_its_mean_and_its_ends(count):
    curve = Curve()
    for step in range(1, count + 1):
        curve.add(step, float(step))
    found = curve.to_json()
    assert MOST_POINTS / 2 <= len(found["points"]) <= MOST_POINTS
    assert found["points"][-1][0] == count
    # Each point stands for `per` values, the last one for what is left.
    sizes = [found["per"]] * (count // found["per"]) + ([count % found["per"]] if count % found["per"] else [])
    total = sum(size * value for size, (_, value) in zip(sizes, found["points"], strict=True))
    assert total == pytest.approx(count * (count + 1) / 2, rel=1e-5)


def test_numbers_that_json_does_not_have_are_left_out():
    curve = Curve()
    for step, value in enumerate((1.0, math.inf, math.nan, 3.0), 1):
        curve.add(step, value)
    assert curve.to_json()["points"] == [[1, 1.0], [4, 3.0]]


def sampled(steps: int, prompts: int = 2, size: int = 1000) -> Record:
    found = Record()
    for step in range(0, 10 * steps, 10):
        for number in range(prompts):
            found.sample(step, 1, number, f"prompt {number}", "x.png", "s" * size)
    return found


def test_samples_in_between_are_left_out_where_there_are_too_many(monkeypatch):
    monkeypatch.setattr(record, "MOST_IMAGE_BYTES", 20_000)
    found = sampled(200)
    data = found.to_json([])
    assert sum(len(one["src"]) for one in data["samples"]) <= 20_000
    steps = sorted({one["step"] for one in data["samples"]})
    assert (steps[0], steps[-1]) == (0, 1990)
    assert len(steps) >= 5
    assert max(later - one for one, later in itertools.pairwise(steps)) < 1000, "from all over the run"
    assert data["samples_left_out"] == 400 - len(data["samples"])
    for step in steps:
        assert {one["number"] for one in data["samples"] if one["step"] == step} == {0, 1}


def test_of_very_many_prompts_the_last_ones_are_left_out(monkeypatch):
    monkeypatch.setattr(record, "MOST_IMAGE_BYTES", 20_000)
    data = sampled(2, prompts=50).to_json([])
    assert sum(len(one["src"]) for one in data["samples"]) <= 20_000
    assert {one["number"] for one in data["samples"]} == set(range(10))


def test_a_step_that_is_sampled_again_replaces_what_was_there():
    found = sampled(2)
    found.sample(10, 1, 1, "new", "y.png", "t")
    assert [one["prompt"] for one in found.samples if one["step"] == 10] == ["prompt 0", "new"]


def test_a_resumed_run_forgets_what_it_does_again():
    found = sampled(4)
    for step in range(1, 41):
        found.scalars(step, {"loss/current": step / 8})
    found.saved("a-step00000020.safetensors", "a", 20, 1, 5, 1.0)
    found.saved("a-step00000040.safetensors", "b", 40, 1, 5, 2.0)
    everything = ["a-step00000020.safetensors", "a-step00000040.safetensors"]
    page = json.loads(json.dumps({**found.to_json(everything), "progress": {"seconds": 12.5}}))
    again = Record.resumed_from(page, 25)
    assert {one["step"] for one in again.samples} == {0, 10, 20}
    again.scalars(26, {"loss/current": 9.0})
    assert again.to_json([])["series"]["loss/current"]["points"][-2:] == [[25, 25 / 8], [26, 9.0]]
    assert (again.resumed, again.seconds) == ([25], 12.5)
    again.saved("a-step00000040.safetensors", "b", 40, 2, 6, 3.0)
    assert [(file["step"], file["size"]) for file in again.to_json(everything)["files"]] == [(20, 5), (40, 6)]
    assert again.to_json(everything[1:])["files"][0]["step"] == 40, "what has been removed is not shown"
    with pytest.raises((KeyError, TypeError, ValueError)):
        Record.resumed_from({"tables": []}, 0)
