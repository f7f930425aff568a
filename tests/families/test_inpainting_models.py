"""U-Nets that get inputs for a mask: what they predict before training, and their files."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline
from safetensors.torch import load_file

from library.families.sd.saving import save_model as save_sd
from library.families.sdxl.saving import save_model as save_sdxl
from library.families.shared.inpainting import widen_input
from tests.builders import tiny_sd
from tests.builders.sdxl import tiny_sdxl

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

FAMILIES = {
    "sd1": (tiny_sd, save_sd, StableDiffusionInpaintPipeline, "model.diffusion_model.input_blocks.0.0.weight"),
    "sd2": (
        partial(tiny_sd, True),
        partial(save_sd, v2=True),
        StableDiffusionInpaintPipeline,
        "model.diffusion_model.input_blocks.0.0.weight",
    ),
    "sdxl": (tiny_sdxl, save_sdxl, StableDiffusionXLInpaintPipeline, "model.diffusion_model.input_blocks.0.0.weight"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_changes_until_it_is_trained(name):
    """Whatever the mask is, to the rounding of sums with more zeros in them."""
    unet = FAMILIES[name][0]().denoiser.eval()
    rng = torch.Generator().manual_seed(1)
    latents, mask = torch.randn(2, 4, 8, 8, generator=rng), torch.randn(2, 5, 8, 8, generator=rng)
    context = torch.randn(2, 7, unet.config.cross_attention_dim, generator=rng)
    more = {}
    if name == "sdxl":
        width = unet.add_embedding.linear_1.in_features
        own = unet.config.addition_time_embed_dim * 6
        more = {"text_embeds": torch.randn(2, width - own, generator=rng), "time_ids": torch.ones(2, 6)}
    predict = partial(
        unet, timestep=torch.tensor([3, 700]), encoder_hidden_states=context, added_cond_kwargs=more or None
    )
    with torch.no_grad():
        before = predict(latents).sample
        weight, bias = unet.conv_in.weight.clone(), unet.conv_in.bias
        widen_input(unet)
        after = predict(torch.cat([latents, mask], dim=1)).sample
    assert (after - before).abs().max() <= 1e-6 * before.abs().max()
    assert torch.equal(unet.conv_in.weight[:, :4], weight)
    assert not unet.conv_in.weight[:, 4:].any()
    assert unet.conv_in.bias is bias
    assert unet.config.in_channels == 9


@pytest.mark.parametrize("name", FAMILIES)
def test_files_and_folders_are_those_of_models_for_inpainting(name, tmp_path):
    make, save, pipeline, key = FAMILIES[name]
    models = make()
    widen_input(models.denoiser)
    models = replace(models, inpaints=True)
    save = partial(save, models, dtype=None, metadata={})
    save(tmp_path / "model.safetensors", save_as="safetensors")
    assert load_file(tmp_path / "model.safetensors")[key].shape[1] == 9
    save(tmp_path / "folder", save_as="diffusers")
    assert json.loads((tmp_path / "folder/model_index.json").read_text())["_class_name"] == pipeline.__name__
    opened = pipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    assert torch.equal(opened.unet.conv_in.weight, models.denoiser.conv_in.weight)
