"""FLUX.1 models from every kind of source: the right weights in the right places, and clear words for the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from library.errors import UserError
from library.families.flux.adapter import FluxFamily
from library.families.flux.keymap import flux_map
from library.families.flux.variants import check_paths, flux_shape
from library.families.shared.clip import public_state
from library.memory.low_precision import Fp8Linear
from library.training import placement
from tests.builders.flux import (
    WIDTH,
    ae_tensors,
    clip_l_tensors,
    flux_options,
    flux_tensors,
    tiny_ae,
    tiny_clip_l,
    write_bundle,
    write_flux,
    write_parts,
)
from tests.builders.fp8 import fp8_scaled
from tests.builders.options import options_for
from tests.builders.t5 import t5_weights, tiny_t5


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts"))


def load(model, parts):
    return FluxFamily(flux_options(model, **parts)).loader.load()


def assert_same_weights(model, tensors):
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_close(state[name].float(), tensor.float(), atol=0, rtol=0, msg=name)


# --- names and shapes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["dev", "schnell"])
def test_conversion_equals_diffusers(variant):
    """Its converter cuts linear1 by the real rows, whatever the width of the rest."""
    tensors = flux_tensors(variant)
    for name in [name for name in tensors if ".linear1." in name]:
        tensors[name] = torch.randn(7 * 3072, *tensors[name].shape[1:], generator=torch.Generator().manual_seed(1))
    expected = convert_flux_transformer_checkpoint_to_diffusers({k: v.clone() for k, v in tensors.items()})
    converted = flux_map().to_model(tensors)
    assert converted.keys() == expected.keys()
    for name, tensor in converted.items():
        assert_close(tensor, expected[name], atol=0, rtol=0, msg=name)
    back = flux_map().to_file(converted)
    assert back.keys() == tensors.keys()
    assert all(back[name].equal(tensor) for name, tensor in tensors.items())


def test_published_shapes_give_the_published_configuration():
    """dev has 19 and 38 blocks, 780 tensors; the shapes are enough, so no numbers are drawn."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    state = model.state_dict()
    shapes = {e.file: tuple(e.rule.join([state[name] for name in e.models]).shape) for e in flux_map().entries(state)}
    assert len(shapes) == 780
    config = flux_shape(shapes).diffusers_config()
    assert {name: model.config[name] for name in config} == config
    assert config["axes_dims_rope"] == (16, 56, 56)


def test_pruned_models_keep_their_depths():
    shapes = {key: tuple(tensor.shape) for key, tensor in flux_tensors(double=1, single=3).items()}
    shape = flux_shape(shapes)
    assert (shape.double, shape.single) == (1, 3)


