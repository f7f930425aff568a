"""Modules of others on models that are laid out otherwise than files: they train every layer, under files' names.

References: the changed weights of a whole layer of the file, from the formulas of the file format, loaded into a model
without any network.
"""

from __future__ import annotations

import copy
import importlib
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.errors import UserError
from library.families.flux.keymap import flux_map
from library.families.flux.targets import text_targets, transformer_targets
from library.families.sd3.keymap import mmdit_map
from library.families.sd3.targets import mmdit_targets
from library.families.shared.t5 import t5_targets
from library.families.shared.targets import clip_targets
from library.types import Models
from networks.file_layout import Linear, file_layout
from networks.files import read
from networks.third_party import ThirdPartyBuilder
from tests.networks import dits
from tests.networks.test_third_party import change, make, trained, write

ALGOS = {
    "locon": {"algo": "locon"},
    "dora": {"algo": "locon", "dora_wd": "True"},
    "loha": {"algo": "loha"},
    "lokr": {"algo": "lokr", "factor": "4"},
    "full": {"algo": "full"},
}


@pytest.fixture(scope="module")
def lycoris():
    return ThirdPartyBuilder(importlib.import_module("lycoris.kohya"))


def flux_output(denoiser):
    rng = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(shape, generator=rng)  # noqa: E731
    return denoiser(
        hidden_states=draw(2, 4, 4),
        encoder_hidden_states=draw(2, 3, 6),
        pooled_projections=draw(2, 5),
        timestep=torch.tensor([0.1, 0.7]),
        guidance=torch.tensor([1.0, 3.0]),
        img_ids=draw(4, 3),
        txt_ids=torch.zeros(3, 3),
    ).sample


def sd3_output(denoiser):
    rng = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(shape, generator=rng)  # noqa: E731
    return denoiser(
        hidden_states=draw(2, 4, 8, 8),
        encoder_hidden_states=draw(2, 3, 6),
        pooled_projections=draw(2, 5),
        timestep=torch.tensor([100.0, 700.0]),
    ).sample


class Case:
    """A model, its targets, its forward pass, and its names in files."""

    def __init__(self, models: Models, targets, output, keys):
        self.models, self.targets, self.output, self.keys = models, targets, output, keys
        self.wanted = {t.key for t in targets if t.part == "denoiser" and not t.optional}


def case(family: str) -> Case:
    torch.manual_seed(0)
    if family == "flux":
        models = dits.flux()
        targets = text_targets(models.text_encoders) + transformer_targets(models.denoiser)
        return Case(models, targets, flux_output, flux_map())
    models = dits.sd3()
    targets = clip_targets(models.text_encoders["te1"], "te1") + clip_targets(models.text_encoders["te2"], "te2")
    targets += t5_targets(models.text_encoders["te3"]) + mmdit_targets(models.denoiser)
    return Case(models, targets, sd3_output, mmdit_map(models.denoiser.config.num_layers, prefix=""))


@pytest.fixture(params=["flux", "sd3"])
def given(request):
    return case(request.param)


def merged(denoiser: nn.Module, keys, file) -> nn.Module:
    """The denoiser with the file's changes in the weights of the file's own layers."""
    weights = keys.to_file(denoiser.state_dict())
    names = {f"lora_unet_{key.rpartition('.')[0].replace('.', '_')}": key.rpartition(".")[0] for key in weights}
    for layer, tensors in file.entries.items():
        if not layer.startswith("lora_unet_"):
            continue
        key = names[layer]
        weights[f"{key}.weight"] = change(weights[f"{key}.weight"], tensors)
        if "diff_b" in tensors:
            weights[f"{key}.bias"] = weights[f"{key}.bias"] + tensors["diff_b"]
    denoiser.load_state_dict(keys.to_model(weights))
    return denoiser


@pytest.mark.parametrize("algo", ALGOS)
def test_every_layer_is_trained_under_the_name_that_files_have(lycoris, given, tmp_path, algo):
    models, other = given.models, copy.deepcopy(given.models.denoiser)
    with torch.no_grad():
        bare = given.output(models.denoiser)
        network = make(lycoris, given.targets, models, args=ALGOS[algo])
        assert (given.output(models.denoiser) - bare).abs().max() < 1e-5  # nothing yet; DoRA divides by a norm
        trained(network).eval()
        file = read(write(network, tmp_path / "a.safetensors"))
        assert {layer for layer in file.entries if layer.startswith("lora_unet_")} == given.wanted
        ours, theirs = given.output(models.denoiser), given.output(merged(other, given.keys, file))
    assert (ours - theirs).abs().max() < 2e-5  # float32, tens of layers
    assert (ours - bare).abs().max() > 1e-3


