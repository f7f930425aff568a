"""Network files as other programs write them, merged and continued. References: the changed weights themselves."""

from __future__ import annotations

import copy
import json
import logging
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import nn

import networks.lycoris
from library.errors import UserError
from library.families.sd.adapter import SdTargets
from library.families.sd.targets import unet_targets as sd_targets
from library.families.sdxl.adapter import SdxlTargets
from library.families.shared.clip import public_name
from library.families.shared.unet import map_of_config
from library.types import LoraTarget, Models
from networks.build import merge
from networks.files import read, warn_of_words
from tests.builders.sdxl import tiny_sdxl
from tests.networks.builders import lora

NO_LAYER = re.compile(r"embeddings\.|text_projection")
LYCORIS = networks.lycoris.MODULE.builder(networks.lycoris.MODULE)


CLIPS = {"te": "clip_l", "te1": "clip_l", "te2": "clip_g"}  # ComfyUI's names of text encoders


def random_differences(models: Models, rank: int | None) -> dict[tuple[str, str], tuple[torch.Tensor, ...]]:
    """By part and name, for every weight and bias of a layer or norm: the difference, or with a rank up and down."""
    rng, found = torch.Generator().manual_seed(2), {}
    draw = lambda *shape: torch.randn(shape, generator=rng) * 0.3  # noqa: E731
    for part, module in {"denoiser": models.denoiser, **models.text_encoders}.items():
        for name, parameter in module.named_parameters():
            if NO_LAYER.search(name):
                continue
            out, *others = parameter.shape
            pair = bool(rank and others)
            found[part, name] = (draw(out, rank), draw(rank, *others)) if pair else (draw(out, *others),)
    return found


def comfyui_file(models: Models, differences) -> dict[str, torch.Tensor]:
    """As ComfyUI's LoraSave names what it extracts: of layers matrices, of norms and biases the differences."""
    keys, state = map_of_config(models.denoiser.config, prefix=""), {}
    for (part, name), tensors in differences.items():
        layer, _, kind = name.rpartition(".")
        if part == "denoiser":
            layer = f"diffusion_model.{keys.file_name(layer)}"
        else:
            layer = f"text_encoders.{CLIPS[part]}.transformer.{public_name(layer)}"
        if len(tensors) == 1:
            state[f"{layer}.diff{'_b' if kind == 'bias' else ''}"] = tensors[0]
        else:
            up, down = tensors
            state[f"{layer}.lora_up.weight"] = up.reshape(*up.shape, *[1] * (down.dim() - 2))
            state[f"{layer}.lora_down.weight"] = down
    return state


def add(models: Models, differences) -> None:
    parts = {"denoiser": models.denoiser, **models.text_encoders}
    with torch.no_grad():
        for (part, name), tensors in differences.items():
            parameter = parts[part].get_parameter(name)
            whole = tensors[0] if len(tensors) == 1 else (tensors[0] @ tensors[1].flatten(1)).reshape(parameter.shape)
            parameter.add_(whole)


@pytest.mark.parametrize(("family", "rank"), [("sd", 3), ("sd", None), ("sdxl", 3)])
def test_a_comfyui_file_is_merged_whole(models, tmp_path, family, rank):
    """Layers, norms and biases in single files' names. Embeddings of tokens and places are no layers."""
    if family == "sdxl":
        models = tiny_sdxl()
    adapter = {"sd": SdTargets, "sdxl": SdxlTargets}[family](None)
    other = Models(copy.deepcopy(models.denoiser), copy.deepcopy(models.text_encoders), {}, None)
    differences = random_differences(models, rank)
    add(other, differences)
    save_file(comfyui_file(models, differences), tmp_path / "a.safetensors")
    merged, unused = merge(adapter.lora(models), models, read(tmp_path / "a.safetensors"), 1.0)
    assert unused == 0
    assert merged > 100
    for part, module in {"denoiser": models.denoiser, **models.text_encoders}.items():
        theirs = other.denoiser if part == "denoiser" else other.text_encoders[part]
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beginning", ["lora_unet_", "diffusion_model."])
def test_training_goes_on_from_single_files_names_in_the_familys_own(models, outputs, tmp_path, beginning):
    """Alpha is missing, and so the rank. The file that is saved has the names of SD1's LoRA."""
    targets = sd_targets(models.denoiser)
    keys = map_of_config(models.denoiser.config, prefix="")
    rng, state, delta = torch.Generator().manual_seed(1), {}, {}
    for target in targets:
        module = models.denoiser.get_submodule(target.modules[0])
        if isinstance(module, nn.Linear) and not target.optional:
            down, up = (
                torch.randn(shape, generator=rng) * 0.2 for shape in ((2, module.in_features), (module.out_features, 2))
            )
            name = keys.file_name(target.modules[0])
            layer = beginning + (name if beginning.endswith(".") else name.replace(".", "_"))
            state |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
            delta[target.modules[0]] = up @ down
    save_file(state, tmp_path / "a.safetensors")
    other = copy.deepcopy(models.denoiser)
    with torch.no_grad():
        for path, change in delta.items():
            other.get_submodule(path).weight += change
    expected = outputs(Models(other, models.text_encoders, {}, None))[0]
    network = lora.from_weights(targets, models, lora.read(tmp_path / "a.safetensors"), args={})
    network.attach(models)
    torch.testing.assert_close(outputs(models)[0], expected, rtol=1e-4, atol=1e-4)
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.alpha" in network.file_state()
    assert len(network.layers()) == len(delta)


