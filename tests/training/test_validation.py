"""When to validate, and what is measured then: the loss of each image at fixed timesteps with fixed noise."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler

from library.objectives.objective import DdpmObjective
from library.options.base import Given, build_options
from library.options.loss import LossOptions, NoiseOptions
from library.options.sampling import ValidationOptions
from library.runtime.seeds import generator
from library.training.paired import Difference
from library.training.step import StepParts
from library.training.validation import Validation, averages, points_per_image
from library.types import Batch, Size, TextCond

OBJECTIVE = DdpmObjective("epsilon", NoiseOptions(), LossOptions())


def validation_of(data, **given) -> Validation:
    opts = build_options([ValidationOptions], {name: Given(value, "command line") for name, value in given.items()})
    return Validation(opts, data, 1, OBJECTIVE)


def moments(data, steps, **given):
    validation = validation_of(data, **given)
    per_step = [step for step in range(1, steps + 1) if validation.due(step)]
    per_epoch = [epoch for epoch in range(1, steps + 1) if validation.due(0, epoch)]
    return per_step, per_epoch


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ([], [1, 2, 3, 4, 5, 6])),
        ({"validate_every_n_steps": 2}, ([2, 4, 6], [])),
        ({"validate_every_n_epochs": 3}, ([], [3, 6])),
        ({"validate_every_n_steps": 4, "validate_every_n_epochs": 5}, ([4], [5])),
    ],
)
def test_moments(given, expected):
    assert moments(object(), 6, **given) == expected
    assert moments(None, 6, **given) == ([], [])
    assert validation_of(object(), **given).wanted
    assert not validation_of(None, **given).wanted


def test_options_without_images_to_validate_with_are_reported(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("trainscripts"), "propagate", True)
    moments(None, 1, save_best_validation=True, early_stop_patience=3)
    (line,) = caplog.messages
    assert line.startswith("--save_best_validation, --early_stop_patience: has no effect, no images are kept")
    caplog.clear()
    moments(object(), 1, early_stop_patience=3)
    moments(None, 1)
    assert not caplog.messages


class Held:
    """Three images of two concepts in two batches, with latents."""

    concepts = (("a", "b"), ("b",))

    def __init__(self, names=("x.png", "y.png", "z.png"), batch_size=2):
        self.batch_size = batch_size
        self.latents = torch.randn(3, 4, 2, 3, generator=torch.Generator().manual_seed(1))
        self.names = names

    def records_by_batch(self, epoch):
        subsets = {name: SimpleNamespace(concept=name) for name in "ab"}
        names = iter(self.names)
        return [
            [SimpleNamespace(path=Path(next(names)), bucket=Size(24, 16), subset=subsets[one]) for one in batch]
            for batch in self.concepts
        ]

    def loader(self, epoch, first_batch=0, rank=0, world=1):
        batches = [self.batch(slice(0, 2)), self.batch(slice(2, 3))]
        turns = -(-len(batches) // world)
        return [batches[(turn * world + rank) % len(batches)] for turn in range(turns)]

    def batch_sizes(self):
        return [self.batch_size]

    def batch(self, part: slice) -> Batch:
        latents = self.latents[part]
        count = len(latents)
        sizes = torch.zeros(count, 2, dtype=torch.int64)
        return Batch([""] * count, latents, None, torch.ones(count), None, sizes, sizes, sizes)


def measured(validation, rank=0, world=1) -> torch.Tensor:
    """What a process measures of a model that predicts half of what it sees, and encodes nothing."""
    scaled = SimpleNamespace(scale=lambda latents: 2 * latents)
    text = SimpleNamespace(encode=lambda models, captions, cached=None: TextCond({}))
    parts = StepParts(
        SimpleNamespace(latents=scaled, text=text),
        SimpleNamespace(text_encoders={}),
        lambda noisy, timesteps, cond, batch: 0.5 * noisy,
        OBJECTIVE,
        grad_text=False,
    )
    process = SimpleNamespace(
        device=torch.device("cpu"),
        process_index=rank,
        num_processes=world,
        autocast=lambda: torch.autocast("cpu", enabled=False),
        reduce=lambda tensor, _: tensor,
    )
    return validation.losses(parts, process, lambda batch: None)


def test_each_look_is_the_loss_at_its_timestep_with_its_noise():
    """By hand, with diffusers' schedule, for images, timesteps and noise that nothing but the seed decides."""
    held, schedule = Held(), DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    found = measured(validation_of(held, validation_seed=5)).view(3, -1)
    assert found.shape[1] == points_per_image(3) == 24
    for number, part in enumerate((slice(0, 2), slice(2, 3))):
        clean = 2 * held.latents[part]
        for place in (0, 13, 23):
            noise = torch.randn(clean.shape, generator=generator("cpu", 5, "validation", number, place))
            time = torch.full((len(clean),), 1000 * (place + 1) // 25)
            noisy = schedule.add_noise(clean, noise, time)
            expected = (0.5 * noisy - noise).square().flatten(1).mean(1)
            assert torch.allclose(found[part, place].float(), expected, rtol=1e-5)  # float32


def test_measuring_again_gives_the_same_and_draws_nothing_of_trainings_numbers():
    validation, before = validation_of(Held()), torch.get_rng_state()
    first = measured(validation)
    assert torch.equal(measured(validation), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_looks_at_one_image_may_share_a_batch():
    """As many as training has: one at a time, all 24 at once, or 5 and a rest."""
    alone = measured(validation_of(Held()))
    for size in (5, 10, 100):
        assert torch.allclose(measured(validation_of(Held(batch_size=size))), alone, rtol=1e-6)  # order of summing


def test_several_processes_measure_what_one_does():
    validation = validation_of(Held())
    for world in (2, 3):  # the third has nothing of its own
        assert torch.equal(sum(measured(validation, rank, world) for rank in range(world)), measured(validation))


def test_every_quarter_of_the_timesteps_has_as_many_looks():
    assert [points_per_image(count) for count in (1, 2, 5, 16, 17, 1000)] == [64, 32, 16, 4, 4, 4]
    for count in (4, 8, 16, 64):
        quarters = [time // 250 for time in OBJECTIVE.validation_timesteps(count)]
        assert [quarters.count(quarter) for quarter in range(4)] == [count // 4] * 4


def test_most_steps_are_batches():
    points = validation_of(Held(), max_validation_steps=1).points
    assert (points.images, points.per_image) == (2, 32)
    assert len(measured(validation_of(Held(), max_validation_steps=1))) == 64


def test_other_images_or_noise_are_other_looks():
    digests = [validation_of(Held(), validation_seed=seed).points.digest for seed in (1, 1, 2)]
    digests.append(validation_of(Held(("x.png", "y.png", "other.png")), validation_seed=1).points.digest)
    assert [digests.index(digest) for digest in digests] == [0, 0, 2, 3]


def test_values_by_range_and_concept_add_up():
    validation = validation_of(Held())
    base = torch.arange(72, dtype=torch.float64)
    values = validation.values(base * 0.9 + 1, base)
    assert values["loss/validation/base"] == 35.5
    assert values["loss/validation"] == pytest.approx(0.9 * 35.5 + 1)
    assert values["loss/validation/difference"] == pytest.approx(1 - 3.55)
    ranges = ("t 000-249", "t 250-499", "t 500-749", "t 750-999")
    mean = sum(values[f"loss/validation/difference {one}"] for one in ranges) / 4
    assert mean == pytest.approx(values["loss/validation/difference"])
    assert values["loss/validation/base of a"] == pytest.approx(11.5)  # the first image
    assert values["loss/validation of b"] == pytest.approx(0.9 * 47.5 + 1)
    assert all(values[name] > 0 for name in values if "standard error" in name)


def test_the_line_gives_the_difference_in_percent():
    validation, base = validation_of(Held()), torch.full((72,), 0.5)
    assert validation.line(base * 0.9, base, Difference(0.05, 0.002), 7) == (
        "validation loss 0.45000 at step 7: -10.0 % (standard error 0.00 %) from the base, "
        "+12.5 % (standard error 0.50 %) from the best so far"
    )
    assert validation.line(base, 0 * base, Difference(0.5, math.inf), 7) == (
        "validation loss 0.50000 at step 7: +0.50000 from the base, +0.50000 from the best so far"
    )


def test_names_of_earlier_trainers():
    assert averages(0.3, 0.2, "epoch") == {
        "loss/validation/epoch_average": 0.3,
        "loss/validation/epoch_divergence": pytest.approx(0.1),
    }
