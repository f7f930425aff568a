from __future__ import annotations

import logging
import random
import re
from dataclasses import replace

import numpy
import pytest
import torch
from PIL import Image

from library.errors import UserError
from library.inference import placement
from library.inference.generate import generate
from library.inference.preview import Preview
from library.inference.prompts import SamplePrompt
from library.options.base import Options
from library.runtime.logs import LOGGER
from tests.builders.options import options_for

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # diffusers with newer numpy

PROMPTS = [
    SamplePrompt("a cat", "ugly", 64, 64, 5, 2, 3.0, "euler_a"),
    SamplePrompt("ein Hündchen 犬", "", 64, 96, None, 1, 1.0, "ddim"),
]


def options(tmp_path, **changes) -> Options:
    given = {"output_dir": str(tmp_path / "out"), "output_name": "my_lora", "seed": 42, **changes}
    return options_for("sd", "network", **given)


@pytest.fixture
def make(tmp_path, make_family):
    return lambda prompts=PROMPTS, **changes: Preview(options(tmp_path, **changes), make_family(), prompts)


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(LOGGER, "propagate", True)
    caplog.set_level(logging.WARNING, logger=LOGGER.name)
    return caplog


def occasions(preview: Preview, steps: int = 8, per_epoch: int = 4) -> list[tuple[int, int | None]]:
    """Asks as the loop does: before the first step, after each step, and at each epoch's end."""
    asked = [(0, None)]
    for step in range(1, steps + 1):
        asked.append((step, None))
        if step % per_epoch == 0:
            asked.append((step, step // per_epoch))
    return [moment for moment in asked if preview.due(*moment)]


def test_when_it_is_due(make):
    assert occasions(make()) == []
    assert occasions(make(sample_at_first=True)) == [(0, None)]
    assert occasions(make(sample_every_n_steps=3)) == [(3, None), (6, None)]
    assert occasions(make(sample_every_n_steps=4)) == [(4, None), (8, None)]
    assert occasions(make(sample_every_n_epochs=1)) == [(4, 1), (8, 2)]
    assert occasions(make(sample_every_n_epochs=2, sample_every_n_steps=1)) == [(8, 2)]  # epochs override steps
    assert occasions(make(sample_at_first=True, sample_every_n_steps=8)) == [(0, None), (8, None)]
    assert occasions(make(prompts=[], sample_at_first=True, sample_every_n_steps=1)) == []


@pytest.mark.rows("R281")
@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("flag", ["sample_every_n_steps", "sample_every_n_epochs"])
def test_periods_of_zero_or_less_are_ignored(make, flag, value):
    assert occasions(make(**{flag: value})) == []


def test_an_ignored_epoch_period_does_not_override_steps(make):
    assert occasions(make(sample_every_n_epochs=0, sample_every_n_steps=4)) == [(4, None), (8, None)]


def test_prompts_come_from_the_option(tmp_path, make_family, said):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat --s 3\n")
    preview = Preview.from_options(
        options(tmp_path, sample_prompts=str(file), sample_sampler="euler", sample_at_first=True), make_family()
    )
    assert [(p.prompt, p.steps, p.sampler) for p in preview.prompts] == [("a cat", 3, "euler")]
    assert said.text == ""
    for idle in ({"sample_prompts": str(file)}, {"sample_every_n_steps": 5}, {}):
        preview = Preview.from_options(options(tmp_path, **idle), make_family())
        assert not preview.prompts
        assert not any(preview.due(step) for step in range(10))


@pytest.fixture
def with_edges(tmp_path, make_family):
    """A preview of prompts of which one has a control image of 32x32: white on the left, black on the right."""
    edges = Image.new("RGB", (32, 32))
    edges.paste((255, 255, 255), (0, 0, 16, 32))
    edges.save(tmp_path / "edges.png")
    text = f"a cat --w 64 --h 96 --s 1 --d 3 --cn {tmp_path / 'edges.png'}\na cat --w 64 --h 64 --s 1 --d 3\n"
    (tmp_path / "prompts.txt").write_text(text)
    opts = options(tmp_path, sample_prompts=str(tmp_path / "prompts.txt"), sample_at_first=True)
    return lambda **more: Preview.from_options(opts, make_family(), **more)


def test_control_images_are_read_once_and_come_with_the_batch(with_edges, models, tmp_path, said):
    preview = with_edges(takes_control=True)
    assert said.text.count("1 of 2 prompts have no --cn") == 1
    (tmp_path / "edges.png").unlink()
    seen = []

    def denoise(noisy, timesteps, cond, batch):
        seen.append(batch.control)
        return preview.family.predict(models, noisy, timesteps, cond, batch)

    images = preview.render(models, 1, None, denoise=denoise)
    assert seen[1] is None
    assert seen[0].shape == (2, 3, 96, 64)  # with guidance, for both halves
    assert (seen[0][..., :31] == 1).all()
    assert (seen[0][..., 33:] == 0).all()
    assert Image.open(images[0].path).text["control-image"].endswith("edges.png")
    assert "control-image" not in Image.open(images[1].path).text


def test_control_images_without_a_controlnet_have_no_effect(with_edges, tmp_path, said):
    (tmp_path / "edges.png").unlink()
    assert all(prompt.control is None for prompt in with_edges().prompts)
    assert said.text.count("--cn (controlnet_image) has no effect") == len(said.records) == 1


@pytest.mark.rows("R507")
def test_the_strength_of_a_prompt_is_set_for_its_image_and_taken_back(tmp_path, make_family, models, said):
    text = "a cat --s 1 --d 3{}\n"
    lines = [text.format(more + " --w 64 --h 64") for more in ("", " --am 0.5,7", " --am 0.5", " --am -1")]
    (tmp_path / "prompts.txt").write_text("".join(lines))
    opts = options(
        tmp_path, sample_prompts=str(tmp_path / "prompts.txt"), sample_at_first=True, network_module="networks.lora"
    )
    found = []
    preview = Preview.from_options(opts, make_family())
    preview.render(models, 1, None, set_strength=found.append, write=False)
    assert found == [1.0, 0.5, -1.0, 1.0]
    assert said.text == ""
    given = {"sample_prompts": str(tmp_path / "prompts.txt"), "sample_at_first": True, "output_dir": str(tmp_path)}
    without = Preview.from_options(options_for("sd", "finetune", **given), make_family())
    assert said.text.count("--am (additional_network_multiplier) has no effect, as no network is trained here") == 1
    assert not any(prompt.multipliers for prompt in without.prompts)


def test_a_control_image_that_cannot_be_read_is_named(with_edges, tmp_path):
    (tmp_path / "edges.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"--cn .*edges\.png: the control image cannot be read \(the file is empty\)"):
        with_edges(takes_control=True)


@pytest.mark.parametrize(
    ("chosen", "warnings"), [(None, 0), ("euler", 0), ("k_euler", 0), ("ddim", 1), ("dpmsolver++", 1)]
)
def test_a_sampler_chosen_for_a_flow_model_is_said_to_have_no_effect(tmp_path, make_family, said, chosen, warnings):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    family = make_family()
    family.traits = replace(family.traits, objective="flow")
    given = {} if chosen is None else {"sample_sampler": chosen}
    opts = options(tmp_path, sample_prompts=str(tmp_path / "prompts.txt"), sample_at_first=True, **given)
    preview = Preview.from_options(opts, family)
    assert [prompt.sampler for prompt in preview.prompts] == ["euler", "euler"]
    assert said.text.count(f"--sample_sampler {chosen} has no effect") == len(said.records) == warnings


@pytest.mark.parametrize(
    ("changes", "step", "epoch", "starts"),
    [
        ({}, 12, None, ("my_lora_000012_00_", "my_lora_000012_01_")),
        ({"output_name": None}, 12, 3, ("e000003_00_", "e000003_01_")),
    ],
)
def test_files_have_the_agreed_names(make, models, tmp_path, changes, step, epoch, starts):
    images = make(**changes).render(models, step, epoch)
    folder = tmp_path / "out" / "sample"
    names = [image.path.name for image in images]
    assert re.fullmatch(re.escape(starts[0]) + r"\d{14}_5\.png", names[0])
    assert re.fullmatch(re.escape(starts[1]) + r"\d{14}\.png", names[1])
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)  # nothing unfinished is left
    assert all(image.path.parent == folder for image in images)


@pytest.mark.rows("R282")
def test_files_hold_the_images_and_name_how_they_were_made(make, models, make_family):
    images = make().render(models, 12, None)
    expected = generate(make_family(), models, [p.prompt for p in images], "cpu")
    for made, image in zip(images, expected, strict=True):
        with Image.open(made.path) as stored:
            assert numpy.array_equal(numpy.asarray(stored), numpy.asarray(image))
            prompt = made.prompt
            assert stored.text == {
                "prompt": prompt.prompt,
                "negative-prompt": prompt.negative_prompt,
                "seed": str(prompt.seed),
                "sampler": prompt.sampler,
                "steps": str(prompt.steps),
                "scale": str(prompt.scale),
            }
    assert images[0].prompt.seed == 5


def test_a_prompt_without_seed_varies_by_step_and_repeats_with_the_run(make, models):
    seeds = [make().render(models, step, None)[1].prompt.seed for step in (1, 1, 2)]
    assert seeds[0] == seeds[1] != seeds[2]
    assert make(seed=43).render(models, 1, None)[1].prompt.seed != seeds[0]


@pytest.mark.rows("R284")
def test_prompts_are_those_of_the_start(tmp_path, make_family, models):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat --w 64 --h 64 --s 1 --d 5", encoding="utf-8")
    preview = Preview.from_options(options(tmp_path, sample_prompts=str(file), sample_every_n_steps=1), make_family())
    (before,) = preview.render(models, 1, None)
    file.write_text("a dog --w 64 --h 64 --s 1 --d 6\na house", encoding="utf-8")
    (after,) = preview.render(models, 2, None)
    assert after.prompt == before.prompt
    assert numpy.array_equal(after.image, before.image)


def test_the_run_is_left_as_it_was(make, models):
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    models.denoiser.train()
    models.denoiser.mid_block.eval()
    models.text_encoders["te"].train()
    everything = [models.denoiser, models.vae, *models.text_encoders.values(), network]
    modes = [part.training for module in everything for part in module.modules()]
    grads = torch.is_grad_enabled()
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    seen = []
    models.denoiser.register_forward_hook(
        lambda *_: seen.append((models.denoiser.training, network[1].training, torch.is_grad_enabled()))
    )
    make().render(models, 1, None, trained=network)
    assert set(seen) == {(False, False, False)}
    assert modes == [part.training for module in everything for part in module.modules()]
    assert torch.is_grad_enabled() == grads
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), numpy.random.get_state()[1].tolist())


