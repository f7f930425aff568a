"""networks.lora_sd3 on a small SD3.5 transformer. References: written out counts, and merged weights."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.methods.network import NetworkMethod
from library.options.base import Given, build_options
from library.options.network import NetworkOptions
from library.options.optimizer import OptimizerOptions
from library.options.saving import SavingOptions
from library.options.training import TrainingOptions
from library.types import Models
from networks import build
from networks.layers.functional import delta
from tests.networks import dits
from tests.networks.builders import lora, lora_fa, lora_sd3

SPLIT = {"split_qkv": "True"}
EMBEDDINGS = {"emb_dims": "[1,2,3,4,5,6]"}


@pytest.fixture
def models():
    torch.manual_seed(0)
    return dits.sd3()


@pytest.fixture
def targets(models):
    return dits.sd3_targets(models)


@pytest.fixture
def unet(targets):
    return [target for target in targets if target.part == "denoiser"]


def make(targets, models, *, module=lora_sd3, dim=4, alpha=2.0, args=None, seed=11):
    return module.create(targets, models, dim=dim, alpha=alpha, dropout=None, args=args or {}, seed=seed)


def write(network, path):
    save_file({name: tensor.detach().clone() for name, tensor in network.file_state().items()}, path)
    return path


def ranks(network):
    found = {}
    for key, layer in network.layers().items():
        if key.startswith("lora_unet_"):
            name = re.sub(r"joint_blocks_\d+_", "", key.removeprefix("lora_unet_"))
            found.setdefault(name, set()).add(layer.rank)
    return {name: seen.pop() if len(seen) == 1 else seen for name, seen in found.items()}


@pytest.mark.parametrize(
    ("layers", "dual", "heads", "count"), [(24, (), 24, 237), (24, tuple(range(13)), 24, 263), (38, (), 38, 377)]
)
def test_layers_of_the_published_models(layers, dual, heads, count):
    with torch.device("meta"):
        sizes = {"num_attention_heads": heads, "caption_projection_dim": 64 * heads}
        models = Models(dits.sd3_transformer(layers, dual, **sizes), {}, {}, None)
    network = make(dits.sd3_targets(models), models, dim=1)
    assert network.counts() == {"denoiser": count}
    up = {key: layer.lora_up.weight.shape[0] // heads // 64 for key, layer in network.layers().items()}
    assert up["lora_unet_joint_blocks_0_x_block_adaLN_modulation_1"] == (9 if dual else 6)
    assert up[f"lora_unet_joint_blocks_{layers - 1}_context_block_adaLN_modulation_1"] == 2


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({}, {"te1": 12, "te2": 12}),
        ({"train_t5xxl": "False"}, {"te1": 12, "te2": 12}),
        ({"train_t5xxl": "True"}, {"te1": 12, "te2": 12, "te3": 14}),
    ],
)
@pytest.mark.rows("R442")
def test_parts(models, targets, args, text):
    assert make(targets, models, args=args).counts() == {"denoiser": 2 * 5 + 2 + 2 * 7 + 5, **text}


@pytest.mark.rows("R443")
def test_rates_of_the_text_encoders(models, targets):
    network = make(targets, models, args={"train_t5xxl": "True"})
    rates = {"te1": 1e-4, "te2": 2e-4, "te3": 3e-4, "denoiser": 1e-3}
    groups = {group["name"]: group["lr"] for group in network.parameter_groups(rates)}
    assert groups == {"textencoder 1": 1e-4, "textencoder 2": 2e-4, "textencoder 3": 3e-4, "unet": 1e-3}


@pytest.mark.rows("R445")
@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ([], {"textencoder 1": 1e-4, "textencoder 2": 2e-4}),
        (["train_t5xxl=True"], {"textencoder 1": 1e-4, "textencoder 2": 2e-4, "textencoder 3": 2e-4}),
    ],
)
def test_text_encoders_alone(models, targets, tmp_path, args, parts):
    given = {"network_module": "networks.lora_sd3", "learning_rate": 1e-3, "seed": 5, "network_args": args}
    given |= {"network_train_text_encoder_only": True, "text_encoder_lr": [1e-4, 2e-4]}
    groups = [NetworkOptions, OptimizerOptions, SavingOptions, TrainingOptions]
    made = NetworkMethod(build_options(groups, {name: Given(value, "test") for name, value in given.items()}))
    traits = SimpleNamespace(text_encoders=("te1", "te2", "te3"), block_layout=None)
    made.attach(SimpleNamespace(traits=traits, targets=SimpleNamespace(lora=lambda _: targets)), models)
    assert {group["name"]: group["lr"] for group in made.parameter_groups()} == pytest.approx(parts)
    assert made.trained_text_encoders()
    made.save(tmp_path / "te.safetensors", None, None)
    kept = {key.split("_")[1] for key in load_file(tmp_path / "te.safetensors")}
    assert kept == {"te1", "te2", "te3"} if args else {"te1", "te2"}


TYPES = {
    "context_attn_dim": ("context_block_attn_qkv", "context_block_attn_proj"),
    "context_mlp_dim": ("context_block_mlp_fc1", "context_block_mlp_fc2"),
    "context_mod_dim": ("context_block_adaLN_modulation_1",),
    "x_attn_dim": ("x_block_attn_qkv", "x_block_attn_proj", "x_block_attn2_qkv", "x_block_attn2_proj"),
    "x_mlp_dim": ("x_block_mlp_fc1", "x_block_mlp_fc2"),
    "x_mod_dim": ("x_block_adaLN_modulation_1",),
}
PLAIN = {layer: 4 for layers in TYPES.values() for layer in layers}


@pytest.mark.parametrize("argument", TYPES)
@pytest.mark.rows("R450")
def test_ranks_by_type(models, targets, argument):
    other = dict.fromkeys(TYPES[argument], 7)
    assert ranks(make(targets, models, args={argument: "7"})) == {**PLAIN, **other}
    left_out = {layer: rank for layer, rank in PLAIN.items() if layer not in other}
    assert ranks(make(targets, models, args={argument: "0", **EMBEDDINGS, "emb_dims": "0,0,0,0,0,0"})) == left_out


@pytest.mark.rows("R451")
def test_embeddings(models, targets):
    network = make(targets, models, args=EMBEDDINGS)
    assert ranks(network) == {
        **PLAIN,
        "context_embedder": 1,
        "t_embedder_mlp_0": 2,
        "t_embedder_mlp_2": 2,
        "x_embedder_proj": 3,
        "y_embedder_mlp_0": 4,
        "y_embedder_mlp_2": 4,
        "final_layer_adaLN_modulation_1": 5,
        "final_layer_linear": 6,
    }
    convolution = network.layers()["lora_unet_x_embedder_proj"]
    assert convolution.lora_down.weight.shape == (3, 4, 2, 2)
    assert convolution.lora_up.weight.shape == (16, 3, 1, 1)


@pytest.mark.parametrize(
    ("text", "expected"), [("all", {0, 1, 2}), ("none", set()), ("1", {1}), ("0,2", {0, 2}), ("1-2", {1, 2})]
)
@pytest.mark.rows("R452")
def test_blocks_by_number(models, targets, text, expected):
    network = make(targets, models, args={"train_block_indices": text})
    assert {network.targets[key].block for key in network.layers() if key.startswith("lora_unet")} == expected


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"train_block_indices": "3"}, "train_block_indices=3: there is no block 3; this model has 0-2"),
        ({"train_block_indices": "first"}, "'first' is no block"),
        ({"emb_dims": "1,2,3,4,5"}, "emb_dims=1,2,3,4,5: is not 6 whole numbers from 0 up"),
        ({"emb_dims": "1,2,3,4,5,32769"}, "emb_dims=1,2,3,4,5,32769: has an entry above 32768"),
        ({"train_block_indices": "9" * 5000}, "is no block"),
        ({"x_mod_dim": "x"}, "x_mod_dim=x: is not a whole number"),
        ({"x_mod_dim": "32769"}, "x_mod_dim=32769: must be at least 0, at most 32768"),
        ({"x_attn_dim": "-1"}, "x_attn_dim=-1: must be at least 0, at most 32768"),
        ({"train_t5xxl": "2"}, "train_t5xxl=2: is neither True nor False"),
    ],
)
def test_arguments_that_are_refused(models, targets, args, message):
    with pytest.raises(UserError) as caught:
        make(targets, models, args=args)
    assert message in str(caught.value)


def test_arguments_without_effect_are_said():
    assert lora_sd3.module.check({"x_attn_dim": "4", "verbose": "True"}, dim=4, ranks_from_file=False) == []
    assert "conv_alpha has no effect" in lora_sd3.module.check({"conv_alpha": "1"}, dim=4, ranks_from_file=False)[0]
    assert len(lora_sd3.module.check({**EMBEDDINGS, "train_block_indices": "0"}, dim=4, ranks_from_file=True)) == 2


def test_another_kind_of_model_is_named():
    models = dits.flux()
    with pytest.raises(UserError, match=r"networks\.lora_sd3 is for another kind.*networks\.lora_flux"):
        make(dits.flux_targets(models), models)


# ---- values


def merged_by_hand(denoiser, targets, state):
    """Every change added to the live weights, with diffusers' order of the two halves of final modulations."""
    merged = copy.deepcopy(denoiser)
    for target in targets:
        if f"{target.key}.alpha" not in state:
            continue
        down, up = state[f"{target.key}.lora_down.weight"], state[f"{target.key}.lora_up.weight"]
        change = delta(down, up) * state[f"{target.key}.alpha"] / len(down)
        last = f"joint_blocks_{len(denoiser.transformer_blocks) - 1}_context_block_adaLN"
        if last in target.key or "final_layer_adaLN" in target.key:
            shift, scale = change.chunk(2)
            change = torch.cat([scale, shift])
        weights = [merged.get_submodule(path).weight for path in target.modules]
        for weight, part in zip(weights, change.split([len(w) for w in weights]), strict=True):
            weight.data += part
    return merged


