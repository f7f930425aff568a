"""tools/latent_upscaler.py, against diffusers' own pipeline on the same images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionLatentUpscalePipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from library.text.tokenizers import bundled_clip_tokenizer
from tests.builders import write_tiny_sd1

SCRIPT = "tools/latent_upscaler.py"


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory):
    """A tiny one: the parts and sizes that diffusers' class asks for, with random weights."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        act_fn="gelu",
        attention_head_dim=8,
        norm_num_groups=None,
        block_out_channels=(32, 32, 64, 64),
        time_cond_proj_dim=128 + 32,
        conv_in_kernel=1,
        conv_out_kernel=1,
        cross_attention_dim=32,
        down_block_types=("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
        in_channels=8,
        mid_block_type=None,
        only_cross_attention=False,
        out_channels=5,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
        up_block_types=(*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=49407,
        )
    )
    pipe = StableDiffusionLatentUpscalePipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=bundled_clip_tokenizer(None),
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(prediction_type="sample"),
    )
    folder = tmp_path_factory.mktemp("upscaler")
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return folder, pipe


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
