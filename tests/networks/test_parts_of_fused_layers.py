"""Query, key and value one by one, with changes of any type, where the model's files have one fused layer.

Reference: each module with its own layer of lycoris, float32, and the formulas of the types.
"""

from __future__ import annotations

import copy

import pytest
import torch
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import load_file, save_file
from torch import nn

from library.errors import UserError
from library.methods.network import network_builder
from library.types import LoraTarget, Models
from networks.build import DeclaredBuilder, merge
from networks.files import read
from networks.layers.stacked import StackedLayer
from networks.loha import MODULE as LOHA
from networks.lycoris import MODULE as LYCORIS
from tests.networks import dits

PARTS = ("to_q", "to_k", "to_v")
TARGET = LoraTarget("lora_unet_qkv", "denoiser", tuple(f"x.{name}" for name in PARTS))


class Difference(nn.Module):
    """A weight and a bias with differences, in the words of lycoris' classes."""

    def __init__(self, name, module, multiplier, rank, alpha):
        super().__init__()
        self.base = [module]
        self.weight, self.bias = (nn.Parameter(torch.zeros_like(own)) for own in (module.weight, module.bias))

    def forward(self, x):
        return nn.functional.linear(x, self.base[0].weight + self.weight, self.base[0].bias + self.bias)


THEIRS = {
    "loha": (LohaModule, {}),
    "loha dora": (LohaModule, {"weight_decompose": True}),
    "lokr": (LokrModule, {"factor": 2}),
    "full lokr": (LokrModule, {"factor": 2, "full_matrix": True}),
    "full": (Difference, {}),
}


def modules(width: int = 6) -> Models:
    torch.manual_seed(0)
    parts = {name: nn.Linear(width, rows) for name, rows in zip(PARTS, (4, 8, 4), strict=True)}
    return Models(nn.ModuleDict({"x": nn.ModuleDict(parts)}).requires_grad_(False), {}, {}, None)


def written(models, kind, path, names=PARTS, beginning="transformer.x."):
    """A file of lycoris' tensors for some of the parts, and what each of these gives for an input."""
    made, given = THEIRS[kind]
    tensors, layers = {}, {}
    for name in names:
        layer = made(name, copy.deepcopy(models.denoiser.x[name]), 1.0, 2, 1.0, **given)
        rng = torch.Generator().manual_seed(len(layers))
        for parameter in layer.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=rng), alpha=0.3)
        state = {f"{beginning}{name}.{key}": value for key, value in layer.state_dict().items()}
        if kind == "full":
            state = {key.replace(".weight", ".diff").replace(".bias", ".diff_b"): value for key, value in state.items()}
        tensors |= {key: value.detach().clone() for key, value in state.items() if not key.endswith("scalar")}
        layers[name] = layer
    save_file(tensors, path)
    return layers


@pytest.mark.parametrize("names", [PARTS, PARTS[1:2]], ids=["all", "one"])
@pytest.mark.parametrize("kind", THEIRS)
def test_each_part_is_that_of_lycoris_attached_and_merged(tmp_path, kind, names):
    models, x = modules(), torch.randn(3, 6)
    layers = written(models, kind, tmp_path / "a.safetensors", names)
    bare = {name: models.denoiser.x[name](x) for name in PARTS}
    expected = {name: layers[name](x) if name in layers else bare[name] for name in PARTS}
    file, builder = read(tmp_path / "a.safetensors"), DeclaredBuilder(LYCORIS)
    assert not file.unused([TARGET])
    network = builder.from_weights([TARGET], models, file, args={})
    assert isinstance(network.lora_unet_qkv, StackedLayer)
    network.attach(models)
    for name in PARTS:
        torch.testing.assert_close(models.denoiser.x[name](x), expected[name], rtol=1e-5, atol=1e-5)
    network.set_multiplier(0)
    assert all(torch.equal(models.denoiser.x[name](x), bare[name]) for name in PARTS)
    network.detach()
    assert merge([TARGET], models, file, 1.0) == (1, 0)
    for name in PARTS:
        torch.testing.assert_close(models.denoiser.x[name](x), expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["loha", "full lokr", "full"])
