"""Every recipe trains on a tiny model of its kind, to a file that is read again.

For a network and a whole model of each family the one with the most means against memory does so in the fast suite,
where the others are checked only. A CPU does all that they ask for, 8-bit optimizers and weights and bf16 too,
so `SIZES` and `SMALLER` are all that is given in place of a recipe's own values.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from library import checking
from library.options import recipes
from library.options.parsing import parse_options
from library.registry import FAMILIES, METHODS, groups_for, scripts_of
from library.session import SAVE_DTYPES
from tests.builders import write_tiny_sd1
from tests.builders.flux import write_flux, write_parts
from tests.builders.sd3 import write_encoder_file, write_tiny_sd3
from tests.builders.sdxl import write_tiny_sdxl
from tests.builders.t5 import write_t5_tokenizer
from tests.scripts.starting import as_words

NAMES = recipes.names()
REPEATS = 8  # of the one image: a full batch of the largest size in a recipe
SIZES = {
    "resolution": 64,
    "min_bucket_reso": 64,
    "max_train_steps": 2,
    "lr_warmup_steps": 0,  # the recipes' 100 would leave rates that change nothing in two steps
    "max_data_loader_n_workers": 0,  # processes of their own for one image would only take time
}
SMALLER = {"blocks_to_swap": 1}  # where a recipe has it: the tiny models have few blocks
# By method, the option that names a file to go on from; the others write whole models.
CONTINUED_BY = {
    "network": "network_weights",
    "lllite": "network_weights",
    "control_net": "controlnet_model_name_or_path",
    "embedding": "weights",
}


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


# The last one of each script; other tests of the fast suite run the scripts that are left out.
FAST = {place(name)[0]: name for name in sorted(NAMES, key=means) if place(name)[2] in ("network", "finetune")}.values()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By what the names of recipes begin with, the options that name a tiny model of that kind."""
    folder = tmp_path_factory.mktemp("models")
    write_t5_tokenizer(folder / "google_t5-v1_1-xxl")
    texts = {"tokenizer_cache_dir": folder}
    for flag, part in (("clip_l", "te1"), ("clip_g", "te2"), ("t5xxl", "te3")):
        texts[flag] = write_encoder_file(folder / f"sd3_{flag}.safetensors", part)
    files = {
        "sd15": write_tiny_sd1(folder / "sd.safetensors"),
        "sdxl": write_tiny_sdxl(folder / "sdxl.safetensors"),
        "sd35m": write_tiny_sd3(folder / "sd35m.safetensors", "5-medium"),
        "sd35l": write_tiny_sd3(folder / "sd35l.safetensors", "5-large"),
        "flux": write_flux(folder),
    }
    beside = {"sd35m": texts, "sd35l": texts, "flux": write_parts(folder)}
    return {kind: {"pretrained_model_name_or_path": file, **beside.get(kind, {})} for kind, file in files.items()}


@pytest.fixture
def arguments(models, tmp_path):
    """What a recipe is to be given, and sizes for a tiny model."""
    images = tmp_path / "images" / f"{REPEATS}_a"
    for folder in (images, tmp_path / "control"):
        folder.mkdir(parents=True)
        pixels = np.repeat(np.repeat(np.random.default_rng(1).integers(0, 255, (4, 4, 3), np.uint8), 16, 0), 16, 1)
        Image.fromarray(pixels).save(folder / "image.png")
    (images / "image.caption").write_text("a zqxword", encoding="utf-8")
    (tmp_path / "meta.json").write_text('{"image": {"caption": "a zqxword"}}', encoding="utf-8")
    (tmp_path / "data.toml").write_text(
        f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{images}'\nmetadata_file = '{tmp_path}/meta.json'\n"
        f"num_repeats = {REPEATS}\n",
        encoding="utf-8",
    )
    data = {
        "control_net": {"train_data_dir": images.parent, "conditioning_data_dir": tmp_path / "control"},
        "lllite": {"train_data_dir": images.parent, "conditioning_data_dir": tmp_path / "control"},
        "finetune": {"dataset_config": tmp_path / "data.toml"},
        "embedding": {"train_data_dir": images.parent, "token_string": "zqxword", "init_word": "a"},
    }

    def build(name: str) -> list[str]:
        _, _, method = place(name)
        own = data.get(method, {"train_data_dir": images.parent})
        smaller = {dest: value for dest, value in SMALLER.items() if dest in given_by(name)}
        out = {"output_dir": tmp_path / "out", "output_name": "result", "no_results_page": True}
        return as_words({"recipe": name, **models[name.split("-")[0]], **own, **SIZES, **smaller, **out})

    return build


def saved(name: str, words: list[str], path: Path) -> dict[str, Tensor]:
    """What a recipe's method saves when it has trained nothing, for the words of a command line."""
    _, family, method = place(name)
    opts = parse_options(groups_for(family, method), words, scripts=scripts_of(family, method))
    opts = METHODS[method].complete_options(FAMILIES[family].complete_options(opts))
    adapter, trained = FAMILIES[family].adapter(opts), METHODS[method].method(opts)
    trained.attach(adapter, adapter.loader.load())
    trained.save(path, SAVE_DTYPES[opts.saving.save_precision], None)
    return load_file(path)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NAMES])
def test_a_recipe_trains_to_a_file_that_is_read_again(run_script, arguments, name, tmp_path):
    script, _, method = place(name)
    words, file = arguments(name), tmp_path / "out" / "result.safetensors"
    done = run_script(f"{script}.py", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "has no effect" not in done.stderr.replace("has no effect on a CPU", "")
    assert "UserWarning" not in done.stderr

    trained = load_file(file)
    start = saved(name, words, tmp_path / "start.safetensors")
    again = saved(name, [*words, f"--{CONTINUED_BY.get(method, 'pretrained_model_name_or_path')}={file}"], file)
    assert trained.keys() == start.keys() == again.keys()
    assert all(torch.equal(again[key], weight) for key, weight in trained.items())
    # What is new begins at random but for zeros, so there these are what shows that something was learned.
    known = method not in CONTINUED_BY or method == "embedding"
    assert any(not torch.equal(weight, start[key]) for key, weight in trained.items() if known or not start[key].any())


@pytest.mark.parametrize("name", sorted({*NAMES} - {*FAST}))
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
