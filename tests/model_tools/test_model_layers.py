"""Layers of a model's file, read and changed without loading it, against the model that the family's loader makes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoints.scaled import is_scale
from library.checkpoints.writing import write_safetensors
from library.errors import UserError
from library.families.registry import FAMILIES
from library.model_tools.model_layers import open_model_file
from networks.targets import live_modules, weight_of
from tests.builders import write_tiny_sd1
from tests.builders.flux import flux_tensors, write_flux
from tests.builders.model_files import CASES, ENCODER_FILES, ENCODER_OPTIONS


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    found = CASES[request.param]
    path = found.write(tmp_path_factory.mktemp(request.param) / "model.safetensors")
    return found, path, *found.models(path)


def opened(case, path):
    return open_model_file(path, (case.family,))


def shift(tensor, target):
    """Values of its own for every layer and row."""
    steps = torch.linspace(-1, 1, tensor.numel()).reshape(tensor.shape)
    return tensor + 0.01 * (1 + len(target.key) % 7) * steps


def test_every_layer_is_what_the_loaded_model_has(case):
    family, path, models, targets = case
    file = opened(family, path)
    there = [target for target in targets if target.part in file.parts]
    assert file.targets == there
    for target in there:
        wanted, found = weight_of(models, target), file.weight(target)
        assert file.shape(target) == wanted.shape
        # Such weights are loaded in bfloat16.
        if (
            "scaled" in path.parent.name and "_blocks_" in target.key and not target.norm
        ):  # such weights are loaded in bfloat16
            found = found.bfloat16().float()
        assert torch.equal(found, wanted), target.key
        assert file.rows(target) == [module.weight.shape[0] for module in live_modules(models, target)]
        bias = getattr(live_modules(models, target)[0], "bias", None)  # RMS norms have none
        assert file.has(target, "bias") == (bias is not None), target.key


def test_no_weight_is_read_for_that(case, monkeypatch):
    family, path, *_ = case
    monkeypatch.setattr("library.families.shared.reading.PlainFile.__getitem__", lambda *_: pytest.fail("read"))
    monkeypatch.setattr("library.checkpoints.reading.TorchFile.__getitem__", lambda *_: pytest.fail("read"))
    assert opened(family, path).targets


@pytest.mark.parametrize("name", ["sd2", "flux-diffusers", "sd3-bundle"])
def test_changes_are_what_the_loader_finds(name, tmp_path):
    family = CASES[name]
    file = opened(family, family.write(tmp_path / "model.safetensors"))
    edits, wanted = {}, {}
    for target in file.targets[::2]:
        for name in ("weight", "bias"):
            if file.has(target, name):
                value = shift(file.weight(target, name), target)
                edits[target.key, name] = lambda value=value: value
                wanted[target.key, name] = value
    write_safetensors(tmp_path / "new.safetensors", file.with_edits(edits, torch.float32))
    changed, _ = family.models(tmp_path / "new.safetensors")
    again = opened(family, tmp_path / "new.safetensors")
    for target in file.targets:
        new = wanted.get((target.key, "weight"), file.weight(target))
        assert torch.equal(weight_of(changed, target), new), target.key
        if file.has(target, "bias"):
            new = wanted.get((target.key, "bias"), file.weight(target, "bias"))
            assert torch.equal(again.weight(target, "bias"), new), target.key


@pytest.mark.parametrize(("family", "part"), [(f, part) for f, parts in ENCODER_FILES.items() for part in parts])
def test_files_of_text_encoders(family, part, tmp_path):
    case = CASES[family]
    models, targets = case.models(case.write(tmp_path / "model.safetensors"))
    file = open_model_file(tmp_path / f"{ENCODER_OPTIONS[part]}.safetensors", (family,), encoder=part)
    assert file.targets == [target for target in targets if target.part == part]
    assert all(torch.equal(file.weight(target), weight_of(models, target)) for target in file.targets)


def test_without_changes_every_byte_stays(tmp_path):
    path = write_flux(tmp_path, dtype=torch.bfloat16)
    tensors = load_file(path)
    tensors["vae.kept"] = torch.arange(3)
    tensors["double_blocks.0.img_mod.lin.weight"] = tensors["double_blocks.0.img_mod.lin.weight"].to(
        torch.float8_e4m3fn
    )
    save_file(tensors, path)
    file = open_model_file(path, ("flux",))
    write_safetensors(tmp_path / "same.safetensors", file.with_edits({}, None))
    assert (tmp_path / "same.safetensors").read_bytes() == path.read_bytes()


def test_dtypes(tmp_path):
    """Untouched tensors keep theirs; what is changed does not go back into 8 bits; scales go with what they scale."""
    tensors = flux_tensors()
    scaled, small, plain = (f"single_blocks.0.{name}.weight" for name in ("linear1", "linear2", "modulation.lin"))
    tensors[scaled.replace(".weight", ".scale_weight")] = torch.tensor(2.0)
    for name in (scaled, small, "double_blocks.0.img_mlp.0.weight"):
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors")
    file = open_model_file(tmp_path / "model.safetensors", ("flux",))
    (target,) = [target for target in file.targets if target.key == "lora_unet_single_blocks_0_linear2"]
    edits = {(target.key, "weight"): lambda: file.weight(target) * 0.5}
    write_safetensors(tmp_path / "new.safetensors", file.with_edits(edits, None))
    new = load_file(tmp_path / "new.safetensors")
    assert not any(is_scale(name) for name in new)
    assert new[scaled].dtype == new[small].dtype == torch.bfloat16
    assert torch.equal(new[scaled].float(), tensors[scaled].float() * 2)
    assert torch.equal(new[small].float(), tensors[small].float() * 0.5)
    assert torch.equal(new[plain], tensors[plain])
    assert new["double_blocks.0.img_mlp.0.weight"].dtype == torch.float8_e4m3fn
    write_safetensors(tmp_path / "small.safetensors", file.with_edits(edits, torch.float8_e5m2))
    assert {tensor.dtype for tensor in load_file(tmp_path / "small.safetensors").values()} == {torch.float8_e5m2}


def test_8_bits_hold_their_largest_number_where_a_value_is_larger(tmp_path):
    file = open_model_file(write_tiny_sd1(tmp_path / "model.safetensors"), ("sd",))
    target = file.targets[0]
    edits = {(target.key, "weight"): lambda: torch.full(file.shape(target), 1e5)}
    write_safetensors(tmp_path / "new.safetensors", file.with_edits(edits, torch.float8_e4m3fn))
    key = "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.k_proj.weight"
    assert load_file(tmp_path / "new.safetensors")[key].float().unique().tolist() == [448.0]


@pytest.mark.parametrize(
    ("families", "tensors", "message"),
    [
        (("sdxl",), "sd1", "this is a Stable Diffusion 1.x model; an SDXL model is needed here"),
        (("flux",), {"lora_unet_x.lora_down.weight": torch.zeros(1)}, "this is a LoRA .* file; a FLUX model is needed"),
        (("flux",), {"double_blocks.0.x": torch.zeros(1)}, "lacks the tensor img_in.weight"),
    ],
)
def test_something_else(families, tensors, message, tmp_path):
    path = tmp_path / "model.safetensors"
    if tensors == "sd1":
        write_tiny_sd1(path)
    else:
        save_file(tensors, path)
    with pytest.raises(UserError, match=message) as error:
        open_model_file(path, families)
    assert str(error.value).startswith(str(path))


def test_a_tensor_that_is_missing(tmp_path):
    tensors = load_file(write_flux(tmp_path))
    del tensors["single_blocks.1.linear2.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks 1 tensors: single_transformer_blocks.1.proj_out.weight"):
        open_model_file(tmp_path / "model.safetensors", ("flux",))


def test_every_family_has_its_file_model():
    assert all(spec.file_model.load() for spec in FAMILIES.values())
