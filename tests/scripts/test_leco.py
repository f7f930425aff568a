"""The scripts of concept editing from the outside, for every family, on tiny models."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.checkpoints.reading import read_metadata
from tests.builders.flux import write_flux, write_parts
from tests.builders.sd3 import write_tiny_sd3
from tests.builders.sdxl import write_tiny_sdxl
from tests.builders.t5 import write_t5_tokenizer
from tests.scripts.starting import as_words
from tests.scripts.test_resume import killed
from tests.scripts.weights import furthest, hash_of

SLIDER = """
resolution = 64
dynamic_crops = true
neutral = "a figure"
[[targets]]
target_class = "a circle"
positive = "a large circle"
negative = "a small circle"
"""
COMMON = {"network_dim": 2, "max_denoising_steps": 3, "learning_rate": 1e-3, "seed": 1, "output_name": "edit"}


@pytest.fixture(scope="module")
def models(tmp_path_factory, small_model) -> dict[str, dict[str, object]]:
    """By script: the options of a tiny model."""
    folder = tmp_path_factory.mktemp("models")
    write_t5_tokenizer(folder / "google_t5-v1_1-xxl")
    with_t5 = {"t5xxl_max_token_length": 16, "tokenizer_cache_dir": folder}
    encoders = ("te1", "te2", "te3")
    return {
        "train_leco": {"pretrained_model_name_or_path": small_model},
        "sdxl_train_leco": {"pretrained_model_name_or_path": write_tiny_sdxl(folder / "sdxl.safetensors")},
        "sd3_train_leco": {
            "pretrained_model_name_or_path": write_tiny_sd3(folder / "sd3.safetensors", encoders=encoders),
            **with_t5,
        },
        "flux_train_leco": {
            "pretrained_model_name_or_path": write_flux(folder),
            **write_parts(folder),
            **with_t5,
            "model_prediction_type": "raw",
        },
    }


@pytest.fixture(scope="module")
def arguments(models, tmp_path_factory):
    prompts = tmp_path_factory.mktemp("prompts") / "slider.toml"
    prompts.write_text(SLIDER, encoding="utf-8")

    def build(out: Path, script: str = "train_leco", **changes: object) -> list[str]:
        return [
            f"{script}.py",
            *as_words({**models[script], "prompts_file": prompts, "output_dir": out, **COMMON, **changes}),
        ]

    return build


def ran(run_script, line, *, fails: bool = False, processes: int = 1) -> str:
    done = run_script(*line, processes=processes)
    assert done.returncode == (2 if fails else 0), done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.rows("R511")
@pytest.mark.parametrize("script", ["train_leco", "sdxl_train_leco", "sd3_train_leco", "flux_train_leco"])
def test_two_steps_and_the_same_from_a_state_between_them(run_script, arguments, tmp_path, script):
    """With an average, sample images, and a base in 8 bits computed in bf16."""
    (tmp_path / "prompts.txt").write_text("a circle --w 64 --h 64 --s 2 --d 7\n", encoding="utf-8")
    options = {"max_train_steps": 2, "save_state": True, "save_every_n_steps": 1, "ema": True, "fp8_base": True}
    options |= {"mixed_precision": "bf16", "gradient_checkpointing": True, "training_comment": "a test"}
    images = {"sample_prompts": tmp_path / "prompts.txt", "sample_at_first": True, "sample_every_n_steps": 2}
    said = ran(run_script, arguments(tmp_path / "whole", script, **options, **images))
    assert "slider.toml: 4 pairs of prompts" in said
    assert "images x repeats" not in said
    file = tmp_path / "whole" / "edit.safetensors"
    weights = load_file(file)
    assert all(name.startswith("lora_unet_") for name in weights)
    assert all(value.isfinite().all() for value in weights.values())
    ups = [value for name, value in weights.items() if "lora_up" in name]
    # At its coarsest level the smallest model has one position, which sees itself alone and needs no queries and keys.
    assert sum(bool(value.any()) for value in ups) > 0.9 * len(ups)
    shown = [Image.open(path).tobytes() for path in sorted((tmp_path / "whole" / "sample").iterdir())]
    assert len(shown) == 2
    metadata = read_metadata(file)
    expected = {"ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "1.0"}
    expected |= {"ss_leco_prompt_count": "4", "ss_leco_prompts_file": "slider.toml", "ss_training_comment": "a test"}
    assert {name: metadata[name] for name in expected} == expected
    assert [pair["action"] for pair in json.loads(metadata["ss_leco_preview"])] == ["erase", "enhance"] * 2
    assert not metadata.keys() & {"ss_num_train_images", "ss_cache_latents", "ss_resolution", "ss_tag_frequency"}
    state = tmp_path / "whole" / "edit-step00000001-state"
    said = ran(run_script, arguments(tmp_path / "again", script, **options, resume=state))
    assert "the data is not that" not in said
    assert hash_of(tmp_path / "again" / "edit.safetensors") == hash_of(file)


@pytest.fixture(scope="module")
def whole(run_script, arguments, tmp_path_factory) -> SimpleNamespace:
    """A run of more than an epoch, with dropout and accumulated gradients."""
    out = tmp_path_factory.mktemp("whole")
    options = {"max_train_steps": 5, "gradient_accumulation_steps": 2, "network_dropout": 0.1, "save_state": True}
    options |= {"save_every_n_steps": 1, "save_last_n_steps": 3, "lr_scheduler": "cosine"}
    ran(run_script, arguments(out, **options))
    return SimpleNamespace(options=options, file=out / "edit.safetensors", out=out)


def test_steps_are_optimizer_steps(whole):
    names = sorted(path.name for path in whole.out.glob("*.safetensors"))
    assert names == [*(f"edit-step0000000{step}.safetensors" for step in (2, 3, 4, 5)), "edit.safetensors"]
    assert read_metadata(whole.file)["ss_steps"] == "5"
    assert read_metadata(whole.file)["ss_epoch"] == "2"


def test_kills_change_nothing(whole, start_script, arguments, tmp_path):
    killed(start_script, lambda state: arguments(tmp_path, **whole.options, resume=state), tmp_path, times=2)
    assert hash_of(tmp_path / "edit.safetensors") == hash_of(whole.file)


def test_other_prompts_are_reported_on_resuming(whole, run_script, arguments, tmp_path):
    other = tmp_path / "other.toml"
    other.write_text(SLIDER.replace("large", "huge"), encoding="utf-8")
    state = whole.out / "edit-step00000005-state"
    given = whole.options | {"resume": state, "prompts_file": other, "max_train_steps": 6}
    said = ran(run_script, arguments(tmp_path, **given))
    assert "the data is not that of the resumed run (other prompts)" in said


def test_two_processes_train_as_one_that_accumulates(run_script, arguments, tmp_path):
    """float32: the mean of two gradients is taken in another place."""
    ran(run_script, arguments(tmp_path / "one", max_train_steps=2, gradient_accumulation_steps=2))
    ran(run_script, arguments(tmp_path / "two", max_train_steps=2), processes=2)
    one, two = (load_file(tmp_path / name / "edit.safetensors") for name in ("one", "two"))
    assert furthest(one, two) < 1e-6


def test_another_network_goes_on_from_its_file(run_script, arguments, tmp_path):
    ran(run_script, arguments(tmp_path, max_train_steps=1, network_module="networks.loha"))
    file = tmp_path / "edit.safetensors"
    before = load_file(file)
    assert any("hada_w1_a" in name for name in before)
    kept = {"network_weights": file, "dim_from_weights": True, "learning_rate": 1e-12, "output_name": "more"}
    ran(run_script, arguments(tmp_path, max_train_steps=1, network_module="networks.loha", **kept))
    assert furthest(load_file(tmp_path / "more.safetensors"), before) < 1e-9


def test_the_recipes_of_the_guide(run_script, tmp_path):
    """As they are printed, but for fewer steps and another place."""
    printed = re.findall(r"```\n(python train_leco.*?)\npython", Path("docs/leco.md").read_text(), re.S)
    assert len(printed) == 2
    for number, text in enumerate(printed):
        _, *words = shlex.split(text.replace("\\\n", " "))
        ran(run_script, [*words, f"--output_dir={tmp_path}", f"--output_name={number}", "--max_train_steps=1"])
        assert load_file(tmp_path / f"{number}.safetensors")


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"prompts_file": None}, "error: --prompts_file: missing; name a TOML file with [[prompts]] or [[targets]]"),
        ({"prompts_file": "none.toml"}, "error: --prompts_file: there is no file 'none.toml'"),
        ({"prompts_file": "README.md"}, "error: --prompts_file: README.md"),
        (
            {"network_train_text_encoder_only": True},
            "error: --network_train_text_encoder_only: only the denoiser can be trained here; leave it out",
        ),
        ({"train_data_dir": "examples/concept"}, "error: unknown option --train_data_dir: not here; an option of "),
        ({"max_denoising_steps": 1}, "error: --max_denoising_steps: must be at least 2 and at most 1000, got 1"),
        ({"output_dir": None}, "error: --output_dir: missing"),
    ],
)
def test_mistakes_are_one_line_before_a_model_is_read(run_script, arguments, tmp_path, given, line):
    said = ran(run_script, arguments(tmp_path, **given), fails=True)
    (error,) = [text for text in said.splitlines() if text.startswith("error")]
    assert error.startswith(line)
    assert "loaded" not in said
    assert not list(tmp_path.iterdir())


def test_options_of_images_are_named_once(run_script, arguments, tmp_path):
    given = {"cache_latents": True, "train_batch_size": 4, "max_data_loader_n_workers": 8, "max_train_steps": 1}
    said = ran(run_script, arguments(tmp_path, **given, no_metadata=True))
    assert said.count("have no effect, as nothing is trained on images here") == 1
    assert "--cache_latents, --train_batch_size: have no effect" in said
    assert "ss_leco_prompt_count" not in read_metadata(tmp_path / "edit.safetensors")
    assert torch.is_tensor(next(iter(load_file(tmp_path / "edit.safetensors").values())))
