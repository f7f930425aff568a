"""Of each script the recipe with the most means against memory trains to its end, on tiny models; all are checked."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from library import checking
from library.options import recipes
from library.options.parsing import parse_options
from library.registry import FAMILIES, METHODS, groups_for, scripts_of
from tests.builders import write_tiny_sd1
from tests.builders.flux import write_flux, write_parts
from tests.builders.sd3 import write_encoder_file, write_tiny_sd3
from tests.builders.sdxl import write_tiny_sdxl
from tests.builders.t5 import write_t5_tokenizer
from tests.scripts.starting import as_words

NAMES = recipes.names()
SMALLER = {"blocks_to_swap": 1}  # the tiny models have few blocks


def place(name: str) -> tuple[str, str, str]:
    """The script of a recipe, its family and its method."""
    script = recipes.about(recipes.FOLDER / f"{name}.toml").script
    return next((script, family, spec.scripts[script]) for family, spec in FAMILIES.items() if script in spec.scripts)


def given_by(name: str) -> dict[str, object]:
    """The options of a recipe by name."""
    _, family, method = place(name)
    opts = parse_options(groups_for(family, method), ["--recipe", name], scripts=scripts_of(family, method))
    return {dest: given.value for dest, given in opts.given.items()}


def means(name: str) -> int:
    """How many options of a recipe are there to save memory in special ways."""
    return sum(name in ("fused_backward_pass", "quantize_base", "blocks_to_swap") for name in given_by(name))


RUN = {place(name)[0]: name for name in sorted(NAMES, key=means)}  # the last one of each script


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By family, the options that name a tiny model."""
    folder = tmp_path_factory.mktemp("models")
    sd3 = {"pretrained_model_name_or_path": write_tiny_sd3(folder / "sd3.safetensors", "5-medium")}
    for flag, part in (("clip_l", "te1"), ("clip_g", "te2"), ("t5xxl", "te3")):
        sd3[flag] = write_encoder_file(folder / f"sd3_{flag}.safetensors", part)
    write_t5_tokenizer(folder / "google_t5-v1_1-xxl")
    return {
        "sd": {"pretrained_model_name_or_path": write_tiny_sd1(folder / "sd.safetensors")},
        "sdxl": {"pretrained_model_name_or_path": write_tiny_sdxl(folder / "sdxl.safetensors")},
        "sd3": {**sd3, "tokenizer_cache_dir": folder},
        "flux": {"pretrained_model_name_or_path": write_flux(folder), **write_parts(folder)},
    }


@pytest.fixture
def arguments(models, tmp_path):
    """What a recipe is to be given, and sizes for a tiny model."""
    images = tmp_path / "images" / "1_a"
    for folder in (images, tmp_path / "control"):
        folder.mkdir(parents=True)
        pixels = np.repeat(np.repeat(np.random.default_rng(1).integers(0, 255, (4, 4, 3), np.uint8), 16, 0), 16, 1)
        Image.fromarray(pixels).save(folder / "image.png")
    (images / "image.caption").write_text("a zqxword", encoding="utf-8")
    (tmp_path / "meta.json").write_text('{"image": {"caption": "a zqxword"}}', encoding="utf-8")
    (tmp_path / "data.toml").write_text(
        f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{images}'\nmetadata_file = '{tmp_path}/meta.json'\n",
        encoding="utf-8",
    )
    data = {
        "control_net": {"train_data_dir": images.parent, "conditioning_data_dir": tmp_path / "control"},
        "lllite": {"train_data_dir": images.parent, "conditioning_data_dir": tmp_path / "control"},
        "finetune": {"dataset_config": tmp_path / "data.toml"},
        "embedding": {"train_data_dir": images.parent, "token_string": "zqxword", "init_word": "a"},
    }

    def build(name: str) -> list[str]:
        _, family, method = place(name)
        own = data.get(method, {"train_data_dir": images.parent})
        numbers = {
            "resolution": 64,
            "min_bucket_reso": 64,
            "max_train_steps": 1,
            "lr_warmup_steps": 0,
            "max_data_loader_n_workers": 0,
        }
        smaller = {dest: value for dest, value in SMALLER.items() if dest in given_by(name)}
        out = {"output_dir": tmp_path / "out", "output_name": "result", "no_results_page": True}
        return as_words({"recipe": name, **models[family], **own, **numbers, **smaller, **out})

    return build


@pytest.mark.parametrize("name", RUN.values())
def test_a_recipe_trains_to_its_end(run_script, arguments, name, tmp_path):
    script, *_ = place(name)
    done = run_script(f"{script}.py", *arguments(name))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "result.safetensors").is_file()
    assert "has no effect" not in done.stderr.replace("has no effect on a CPU", "")
    assert "UserWarning" not in done.stderr


@pytest.mark.parametrize("name", sorted({*NAMES} - {*RUN.values()}))
def test_a_recipe_has_no_option_that_its_script_refuses(arguments, name):
    _, family, method = place(name)
    opts = parse_options(groups_for(family, method), arguments(name), scripts=scripts_of(family, method))
    assert opts.remarks == ()
    opts = METHODS[method].complete_options(FAMILIES[family].complete_options(opts))
    assert checking.check(opts, FAMILIES[family], METHODS[method])


def test_a_recipe_caches_and_then_trains_from_the_caches_with_what_is_given_beside_it(run_script, arguments, tmp_path):
    words = arguments("sdxl-lora-8gb")
    for tool in ("cache_latents", "cache_text_encoder_outputs"):
        done = run_script(f"tools/{tool}.py", *(word for word in words if not word.startswith("--lr_warmup_steps")))
        assert done.returncode == 0, done.stderr[-3000:]
    done = run_script("sdxl_train_network.py", *words, "--network_dim=3")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("1 used as they are") == 2
    weights = load_file(tmp_path / "out" / "result.safetensors")
    assert {len(weight) for key, weight in weights.items() if key.endswith("lora_down.weight")} == {3}