def test_training_goes_on_with_each_part(tmp_path, kind):
    """Gradients are those of lycoris' layers; what is saved has a name for each part and is read again."""
    models = modules()
    layers = written(models, kind, tmp_path / "a.safetensors")
    network = DeclaredBuilder(LYCORIS).from_weights([TARGET], models, read(tmp_path / "a.safetensors"), args={})
    network.attach(models)
    x = torch.randn(3, 6)
    sum(models.denoiser.x[name](x).square().sum() for name in PARTS).backward()
    sum(layers[name](x).square().sum() for name in PARTS).backward()
    for name, part in zip(PARTS, network.lora_unet_qkv.parts.values(), strict=True):
        theirs = {key: value.grad for key, value in layers[name].named_parameters() if value.grad is not None}
        ours = {key: value.grad for key, value in part.named_parameters()}
        for key, gradient in ours.items():
            key = {"diffs.0": "weight", "diff_b": "bias"}.get(key, key)
            torch.testing.assert_close(gradient, theirs[key], rtol=1e-4, atol=1e-5)
    saved = {name: tensor.detach().clone() for name, tensor in network.file_state().items()}
    assert all(name.startswith("lycoris_x_to_") for name in saved)
    save_file(saved, tmp_path / "b.safetensors")
    again = DeclaredBuilder(LYCORIS).from_weights([TARGET], models, read(tmp_path / "b.safetensors"), args={})
    assert all(torch.equal(tensor, saved[name]) for name, tensor in again.file_state().items())


def test_parts_and_a_new_fused_layer_do_not_go_together(tmp_path):
    models = modules()
    written(models, "loha", tmp_path / "a.safetensors")
    builder = DeclaredBuilder(LOHA)
    network = builder.create([TARGET], models, dim=2, alpha=None, args={}, seed=1)
    with pytest.raises(UserError, match=r"lora_unet_qkv: the file has the modules of this layer one by one") as caught:
        builder.load(network, builder.read(tmp_path / "a.safetensors"))
    assert caught.value.hint == "--dim_from_weights continues with them so"
    assert builder.from_weights([TARGET], models, builder.read(tmp_path / "a.safetensors"), args={}).ranks() == {2}


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_simpletuners_names_on_a_transformer(tmp_path, family):
    """`lycoris_transformer_blocks_0_attn_to_q.lokr_w1`: the wrapper's names of diffusers' modules."""
    models = getattr(dits, family)()
    targets = [t for t in getattr(dits, f"{family}_targets")(models) if t.part == "denoiser"]
    paths = [path for target in targets if len(target.modules) > 1 for path in target.modules]
    other, tensors = copy.deepcopy(models.denoiser), {}
    rng = torch.Generator().manual_seed(0)
    for path in paths:
        module = other.get_submodule(path)
        first, second = torch.randn(2, 2, generator=rng), torch.randn(module.out_features // 2, module.in_features // 2)
        module.weight.data += torch.kron(first, 0.02 * second)
        name = f"lycoris_{path.replace('.', '_')}"
        tensors |= {f"{name}.lokr_w1": first, f"{name}.lokr_w2": 0.02 * second, f"{name}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    output, file = getattr(dits, f"{family}_output"), read(tmp_path / "a.safetensors")
    expected = output(other)
    network = network_builder("networks.lycoris").from_weights(targets, models, file, args={})
    network.attach(models)
    torch.testing.assert_close(output(models.denoiser), expected, rtol=1e-4, atol=1e-4)
    network.detach()
    assert merge(targets, models, file, 1.0)[1] == 0
    torch.testing.assert_close(output(models.denoiser), expected, rtol=1e-4, atol=1e-4)
    assert load_file(tmp_path / "a.safetensors").keys() == network.file_state().keys()