def test_layers_with_biases_and_norms_go_on_as_lycoris(models, outputs, tmp_path):
    """Also where only the bias differs. LoRA alone does not take them, naming what does."""
    parts = ("up_blocks.0.resnets.0.", "up_blocks.1.attentions.0.")
    biases_only = tuple(f"up_blocks.0.resnets.0.{layer}.weight" for layer in ("norm2", "conv1"))
    differences = {
        (part, name): difference
        for (part, name), difference in random_differences(models, 3).items()
        if name.startswith(parts) and name not in biases_only
    }
    save_file(comfyui_file(models, differences), tmp_path / "a.safetensors")
    targets, bare = sd_targets(models.denoiser), outputs(models)[0]
    other = Models(copy.deepcopy(models.denoiser), models.text_encoders, {}, None)
    add(other, differences)
    expected = outputs(other)[0]
    assert (expected - bare).abs().max() > 1e-2
    with pytest.raises(
        UserError, match=r"differences of weights or biases; --network_module=networks\.lycoris continues"
    ):
        lora.read(tmp_path / "a.safetensors")
    network = LYCORIS.from_weights(targets, models, LYCORIS.read(tmp_path / "a.safetensors"), args={})
    network.attach(models)
    torch.testing.assert_close(outputs(models)[0], expected, rtol=1e-4, atol=1e-4)
    network.set_multiplier(0)
    assert torch.equal(outputs(models)[0], bare)
    saved = {name: tensor.contiguous() for name, tensor in network.file_state().items()}
    save_file(saved, tmp_path / "b.safetensors")
    network.detach()
    merge(targets, models, read(tmp_path / "b.safetensors"), 1.0)
    torch.testing.assert_close(outputs(models)[0], expected, rtol=1e-4, atol=1e-4)


def one_layer(bias=True) -> tuple[Models, LoraTarget]:
    torch.manual_seed(0)
    return Models(nn.ModuleDict({"a": nn.Linear(6, 4, bias=bias)}), {}, {}, None), LoraTarget(
        "lora_unet_x_a", "denoiser", ("a",)
    )


def with_peft_biases(layer: nn.Linear, tmp_path, alpha: int) -> nn.Module:
    """LoRA of PEFT with a bias on its second matrix, saved as diffusers does, with alpha in the metadata."""
    changed = nn.ModuleDict({"a": copy.deepcopy(layer)})
    config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["a"], lora_bias=True)
    inject_adapter_in_model(config, changed)
    with torch.no_grad():
        for parameter in changed["a"].lora_B.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    state = {f"unet.x.{name}": tensor.contiguous() for name, tensor in get_peft_model_state_dict(changed).items()}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": alpha})}
    save_file(state, tmp_path / "a.safetensors", metadata)
    return changed["a"].eval()


def test_biases_of_lora_have_its_scale(tmp_path):
    models, target = one_layer()
    changed = with_peft_biases(models.denoiser["a"], tmp_path, alpha=6)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    merge([target], models, read(tmp_path / "a.safetensors"), 1.0)
    torch.testing.assert_close(models.denoiser["a"](x), changed(x), rtol=1e-5, atol=1e-6)


