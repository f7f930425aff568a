"""ControlNet-LLLite against its formula, written out plainly; its files, and where its layers are."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from library.errors import UserError
from library.families.sdxl.adapter import SdxlFamily
from library.families.sdxl.lllite import LlliteControl, LlliteLayer, places_of
from library.families.sdxl.variants import check_paths
from library.types import Models
from tests.builders.options import options_for
from tests.builders.sdxl import tiny_sdxl
from tests.families.test_controlnet import batch_of, inputs_of
from tests.families.test_sdxl_adapter import real_models

EMBEDDING, INNER = 6, 5


def family_with(**options):
    return SdxlFamily(options_for("sdxl", "lllite", cond_emb_dim=EMBEDDING, network_dim=INNER, **options))


@pytest.fixture(scope="module")
def unet():
    return tiny_sdxl().denoiser


@pytest.fixture
def fresh(unet):
    """Makes models with a U-Net to which nothing is attached."""
    return lambda: Models(copy.deepcopy(unet), {}, {}, None)


def shaken(net):
    """With other numbers than it was made with, the same ones each time."""
    generator = torch.Generator().manual_seed(1)
    for weight in net.parameters():
        weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    return net.requires_grad_(False).eval()


@pytest.fixture
def case(fresh):
    """(family, models with a network attached, the network)."""
    family, models = family_with(), fresh()
    return family, models, shaken(family.lllite.build(models))


def plain_change(tensors, name, x, image, multiplier):
    """The formula for a linear layer, from the tensors of a file. The image is in [-1, 1]."""

    def part(number_or_name):
        return tensors[f"{name}.{number_or_name}.weight"], tensors[f"{name}.{number_or_name}.bias"]

    found = image
    for number in (0, 2, 4):
        if f"{name}.conditioning1.{number}.weight" in tensors:
            weight, bias = part(f"conditioning1.{number}")
            found = F.conv2d(found if number == 0 else torch.relu(found), weight, bias, stride=weight.shape[-1])
    rows = found.reshape(*found.shape[:2], -1).permute(0, 2, 1)
    down = torch.relu(F.linear(x, *part("down.0")))
    mid = torch.relu(F.linear(torch.cat([rows, down], 2), *part("mid.0")))
    return x + multiplier * F.linear(mid, *part("up.0"))


def paths_by_key(unet):
    """Names in files by the U-Net's own, made from diffusers' names by hand for the tiny model's blocks."""
    found = {}
    for path, module in unet.named_modules():
        match = re.fullmatch(
            r"(?:down_blocks\.(\d)\.attentions\.(\d)|mid_block\.attentions\.0)\.transformer_blocks\.(\d+)\."
            r"(attn1\.to_[qkv]|attn2\.to_q)", path,
        )  # fmt: skip
        if match and isinstance(module, torch.nn.Linear):
            level, number, block, layer = match.groups()
            place = "middle_block_1" if level is None else f"input_blocks_{3 * int(level) + 1 + int(number)}_1"
            found[f"lllite_unet_{place}_transformer_blocks_{block}_{layer.replace('.', '_')}"] = path
    return found


@torch.no_grad()
@pytest.mark.parametrize("multiplier", [1.0, 0.5])
def test_the_prediction_is_that_of_the_formula(case, fresh, tmp_path, multiplier):
    """float32, the formula in another order of sums: 1e-5 of the largest value."""
    family, models, net = case
    family.lllite.save(net, tmp_path / "net.safetensors", save_as="safetensors", dtype=None, metadata={})
    tensors, plain = load_file(tmp_path / "net.safetensors"), fresh()
    batch = batch_of(side=128)
    for name, path in paths_by_key(plain.denoiser).items():

        def change(_module, args, name=name):
            return (plain_change(tensors, name, args[0], batch.control * 2 - 1, multiplier),)

        plain.denoiser.get_submodule(path).register_forward_pre_hook(change)
    assert {key.partition(".")[0] for key in tensors} == paths_by_key(plain.denoiser).keys()
    _, timesteps, cond, _ = inputs_of(family)
    noisy = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(4))
    net.multiplier = multiplier
    found = family.lllite.predict(models, net, noisy, timesteps, cond, batch)
    expected = family.denoiser.predict(plain, noisy, timesteps, cond, batch)
    without = family.denoiser.predict(fresh(), noisy, timesteps, cond, batch)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found - without).abs().max() > 1e-2 * expected.abs().max()


