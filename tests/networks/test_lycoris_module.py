"""networks.lycoris, .loha, .lokr and .oft on a tiny Stable Diffusion. Reference: lycoris.kohya."""

from __future__ import annotations

import copy
import importlib
import re

import pytest
import torch
from safetensors.torch import save_file

import networks.loha
import networks.lokr
import networks.lycoris
import networks.oft
import networks.oft_flux
from library.errors import UserError
from library.families.flux.targets import text_targets as flux_text_targets
from library.families.flux.targets import transformer_targets
from library.families.sd.targets import text_targets, unet_targets
from networks.build import DeclaredBuilder, merge
from networks.third_party import ThirdPartyBuilder
from tests.networks import dits

OURS = DeclaredBuilder(networks.lycoris.MODULE)
LOHA, LOKR, OFT, OFT_FLUX = (
    DeclaredBuilder(module.MODULE) for module in (networks.loha, networks.lokr, networks.oft, networks.oft_flux)
)

ALGOS = {
    "lora": {},
    "locon": {"algo": "locon", "conv_dim": "3", "conv_alpha": "1"},
    "tucker": {"algo": "locon", "use_tucker": "True"},
    "loha": {"algo": "loha", "preset": "attn-mlp"},
    "lokr": {"algo": "lokr", "factor": "4", "decompose_both": "True"},
    "dora": {"algo": "locon", "dora_wd": "True"},
    "dora of columns": {"algo": "lokr", "dora_wd": "True", "wd_on_output": "False", "factor": "2"},
    "full": {"algo": "full", "preset": "unet-convblock-only"},
    "diag-oft": {"algo": "diag-oft", "constraint": "0.01"},
    "boft": {"algo": "boft", "preset": "unet-transformer-only", "rescaled": "True"},
    "glora": {"algo": "glora", "preset": "attn-mlp"},
    "norms": {"algo": "lora", "train_norm": "True", "preset": "unet-only"},
}


@pytest.fixture
def targets(models):
    """Those of the family, with norms and the layers at both ends."""
    return unet_targets(models.denoiser) + text_targets(models.text_encoders["te"])


def make(builder, targets, models, args, dim=4):
    return builder.create(targets, models, dim=dim, alpha=1.0, args=args, seed=11)


def trained(network):
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.05)
    return network.eval()


def write(network, path):
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in network.file_state().items()}, path)
    return path


@pytest.mark.parametrize("name", [name for name in ALGOS if "columns" not in name])  # it reads norms of rows only
def test_lycoris_makes_the_same_layers_and_reads_the_file(models, targets, outputs, tmp_path, name):
    bare, args, other = outputs(models), ALGOS[name], copy.deepcopy(models)
    network = make(OURS, targets, models, args)
    network.attach(models)
    for started, plain in zip(outputs(models), bare, strict=True):
        torch.testing.assert_close(started, plain, rtol=0, atol=1e-5)
    path = write(trained(network), tmp_path / "a.safetensors")
    lycoris = ThirdPartyBuilder(importlib.import_module("lycoris.kohya"))
    theirs = lycoris.from_weights(targets, other, lycoris.read(path), args={})
    theirs.network.eval()
    assert set(theirs.layers()) == set(network.layers())
    for ours, read in zip(outputs(models), outputs(other), strict=True):
        torch.testing.assert_close(read, ours, rtol=1e-4, atol=1e-4)
    assert max((a - b).abs().max() for a, b in zip(outputs(models), bare, strict=True)) > 1e-3


@pytest.mark.parametrize(
    "preset", ["full", "full-lin", "attn-mlp", "unet-only", "unet-transformer-only", "unet-convblock-only"]
)
@pytest.mark.parametrize("norms", ["False", "True"])
def test_presets_choose_the_layers_that_lycoris_chooses(models, targets, preset, norms):
    args = {"preset": preset, "train_norm": norms, "algo": "loha"}
    ours = make(OURS, targets, models, args)
    kept = [target for target in targets if target.part == "denoiser" or "unet" not in preset]
    lycoris = ThirdPartyBuilder(importlib.import_module("lycoris.kohya"))
    theirs = make(lycoris, kept, copy.deepcopy(models), args)
    # Newer versions name the class of the time embedding for another model's sake, and find it here too.
    extra = set() if "full" in preset or "unet-only" in preset else {"time_embedding"}
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in theirs.file_state().items()
        if not any(part in name for part in extra)
    }
    assert set(ours.layers()) == {name.partition(".")[0] for name in shapes}
    assert {name: tuple(tensor.shape) for name, tensor in ours.file_state().items()} == shapes


def test_a_preset_file(models, targets, tmp_path):
    (tmp_path / "own.toml").write_text(
        'enable_conv = true\nunet_target_module = ["CrossAttention"]\nunet_target_name = ["conv_in"]\n'
        'text_encoder_target_module = ["CLIPMLP"]\nexclude_name = [".*attn1.*"]\n'
        '[module_algo_map.CLIPMLP]\nalgo = "lokr"\ndim = 7\nfactor = 2\n'
    )
    network = make(OURS, targets, models, {"algo": "loha", "preset": str(tmp_path / "own.toml")})
    state = network.file_state()
    assert {key.split("_attn2_")[0] for key in network.layers() if "attn2" in key}
    assert not [key for key in network.layers() if "attn1" in key]
    assert "lora_unet_conv_in.hada_w1_a" in state
    assert "lora_te_text_model_encoder_layers_0_mlp_fc1.lokr_w1" in state
    assert all("_attn2_" in key or "_mlp_" in key or key == "lora_unet_conv_in" for key in network.layers())
    for text, message in (
        ('unet_modules = ["X"]\n', "unet_modules is unknown; a preset has enable_conv"),
        ("enable_conv = [", "own.toml"),
    ):
        (tmp_path / "own.toml").write_text(text)
        with pytest.raises(UserError, match=message):
            make(OURS, targets, models, {"preset": str(tmp_path / "own.toml")})
    with pytest.raises(UserError, match="preset=all: is none of full, full-lin"):
        make(OURS, targets, models, {"preset": "all"})
    with pytest.raises(UserError, match="algo=dora: is none of lora, locon, loha"):
        make(OURS, targets, models, {"algo": "dora"})


