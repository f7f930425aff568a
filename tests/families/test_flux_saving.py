"""FLUX.1 models come out of saving as they went in, and what is saved opens in diffusers."""

from __future__ import annotations

import hashlib

import pytest
import torch
from diffusers import FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from library.errors import UserError
from library.families.flux.adapter import FluxFamily
from library.families.flux.keymap import flux_map
from tests.builders.flux import flux_options, flux_tensors, write_bundle, write_flux, write_parts
from tests.builders.memory import most_memory, needs_linux


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts"))


def load(model, parts):
    family = FluxFamily(flux_options(model, **parts))
    return family, family.loader.load()


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_read_then_saved_gives_the_same_bytes(tmp_path, parts, dtype, prefix):
    source = write_flux(tmp_path, dtype=dtype, prefix=prefix)
    family, models = load(source, parts)
    assert models.source.save_as == "safetensors"
    family.writer.save(models, tmp_path / "again.safetensors", save_as="safetensors", dtype=None, metadata={})
    assert digest(tmp_path / "again.safetensors") == digest(source)


def test_weights_of_8_bits_do_not_lose_what_was_trained(tmp_path, parts):
    """They have three bits of precision: hardly a step of training would be left in them."""
    source = write_flux(tmp_path, dtype=torch.float8_e4m3fn)
    family, models = load(source, parts)
    models.denoiser.float()
    trained = models.denoiser.transformer_blocks[1].attn.to_k.weight
    with torch.no_grad():
        trained.add_(1e-3)
    path = tmp_path / "out.safetensors"
    family.writer.save(models, path, save_as="safetensors", dtype=None, metadata={})
    before, after = load_file(source), load_file(path)
    changed = after.pop("double_blocks.1.img_attn.qkv.weight")
    assert changed.dtype == torch.bfloat16
    assert_close(changed.chunk(3)[1].float(), trained, rtol=2**-8, atol=0)
    assert all(
        value.dtype == torch.float8_e4m3fn and value.float().equal(before[name].float())
        for name, value in after.items()
    )


def test_a_bundle_keeps_its_other_parts(tmp_path, parts):
    source = write_bundle(tmp_path / "all.safetensors")
    family, models = load(source, {"tokenizer_cache_dir": parts["tokenizer_cache_dir"]})
    family.writer.save(models, tmp_path / "again.safetensors", save_as="safetensors", dtype=None, metadata={})
    assert digest(tmp_path / "again.safetensors") == digest(source)


def test_precision_and_metadata(tmp_path, parts):
    family, models = load(write_flux(tmp_path), parts)
    path = tmp_path / "out.safetensors"
    family.writer.save(models, path, save_as="safetensors", dtype=torch.bfloat16, metadata={"modelspec.title": "x"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"modelspec.title": "x"}
    saved = load_file(path)
    assert saved.keys() == flux_tensors().keys()
    assert all(saved[name].equal(tensor.to(torch.bfloat16)) for name, tensor in flux_tensors().items())


@pytest.mark.rows("R406")
@needs_linux
def test_saving_takes_the_memory_of_one_tensor(tmp_path, parts):
    save_file(flux_tensors(width=1024, head=32, blank=True), tmp_path / "wide.safetensors")
    family, models = load(tmp_path / "wide.safetensors", parts)
    sizes = [weight.nbytes for weight in models.denoiser.parameters()]
    assert sum(sizes) > 150e6
    state = models.denoiser.state_dict()
    assert most_memory(lambda: [tensor.clone() for tensor in state.values()]) > 0.9 * sum(sizes), "it is measured"
    path = tmp_path / "out.safetensors"
    taken = most_memory(lambda: family.writer.save(models, path, save_as="safetensors", dtype=None, metadata={}))
    largest = max(tensor.nbytes for tensor in load_file(path).values())
    assert taken < 2 * largest + 16e6, "one tensor and its copy, much less than the model"
    assert digest(path) == digest(tmp_path / "wide.safetensors")


def test_ckpt(tmp_path, parts):
    family, models = load(write_flux(tmp_path), parts)
    path = tmp_path / "out.ckpt"
    family.writer.save(models, path, save_as="ckpt", dtype=None, metadata={"ss_epoch": "2", "ss_steps": "30"})
    content = torch.load(path, weights_only=True)
    assert (content["epoch"], content["global_step"]) == (2, 30)
    assert all(content["state_dict"][name].equal(tensor) for name, tensor in flux_tensors().items())
    again = load(path, parts)[1]
    assert again.source.save_as == "ckpt"
    assert again.source.counters == {"epoch": 2, "global_step": 30}


@pytest.mark.parametrize("variant", ["dev", "schnell"])
def test_a_folder_opens_in_diffusers_and_its_file_is_the_first_again(tmp_path, parts, variant):
    source = write_flux(tmp_path, variant, dtype=torch.bfloat16)
    family, models = load(source, parts)
    models.vae = None  # as after caching
    models.text_encoders.clear()
    family.writer.save(models, tmp_path / "folder", save_as="diffusers_safetensors", dtype=None, metadata={})
    pipe = FluxPipeline.from_pretrained(tmp_path / "folder", torch_dtype=torch.float32)
    expected = {name: tensor.to(torch.bfloat16).float() for name, tensor in flux_tensors(variant).items()}
    for name, tensor in flux_map().to_model(expected).items():
        assert_close(pipe.transformer.state_dict()[name], tensor, atol=0, rtol=0, msg=name)
    assert pipe.scheduler.config.use_dynamic_shifting == (variant == "dev")
    again_family, again = load(tmp_path / "folder", {})
    with torch.no_grad():
        states, pooled, _ = pipe.encode_prompt(["a red house"], None, max_sequence_length=256)
        opts = flux_options(tmp_path / "folder", t5xxl_max_token_length=256)
        cond = FluxFamily(opts).text.encode(again, ["a red house"])
    assert_close(cond.tensors["t5_out"], states, atol=1e-5, rtol=0)
    assert_close(cond.tensors["l_pooled"], pooled, atol=1e-5, rtol=0)
    again_family.writer.save(again, tmp_path / "again.safetensors", save_as="safetensors", dtype=None, metadata={})
    assert digest(tmp_path / "again.safetensors") == digest(source)


def test_an_unknown_format(tmp_path, parts):
    family, models = load(write_flux(tmp_path), parts)
    with pytest.raises(UserError, match="--save_model_as onnx"):
        family.writer.save(models, tmp_path / "x", save_as="onnx", dtype=None, metadata={})