@torch.no_grad()
def test_it_acts_where_the_batch_has_control_images_and_a_new_one_not_at_all(case, fresh):
    family, models, net = case
    noisy, timesteps, cond, _ = inputs_of(family)
    batch = batch_of()
    with_image = family.lllite.predict(models, net, noisy, timesteps, cond, batch)
    batch = replace(batch, control=None)
    assert not torch.equal(with_image, family.lllite.predict(models, net, noisy, timesteps, cond, batch))
    plain = fresh()
    expected = family.denoiser.predict(plain, noisy, timesteps, cond, batch)
    assert torch.equal(family.lllite.predict(models, net, noisy, timesteps, cond, batch), expected)
    new = family.lllite.build(plain).eval()
    assert torch.equal(family.lllite.predict(plain, new, noisy, timesteps, cond, batch_of()), expected)


def test_layers_of_the_published_model():
    """136: 16 where the latents are halved once, 120 where twice; both widths are the defaults."""
    unet = real_models().denoiser
    with torch.device("meta"):
        control = LlliteControl(options_for("sdxl", "lllite"), None)
        net = control.build(Models(unet, {}, {}, None))
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    depths = Counter("conditioning1.4" in "".join(key for key in shapes if key.startswith(f"{n}.")) for n in net)
    assert (len(net), depths) == (136, {True: 120, False: 16})
    first, last = "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "lllite_unet_middle_block_1_"
    assert {key.removeprefix(f"{first}."): shape for key, shape in shapes.items() if key.startswith(f"{first}.")} == {
        "conditioning1.0.weight": (16, 3, 4, 4),
        "conditioning1.0.bias": (16,),
        "conditioning1.2.weight": (32, 16, 4, 4),
        "conditioning1.2.bias": (32,),
        "down.0.weight": (64, 640),
        "down.0.bias": (64,),
        "mid.0.weight": (64, 96),
        "mid.0.bias": (64,),
        "up.0.weight": (640, 64),
        "up.0.bias": (640,),
    }
    deep = {key: shape for key, shape in shapes.items() if key.startswith(last) and "blocks_9_attn2_to_q.cond" in key}
    assert {key.rpartition("to_q.")[2]: shape for key, shape in deep.items() if key.endswith("weight")} == {
        "conditioning1.0.weight": (16, 3, 4, 4),
        "conditioning1.2.weight": (16, 16, 4, 4),
        "conditioning1.4.weight": (32, 16, 2, 2),
    }


@pytest.mark.parametrize("save_as", ["safetensors", "ckpt", "pt"])
def test_what_is_saved_is_read_again_to_the_bit(case, fresh, tmp_path, save_as):
    """With sizes of the file, whatever the options say otherwise."""
    family, _, net = case
    path, metadata = tmp_path / f"net.{save_as}", {"modelspec.architecture": "x/control-net-lllite"}
    family.lllite.save(net, path, save_as=save_as, dtype=None, metadata=metadata)
    other = SdxlFamily(options_for("sdxl", "lllite", network_weights=str(path)))
    again = other.lllite.load(fresh(), str(path))
    assert again.state_dict().keys() == net.state_dict().keys()
    assert all(torch.equal(again.state_dict()[key], value) for key, value in net.state_dict().items())
    if save_as == "safetensors":
        header = path.read_bytes()
        assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"] == metadata


@torch.no_grad()
def test_other_layers_of_a_file_and_convolutions_have_their_place(case, fresh, tmp_path):
    """A foreign file: a layer of the way up and a 1x1 convolution, at the resolutions of their blocks."""
    family, models, _ = case
    places = places_of(models.denoiser)
    conv = next(name for name, place in places.items() if place.conv and "output_blocks" in name)
    linear = next(name for name, place in places.items() if not place.conv and "output_blocks_5" in name)
    layers = {
        name: shaken(LlliteLayer(places[name].width, depth, EMBEDDING, INNER, conv=places[name].conv))
        for name, depth in ((conv, 3), (linear, 2))
    }
    tensors = {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.state_dict().items()}
    save_file(tensors, tmp_path / "net.safetensors")
    net = family.lllite.load(fresh(), str(tmp_path / "net.safetensors"))
    assert net[conv].down[0].weight.ndim == 4
    image = batch_of(side=64).control * 2 - 1
    x = torch.randn(2, places[conv].width, 2, 2, generator=torch.Generator().manual_seed(3))
    flat = {
        key: value[:, :, 0, 0] if value.ndim == 4 and "cond" not in key else value for key, value in tensors.items()
    }
    expected = plain_change(flat, conv, x.flatten(2).mT, image, 1.0).mT.reshape(x.shape)
    assert (net[conv](x, image, 1.0) - expected).abs().max() < 1e-5


