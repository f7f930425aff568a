"""What a training step asks of the device: with every family, nothing that it would have to wait for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from library import registry
from library.methods.network import NetworkMethod
from library.options.parsing import parse_options
from library.registry import groups_for
from library.training.ema import EMA
from library.training.scalars import ScalarQueue
from library.training.step import StepParts, training_step
from library.types import Batch
from tests.builders import write_tiny_sd1
from tests.builders.flux import write_flux, write_parts
from tests.builders.host_reads import HostReads
from tests.builders.sd3 import write_encoder_file, write_tiny_sd3
from tests.builders.sdxl import write_tiny_sdxl
from tests.builders.t5 import write_t5_tokenizer

CAPTIONS = ["a red house", "blue"]


def sd3_files(folder):
    write_t5_tokenizer(folder / "google_t5-v1_1-xxl")
    parts = {"clip_l": "te1", "clip_g": "te2", "t5xxl": "te3"}
    files = [f"--{name}={write_encoder_file(folder / f'{name}.safetensors', part)}" for name, part in parts.items()]
    return [str(write_tiny_sd3(folder / "sd3.safetensors")), *files, f"--tokenizer_cache_dir={folder}"]


FILES = {
    "sd": lambda folder: [str(write_tiny_sd1(folder / "sd.safetensors"))],
    "sdxl": lambda folder: [str(write_tiny_sdxl(folder / "sdxl.safetensors"))],
    "sd3": sd3_files,
    "flux": lambda folder: [
        str(write_flux(folder)),
        *(f"--{name}={value}" for name, value in write_parts(folder).items()),
    ],
}
OPTIONS = {
    "sd": ("--noise_offset=0.1", "--min_snr_gamma=5", "--loss_type=huber", "--scale_weight_norms=1"),
    "sdxl": ("--ip_noise_gamma=0.1", "--multires_noise_iterations=4", "--debiased_estimation_loss"),
    "sd3": ("--weighting_scheme=logit_normal", "--t5_dropout_rate=0.1", "--pos_emb_random_crop_rate=0.5"),
    "flux": ("--timestep_sampling=flux_shift", "--model_prediction_type=raw"),
}
# With this, transformers looks at T5's mask; what is cached has been encoded before.
CACHED_OPTIONS = {"flux": ("--apply_t5_attn_mask",), "sd3": ("--apply_t5_attn_mask", "--apply_lg_attn_mask")}
MODULES = {"sd3": "networks.lora_sd3", "flux": "networks.lora_flux"}


@pytest.mark.parametrize("cached", [False, True], ids=["text encoders trained", "text from the cache"])
@pytest.mark.parametrize("name", FILES)
def test_a_step_reads_nothing_back(name, cached, tmp_path):
    model, *files = FILES[name](tmp_path)
    line = [f"--pretrained_model_name_or_path={model}", *files, *OPTIONS[name], "--seed=1", "--network_dropout=0.1"]
    line += [f"--network_module={MODULES.get(name, 'networks.lora')}", "--learning_rate=1e-3"]
    line += ["--network_train_unet_only", *CACHED_OPTIONS.get(name, ())] if cached else []
    family = registry.FAMILIES[name].adapter(parse_options(groups_for(name, "network"), line))
    models = family.loader.load()
    for part in (models.denoiser, *models.text_encoders.values()):
        part.float()
    method = NetworkMethod(family.opts)
    method.attach(family, models)
    models.denoiser.train()
    parts = StepParts(
        family,
        models,
        method.denoise(family, models),
        family.denoiser.objective(),
        grad_text=bool(method.trained_text_encoders()),
    )
    assert parts.grad_text != cached
    batch = batch_for(family, models, cached)
    groups = method.parameter_groups()
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    weights = [weight for group in groups for weight in group["params"]]
    average, queue = EMA(weights, 0.9), ScalarQueue()
    rng = torch.Generator().manual_seed(1)

    def step(number):
        losses = training_step(parts, batch, rng).losses.mean()
        losses.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step()
        average.update(number)
        queue.push(number, {"loss/current": losses.detach(), "norm/gradient": norm})

    step(1)  # tables are moved, and the optimizer makes its state
    with HostReads() as reads:
        step(2)
    assert reads.seen == []


@pytest.mark.rows("R504")
def test_offsets_of_a_batch_act_on_its_timesteps(tmp_path):
    model, *files = FILES["flux"](tmp_path)
    line = [f"--pretrained_model_name_or_path={model}", *files, *OPTIONS["flux"], "--seed=1"]
    line += ["--network_module=networks.lora_flux", "--network_train_unet_only"]
    family = registry.FAMILIES["flux"].adapter(parse_options(groups_for("flux", "network"), line))
    models = family.loader.load()
    method = NetworkMethod(family.opts)
    method.attach(family, models)
    parts = StepParts(family, models, method.denoise(family, models), family.denoiser.objective(), grad_text=False)
    batch = batch_for(family, models, cached=True)
    batches = [replace(batch, timestep_offsets=offsets) for offsets in (None, torch.tensor([0.0, 3.0]))]
    bare, moved = (training_step(parts, one, torch.Generator().manual_seed(1)).timesteps for one in batches)
    assert moved[0] == bare[0]
    odds = [time / 1000 / (1 - time / 1000) for time in (moved[1], bare[1])]
    assert (odds[0] / odds[1]).log().item() == pytest.approx(3.0, abs=1e-3)  # in logits, whatever the shift


def batch_for(family, models, cached):
    channels = family.traits.latent_channels
    sizes = torch.tensor([[64, 64], [64, 64]])
    with torch.no_grad():
        text = family.text.encode(models, CAPTIONS) if cached else None
    if cached:
        models.text_encoders.clear()
    return Batch(
        captions=CAPTIONS,
        latents=torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(2)),
        pixels=None,
        loss_weights=torch.ones(2),
        masks=torch.ones(2, 1, 8, 8),
        original_sizes=sizes,
        crop_top_lefts=torch.zeros_like(sizes),
        target_sizes=sizes,
        text=text,
    )
