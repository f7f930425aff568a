"""Batches, texts that are encoded once, slices, and the noise that drawing begins with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from library.families.sd.adapter import SdFamily
from library.generation.drawing import HowToDraw, decoded_at_once, draw, in_batches
from library.generation.first_noise import varied_noise
from library.generation.model import Model
from library.generation.networks import Networks
from library.generation.requests import Request
from library.inference.generate import initial_noise
from library.inference.prompts import SamplePrompt
from library.options.inference import ImageOptions, PrecisionOptions
from tests.builders import sd_options, tiny_sd

CPU = torch.device("cpu")
PROMPT = SamplePrompt("a cat", "", 64, 64, 1, 1, 2.0, "ddim")


@pytest.fixture(scope="module")
def model():
    opts = sd_options("")
    return Model(SdFamily(opts), tiny_sd(), opts, CPU, torch.float32, Networks())


def test_batches_are_filled_over_all_requests_of_one_kind():
    small = [Request(replace(PROMPT, prompt=str(n), seed=n), "") for n in range(4)]
    wide = [Request(replace(PROMPT, prompt=str(n), width=128), "") for n in range(2)]
    mixed = [small[0], wide[0], small[1], small[2], wide[1], small[3]]
    assert list(in_batches(mixed, 3)) == [[small[0], small[1], small[2]], wide, [small[3]]]
    assert [len(batch) for batch in in_batches(mixed, 1)] == [1] * 6
    other = [Request(replace(PROMPT, multipliers=(0.5,)), ""), Request(replace(PROMPT, steps=2), "")]
    assert len(list(in_batches([small[0], *other], 4))) == 3


@pytest.mark.parametrize(("asked", "images"), [(None, 4), (1.0, 1), (2.0, 2), (0.5, 2), (0.1, 1), (8.0, 8)])
def test_images_decoded_at_once(asked, images):
    assert decoded_at_once(PrecisionOptions(vae_batch_size=asked), 4) == images


def test_every_text_is_encoded_once(model, monkeypatch):
    texts: list[str] = []
    encode = model.family.text.encode

    def counted(models, captions, **how):
        texts.extend(captions)
        return encode(models, captions, **how)

    monkeypatch.setattr(model.family.text, "encode", counted)
    model._texts.clear()
    taken: list = []
    requests = [Request(replace(PROMPT, prompt=text, seed=n), "") for n, text in enumerate(("a", "b", "a", "b"))]
    draw(model, requests, HowToDraw(2, 1, True, None), (), taken.append, lambda _: None)
    assert sorted(texts) == ["", "a", "b"]
    assert [one.request for one in taken] == requests


def test_an_error_in_writing_ends_the_run(model):
    def full(_):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        draw(model, [Request(PROMPT, "")] * 3, HowToDraw(1, 1, True, None), (), full, lambda _: None)


def test_slices_give_the_same_image(model, monkeypatch):
    from library.generation import drawing

    asked: list[int | None] = []
    in_slices = drawing.in_slices

    def counted(decoder, count):
        asked.append(count)
        return in_slices(decoder, count)

    monkeypatch.setattr(drawing, "in_slices", counted)
    images = {}
    for slices in (None, 3):
        taken: list = []
        request = Request(replace(PROMPT, width=64, height=128, scale=1.0), "")
        draw(model, [request], HowToDraw(1, 1, True, slices), (), taken.append, lambda _: None)
        images[slices] = np.asarray(taken[0].image).astype(int)
    assert asked == [None, 3]
    assert images[3].shape == (128, 64, 3)
    assert np.abs(images[3] - images[None]).max() <= 1  # rounding to 8 bits


# --- noise ------------------------------------------------------------------------------------------------------------


def noise(options: ImageOptions, *seeds: int) -> torch.Tensor:
    prompts = [replace(PROMPT, width=256, height=256, seed=seed) for seed in seeds]
    make = varied_noise(options) or initial_noise
    return make(prompts, SdFamily.traits, [torch.Generator().manual_seed(seed) for seed in seeds])


def test_plain_noise_where_nothing_is_asked_for():
    assert varied_noise(ImageOptions()) is None
    plain = noise(ImageOptions(), *range(20))
    some = noise(ImageOptions(pyramid_noise_prob=0.5), *range(20))
    same = [torch.equal(a, b) for a, b in zip(plain, some, strict=True)]
    assert 3 < sum(same) < 17  # half of them, within 3 standard deviations


def test_an_offset_moves_the_mean_of_channels():
    plain = noise(ImageOptions(), 1, 2)
    moved = noise(ImageOptions(noise_offset_prob=1.0, noise_offset_range=[0.5, 0.5]), 1, 2)
    change = moved - plain
    assert change.flatten(2).std(-1).max() < 1e-5
    assert 0.05 < change.abs().mean() < 1.5


def test_pyramid_noise_has_unit_deviation_and_coarse_parts():
    pyramid = noise(ImageOptions(pyramid_noise_prob=1.0, pyramid_noise_discount_range=[0.9, 0.9]), 1)
    assert pyramid.std().item() == pytest.approx(1.0, abs=1e-3)

    def neighbours(values: torch.Tensor) -> float:
        return (values[..., :-1] * values[..., 1:]).mean().item()

    assert neighbours(pyramid) > 0.3  # neighbours of plain noise have nothing in common
    assert abs(neighbours(noise(ImageOptions(), 1))) < 0.05


def test_the_batch_does_not_change_the_noise():
    options = ImageOptions(pyramid_noise_prob=0.5, noise_offset_prob=0.5)
    together = noise(options, 3, 4, 5)
    assert torch.equal(together, torch.cat([noise(options, seed) for seed in (3, 4, 5)]))
