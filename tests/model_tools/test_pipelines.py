"""Network files on diffusers' pipelines: against our own attached network, and against diffusers' own loader."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors.torch import save_file
from torch.testing import assert_close

from library.errors import UserError
from library.model_tools.pipelines import attach, merge
from library.types import Models
from tests.builders import tiny_sd
from tests.builders.networks import TYPES, write_network
from tests.networks import dits


@pytest.fixture(scope="module")
def sd() -> Models:
    return tiny_sd()


def sd_pipeline(models: Models) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=models.vae,
        text_encoder=models.text_encoders["te"],
        tokenizer=models.tokenizers["te"],
        unet=models.denoiser,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe) -> torch.Tensor:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return pipe("a flower", num_inference_steps=2, guidance_scale=3.0, latents=noise, output_type="latent").images


@pytest.mark.parametrize("name", TYPES)
def test_attached_is_our_own_network_and_detached_is_the_bare_model(sd, tmp_path, name):
    pipe = sd_pipeline(sd)
    bare = latents(pipe)
    own = write_network(sd, tmp_path / "net.safetensors", TYPES[name])
    own.set_multiplier(0.7)
    own.attach(sd)
    expected = latents(pipe)
    own.detach()
    assert (expected - bare).abs().max() > 1e-2
    network = attach(pipe, tmp_path / "net.safetensors", 0.7)
    assert network.unused == []
    assert network.layers == len(own.layers())
    assert_close(latents(pipe), expected, rtol=1e-5, atol=1e-5)
    network.multiplier = 0
    assert_close(latents(pipe), bare, rtol=1e-5, atol=1e-5)
    network.detach()
    assert latents(pipe).equal(bare)


def test_two_networks_and_a_block(sd, tmp_path):
    pipe = sd_pipeline(sd)
    bare = latents(pipe)
    first = write_network(sd, tmp_path / "a.safetensors", TYPES["lora"])
    second = write_network(sd, tmp_path / "b.safetensors", TYPES["lokr"])
    first.attach(sd)
    second.attach(sd)
    expected = latents(pipe)
    first.detach()
    second.detach()
    with attach(pipe, tmp_path / "a.safetensors"), attach(pipe, tmp_path / "b.safetensors"):
        assert_close(latents(pipe), expected, rtol=1e-5, atol=1e-5)
    assert latents(pipe).equal(bare)


def test_merged_is_attached(tmp_path):
    models = tiny_sd()
    pipe = sd_pipeline(models)
    own = write_network(models, tmp_path / "net.safetensors", TYPES["lora"])
    with attach(pipe, tmp_path / "net.safetensors", 0.5):
        expected = latents(pipe)
    assert merge(pipe, tmp_path / "net.safetensors", 0.5) == len(own.layers())
    assert_close(latents(pipe), expected, rtol=1e-4, atol=1e-4)


def test_diffusers_own_loader_gives_the_same(tmp_path):
    """Whole pipelines, so the tolerance is that of sums in other orders over two steps."""
    models = tiny_sd()
    pipe = sd_pipeline(models)
    write_network(models, tmp_path / "net.safetensors", TYPES["lora"])
    with attach(pipe, tmp_path / "net.safetensors"):
        expected = latents(pipe)
    pipe.load_lora_weights(tmp_path / "net.safetensors")
    assert_close(latents(pipe), expected, rtol=1e-4, atol=1e-4)


def test_it_follows_the_pipeline_into_half_precision(sd, tmp_path):
    models = tiny_sd()
    pipe = sd_pipeline(models)
    write_network(models, tmp_path / "net.safetensors", TYPES["lora"])
    network = attach(pipe, tmp_path / "net.safetensors")
    expected = latents(pipe)
    pipe.to(torch.bfloat16)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)).bfloat16()
    got = pipe("a flower", num_inference_steps=2, guidance_scale=3.0, latents=noise, output_type="latent").images
    assert got.dtype == torch.bfloat16
    assert {p.dtype for p in network._network.parameters()} == {torch.bfloat16}
    assert (got.float() - expected).norm() < 0.05 * expected.norm()  # bfloat16 has 8 bits


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_transformers(tmp_path, family):
    models = getattr(dits, family)()
    output = getattr(dits, f"{family}_output")
    rest = {"scheduler": None, "vae": None, "transformer": models.denoiser}
    if family == "flux":
        encoders = {"text_encoder": models.text_encoders["te1"], "text_encoder_2": models.text_encoders.get("te3")}
        pipe = FluxPipeline(**rest, **encoders, tokenizer=None, tokenizer_2=None)
    else:
        names = {f"text_encoder{end}": models.text_encoders.get(f"te{n}") for n, end in ((1, ""), (2, "_2"), (3, "_3"))}
        pipe = StableDiffusion3Pipeline(**rest, **names, tokenizer=None, tokenizer_2=None, tokenizer_3=None)
    bare = output(models.denoiser)
    own = write_network(models, tmp_path / "net.safetensors", TYPES["lora"], family)
    own.attach(models)
    expected = output(models.denoiser)
    own.detach()
    with attach(pipe, tmp_path / "net.safetensors") as network:
        assert network.layers == len(own.layers())
        assert_close(output(models.denoiser), expected, rtol=1e-5, atol=1e-5)
    assert output(models.denoiser).equal(bare)
    assert not expected.equal(bare)


def test_wrong_files_and_pipelines(sd, tmp_path):
    pipe = sd_pipeline(sd)
    save_file({"lora_unet_double_blocks_0_img_mlp_0.lora_down.weight": torch.zeros(2, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="is not LoRA or"):
        attach(pipe, tmp_path / "a.safetensors")
    tensors = {f"lora_unet_double_blocks_0_img_mlp_0.lora_{side}.weight": torch.zeros(4, 4) for side in ("down", "up")}
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="none of its 1 layers fits"):
        merge(pipe, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="not known here"):
        attach(object(), tmp_path / "b.safetensors")


def test_the_script(sd, run_script, tmp_path):
    pipe = sd_pipeline(sd)
    pipe.save_pretrained(tmp_path / "model")
    write_network(sd, tmp_path / "net.safetensors", TYPES["loha"])
    line = ["networks/lora_diffusers.py", "--model_id", tmp_path / "model", "--prompt", "a flower", "--seed", "5"]
    out = tmp_path / "image.png"
    line += ["--lora_weights", tmp_path / "net.safetensors", "--output", out, "--steps", "2", "--multiplier", "0.5"]
    done = run_script(*line)
    assert done.returncode == 0, done.stderr
    from PIL import Image

    with attach(pipe, tmp_path / "net.safetensors", 0.5):
        rng = torch.Generator().manual_seed(5)
        expected = pipe("a flower", num_inference_steps=2, generator=rng).images[0]
    image = Image.open(out)
    assert image.size == (64, 64)
    assert max(abs(a - b) for a, b in zip(image.tobytes(), expected.tobytes(), strict=True)) <= 1
    refused = run_script(*line, "--sdxl")
    assert refused.returncode == 2
    assert "--sdxl:" in refused.stderr
    assert "Stable Diffusion 1.x" in refused.stderr