def test_heads_that_rotary_axes_cannot_share():
    shapes = {key: tuple(tensor.shape) for key, tensor in flux_tensors(width=32, head=16).items()}
    with pytest.raises(UserError, match="heads are multiples of 32 wide"):
        flux_shape(shapes).diffusers_config()


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("variant", ["dev", "schnell"])
def test_single_file_with_files_for_the_parts(tmp_path, parts, variant, prefix):
    models = load(write_flux(tmp_path, variant, prefix=prefix), parts)
    assert models.source.variant == variant
    assert models.denoiser.config.guidance_embeds == (variant == "dev")
    assert_same_weights(models.denoiser, flux_map().to_model(flux_tensors(variant)))
    assert_same_weights(models.text_encoders["te1"], tiny_clip_l().state_dict())
    assert_same_weights(models.text_encoders["te3"], tiny_t5(48).state_dict())
    assert_same_weights(models.vae, tiny_ae().state_dict())
    for model in (models.denoiser, models.vae, *models.text_encoders.values()):
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert list(models.text_encoders) == list(models.tokenizers) == ["te1", "te3"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_narrow_files(tmp_path, parts, dtype):
    models = load(write_flux(tmp_path, dtype=dtype), parts)
    assert models.denoiser.dtype == torch.bfloat16
    expected = {name: tensor.to(dtype).float() for name, tensor in flux_tensors().items()}
    assert_same_weights(models.denoiser, flux_map().to_model(expected))


@pytest.mark.rows("R409")
def test_files_that_are_not_mapped(tmp_path, parts):
    models = load(write_flux(tmp_path, dtype=torch.float8_e4m3fn), {**parts, "mapless": True})
    expected = {name: tensor.to(torch.float8_e4m3fn).float() for name, tensor in flux_tensors().items()}
    assert_same_weights(models.denoiser, flux_map().to_model(expected))
    assert_same_weights(models.text_encoders["te3"], tiny_t5(48).state_dict())


@pytest.mark.rows("R346", "R347")
@pytest.mark.parametrize("base", [True, False], ids=["fp8_base", "plain"])
def test_files_in_8_bits_keep_their_numbers(tmp_path, parts, base):
    """In 8 bits again with --fp8_base, in the computing precision without it: nothing is rounded a second time."""
    t5 = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in t5_weights(tiny_t5(48)).items()}
    save_file(t5, tmp_path / "t5xxl_fp8_e4m3fn.safetensors")
    flux = write_flux(tmp_path, dtype=torch.float8_e4m3fn)
    models = load(flux, {**parts, "t5xxl": str(tmp_path / "t5xxl_fp8_e4m3fn.safetensors")})
    opts, cpu = options_for("flux", "network", mixed_precision="bf16", fp8_base=base), torch.device("cpu")
    placement.place_text_encoders(models, opts, cpu, grad_text=False)
    placement.place_denoiser(models, opts, cpu)
    layer = "encoder.block.0.layer.0.SelfAttention.q"
    assert models.text_encoders["te3"].get_submodule(layer).weight.float().equal(t5[f"{layer}.weight"].float())
    expected = flux_map().to_model({name: tensor.float() for name, tensor in load_file(flux).items()})
    for part in (models.denoiser, models.text_encoders["te3"]):
        layers = [module for module in part.modules() if isinstance(module, torch.nn.Linear)]
        assert {isinstance(module, Fp8Linear) for module in layers} == {base}
    for name, module in models.denoiser.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.float().equal(expected[f"{name}.weight"]), name


def test_diffusers_names_in_a_single_file(tmp_path, parts):
    save_file(flux_map().to_model(flux_tensors()), tmp_path / "model.safetensors")
    models = load(tmp_path / "model.safetensors", parts)
    assert_same_weights(models.denoiser, flux_map().to_model(flux_tensors()))


def test_a_bundle_brings_its_parts(tmp_path, parts):
    models = load(write_bundle(tmp_path / "all.safetensors"), {"tokenizer_cache_dir": parts["tokenizer_cache_dir"]})
    assert_same_weights(models.denoiser, flux_map().to_model(flux_tensors()))
    assert_same_weights(models.text_encoders["te1"], tiny_clip_l().state_dict())
    assert_same_weights(models.text_encoders["te3"], tiny_t5(48).state_dict())
    assert_same_weights(models.vae, tiny_ae().state_dict())


@pytest.mark.parametrize("as_hub_id", [False, True])
def test_diffusers_folder_and_hub_id(tmp_path, parts, as_hub_id, monkeypatch):
    family = FluxFamily(flux_options(write_flux(tmp_path), **parts))
    folder, name = tmp_path / "folder", str(tmp_path / "folder")
    if as_hub_id:
        hub = tmp_path / "hub" / "models--someone--flux"
        folder, name = hub / "snapshots" / "abc", "someone/flux"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        (hub / "refs").mkdir(parents=True)
        (hub / "refs" / "main").write_text("abc")
    family.writer.save(family.loader.load(), folder, save_as="diffusers_safetensors", dtype=None, metadata={})
    models = FluxFamily(flux_options(name)).loader.load()
    assert models.source.variant == "dev"
    assert models.source.save_as == "diffusers_safetensors"
    assert_same_weights(models.denoiser, flux_map().to_model(flux_tensors()))
    assert_same_weights(models.text_encoders["te1"], tiny_clip_l().state_dict())
    assert_same_weights(models.text_encoders["te3"], tiny_t5(48).state_dict())
    assert_same_weights(models.vae, tiny_ae().state_dict())
    assert models.text_encoders["te3"].config.dropout_rate == 0


def test_files_replace_parts_of_a_folder(tmp_path, parts):
    family = FluxFamily(flux_options(write_flux(tmp_path), **parts))
    family.writer.save(
        family.loader.load(), tmp_path / "folder", save_as="diffusers_safetensors", dtype=None, metadata={}
    )
    save_file(clip_l_tensors(tiny_clip_l(seed=9)), tmp_path / "other.safetensors")
    models = FluxFamily(flux_options(tmp_path / "folder", clip_l=str(tmp_path / "other.safetensors"))).loader.load()
    assert_same_weights(models.text_encoders["te1"], tiny_clip_l(seed=9).state_dict())


