"""Control LoRAs of FLUX.1, as Black Forest Labs publish them: read, merged, converted. Reference: diffusers' converter.

tests/generation/test_against_pipelines.py draws with one as diffusers' pipeline does.
"""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.families.flux.loading import transformer_of_file
from library.families.flux.targets import transformer_targets
from library.families.shared.reading import Reader, open_model
from library.model_tools.converting import convert_file
from library.types import Models
from networks.build import DeclaredBuilder, merge
from networks.files import read
from networks.inputs import with_all_inputs, with_inputs_of
from networks.lycoris import MODULE
from tests.builders.flux import IN_CHANNELS, as_diffusers_names, control_lora, flux_tensors, write_flux


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory):
    file = write_flux(tmp_path_factory.mktemp("flux"))
    return transformer_of_file(Reader(open_model(file, mapped=False), None))[0].eval()


@pytest.fixture
def models(denoiser) -> Models:
    return Models(copy.deepcopy(denoiser), {}, {}, None)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return control_lora(tmp_path_factory.mktemp("control") / "canny.safetensors", rank=3)


def merged_tensors(file, multiplier=1.0, inputs=2 * IN_CHANNELS):
    """The model's tensors under the original names, with the network in them by its formula."""
    tensors, network = flux_tensors(), load_file(file)
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind == "scale":
            tensors[name] = network[name] if multiplier else tensor
        elif kind == "bias":
            tensors[name] = tensor + multiplier * network[f"{layer}.lora_B.bias"]
        else:
            down = network[f"{layer}.lora_A.weight"]
            down = down[:, :inputs] if layer == "img_in" else down
            wide = torch.nn.functional.pad(tensor, (0, down.shape[1] - tensor.shape[1]))
            tensors[name] = wide + multiplier * network[f"{layer}.lora_B.weight"] @ down
    return tensors


def require_tensors(denoiser, tensors):
    from library.families.flux.keymap import flux_map

    found = flux_map().to_file(denoiser.state_dict())
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("multiplier", [1.0, 0.5, 0.0])
def test_all_of_it_is_merged(models, file, multiplier):
    """Layers, biases, norms, which are replaced, and inputs that the model does not have yet."""
    targets = transformer_targets(models.denoiser)
    (network,) = with_all_inputs([read(file)], targets, models)
    assert models.denoiser.x_embedder.in_features == 2 * IN_CHANNELS
    assert merge(targets, models, network, multiplier) == (len(network.entries), 0)
    require_tensors(models.denoiser, merged_tensors(file, multiplier))


def test_without_a_control_image_its_inputs_are_left_out(models, file, caplog):
    targets = transformer_targets(models.denoiser)
    network = with_inputs_of(read(file), targets, models)
    assert "is a control LoRA; there is no control image here" in caplog.text
    merge(targets, models, network, 1.0)
    require_tensors(models.denoiser, merged_tensors(file, inputs=IN_CHANNELS))


def test_another_network_beside_it_gets_inputs_of_zeros(models, file, tmp_path):
    down, up = torch.randn(2, IN_CHANNELS), torch.randn(64, 2)
    save_file(
        {"lora_unet_img_in.lora_down.weight": down, "lora_unet_img_in.lora_up.weight": up}, tmp_path / "a.safetensors"
    )
    targets, before = transformer_targets(models.denoiser), models.denoiser.x_embedder.weight.detach().clone()
    _, other = with_all_inputs([read(file), read(tmp_path / "a.safetensors")], targets, models)
    merge(targets, models, other, 1.0)
    expected = torch.cat([before + up @ down, torch.zeros(64, IN_CHANNELS)], 1)
    torch.testing.assert_close(models.denoiser.x_embedder.weight, expected, rtol=1e-5, atol=1e-5)


def run(denoiser, channels):
    rng = torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.randn(shape, generator=rng)  # noqa: E731
    ids = torch.stack([torch.zeros(6), torch.arange(6) // 3, torch.arange(6) % 3], 1)
    given = {"hidden_states": draw(1, 6, 2 * IN_CHANNELS)[..., :channels], "encoder_hidden_states": draw(1, 4, 48)}
    given |= {"pooled_projections": draw(1, 64), "timestep": torch.tensor([0.5]), "guidance": torch.tensor([2.0])}
    with torch.no_grad():
        return denoiser(**given, img_ids=ids, txt_ids=torch.zeros(4, 3)).sample


def test_attached_it_is_what_it_is_merged(models, file):
    """And at 0 the model without it; what is saved is read again."""
    targets, builder = transformer_targets(models.denoiser), DeclaredBuilder(MODULE)
    bare = run(models.denoiser, IN_CHANNELS)
    (network_file,) = with_all_inputs([read(file)], targets, models)
    network = builder.from_weights(targets, models, network_file, args={})
    network.eval().attach(models)
    found = run(models.denoiser, 2 * IN_CHANNELS)
    network.set_multiplier(0)
    torch.testing.assert_close(run(models.denoiser, 2 * IN_CHANNELS), bare, rtol=1e-5, atol=1e-5)
    network.detach()
    merge(targets, models, network_file, 1.0)
    torch.testing.assert_close(found, run(models.denoiser, 2 * IN_CHANNELS), rtol=1e-4, atol=1e-4)
    assert (found - bare).abs().max() > 0.1
    state = network.file_state()
    assert torch.equal(
        state["lora_unet_single_blocks_1_norm_key_norm.set_weight"],
        load_file(file)["single_blocks.1.norm.key_norm.scale"],
    )
    again = builder.from_weights(targets, models, type(network_file)(file, _entries(state)), args={})
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.file_state().items())


def _entries(state):
    found = {}
    for name, tensor in state.items():
        layer, _, rest = name.partition(".")
        found.setdefault(layer, {})[rest] = tensor
    return found


def test_diffusers_names_are_those_of_its_own_converter(file, tmp_path):
    """And reading them gives the same network as reading the file itself."""
    convert_file(file, tmp_path / "d.safetensors", "diffusers")
    found, expected = load_file(tmp_path / "d.safetensors"), as_diffusers_names(load_file(file))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("layout", ["diffusers", "comfyui", "kohya"])
def test_every_layout_is_merged_to_the_same_model(models, file, tmp_path, layout):
    convert_file(file, tmp_path / "d.safetensors", layout)
    if layout == "comfyui":
        names = load_file(tmp_path / "d.safetensors")
        assert names["diffusion_model.img_in.reshape_weight"].tolist() == [64, 2 * IN_CHANNELS]
        assert "diffusion_model.double_blocks.0.img_attn.norm.query_norm.set_weight" in names
        assert "diffusion_model.double_blocks.0.img_attn.qkv.diff_b" in names
    targets = transformer_targets(models.denoiser)
    (network,) = with_all_inputs([read(tmp_path / "d.safetensors")], targets, models)
    assert merge(targets, models, network, 1.0)[1] == 0
    require_tensors(models.denoiser, merged_tensors(file))


def test_a_norm_that_does_not_fit_is_refused(models, tmp_path):
    save_file({"double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(7)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"set_weight: shape \(7,\) does not fit \(32,\)"):
        merge(transformer_targets(models.denoiser), models, read(tmp_path / "a.safetensors"), 1.0)
