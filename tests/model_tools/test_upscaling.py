"""tools/latent_upscaler.py, against diffusers' own pipeline on the same images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.errors import UserError
from tests.builders import write_tiny_sd1
from tests.builders.upscaler import write_upscaler

SCRIPT = "tools/latent_upscaler.py"


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upscaler")
    return folder, write_upscaler(folder)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a", (64, 64)), ("b", (64, 64)), ("c", (150, 70))):
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(folder / f"{name}.png")
    (folder / "d.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


def expected(pipe, image: Image.Image) -> np.ndarray:
    pixels = torch.from_numpy(np.asarray(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
        rng = torch.Generator().manual_seed(0)
        made = pipe("", image=latents, num_inference_steps=2, guidance_scale=0, generator=rng, output_type="np").images
    return made[0] * 255


def test_images_come_out_as_diffusers_makes_them(run_script, upscaler, images, tmp_path):
    folder, pipe = upscaler
    line = ["--weights", folder, "--image_pattern", images / "*.png", "--output_dir", tmp_path / "out", "--steps", "2"]
    done = run_script(SCRIPT, *line, "--debug")
    assert done.returncode == 0, done.stderr
    assert "3 done, 1 failed" in done.stderr
    names = {path.name: Image.open(path) for path in (tmp_path / "out").iterdir()}
    assert sorted(names) == [f"{name}{end}.png" for name in "abc" for end in ("", "_vae")]
    assert names["c.png"].size == (256, 128)
    assert names["c_vae.png"].size == (128, 64)
    for name in "ab":
        wanted = expected(pipe, Image.open(images / f"{name}.png"))
        assert np.abs(np.asarray(names[f"{name}.png"]) - wanted).max() <= 1  # rounding


@pytest.mark.parametrize("size", [(128, 256), (200, 120)])
def test_as_the_upscaler_of_highres_fix(upscaler, size):
    """Images become as large as they are asked for; where sides do not divide, they are resized before and after."""
    from tools.latent_upscaler import create_upscaler

    folder, pipe = upscaler
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (128, 64, 3), np.uint8))
    (found,) = create_upscaler(weights=str(folder), steps="2").upscale([image], *size)
    assert found.size == size
    if size == (128, 256):
        assert np.abs(np.asarray(found) - expected(pipe, image)).max() <= 1  # rounding


@pytest.mark.parametrize(
    ("given", "message"), [({}, "weights=FOLDER"), ({"weights": "x", "steps": "few"}, "got 'few'")]
)
def test_wrong_arguments_of_highres_fix(given, message):
    from library.model_tools.upscaling import create_upscaler

    with pytest.raises(UserError, match=f"--highres_fix_upscaler_args: .*{message}"):
        create_upscaler(**given)


def test_another_vae(run_script, upscaler, images, tmp_path):
    folder, _ = upscaler
    model = write_tiny_sd1(tmp_path / "model.safetensors")
    line = [SCRIPT, "--weights", folder, "--image_pattern", images / "a.png", "--steps", "1"]
    assert run_script(*line, "--output_dir", tmp_path / "own").returncode == 0
    done = run_script(*line, "--output_dir", tmp_path / "other", "--vae_path", model)
    assert done.returncode == 0, done.stderr
    own, other = (np.asarray(Image.open(tmp_path / name / "a.png")).astype(int) for name in ("own", "other"))
    assert own.shape == other.shape
    assert np.abs(own - other).max() > 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"weights": None}, "--weights is required: the Diffusers folder of a latent upscaler"),
        ({"weights": "model.safetensors"}, "layouts of other programs' latent upscalers are not known here"),
        ({"weights": "nothing/here"}, "cannot be loaded"),
        ({"image_pattern": "no*.png"}, "there are no images"),
        ({"output_dir": "images"}, "holds the images themselves"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(run_script, images, tmp_path, more, message):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    options = {"weights": "folder", "image_pattern": "images/*.png", "output_dir": "out", **more}
    words = [word for name, value in options.items() if value for word in (f"--{name}", value)]
    done = run_script(Path(__file__).parents[2] / SCRIPT, *words, folder=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