@pytest.mark.parametrize("args", [EMBEDDINGS, {**EMBEDDINGS, **SPLIT}], ids=["fused", "split"])
@pytest.mark.rows("R447")
def test_the_live_network_is_what_its_file_says(models, targets, unet, randomise, tmp_path, args):
    bare = dits.sd3_output(models.denoiser)
    network = randomise(make(unet, models, args=args))
    state = load_file(write(network, tmp_path / "a.safetensors"))
    expected = dits.sd3_output(merged_by_hand(models.denoiser, targets, state))
    network.attach(models)
    torch.testing.assert_close(dits.sd3_output(models.denoiser), expected, rtol=1e-4, atol=1e-5)
    assert (expected - bare).abs().max() > 1e-2
    network.detach()
    file = lora_sd3.read(tmp_path / "a.safetensors")
    built = lora_sd3.from_weights(targets, models, file, dropout=None, args=args)
    assert all(torch.equal(tensor, state[name]) for name, tensor in built.file_state().items())
    loaded = make(unet, models, args=args, seed=12, alpha=1.0)
    assert lora_sd3.load(loaded, file) == (len(network.layers()), 0, 0)
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.file_state().items())
    build.merge(targets, models, file, 1.0)
    torch.testing.assert_close(dits.sd3_output(models.denoiser), expected, rtol=1e-4, atol=1e-5)


