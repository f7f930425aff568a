"""cache_latents.py and cache_text_encoder_outputs.py from the outside, and the training runs that they are for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.builders.flux import write_flux, write_parts
from tests.builders.sd3 import write_tiny_sd3
from tests.builders.sdxl import write_tiny_sdxl
from tests.builders.t5 import write_t5_tokenizer

SD = "examples/tiny_model/tiny-sd.safetensors"
DATA = ("--resolution=64", "--enable_bucket", "--min_bucket_reso=64", "--flip_aug", "--caption_extension=.txt")
FOUND = "used as they are\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three images with captions, two of which are equal, and a damaged image."""
    place = tmp_path_factory.mktemp("data") / "1_thing"
    place.mkdir()
    for number, caption in enumerate(("a red house", "a blue house", "a red house")):
        Image.new("RGB", (64 + 40 * number, 64), (number * 60, 90, 120)).save(place / f"{number}.png")
        (place / f"{number}.txt").write_text(caption, encoding="utf-8")
    (place / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return place.parent


@pytest.fixture
def data(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "data")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The command line's words about a family's model, by the family's name."""
    place = tmp_path_factory.mktemp("models")
    made: dict[str, list[str]] = {}

    def words(family: str) -> list[str]:
        if family not in made:
            made[family] = list(_write(family, place))
        return made[family]

    return words


def _write(family: str, place: Path):
    if family == "sd":
        yield f"--pretrained_model_name_or_path={SD}"
    elif family == "sdxl":
        yield f"--pretrained_model_name_or_path={write_tiny_sdxl(place / 'sdxl.safetensors')}"
    elif family == "sd3":
        write_t5_tokenizer(place / "sd3" / "google_t5-v1_1-xxl")
        whole = write_tiny_sd3(place / "sd3.safetensors", encoders=("te1", "te2", "te3"))
        yield from (f"--pretrained_model_name_or_path={whole}", f"--tokenizer_cache_dir={place / 'sd3'}")
        yield "--t5xxl_max_token_length=16"
    else:
        yield f"--pretrained_model_name_or_path={write_flux(place / 'flux')}"
        yield from (f"--{name}={value}" for name, value in write_parts(place / "flux").items())
        yield "--t5xxl_max_token_length=16"


def ran(run_script, *arguments, status=0, **how):
    done = run_script(*map(str, arguments), **how)
    assert done.returncode == status, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.rows("R257")
@pytest.mark.parametrize(
    ("family", "script", "network", "caches"),
    [
        ("sdxl", "sdxl_train_network.py", "networks.lora", ("_0064x0064_sdxl.npz", "_te_outputs.npz")),
        ("sd3", "sd3_train_network.py", "networks.lora_sd3", ("_0064x0064_sd3.npz", "_sd3_te.npz")),
        ("flux", "flux_train_network.py", "networks.lora_flux", ("_0064x0064_flux.npz", "_flux_te.npz")),
    ],
)
def test_training_finds_all_that_the_tools_wrote(run_script, data, tmp_path, model, family, script, network, caches):
    given = (f"--train_data_dir={data}", *DATA, *model(family), "--mixed_precision=bf16")
    # Where parts have files of their own, the tools need no others.
    of_latents, of_texts = (
        [word for word in given if not word.startswith(others)] if family == "flux" else given
        for others in (("--pretrained", "--clip_l", "--t5xxl="), ("--pretrained", "--ae"))
    )
    latents = ran(run_script, "tools/cache_latents.py", f"--{family}", *of_latents, "--vae_batch_size=2")
    assert "latents on disk: 3 new" in latents
    assert "3 done, 1 failed" in latents
    processes = 2 if family == "flux" else 1
    texts = ran(run_script, "tools/cache_text_encoder_outputs.py", f"--{family}", *of_texts, processes=processes)
    assert "3 done, 1 failed" in texts
    names = {path.name for path in (data / "1_thing").glob("*.npz")}
    assert {f"0{cache}" for cache in caches} <= names
    assert len(names) == 6
    trained = ran(
        run_script,
        *(script, *given, f"--output_dir={tmp_path}/out", f"--network_module={network}", "--network_dim=2"),
        *("--network_train_unet_only", "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"),
        *("--max_train_steps=1", "--max_data_loader_n_workers=0"),
    )
    assert f"latents on disk: 3 {FOUND}" in trained
    assert f"text encoder outputs on disk: 3 {FOUND}" in trained
    assert {path.name for path in (data / "1_thing").glob("*.npz")} == names


@pytest.mark.rows("R257")
def test_latents_of_the_usual_family_in_two_processes_and_a_second_time(run_script, data, tmp_path, model, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # a configuration that is meant for training
    config = tmp_path / "data.toml"
    config.write_text(
        "[general]\nenable_bucket = true\nmin_bucket_reso = 64\ncaption_extension = '.txt'\n[[datasets]]\n"
        f"resolution = 64\n[[datasets.subsets]]\nimage_dir = '{(data / '1_thing').as_posix()}'\n"
    )
    given = (f"--dataset_config={config}", *model("sd"))
    first = ran(run_script, "tools/cache_latents.py", *given, processes=2)
    assert "3 done, 1 failed" in first
    assert "2/2" in first, "the first of them encodes two"
    assert len(list((data / "1_thing").glob("*_sd.npz"))) == 3
    second = ran(run_script, "tools/cache_latents.py", *given, "--skip_existing", "--strict", status=1)
    assert f"latents on disk: 3 {FOUND}" in second
    assert "--skip_existing: has no effect" in second
    assert "0 done, 3 skipped, 1 failed" in second
