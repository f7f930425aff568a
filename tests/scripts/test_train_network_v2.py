"""train_network.py on a 768/v model of Stable Diffusion 2.x, with a dataset config and a configuration file.

The model is tiny and random. The script is watched from inside: what it hands to the model is counted.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.builders import write_tiny_sd2

ROOT = Path(__file__).resolve().parents[2]
IMAGES = "examples/concept/10_sks flower"
BATCH_SIZE, STEPS = 4, 6

WATCHED = """
import json, sys
import torch
from library import cli
from library.families.sd.adapter import SdDenoiser
from library.families.shared.roles import VaeLatents

seen = {"trained": [], "encoded": 0, "encoded_before_training": 0, "weights": []}
predict, encode_images = SdDenoiser.predict, VaeLatents.encode

def watched_predict(self, models, noisy, *rest):
    if not seen["trained"]:
        seen["encoded_before_training"] = seen["encoded"]
    seen["trained"].append(len(noisy))
    seen["weights"].append(str(models.denoiser.conv_in.weight.dtype))
    return predict(self, models, noisy, *rest)

def watched_encode_images(self, models, pixels, *rest, **named):
    seen["encoded"] += len(pixels)
    return encode_images(self, models, pixels, *rest, **named)

SdDenoiser.predict, VaeLatents.encode = watched_predict, watched_encode_images
cli.run("sd", "network")
seen["math_kernel"] = torch.backends.cuda.math_sdp_enabled()
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, run_script, train_arguments) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("v2")
    dataset = folder / "data.toml"
    dataset.write_text(
        "[general]\nflip_aug = true\nenable_bucket = true\nmin_bucket_reso = 64\n"
        f"[[datasets]]\nresolution = 64\nbatch_size = {BATCH_SIZE}\n"
        f"[[datasets.subsets]]\nimage_dir = '{IMAGES}'\n",
        encoding="utf-8",
    )
    (folder / "settings.toml").write_text('[memory]\nmixed_precision = "bf16"\n', encoding="utf-8")
    command = train_arguments(
        folder / "out",
        pretrained_model_name_or_path=write_tiny_sd2(folder / "768-v-tiny.safetensors"),
        v2=True,
        v_parameterization=True,
        train_data_dir=None,
        dataset_config=dataset,
        config_file=folder / "settings.toml",
        output_name=None,
        resolution=None,
        enable_bucket=None,
        min_bucket_reso=None,
        train_batch_size=3,
        max_train_steps=STEPS,
        mem_eff_attn=True,
        console_log_simple=True,
    )
    result = run_script("-c", WATCHED, *command[1:])
    assert result.returncode == 0, result.stderr
    return SimpleNamespace(
        out=folder / "out", log=result.stderr.splitlines(), seen=json.loads(result.stdout.splitlines()[-1])
    )


@pytest.mark.rows("R126")
def test_without_a_name_the_last_file_is_called_last(run):
    assert sorted(path.name for path in run.out.iterdir()) == ["last.html", "last.safetensors"]


@pytest.mark.rows("R132", "R135")
def test_the_file_says_which_model_it_is_for(run):
    with safe_open(run.out / "last.safetensors", "pt") as file:
        metadata = file.metadata()
    expected = {
        "ss_v2": "True",
        "ss_base_model_version": "sd_v2_v",
        "modelspec.architecture": "stable-diffusion-v2-768-v/lora",
        "modelspec.prediction_type": "v",
    }
    assert {name: metadata.get(name) for name in expected} == expected
    weights = load_file(run.out / "last.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())
    untouched = {name for name, value in weights.items() if "lora_up" in name and not value.any()}
    # At 64 pixels the middle has one position, and attention among one has nothing to choose: its gradient is what
    # rounding leaves, mostly nothing.
    middle = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_"
    assert untouched <= {f"{middle}{name}.lora_up.weight" for name in "qk"}


@pytest.mark.rows("R138", "R223", "R224")
def test_steps_times_the_batch_size_of_the_dataset_config_are_seen(run):
    """16 images of one size make four whole batches; the run goes through them one and a half times."""
    assert run.seen["trained"] == [BATCH_SIZE] * STEPS
    with safe_open(run.out / "last.safetensors", "pt") as file:
        (dataset,) = json.loads(file.metadata()["ss_datasets"])
    assert dataset["batch_size_per_device"] == BATCH_SIZE


@pytest.mark.rows("R180", "R181")
def test_the_vae_runs_once_for_each_image_and_its_mirror_image(run):
    images = len(list((ROOT / IMAGES).glob("*.png")))
    assert run.seen["encoded"] == run.seen["encoded_before_training"] == 2 * images


@pytest.mark.rows("C99", "R177")
def test_the_configuration_file_sets_the_precision(run):
    assert set(run.seen["weights"]) == {"torch.bfloat16"}


@pytest.mark.rows("R173")
def test_memory_efficient_attention_is_used(run):
    assert run.seen["math_kernel"] is False
    assert any(line.endswith("attention memory-efficient sdpa") for line in run.log)


@pytest.mark.rows("R239")
def test_simple_lines_begin_with_the_message(run):
    assert f"total: {STEPS} optimizer steps, 2 epochs" in run.log
    assert not [line for line in run.log if re.search(r"\d\d:\d\d:\d\d (INFO|WARNING)|\x1b\[\d*m", line)]