@pytest.mark.parametrize("algo", ["loha", "full"])
def test_files_come_back(lycoris, given, tmp_path, algo):
    second, third = copy.deepcopy(given.models), copy.deepcopy(given.models)
    network = trained(make(lycoris, given.targets, given.models, args=ALGOS[algo])).eval()
    file = read(write(network, tmp_path / "a.safetensors"))
    again = make(lycoris, given.targets, second, args=ALGOS[algo], seed=12)
    assert lycoris.load(again, file) == (len(file.entries), 0, 0)
    built = lycoris.from_weights(given.targets, third, file, dropout=None, args={})
    assert len(built.layers()) == len(file.entries)
    with torch.no_grad():
        for one, loaded in ((again, second), (built, third)):
            one.eval()
            assert (given.output(loaded.denoiser) - given.output(given.models.denoiser)).abs().max() < 1e-5


def test_a_fused_layer_is_worked_on_once_and_keeps_nothing(lycoris, given):
    network = trained(make(lycoris, given.targets, given.models, args=ALGOS["loha"])).eval()
    layers = [layer.org_module[0] for layer in network.network.unet_loras if isinstance(layer.org_module[0], Linear)]
    assert layers
    calls = []
    for layer in layers:
        layer.register_forward_hook(lambda module, _args, _output: calls.append(module))
    with torch.no_grad():
        given.output(given.models.denoiser)
    assert len(calls) == len(set(map(id, calls))) == len(layers)
    assert all(layer._input is None and not any(p is not None for p in layer._pieces) for layer in layers)


def test_gradients_with_and_without_checkpointing(lycoris, given):
    network = trained(make(lycoris, given.targets, given.models, args=ALGOS["loha"]))
    network.network.requires_grad_(True)
    found = []
    for again in (False, True):
        network.network.zero_grad()
        if again:
            for name, block in given.models.denoiser.named_modules():
                if name.count(".") == 1 and "blocks" in name:
                    block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        given.output(given.models.denoiser).square().sum().backward()
        found.append({n: p.grad.clone() for n, p in network.network.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    unet = [name for name in found[0] if name.startswith("lora_unet")]
    assert len({name.partition(".")[0] for name in unet}) >= len(given.wanted) - 2  # what the last block ignores
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-5)


def test_the_layout_has_the_paths_and_classes_of_the_original(given):
    layout = file_layout(given.targets, given.models)
    kinds = {type(module).__name__ for module in layout.modules()}
    if "DoubleStreamBlock" in kinds:
        assert {"SingleStreamBlock", "SelfAttention"} <= kinds
        assert isinstance(layout.get_submodule("double_blocks.0.img_attn.qkv"), Linear)
        live = given.models.denoiser.transformer_blocks[0].ff.net[2]
        assert layout.get_submodule("double_blocks.0.img_mlp.2") is live
    else:
        assert "SingleDiTBlock" in kinds
    for name, module in layout.named_modules():
        if isinstance(module, Linear):
            assert module.weight.shape == (module.out_features, module.in_features), name
            x = torch.randn(2, module.in_features)
            expected = nn.functional.linear(x, module.weight, module.bias)
            torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-6)


def test_a_part_that_gets_no_layers_is_refused(lycoris, given):
    """Checked for every module; here by presets that leave a part out."""
    with pytest.raises(UserError, match=r"lycoris\.kohya made no layers in te1, which would stay .*; choose another"):
        make(lycoris, given.targets, given.models, args={"algo": "loha", "preset": "unet-only"})


def test_t5_that_is_asked_for_and_gets_nothing_is_refused(lycoris, given):
    with pytest.raises(UserError, match=r"lycoris\.kohya made no layers in te3, which would stay untrained"):
        make(lycoris, given.targets, given.models, args={"algo": "loha", "train_t5xxl": "True"})


def test_a_denoiser_without_places_that_gets_nothing_is_refused(lycoris):
    """The live model, as modules would find it: nothing in it has a class that they know."""
    found = case("flux")
    targets = [t for t in dits.flux_targets(found.models) if t.part != "te3"]
    with pytest.raises(UserError, match="made no layers in the denoiser, which would stay untrained; add --network_tr"):
        make(lycoris, targets, found.models, args={"algo": "loha"})