def test_halves_matter_where_they_are_swapped(models, unet, randomise):
    """Without the swap the same file gives another image, so the test above would see it."""
    args = {"network_reg_dims": "context_block_adaLN=4,_=0"}
    network = randomise(make([target for target in unet if target.swap_halves], models, args=args))
    key = "lora_unet_joint_blocks_2_context_block_adaLN_modulation_1"
    assert list(network.layers()) == [key]
    state = {name: tensor.detach() for name, tensor in network.file_state().items()}
    plain = copy.deepcopy(models.denoiser)
    linear = plain.get_submodule(network.targets[key].modules[0])
    linear.weight.data += delta(state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"]) * 0.5
    network.attach(models)
    difference = dits.sd3_output(models.denoiser) - dits.sd3_output(plain)
    assert difference.abs().max() > 3e-4  # above the tolerance of the test above


@pytest.mark.parametrize("module", [lora, lora_fa])
def test_other_modules_swap_halves_too_and_leave_embeddings_out(models, unet, randomise, module):
    network = randomise(make(unet, models, module=module))
    assert len(network.layers()) == 2 * 5 + 2 + 2 * 7 + 5
    expected = dits.sd3_output(merged_by_hand(models.denoiser, unet, network.file_state()))
    network.attach(models)
    torch.testing.assert_close(dits.sd3_output(models.denoiser), expected, rtol=1e-4, atol=1e-5)


def test_the_familys_targets_are_those_of_the_files(models, unet):
    from library.families.sd3.targets import mmdit_targets

    def facts(targets):
        return {t.key: (t.modules, t.swap_halves, t.optional) for t in targets}

    assert facts(mmdit_targets(models.denoiser)) == facts(unet)