# --- mistakes ---------------------------------------------------------------------------------------------------------


def problems_of(model, parts):
    return "\n".join(check_paths(flux_options(model, **parts)))


def write(path, tensors):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distilled_guidance_layer.norms.0.scale": torch.ones(2)}, "this is a Chroma model"),
        ({"double_stream_modulation_img.lin.weight": torch.ones(2)}, "this is a FLUX.2 model"),
        ({"double_blocks.0.img_mlp.0.weight.absmax": torch.ones(2)}, "quantised to 4 bits"),
        ({"img_in.weight": torch.ones(WIDTH, 384)}, "384 channels instead of 64: this is FLUX.1 Fill, which cannot"),
        ({"img_in.weight": torch.ones(WIDTH, 128)}, "128 channels instead of 64: this is a FLUX.1 for control images"),
        ({"txt_in.weight": None}, "lacks the tensor txt_in.weight"),
        ({"lora_unet_x.lora_down.weight": torch.ones(2)}, "this is a LoRA"),
    ],
)
def test_other_files_are_named_before_and_at_loading(tmp_path, parts, change, message):
    tensors = {name: tensor for name, tensor in {**flux_tensors(), **change}.items() if tensor is not None}
    path = write(tmp_path / "model.safetensors", tensors)
    assert message in problems_of(path, parts)
    with pytest.raises(UserError, match=message):
        load(path, parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"double_blocks.1.txt_mlp.2.bias": None}, "lacks"),
        ({"double_blocks.1.something.weight": torch.ones(2)}, "unknown names: double_blocks.1.something.weight"),
        ({"final_layer.linear.weight": torch.ones(60, WIDTH)}, "proj_out.weight has shape"),
    ],
)
def test_broken_models_are_named(tmp_path, parts, change, message):
    tensors = {name: tensor for name, tensor in {**flux_tensors(), **change}.items() if tensor is not None}
    with pytest.raises(UserError, match=message) as caught:
        load(write(tmp_path / "model.safetensors", tensors), parts)
    assert "model.safetensors" in str(caught.value)


def test_missing_parts_are_asked_for_by_their_options(tmp_path):
    found = problems_of(write_flux(tmp_path), {})
    assert [line.split(":")[0] for line in found.splitlines()] == ["--clip_l", "--t5xxl", "--ae"]
    assert problems_of(write_bundle(tmp_path / "all.safetensors"), {}) == ""


def test_swapped_parts_are_named(tmp_path, parts):
    model = write_flux(tmp_path)
    assert problems_of(model, parts) == ""
    swapped = {**parts, "clip_l": parts["t5xxl"], "t5xxl": parts["clip_l"], "ae": str(model)}
    found = problems_of(model, swapped)
    assert [line.split(":")[0] for line in found.splitlines()] == ["--clip_l", "--t5xxl", "--ae"]
    assert "this is a T5 text encoder; CLIP-L" in found
    assert "this is a text encoder by itself; T5" in found
    assert "this is FLUX's transformer" in found
    for name in ("clip_l", "t5xxl", "ae"):
        with pytest.raises(UserError):
            load(model, {**parts, name: swapped[name]})


# --- 8 bits with scales -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
def test_fp8_scaled_models_are_multiplied(tmp_path, parts, prefix, name):
    """To the bit: the product in float32, rounded to bfloat16 as all 8 bit weights are."""
    tensors = {prefix + key: tensor.bfloat16() for key, tensor in flux_tensors().items()}
    stored, meant = fp8_scaled(tensors, lambda key, _: "_blocks." in key, name=name, prefix=prefix)
    models = load(write(tmp_path / "model.safetensors", stored), parts)
    expected = flux_map(prefix).to_model({key: tensor.bfloat16() for key, tensor in meant.items()})
    assert_same_weights(models.denoiser, expected)
    assert {parameter.dtype for parameter in models.denoiser.parameters()} == {torch.bfloat16}
    assert models.source.preserved == ()