def test_modes_and_files_survive_a_failure(make, models, make_family, monkeypatch, tmp_path):
    models.denoiser.train()
    preview = make()
    monkeypatch.setattr(preview.family.latents, "decode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        preview.render(models, 1, None)
    assert models.denoiser.training
    assert not (tmp_path / "out" / "sample").exists()


def test_images_that_no_memory_holds_are_one_warning_and_the_run_goes_on(make, models, said, tmp_path):
    """The allocator's own error, from inside the model."""
    models.denoiser.train()
    models.denoiser.mid_block.register_forward_hook(lambda *_: torch.empty(1 << 50))
    assert make().render(models, 1, None) == []
    assert [record.getMessage() for record in said.records] == [
        "no sample images: not enough CPU memory; choose smaller ones in --sample_prompts"
    ]
    assert models.denoiser.training
    assert not (tmp_path / "out" / "sample").exists()


def test_mixed_precision_and_vae_precision_follow_the_options(make, models):
    types = {}
    models.denoiser.conv_in.register_forward_hook(lambda m, a, out: types.update(denoiser=out.dtype))
    models.vae.decoder.conv_in.register_forward_hook(lambda m, a, out: types.update(vae=out.dtype))
    make(mixed_precision="bf16").render(models, 1, None)
    assert types == {"denoiser": torch.bfloat16, "vae": torch.bfloat16}
    make(mixed_precision="bf16", no_half_vae=True).render(models, 1, None)
    assert types == {"denoiser": torch.bfloat16, "vae": torch.float32}
    make(mixed_precision="bf16").render(models, 1, None, dtype=torch.float32)
    assert types == {"denoiser": torch.float32, "vae": torch.float32}


def test_a_folder_that_cannot_be_made_is_named(make, models, tmp_path):
    (tmp_path / "out").write_text("a file, not a folder")
    with pytest.raises(UserError, match="cannot write the sample image"):
        make().render(models, 1, None)


def test_modules_come_back_from_another_device():
    """The meta device stands for one that this machine may not have."""
    module = torch.nn.Linear(2, 2)
    weights = module.weight.clone()
    with placement.on_device([module], torch.device("cpu")):
        assert module.weight.device.type == "cpu"
    assert torch.equal(module.weight, weights)
    away = torch.nn.Linear(2, 2, device="meta")
    moved = []
    away.to = lambda device: moved.append(torch.device(device).type)
    with placement.on_device([away], torch.device("cpu")):
        assert moved == ["cpu"]
    assert moved == ["cpu", "meta"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_helpers_return_to_the_cpu_after_images_on_the_gpu(make, models):
    models.denoiser.cuda()
    assert make().render(models, 1, None)
    assert next(models.vae.parameters()).device.type == "cpu"
    assert next(models.text_encoders["te"].parameters()).device.type == "cpu"
