"""train_db.py and fine_tune.py from the outside, on the bundled model: the printed command lines, and learning.

Only paths, sizes and lengths of the command lines are changed, and on machines without a GPU their fp16.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from library import cli
from library.data.sample import images as imaging
from library.types import Size

MODEL = "examples/tiny_model/tiny-sd.safetensors"
CONCEPT = Path("examples/concept/10_sks flower")


@pytest.fixture(scope="module")
def base(tmp_path_factory, small_model):
    """The small model as a .ckpt that has been trained before."""
    path = tmp_path_factory.mktemp("base") / "model.ckpt"
    family, models = cli.load_family("sd", [f"--pretrained_model_name_or_path={small_model}"])
    family.writer.save(models, path, save_as="ckpt", dtype=None, metadata={"ss_epoch": "2", "ss_steps": "100"})
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two images in a training folder, one in a regularisation folder."""
    folder = tmp_path_factory.mktemp("images")
    for name, files in (("train/1_sks flower", ("00", "01")), ("reg/2_flower", ("02",))):
        (folder / name).mkdir(parents=True)
        for file in files:
            with Image.open(CONCEPT / f"flower_{file}.png") as image:
                image.resize((64, 64)).save(folder / name / f"flower_{file}.png")
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, images, small_model):
    """A metadata file, and the latents that it goes with, without images."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "train_data").mkdir()
    family, models = cli.load_family("sd", [f"--pretrained_model_name_or_path={small_model}"])
    metadata = {}
    for path in sorted(images.glob("train/*/*.png")):
        latents = family.latents.encode(models, pixels_of(path)[None])[0].numpy()
        np.savez(folder / "train_data" / f"{path.stem}.npz", latents=latents, **SIZES)
        metadata[path.stem] = {"caption": "a flower", "tags": "sks, pink", "train_resolution": [64, 64]}
    (folder / "meta_lat.json").write_text(json.dumps(metadata))
    return folder


SIZES = {"original_size": [64, 64], "crop_ltrb": [0, 0, 64, 64]}


def pixels_of(path: Path) -> torch.Tensor:
    return imaging.to_pixels(imaging.resize(imaging.read_image(path), Size(64, 64)))


def ran(run_script, command: str) -> str:
    """Runs a printed command line without its launcher, which `test_train_network.py` starts."""
    done = run_script(*command.split())
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def changed_parts(before: Path | str, after: Path) -> set[str]:
    """The parts of a single file that hold other numbers than before."""
    old, new = weights_of(before), weights_of(after)
    assert old.keys() == new.keys()
    assert all(value.isfinite().all() for value in new.values())
    return {name.split(".")[0] for name, value in new.items() if not torch.equal(value.float(), old[name].float())}


def weights_of(path: Path | str) -> dict[str, torch.Tensor]:
    if Path(path).suffix == ".ckpt":
        return torch.load(path, weights_only=True)["state_dict"]
    return load_file(path)


# ---- the printed command lines


@pytest.mark.rows("C24", "C37", "R5", "R8", "R11", "R117", "R221")
def test_fine_tuning_from_a_metadata_file_and_its_latents(run_script, tmp_path, base, prepared):
    printed = ran(
        run_script,
        f"fine_tune.py --pretrained_model_name_or_path={base} "
        f"--in_json {prepared}/meta_lat.json --train_data_dir={prepared}/train_data --output_dir={tmp_path} "
        "--shuffle_caption --train_batch_size=1 --learning_rate=1e-3 --max_train_steps=5 --use_8bit_adam --xformers "
        "--gradient_checkpointing --mixed_precision=bf16 --save_every_n_epochs=2",
    )
    assert "2 images of which only latents are there" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-000002.ckpt", "last.ckpt", "last.html"]
    assert changed_parts(base, tmp_path / "last.ckpt") == {"model"}, "the text encoder only on request"
    counts = [torch.load(tmp_path / name, weights_only=True) for name in ("epoch-000002.ckpt", "last.ckpt")]
    assert [(file["epoch"], file["global_step"]) for file in counts] == [(4, 104), (5, 105)]


@pytest.mark.rows("C35", "R188", "R226")
def test_fine_tuning_from_a_dataset_config(run_script, tmp_path, small_model, prepared, images):
    (tmp_path / "data.toml").write_text(
        "[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\n"
        f"image_dir = '{(images / 'train' / '1_sks flower').as_posix()}'\n"
        f"metadata_file = '{(prepared / 'meta_lat.json').as_posix()}'\n"
    )
    precision = "fp16" if torch.cuda.is_available() else "no"
    command = (
        f"fine_tune.py --pretrained_model_name_or_path={small_model} "
        f"--output_dir={tmp_path} --output_name=tuned --dataset_config={tmp_path}/data.toml "
        "--save_model_as=safetensors --learning_rate=1e-3 --max_train_steps=2 --use_8bit_adam --xformers "
        f"--gradient_checkpointing --mixed_precision={precision}"
    )
    ran(run_script, f"{command} --train_text_encoder --learning_rate_te=1e-3 --logging_dir={tmp_path}/logs")
    assert changed_parts(small_model, tmp_path / "tuned.safetensors") == {"model", "cond_stage_model"}
    with safe_open(tmp_path / "tuned.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1"
    assert metadata["modelspec.title"] == "tuned"
    assert not [name for name in metadata if name.startswith(("ss_", "sshs_"))]
    (run,) = (tmp_path / "logs").iterdir()
    assert [folder.name for folder in run.iterdir()] == ["finetuning"]


@pytest.mark.rows("C30", "C31", "R14")
@pytest.mark.parametrize(("batch_size", "further"), [(1, " --gradient_checkpointing"), (4, "")])
def test_dreambooth_with_regularisation_images(run_script, tmp_path, base, images, batch_size, further):
    printed = ran(
        run_script,
        f"train_db.py --pretrained_model_name_or_path={base} "
        f"--train_data_dir={images}/train --reg_data_dir={images}/reg --output_dir={tmp_path} "
        f"--prior_loss_weight=1.0 --resolution=64 --train_batch_size={batch_size} --learning_rate=1e-3 "
        f"--max_train_steps=2 --use_8bit_adam --xformers --mixed_precision=bf16 --cache_latents{further}",
    )
    assert "2 images, 2 with repeats; 1 for regularisation, 2 with repeats" in printed
    assert changed_parts(base, tmp_path / "last.ckpt") == {"model", "cond_stage_model"}


@pytest.mark.rows("C32", "R14", "R217")
def test_dreambooth_with_buckets_augmentation_and_state(run_script, tmp_path, small_model, images):
    ran(
        run_script,
        f"train_db.py --pretrained_model_name_or_path={small_model} "
        f"--train_data_dir={images}/train --reg_data_dir={images}/reg --output_dir={tmp_path}/out "
        "--resolution=128,64 --train_batch_size=20 --learning_rate=1e-3 --max_train_steps=2 --use_8bit_adam "
        f"--xformers --mixed_precision=bf16 --save_every_n_epochs=1 --save_state --save_precision=bf16 "
        f"--logging_dir={tmp_path}/logs --enable_bucket --min_bucket_reso=64 --max_bucket_reso=192 --color_aug "
        "--flip_aug --gradient_checkpointing --seed 42 "
        "--stop_text_encoder_training=-1",  # not printed; so that one run shows it
    )
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"epoch-000001.safetensors", "epoch-000001-state", "last.safetensors", "last-state"} <= written
    weights = load_file(tmp_path / "out" / "last.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    rounded = {name: value.bfloat16() for name, value in load_file(small_model).items()}
    changed = {name.split(".")[0] for name, value in weights.items() if not torch.equal(value, rounded[name])}
    assert changed == {"model"}


# ---- what it is for


@pytest.mark.slow
@pytest.mark.rows("R5", "R14", "R117", "R118")
def test_training_images_are_learned_and_diffusers_reads_the_result(run_script, tmp_path):
    """The loss on the training images, at the same noise, before and after; with the model that diffusers opens."""
    from diffusers import StableDiffusionPipeline

    ran(
        run_script,
        f"train_db.py --pretrained_model_name_or_path={MODEL} --train_data_dir=examples/concept "
        f"--output_dir={tmp_path} --output_name=tuned --save_model_as=diffusers_safetensors "
        "--resolution=64 --enable_bucket --min_bucket_reso=64 --train_batch_size=4 --max_train_steps=20 "
        "--learning_rate=2e-4 --cache_latents --seed=1 --max_data_loader_n_workers=0",
    )
    family, before = cli.load_family("sd", [f"--pretrained_model_name_or_path={MODEL}"])
    _, after = cli.load_family("sd", [f"--pretrained_model_name_or_path={tmp_path / 'tuned'}"])
    first, last = (denoising_loss(family, models) for models in (before, after))
    print(f"denoising loss {first:.4f} before, {last:.4f} after")
    assert last < 0.5 * first, (first, last)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "tuned", local_files_only=True)
    ids = pipe.tokenizer(TEXT, padding="max_length", max_length=77, return_tensors="pt").input_ids
    noise, times = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([500])
    with torch.no_grad():
        theirs = pipe.unet(noise, times, pipe.text_encoder(ids)[0]).sample
        ours = family.denoiser.predict(after, noise, times, family.text.encode(after, [TEXT]))
        untrained = family.denoiser.predict(before, noise, times, family.text.encode(before, [TEXT]))
    assert (theirs - ours).abs().max() < 1e-5
    assert (theirs - untrained).abs().max() > 1e-2


TEXT = "a large sks flower on a black background"


@torch.no_grad()
def denoising_loss(family, models) -> float:
    """Mean squared error of the predicted noise over all training images and eight noise levels."""
    rng = torch.Generator().manual_seed(7)
    paths = sorted(CONCEPT.glob("*.png"))
    pixels = torch.stack([pixels_of(path) for path in paths])
    captions = [path.with_suffix(".caption").read_text(encoding="utf-8").strip() for path in paths]
    latents = family.latents.scale(family.latents.encode(models, pixels, rng))
    cond = family.text.encode(models, captions)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, 0).float()
    losses = []
    for time in range(60, 1000, 120):
        noise = torch.randn(latents.shape, generator=rng)
        noisy = kept[time] ** 0.5 * latents + (1 - kept[time]) ** 0.5 * noise
        predicted = family.denoiser.predict(models, noisy, torch.full((len(paths),), time), cond)
        losses.append((predicted - noise).square().mean())
    return float(torch.stack(losses).mean())


@pytest.mark.rows("R222")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("fine_tune.py --train_data_dir=examples/concept --resolution=64", "--in_json: missing"),
        ("fine_tune.py --reg_data_dir=examples/regularisation", "unknown option --reg_data_dir"),
        ("train_db.py --in_json=meta.json", "unknown option --in_json"),
        ("train_db.py --save_model_as=pt", "--save_model_as: must be one of ckpt, safetensors, diffusers"),
    ],
)
def test_mistakes_are_one_clear_line(run_script, tmp_path, arguments, said):
    done = run_script(*arguments.split(), f"--pretrained_model_name_or_path={MODEL}", f"--output_dir={tmp_path}")
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