@pytest.mark.parametrize("name", ALGOS)
def test_files_are_read_again_and_merged(models, targets, outputs, tmp_path, name):
    network = trained(make(OURS, targets, models, ALGOS[name]))
    file = OURS.read(write(network, tmp_path / "a.safetensors"))
    again = trained(make(OURS, targets, models, ALGOS[name]))
    assert OURS.load(again, file) == (len(network.layers()), 0, 0)
    rebuilt = OURS.from_weights(targets, models, file, args=ALGOS[name])
    for one in (again, rebuilt):
        assert all(torch.equal(value, network.file_state()[key]) for key, value in one.file_state().items())
    other = copy.deepcopy(models)
    rebuilt.eval().attach(models)
    assert merge(targets, other, file, 1.0) == (len(network.layers()), 0)
    for live, merged in zip(outputs(models), outputs(other), strict=True):
        torch.testing.assert_close(live, merged, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("args", [{}, {"algo": "boft"}], ids=["without arguments", "of another algorithm"])
@pytest.mark.parametrize("name", ALGOS)
def test_a_file_says_the_types_of_its_layers(models, targets, tmp_path, name, args):
    network = trained(make(OURS, targets, models, ALGOS[name]))
    file = OURS.read(write(network, tmp_path / "a.safetensors"))
    rebuilt = OURS.from_weights(targets, models, file, args={**args, "module_dropout": "0.1"}).file_state()
    assert all(torch.equal(value, rebuilt[key]) for key, value in network.file_state().items())


@pytest.mark.rows("R512")
@pytest.mark.parametrize("builder", [LOHA, LOKR])
def test_loha_and_lokr_have_lora_plus_patterns_and_text_encoders(models, targets, builder):
    args = {"loraplus_unet_lr_ratio": "4", "exclude_patterns": "['.*attn1.*']", "include_patterns": "['.*attn1.to_q']"}
    network = make(builder, targets, models, args)
    assert set(network.counts()) == {"denoiser", "te"}
    assert {key.rsplit("_attn1_")[1] for key in network.layers() if "_attn1_" in key} == {"to_q"}
    groups = {group["name"]: group["lr"] for group in network.parameter_groups({"denoiser": 1e-3, "te": 1e-4})}
    assert groups == {"unet": 1e-3, "unet plus": pytest.approx(4e-3), "textencoder": 1e-4}


def test_oft_rotates_attention_and_on_request_more(models, targets):
    def kinds(**args):
        network = make(OFT, targets, models, args)
        assert set(network.counts()) == {"denoiser"}
        names = {name.split(".")[0] for name in network.file_state()}
        assert all(name.startswith("oft_unet_") for name in names)
        return {
            "attention" if "_attn" in name else "transformer" if "_attentions_" in name else "resnet" for name in names
        }

    assert kinds() == {"attention"}
    assert kinds(enable_all_linear="False", enable_conv="False") == {"attention"}
    assert kinds(enable_all_linear="True") == {"attention", "transformer"}
    assert kinds(enable_conv="True") == {"attention", "resnet"}


@pytest.mark.rows("R320", "R321")
def test_oft_of_flux_rotates_attention_and_on_request_the_mlps():
    """Text encoders never get a layer."""
    models = dits.flux()
    targets = transformer_targets(models.denoiser) + flux_text_targets(models.text_encoders)
    assert {target.part for target in targets} > {"denoiser"}

    def layers(**args):
        network = make(OFT_FLUX, targets, models, args)
        assert set(network.counts()) == {"denoiser"}
        return {re.sub(r"_\d+_", "_N_", name.split(".")[0], count=1) for name in network.file_state()}

    attention = {
        f"oft_unet_double_blocks_N_{stream}_attn_{layer}" for stream in ("img", "txt") for layer in ("qkv", "proj")
    }
    assert layers() == attention
    everything = layers(enable_all_linear="True")
    assert everything > attention | {f"oft_unet_double_blocks_N_{s}_mlp_{n}" for s in ("img", "txt") for n in (0, 2)}
    assert "oft_unet_single_blocks_N_linear1" in everything


@pytest.mark.rows("R315")
def test_an_oft_file_is_read_under_its_own_names(models, targets, outputs, tmp_path):
    network = trained(make(OFT, targets, models, {"enable_all_linear": "True", "enable_conv": "True"}))
    file = OFT.read(write(network, tmp_path / "a.safetensors"))
    rebuilt, other = OFT.from_weights(targets, models, file, args={}), copy.deepcopy(models)
    assert all(torch.equal(value, network.file_state()[key]) for key, value in rebuilt.file_state().items())
    rebuilt.eval().attach(models)
    assert merge(targets, other, file, 1.0) == (len(network.layers()), 0)
    for live, merged in zip(outputs(models), outputs(other), strict=True):
        torch.testing.assert_close(live, merged, rtol=1e-4, atol=1e-4)