@torch.no_grad()
def test_sizes_that_the_unet_rounds_up(case):
    """72 pixels are 9, 5 and 3 rows of the U-Net."""
    family, models, net = case
    _, timesteps, cond, _ = inputs_of(family)
    noisy = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(4))
    assert family.lllite.predict(models, net, noisy, timesteps, cond, batch_of(side=72)).isfinite().all()


def test_dropout_acts_in_training_only():
    layer = shaken(LlliteLayer(8, 2, EMBEDDING, INNER, dropout=0.5))
    x, image = torch.ones(1, 16, 8), torch.ones(1, 3, 64, 64)
    kept = layer(x, image, 1.0)
    assert torch.equal(kept, layer(x, image, 1.0))
    layer.train()
    torch.manual_seed(0)
    first, second = layer(x, image, 1.0), layer(x, image, 1.0)
    assert not torch.equal(first, second)
    assert not torch.equal(first, kept)


def test_gradients_reach_every_layer_through_checkpoints(fresh):
    """The same ones as without."""
    grown = []
    for checkpointing in (False, True):
        family, models = family_with(), fresh()
        net = shaken(family.lllite.build(models)).requires_grad_(True)
        models.denoiser.train()
        if checkpointing:
            models.denoiser.enable_gradient_checkpointing()
        noisy, timesteps, cond, _ = inputs_of(family)
        family.lllite.predict(models, net, noisy, timesteps, cond, batch_of()).square().mean().backward()
        grown.append({name: weight.grad for name, weight in net.named_parameters()})
    idle = {name for name, value in grown[0].items() if not value.any()}
    assert all("middle_block" in name and "attn1_to_" in name for name in idle), idle  # one position, seen by itself
    assert all(torch.allclose(grown[0][name], grown[1][name], rtol=1e-3, atol=1e-6) for name in grown[0])


def test_files_that_do_not_fit_are_found_without_torch(case, tmp_path):
    family, models, net = case
    family.lllite.save(net, tmp_path / "net.safetensors", save_as="safetensors", dtype=None, metadata={})

    def lines(file, **options):
        given = {"pretrained_model_name_or_path": "owner/model", "network_weights": str(tmp_path / file), **options}
        return check_paths(options_for("sdxl", "lllite", **given))

    assert lines("net.safetensors") == lines("net.safetensors", network_dim=INNER) == []
    (line,) = lines("net.safetensors", network_dim=8)
    assert line.endswith("net.safetensors: its --network_dim is 5, not 8; leave the option out")
    (line,) = lines("net.safetensors", cond_emb_dim=8)
    assert line.endswith("its --cond_emb_dim is 6, not 8; leave the option out")
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    (line,) = lines("lora.safetensors")
    assert line.endswith("this is a LoRA (or similar network) file; a ControlNet-LLLite is needed here")
    tensors = load_file(tmp_path / "net.safetensors")
    name = next(iter(tensors)).partition(".")[0]
    unknown = {key.replace(name, "lllite_unet_gone"): value for key, value in tensors.items()}
    save_file(unknown, tmp_path / "unknown.safetensors")
    with pytest.raises(UserError, match=r"unknown\.safetensors: 1 of its layers have no place.*: lllite_unet_gone"):
        family.lllite.load(models, str(tmp_path / "unknown.safetensors"))
    del tensors[f"{name}.down.0.weight"]
    save_file(tensors, tmp_path / "less.safetensors")
    (line,) = lines("less.safetensors")
    assert line.endswith(f"it lacks the tensor {name}.down.0.weight")