def test_a_bias_without_a_place_is_an_error(tmp_path):
    models, target = one_layer()
    with_peft_biases(models.denoiser["a"], tmp_path, alpha=2)
    bare, _ = one_layer(bias=False)
    with pytest.raises(UserError, match="lora_unet_x_a: it changes a bias of 4 entries, which the layer does not have"):
        merge([target], bare, read(tmp_path / "a.safetensors"), 1.0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
def test_files_in_few_bits(tmp_path, dtype):
    models, target = one_layer()
    rng = torch.Generator().manual_seed(3)
    down, up = (torch.randn(shape, generator=rng).to(dtype) for shape in ((2, 6), (4, 2)))
    state = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.0).to(dtype)}
    save_file({f"lora_unet_x_a.{name}": tensor for name, tensor in state.items()}, tmp_path / "a.safetensors")
    expected = models.denoiser["a"].weight + up.float() @ down.float() / 2
    network = lora.from_weights([target], models, lora.read(tmp_path / "a.safetensors"), args={})
    x = torch.eye(6)
    bare = models.denoiser["a"].weight.clone()
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}
    network.attach(models)
    torch.testing.assert_close(models.denoiser["a"](x) - models.denoiser["a"].bias, expected.T, rtol=1e-5, atol=1e-5)
    network.detach()
    merge([target], models, read(tmp_path / "a.safetensors"), 1.0)
    torch.testing.assert_close(models.denoiser["a"].weight - bare, expected - bare, rtol=1e-4, atol=1e-5)


def test_onetrainers_embeddings_are_known_by_their_words(tmp_path, caplog):
    models, target = one_layer()
    state = {
        f"lora_unet_x_a.lora_{side}.weight": torch.ones(shape) for side, shape in (("down", (2, 6)), ("up", (4, 2)))
    }
    state |= {"lora_unet_x_a.alpha": torch.tensor(2.0), "bundle_emb.word.clip_l": torch.ones(2, 8)}
    state["bundle_emb.word.clip_l_out"] = torch.ones(2, 8)
    save_file(state, tmp_path / "a.safetensors")
    bare = models.denoiser["a"].weight.clone()
    file = read(tmp_path / "a.safetensors")
    assert file.words == ("word",)
    assert merge([target], models, file, 1.0) == (1, 0)
    torch.testing.assert_close(models.denoiser["a"].weight, bare + 2)
    with caplog.at_level(logging.WARNING):
        warn_of_words(file, ["word"])
        warn_of_words(file)
    (record,) = caplog.records
    assert record.getMessage().endswith("its embeddings of 'word' have no effect here")


def test_onetrainers_numbers_of_pieces(tmp_path):
    """Query, key and value as pieces of the fused layer, whose name is in the file."""
    parts = nn.ModuleDict({name: nn.Linear(6, 4) for name in ("to_q", "to_k", "to_v")})
    models, target = Models(parts, {}, {}, None), LoraTarget("lora_unet_b_0_qkv", "denoiser", ("to_q", "to_k", "to_v"))
    rng = torch.Generator().manual_seed(3)
    down, up = torch.randn(2, 6, generator=rng), torch.randn(4, 2, generator=rng)
    state = {"transformer.b.0.qkv.1.lora_down.weight": down, "transformer.b.0.qkv.1.lora_up.weight": up}
    save_file(state, tmp_path / "a.safetensors")
    bare = {name: layer.weight.clone() for name, layer in parts.items()}
    merge([target], models, read(tmp_path / "a.safetensors"), 1.0)
    torch.testing.assert_close(parts["to_k"].weight, bare["to_k"] + up @ down)
    assert torch.equal(parts["to_q"].weight, bare["to_q"])


@pytest.mark.parametrize("path", ["down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.time_emb_proj"])
def test_dora_of_peft_has_magnitudes_of_rows(models, outputs, tmp_path, path):
    """Of a convolution they lie on the second axis in the file, where LyCORIS has those of columns."""
    changed = copy.deepcopy(models.denoiser)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=[path], use_dora=True), changed)
    state = {}
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    for name, tensor in get_peft_model_state_dict(changed).items():
        state[f"unet.{name}"] = tensor.contiguous()
    save_file(state, tmp_path / "a.safetensors")
    bare, expected = outputs(models)[0], outputs(Models(changed.eval(), models.text_encoders, {}, None))[0]
    targets = sd_targets(models.denoiser)
    network = LYCORIS.from_weights(targets, models, LYCORIS.read(tmp_path / "a.safetensors"), args={})
    network.attach(models)
    torch.testing.assert_close(outputs(models)[0], expected, rtol=1e-4, atol=1e-5)
    network.detach()
    assert merge(targets, models, read(tmp_path / "a.safetensors"), 1.0) == (1, 0)
    torch.testing.assert_close(outputs(models)[0], expected, rtol=1e-4, atol=1e-5)
    assert (expected - bare).abs().max() > 1e-3