def test_fp8_scaled_encoders_are_multiplied(tmp_path, parts):
    t5, meant_t5 = fp8_scaled(t5_weights(tiny_t5(48)), lambda key, _: ".layer." in key and "bias" not in key)
    clip, meant_clip = fp8_scaled(clip_l_tensors(tiny_clip_l()), lambda key, _: ".layers." in key, with_input=False)
    files = {"t5xxl": write(tmp_path / "t5.safetensors", t5), "clip_l": write(tmp_path / "c.safetensors", clip)}
    models = load(write_flux(tmp_path), {**parts, **{option: str(file) for option, file in files.items()}})
    state = models.text_encoders["te3"].state_dict()
    for key, tensor in meant_t5.items():
        expected = tensor.bfloat16() if t5[key].dtype == torch.float8_e4m3fn else tensor
        assert_close(state[key].float(), expected.float(), atol=0, rtol=0, msg=key)
    state = public_state(models.text_encoders["te1"])
    for key in [key for key in meant_clip if key in state]:
        expected = meant_clip[key].bfloat16() if clip[key].dtype == torch.float8_e4m3fn else meant_clip[key]
        assert_close(state[key].float(), expected.float(), atol=0, rtol=0, msg=key)


def test_a_bundle_keeps_the_scaled_encoders_that_it_does_not_train(tmp_path, parts):
    """Scales of the denoiser are used up; those of parts that are saved as they are stay beside them."""
    whole = load_file(write_bundle(tmp_path / "all.safetensors"))
    t5 = "text_encoders.t5xxl.transformer."
    chosen = lambda key, _: "_blocks." in key or (key.startswith(t5) and ".layer." in key and "bias" not in key)  # noqa: E731
    stored, _ = fp8_scaled(whole, chosen, prefix=t5)
    tokenizer = {"tokenizer_cache_dir": parts["tokenizer_cache_dir"]}
    models = load(write(tmp_path / "all.safetensors", stored), tokenizer)
    kept = set(models.source.preserved)
    assert f"{t5}scaled_fp8" in kept
    assert {key for key in stored if key.endswith("scale_weight") and key.startswith(t5)} <= kept
    assert not any(key.endswith("scale_weight") and "_blocks." in key for key in kept)


def test_other_weights_with_scales_are_named(tmp_path, parts):
    layer = "double_blocks.0.img_mlp.0"
    tensors = {**flux_tensors(), f"{layer}.weight_scale": torch.ones(())}
    tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].to(torch.int8)
    with pytest.raises(UserError, match=r"img_mlp\.0\.weight: weights in int8 with separate scales cannot be read"):
        load(write(tmp_path / "model.safetensors", tensors), parts)


def test_encoders_of_another_width(tmp_path, parts):
    tensors = {**flux_tensors(), "txt_in.weight": torch.ones(WIDTH, 40)}
    with pytest.raises(UserError, match="T5 has width 48, the model needs 40"):
        load(write(tmp_path / "model.safetensors", tensors), parts)


def test_an_autoencoder_with_other_latents(tmp_path, parts):
    tensors = ae_tensors()
    tensors["decoder.conv_in.weight"] = tensors["decoder.conv_in.weight"][:, :4]
    tensors["encoder.conv_out.weight"] = tensors["encoder.conv_out.weight"][:8]
    tensors["encoder.conv_out.bias"] = tensors["encoder.conv_out.bias"][:8]
    path = write(tmp_path / "ae.safetensors", tensors)
    with pytest.raises(UserError, match="4 channels; 16 are needed"):
        load(write_flux(tmp_path), {**parts, "ae": str(path)})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "transformer/config.json is missing"),
        ({"model_index.json": {"_class_name": "StableDiffusionXLPipeline"}}, "this is an SDXL model"),
        ({"transformer/config.json": {"_class_name": "Flux2Transformer2DModel"}}, "is a Flux2Transformer2DModel"),
        (
            {"transformer/config.json": {"_class_name": "FluxTransformer2DModel", "in_channels": 384}},
            "384 channels instead of 64",
        ),
    ],
)
def test_other_folders_are_named(tmp_path, files, message):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    assert message in problems_of(folder, {})
    with pytest.raises(UserError, match=message):
        load(folder, {})


def test_a_model_that_is_nowhere(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "no such file or folder" in problems_of("nothing.safetensors", {})
    assert problems_of("someone/not-in-the-cache", {}) == ""
    with pytest.raises(UserError, match="the hub does not provide it"):
        load("someone/not-in-the-cache", {})


def test_no_torch_is_needed_to_check():
    """What runs before torch is imported; a fresh interpreter shows it."""
    code = "import sys, library.families.flux.variants, library.families.flux.options; print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
