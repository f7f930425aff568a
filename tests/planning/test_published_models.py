"""Plans of models at their published size, from files without data, against counts that others have published."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from tests.scripts.starting import ROOT, as_words

sys.path.insert(0, str(ROOT / "benchmarks"))

import header_models
import memory_recipes

# Runs a script, and says the most memory that it had.
MEASURED = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    from library.training.device_memory import peak_of_process
    print("GB at most:", peak_of_process())
"""
SD15_UNET = 859_520_964  # weights


@pytest.fixture(scope="module")
def sd15(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("published") / "sd15.safetensors"
    header_models.write_sd15(file)
    return file


def test_a_file_without_data_has_the_names_and_the_size_of_the_real_one(sd15):
    assert sd15.stat().st_size // 10**7 == 213  # v1-5-pruned-emaonly in float16 has 2.13 GB
    assert sd15.stat().st_blocks * 512 < 10**7  # a hole
    with safe_open(sd15, "pt") as file:
        sizes = [file.get_slice(key).get_shape() for key in file.keys() if key.startswith("model.diffusion_model.")]  # noqa: SIM118
    assert sum(math.prod(size) for size in sizes) == SD15_UNET


@pytest.mark.slow
def test_a_plan_of_sd15_has_the_weights_and_the_operations_that_are_known(run_script, sd15, tmp_path):
    images = tmp_path / "data" / "1_a"
    images.mkdir(parents=True)
    Image.new("RGB", (512, 512)).save(images / "image.png")
    options = {
        "pretrained_model_name_or_path": sd15,
        "train_data_dir": images.parent,
        "output_dir": tmp_path,
        "resolution": 512,
        "network_module": "networks.lora",
        "network_dim": 16,
        "network_train_unet_only": True,
        "learning_rate": 1e-4,
        "cache_latents": True,
        "mixed_precision": "bf16",
        "max_train_steps": 10,
        "plan": True,
        "plan_device": "RTX 4090",
        "plan_json": tmp_path / "plan.json",
    }
    script = run_script("train_network.py", *as_words(options))
    assert script.returncode == 0, script.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    peak = next(phase for phase in plan["phases"] if phase["name"] == "second step")["peaks"]["gpu"]
    weights = peak["by_kind"]["weights of the denoiser"]
    assert 2 * SD15_UNET <= weights < 2 * SD15_UNET + 512 * 700  # bf16; each of 686 tensors is rounded up
    # 0.68 TFLOP of layers and 0.13 of attention forwards; backwards the same for layers, as nothing but what is added
    # needs gradients of weights, and 2.5 times for attention: 1.8 in all (512 px, batch 1).
    assert "1.8" in script.stdout.partition("estimated from ")[2].split(" TFLOP")[0]


HELD = (
    *("sd15-full-12gb", "sdxl-lora-8gb", "sdxl-full-8gb", "sd35m-lora-12gb", "sd35l-lora-16gb"),
    *("flux-lora-8gb", "flux-lora-12gb", "flux-lora-16gb", "flux-lora-24gb", "flux-full-24gb"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", HELD)
def test_a_recipe_needs_what_its_row_says(tmp_path, name):
    """The tables of the guides are those of the program as it is."""
    recipe = memory_recipes.Recipe(name)
    about, model = recipe.about, memory_recipes.make_model(recipe.model, tmp_path)
    plan = memory_recipes.plan_of(about.script, about.card, ["--recipe", name], model, tmp_path)
    found = memory_recipes.row(recipe, plan)
    rows = (ROOT / "docs" / "recipes.md").read_text("utf-8").splitlines()
    (written,) = (line for line in rows if line.startswith(f"| `{name}` |"))
    assert found == written, "python benchmarks/memory_recipes.py --write"
    assert memory_recipes.share(plan) <= 1 - memory_recipes.SPARE


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems count memory in other units")
def test_cpu_memory_is_that_of_the_real_run(run_script, tmp_path):
    """Within 15 %, with a model of which one copy in float32 takes more than Python and its libraries.

    Its weights are a hole in the file, which reads as zeros.
    """
    header_models.write_sd15(tmp_path / "model.safetensors", block_out_channels=(192, 384, 768, 768))
    options = {
        "pretrained_model_name_or_path": tmp_path / "model.safetensors",
        "output_dir": tmp_path / "out",
        "resolution": 64,
        "min_bucket_reso": 64,
        "network_module": "networks.lora",
        "learning_rate": 1e-4,
        "max_data_loader_n_workers": 0,
        "max_train_steps": 2,
        "no_results_page": True,
    }
    words = [*memory_recipes.data_flags("network", tmp_path, 64), *as_words(options)]
    planned = run_script("train_network.py", *words, "--plan", f"--plan_json={tmp_path / 'plan.json'}")
    assert planned.returncode == 0, planned.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    real = run_script("-c", MEASURED, "train_network.py", *words)
    assert real.returncode == 0, real.stderr
    measured = 1e9 * float(real.stdout.rpartition("GB at most: ")[2])
    assert measured > 2 << 30
    assert plan["cpu_bytes"] == pytest.approx(measured, rel=0.15)
