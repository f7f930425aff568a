"""What we write, diffusers reads: the LoRA of a run, and a whole model, give the same latents there as here.

Tolerance 1e-4 on latents of order 1 after three DDIM steps in float32: both run the same kernels, in other groupings.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from library import cli, registry
from library.inference.generate import sample_latents
from library.inference.prompts import SamplePrompt
from library.methods.network import NetworkMethod
from library.options import parsing

MODEL = "examples/tiny_model/tiny-sd.safetensors"
TEXT = "a sks flower on a black background"


@pytest.fixture(scope="module")
def lora(tmp_path_factory, run_script, train_arguments) -> Path:
    out = tmp_path_factory.mktemp("lora")
    changes = {"pretrained_model_name_or_path": MODEL, "network_args": ["conv_dim=4"], "learning_rate": 1e-2}
    arguments = train_arguments(out, **changes, max_train_steps=3)
    result = run_script(*arguments)
    assert result.returncode == 0, result.stderr
    return out / "lora.safetensors"


def our_latents(lora: Path | None) -> torch.Tensor:
    arguments = [f"--pretrained_model_name_or_path={MODEL}", "--network_module=networks.lora"]
    if lora is not None:
        arguments += [f"--network_weights={lora}", "--dim_from_weights"]
    family, models = cli.load_family("sd", arguments)
    if lora is not None:
        method = NetworkMethod(family.opts)
        method.attach(family, models)
        method.trainable().eval()
    prompt = SamplePrompt(
        prompt=TEXT, negative_prompt="", width=64, height=64, seed=5, steps=3, scale=5.0, sampler="ddim"
    )
    return sample_latents(family, models, [prompt], torch.device("cpu"))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Our model, saved by us as a Diffusers folder, in diffusers' own pipeline."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    folder = tmp_path_factory.mktemp("diffusers") / "model"
    family, models = cli.load_family("sd", [f"--pretrained_model_name_or_path={MODEL}"])
    family.writer.save(models, folder, save_as="diffusers_safetensors", dtype=torch.float32, metadata={})
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def diffusers_latents(pipe) -> torch.Tensor:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return pipe(
        TEXT, height=64, width=64, num_inference_steps=3, guidance_scale=5.0, latents=noise, output_type="latent"
    ).images


@pytest.mark.rows("R118")
def test_a_saved_model(pipeline):
    assert (diffusers_latents(pipeline) - our_latents(None)).abs().max() < 1e-4


def test_a_saved_lora(pipeline, lora, caplog):
    base = diffusers_latents(pipeline)
    with caplog.at_level(logging.WARNING):
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    complaints = [record.message for record in caplog.records if "key" in record.message.lower()]
    assert complaints == [], "no key may be unused or missing"
    with_lora = diffusers_latents(pipeline)
    pipeline.unload_lora_weights()
    assert (with_lora - base).abs().max() > 1e-2, "the LoRA does something"
    assert (with_lora - our_latents(lora)).abs().max() < 1e-4


def test_options_of_the_script_reach_the_network(lora):
    """The helper above builds the method from the script's own options."""
    opts = parsing.parse_options(registry.groups_for("sd", "network"), [f"--network_weights={lora}"])
    assert opts.method.network_weights == str(lora)
