"""The loss of --train_inpainting, against a plain formula with the parts of diffusers' pipelines, float32."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from library import registry
from library.families.sd.saving import save_model as save_sd
from library.families.sdxl.saving import save_model as save_sdxl
from library.methods.network import NetworkMethod
from library.training.step import StepParts, training_step
from library.types import Batch
from tests.builders import for_inpainting, tiny_sd
from tests.builders.options import options_for
from tests.builders.sdxl import tiny_sdxl
from tests.families.test_inpainting import PIPELINES

MODELS = {"sd": (tiny_sd, save_sd), "sdxl": (tiny_sdxl, save_sdxl)}
CAPTIONS = ["a red house", "blue"]


def written(name, folder):
    """A model for inpainting as a file and a folder. Its VAE draws nothing, so that both sides see the same latents."""
    make, save = MODELS[name]
    models = for_inpainting(make())
    with torch.no_grad():
        models.vae.quant_conv.weight[4:] = 0  # the logarithms of variances
        models.vae.quant_conv.bias[4:] = -30
    save(models, folder / "model.safetensors", save_as="safetensors", dtype=None, metadata={})
    save(models, folder / "pipeline", save_as="diffusers", dtype=None, metadata={})
    return folder / "model.safetensors", folder / "pipeline"


def batch_of(rng):
    sizes, masks = torch.tensor([[96, 64], [70, 80]]), torch.zeros(2, 1, 64, 64)
    masks[0, :, 5:40, 10:50], masks[1, :, 30:, :33] = 1, 1
    pixels = torch.rand(2, 3, 64, 64, generator=rng) * 2 - 1
    crops, buckets, weights = torch.tensor([[0, 4], [2, 0]]), torch.full((2, 2), 64), torch.tensor([1.0, 0.5])
    return Batch(CAPTIONS, None, pixels, weights, None, sizes, crops, buckets, inpainting_masks=masks)


@torch.no_grad()
def plain_losses(name, folder, batch, noise, timesteps):
    """Squared errors of the noise, averaged over each image: of the pipeline's own U-Net, VAE and text encoders."""
    pipe = PIPELINES[name].from_pretrained(folder, local_files_only=True)
    latents, masked = (
        pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
        for pixels in (batch.pixels, batch.pixels * (batch.inpainting_masks < 0.5))
    )
    noisy = DDPMScheduler.from_config(pipe.scheduler.config).add_noise(latents, noise, timesteps)
    seen = torch.cat([noisy, batch.inpainting_masks[..., ::8, ::8], masked], dim=1)
    text = pipe.encode_prompt(CAPTIONS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    added = {}
    if name == "sdxl":  # the size, the corner and the bucket, each with the height first
        ids = torch.cat([batch.original_sizes.flip(1), batch.crop_top_lefts, batch.target_sizes.flip(1)], dim=1)
        added = {"added_cond_kwargs": {"text_embeds": text[2], "time_ids": ids}}
    prediction = pipe.unet(seen, timesteps, encoder_hidden_states=text[0], **added).sample
    return (prediction - noise).square().mean([1, 2, 3]) * batch.loss_weights


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_that_of_diffusers_parts(name, tmp_path):
    file, folder = written(name, tmp_path)
    opts = options_for(
        name, "network", pretrained_model_name_or_path=str(file), train_inpainting=True, network_module="networks.lora"
    )
    family = registry.FAMILIES[name].adapter(opts)
    models, method = family.loader.load(), NetworkMethod(opts)
    for part in (models.denoiser, models.vae, *models.text_encoders.values()):
        part.float()
    method.attach(family, models)
    parts = StepParts(family, models, method.denoise(family, models), family.denoiser.objective(), grad_text=False)
    batch = batch_of(torch.Generator().manual_seed(1))
    with torch.no_grad():
        losses = training_step(parts, batch, torch.Generator().manual_seed(5)).losses
    draw = parts.objective.draw(torch.zeros(2, 4, 8, 8), torch.Generator().manual_seed(5))  # the noise and times alone
    expected = plain_losses(name, folder, batch, draw.noise, draw.timesteps)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    other = plain_losses(
        name,
        folder,
        Batch(**{**vars(batch), "inpainting_masks": 1 - batch.inpainting_masks}),
        draw.noise,
        draw.timesteps,
    )
    assert (losses - other).abs().min() > 1e-3  # what is masked matters
