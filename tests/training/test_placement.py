"""Number formats and places of what is trained and what is not."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from library import encoding
from library.checkpoints.hashes import weights_fingerprint
from library.memory.low_precision import Fp8Conv2d, Fp8Linear, QuantisedWeight
from library.memory.quantised import Int8Conv2d, Int8Linear, Nf4Conv2d, Nf4Linear
from library.options.base import Options
from library.training import placement
from tests.builders import tiny_sd
from tests.builders.options import options_for

CPU = torch.device("cpu")


def options(**memory) -> Options:
    return options_for("flux", "network", **{"mixed_precision": "bf16", **memory})


def place(models, chosen):
    placement.place_text_encoders(models, chosen, CPU, grad_text=False)
    placement.place_vae(models, chosen, CPU)
    placement.place_denoiser(models, chosen, CPU)


def formats(module: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in module.parameters()}


@pytest.mark.rows("R182")
def test_what_is_trained_is_wide_unless_reported_otherwise():
    for full, expected in ((False, torch.float32), (True, torch.bfloat16)):
        models = tiny_sd()
        models.denoiser.requires_grad_(True)
        place(models, options(full_bf16=full))
        assert formats(models.denoiser) == {expected}
        assert formats(models.text_encoders["te"]) == {torch.bfloat16}
        assert formats(models.vae) == {torch.float32}
    half = options(full_fp16=True, mixed_precision="fp16")
    assert placement.trained_dtype(half) == torch.float16


def test_a_network_is_cast_but_for_its_buffers_and_what_rests():
    network = nn.Linear(2, 2)
    network.register_buffer("alpha", torch.tensor(0.3))
    network.bias.requires_grad_(False)
    placement.place_trained(network, options(full_bf16=True), CPU)
    assert (network.weight.dtype, network.bias.dtype, network.alpha.dtype) == (torch.bfloat16, *[torch.float32] * 2)


@pytest.mark.rows("R375")
@pytest.mark.parametrize("flag", ["fp8_base", "fp8_base_unet"])
def test_which_parts_are_kept_in_8_bits(flag):
    models = tiny_sd()
    place(models, options(**{flag: True}))

    def turned(part):
        return [isinstance(m, Fp8Linear | Fp8Conv2d) for m in part.modules() if isinstance(m, nn.Linear | nn.Conv2d)]

    assert all(turned(models.denoiser))
    assert set(turned(models.text_encoders["te"])) == {flag == "fp8_base"}
    assert formats(models.text_encoders["te"]) == {torch.bfloat16}
    assert not any(turned(models.vae))
    assert formats(models.denoiser) == {torch.bfloat16}  # biases and norms


LAYERS = {"fp8": {Fp8Linear, Fp8Conv2d}, "int8": {Int8Linear, Int8Conv2d}, "nf4": {Nf4Linear, Nf4Conv2d}}


@pytest.mark.parametrize("form", LAYERS)
def test_which_parts_are_quantised(form):
    models = tiny_sd()
    place(models, options(quantize_base=form))
    assert {type(m) for m in models.denoiser.modules() if isinstance(m, nn.Linear | nn.Conv2d)} == LAYERS[form]
    encoder = models.text_encoders["te"]
    assert {type(m) for m in encoder.modules() if isinstance(m, nn.Linear)} < LAYERS[form]
    assert not any(isinstance(m, QuantisedWeight) for m in models.vae.modules())
    assert formats(models.denoiser) == {torch.bfloat16}


@pytest.mark.parametrize("unet_only", [False, True])
def test_text_outputs_of_quantised_encoders_are_reported_from_exact_ones(unet_only):
    """Else a run with exact encoders would take the outputs of rounded ones from the disk."""
    models, opts = tiny_sd(), options(fp8_base_unet=unet_only, cache_text_encoder_outputs=True)
    family = SimpleNamespace(
        traits=SimpleNamespace(text_encoders=("te",)),
        text=SimpleNamespace(layout=lambda models: SimpleNamespace(settings={})),
    )
    made_by = {}
    method = SimpleNamespace(text_fingerprint=dict, live_text_encoders=list)
    for form in (None, "fp8", "int8", "nf4"):
        made_by[form] = encoding.text_made_by(opts.replaced(quantize_base=form), family, method, models)["te"]
    assert made_by["fp8"] == made_by[None] == weights_fingerprint(models.text_encoders["te"])
    assert len(set(made_by.values())) == (1 if unet_only else 3)


def test_text_outputs_of_changed_encoders_are_of_no_use_to_runs_without_the_change():
    models, opts = tiny_sd(), options(cache_text_encoder_outputs=True)
    family = SimpleNamespace(text=SimpleNamespace(layout=lambda models: SimpleNamespace(settings={"length": 75})))
    plain, changed = (
        encoding.text_made_by(opts, family, SimpleNamespace(text_fingerprint=lambda change=change: change), models)
        for change in ({}, {"te": "network 1a2b"})
    )
    assert changed == {"te": f"{plain['te']} with network 1a2b", "length": "75"}
    assert not plain.items() <= changed.items()


def test_a_part_that_is_trained_is_not_quantised():
    models = tiny_sd()
    models.text_encoders["te"].get_input_embeddings().requires_grad_(True)
    place(models, options(quantize_base="nf4"))
    assert not any(isinstance(m, QuantisedWeight) for m in models.text_encoders["te"].modules())
    assert any(isinstance(m, QuantisedWeight) for m in models.denoiser.modules())


@pytest.mark.rows("R190")
def test_lowram_loads_to_the_device_and_says_where_that_means_nothing(caplog, monkeypatch):
    monkeypatch.setattr(placement.LOGGER, "propagate", True)
    with caplog.at_level(logging.WARNING), placement.loading(options(lowram=True), CPU):
        assert torch.get_default_device() == CPU
    assert "--lowram: has no effect on a CPU" in caplog.text
    elsewhere = torch.device("meta")  # what every build has besides the CPU
    with placement.loading(options(lowram=True), elsewhere):
        assert torch.get_default_device() == elsewhere
    with placement.loading(options(), elsewhere):
        assert torch.get_default_device() == CPU
    swapping = options(lowram=True, blocks_to_swap=3)
    with caplog.at_level(logging.WARNING), placement.loading(swapping, elsewhere):
        assert torch.get_default_device() == CPU, "a whole model would not fit there"
    assert "--lowram: has no effect with --blocks_to_swap" in caplog.text


def test_offloading_says_where_it_means_nothing(caplog, monkeypatch):
    monkeypatch.setattr(placement.LOGGER, "propagate", True)
    chosen = options(gradient_checkpointing=True, cpu_offload_checkpointing=True)
    with caplog.at_level(logging.WARNING):
        place(tiny_sd(), chosen)
    assert "--cpu_offload_checkpointing: has no effect on a CPU" in caplog.text
