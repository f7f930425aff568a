"""networks.lora_flux on a small FLUX transformer. References: written out counts, peft, and diffusers' reader."""

from __future__ import annotations

import copy
import re
from collections import Counter
from dataclasses import replace
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
from library.runtime.logs import LOGGER
from library.training.placement import release_text_encoders
from library.types import Models
from networks import build
from tests.networks import dits
from tests.networks.builders import dylora, lora, lora_fa, lora_flux

BOTH_T5 = {"train_t5xxl": "True"}
SPLIT = {"split_qkv": "True"}
TRANSFORMER_ONLY = 2 * 10 + 3 * 3  # layers of the small model's blocks


@pytest.fixture
def models():
    torch.manual_seed(0)
    return dits.flux()


@pytest.fixture
def targets(models):
    return dits.flux_targets(models)


def make(targets, models, *, module=lora_flux, dim=4, alpha=2.0, dropout=None, args=None, seed=11):
    return module.create(targets, models, dim=dim, alpha=alpha, dropout=dropout, args=args or {}, seed=seed)


def write(network, path):
    save_file({name: tensor.detach().clone() for name, tensor in network.file_state().items()}, path)
    return path


def denoiser_ranks(network):
    """Ranks by type of layer, e.g. "double img_attn_qkv"; the number of a block is left out."""
    ranks = {}
    for key, layer in network.layers().items():
        if key.startswith("lora_unet_"):
            name = re.sub(r"_blocks_\d+", "", key.removeprefix("lora_unet_"))
            ranks.setdefault(name, set()).add(layer.rank)
    return {name: found.pop() if len(found) == 1 else found for name, found in ranks.items()}


def blocks(network, stack):
    found = (re.match(rf"lora_unet_{stack}_blocks_(\d+)_", key) for key in network.layers())
    return sorted({int(match[1]) for match in found if match})


# ---- which layers


def test_the_published_model_has_304_layers():
    with torch.device("meta"):
        models = Models(dits.flux_transformer(19, 38, joint_attention_dim=4096), {}, {}, None)
    network = make(dits.flux_targets(models), models, dim=1)
    assert network.counts() == {"denoiser": 304}
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert shapes["lora_unet_double_blocks_18_img_attn_qkv.lora_up.weight"] == (9216, 1)
    assert shapes["lora_unet_single_blocks_37_linear1.lora_up.weight"] == (21504, 1)
    assert shapes["lora_unet_single_blocks_0_linear2.lora_down.weight"] == (1, 15360)


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ({}, {"te1": 12}),
        ({"train_t5xxl": "False"}, {"te1": 12}),
        ({"train_t5xxl": "false"}, {"te1": 12}),
        (BOTH_T5, {"te1": 12, "te3": 14}),
        ({"train_t5xxl": "true"}, {"te1": 12, "te3": 14}),
    ],
)
@pytest.mark.rows("R370")
def test_t5_is_trained_only_when_asked_for(models, targets, args, parts):
    network = make(targets, models, args=args)
    assert network.counts() == {"denoiser": TRANSFORMER_ONLY, **parts}
    t5 = [key for key in network.layers() if key.startswith("lora_te3")]
    assert not t5 or "lora_te3_encoder_block_0_layer_0_SelfAttention_q" in t5


ALL_TYPES = {
    "img_attn_dim": ("double_img_attn_qkv", "double_img_attn_proj"),
    "txt_attn_dim": ("double_txt_attn_qkv", "double_txt_attn_proj"),
    "img_mlp_dim": ("double_img_mlp_0", "double_img_mlp_2"),
    "txt_mlp_dim": ("double_txt_mlp_0", "double_txt_mlp_2"),
    "img_mod_dim": ("double_img_mod_lin",),
    "txt_mod_dim": ("double_txt_mod_lin",),
    "single_dim": ("single_linear1", "single_linear2"),
    "single_mod_dim": ("single_modulation_lin",),
}
PLAIN = {layer: 4 for layers in ALL_TYPES.values() for layer in layers}


@pytest.mark.parametrize("argument", ALL_TYPES)
@pytest.mark.rows("R380", "R381")
def test_ranks_by_type(models, targets, argument):
    other = dict.fromkeys(ALL_TYPES[argument], 7)
    assert denoiser_ranks(make(targets, models, args={argument: "7"})) == {**PLAIN, **other}
    left_out = {layer: rank for layer, rank in PLAIN.items() if layer not in other}
    network = make(targets, models, args={argument: "0"})
    assert denoiser_ranks(network) == left_out
    assert network.counts()["te1"] == 12
    assert {float(layer.alpha) for layer in network.layers().values()} == {2.0}


@pytest.mark.parametrize("form", ["[3,0,2,1,5]", "3,0,2,1,5", "[3, 0, 2, 1, 5]"])
@pytest.mark.rows("R382")
def test_layers_outside_the_blocks(models, targets, form):
    assert denoiser_ranks(make(targets, models, args={"in_dims": form})) == {
        **PLAIN,
        "img_in": 3,
        "vector_in_in_layer": 2,
        "vector_in_out_layer": 2,
        "txt_in": 5,
        "guidance_in_in_layer": 1,
        "guidance_in_out_layer": 1,
    }


@pytest.mark.parametrize(
    ("args", "double", "single"),
    [
        ({}, [0, 1], [0, 1, 2]),
        ({"train_blocks": "double"}, [0, 1], []),
        ({"train_blocks": "single"}, [], [0, 1, 2]),
        ({"train_double_block_indices": "1"}, [1], [0, 1, 2]),
        ({"train_double_block_indices": "none"}, [], [0, 1, 2]),
        ({"train_double_block_indices": ""}, [], [0, 1, 2]),
        ({"train_single_block_indices": "0, 2"}, [0, 1], [0, 2]),
        ({"train_single_block_indices": "all", "train_double_block_indices": "0-1"}, [0, 1], [0, 1, 2]),
        ({"train_single_block_indices": "1-2", "train_blocks": "single"}, [], [1, 2]),
        ({"train_single_block_indices": "1", "network_reg_dims": "blocks_[12]_=6"}, [0, 1], [1]),
    ],
)
@pytest.mark.rows("R383", "R384")
def test_blocks_by_number(models, targets, args, double, single):
    network = make(targets, models, args=args)
    assert (blocks(network, "double"), blocks(network, "single")) == (double, single)


def test_ranks_and_rates_by_regular_expression(models, targets):
    args = {"network_reg_dims": "img_attn=6,blocks_0_=0,img_in=9", "img_attn_dim": "2", "in_dims": "1,0,0,0,1"}
    network = make(targets, models, args={**args, "network_reg_lrs": "_attn_qkv=1e-6,lora_te1.*fc1=0"})
    ranks = denoiser_ranks(network)
    assert ranks["double_img_attn_qkv"] == 6
    assert (ranks["img_in"], ranks["txt_in"]) == (9, 1)
    assert "lora_unet_double_blocks_0_img_attn_qkv" in network.layers()
    assert "lora_unet_double_blocks_0_txt_attn_qkv" not in network.layers()
    assert network.counts()["te1"] == 10
    rates = {group["name"]: group["lr"] for group in network.parameter_groups({"denoiser": 1e-3, "te1": 1e-4})}
    assert rates == {"textencoder": 1e-4, "unet reg 1": 1e-6, "unet": 1e-3}


@pytest.mark.rows("R381")
def test_verbose_lists_ranks(models, targets, caplog, monkeypatch):
    monkeypatch.setattr(LOGGER, "propagate", True)
    with caplog.at_level("INFO", LOGGER.name):
        make(targets, models, args={"txt_mod_dim": "9", "verbose": "True"})
    assert "lora_unet_double_blocks_1_txt_mod_lin: rank 9" in caplog.text
    assert len(caplog.records) == TRANSFORMER_ONLY + 12


# ---- wrong arguments and models


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"algo": "lokr"}, "algo=lokr: networks.lora_flux trains no such network"),
        ({"train_t5xxl": "yes"}, "train_t5xxl=yes: is neither True nor False"),
        ({"split_qkv": "on"}, "split_qkv=on: is neither True nor False"),
        ({"train_blocks": "doubles"}, "train_blocks=doubles: is none of all, double, single"),
        ({"img_mlp_dim": "-1"}, "img_mlp_dim=-1: must be at least 0"),
        ({"single_dim": "4.5"}, "single_dim=4.5: is not a whole number"),
        ({"in_dims": "4,4,4,4"}, "in_dims=4,4,4,4: is not 5 whole numbers from 0 up"),
        ({"in_dims": "4,4,4,4,-1"}, "is not 5 whole numbers"),
        ({"in_dims": "[]"}, "is not 5 whole numbers"),
        ({"in_dims": "4,4,4,4," + "9" * 30}, "has an entry above 32768"),
        ({"img_attn_dim": "9" * 30}, "must be at least 0, at most 32768"),
        ({"train_single_block_indices": "0-" + "9" * 5000}, "is no block"),
        ({"train_double_block_indices": "0-x"}, "'0-x' is no block; give all, none, or numbers and ranges"),
        ({"train_double_block_indices": "3-1"}, "'3-1' is no block"),
        ({"train_single_block_indices": "1,,2"}, "'' is no block"),
        (
            {"train_double_block_indices": "0,2"},
            "_double_block_indices=0,2: there is no block 2; this model has 0-1",
        ),
        (
            {"train_single_block_indices": "1-3"},
            "_single_block_indices=1-3: there is no block 3; this model has 0-2",
        ),
        ({"ggpo_sigma": "0.03"}, "ggpo_sigma=0.03: needs the other one too: ggpo_sigma and ggpo_beta"),
        ({"ggpo_sigma": "-1", "ggpo_beta": "0"}, "ggpo_sigma=-1: must be at least 0"),
        ({"network_reg_dims": "img"}, "network_reg_dims=img: is not regex=value"),
        ({"rank_dropout": "1"}, "rank_dropout=1: must be at least 0, below 1"),
    ],
)
def test_arguments_that_are_refused(models, targets, args, message):
    with pytest.raises(UserError) as caught:
        make(targets, models, args=args)
    assert message in str(caught.value)
    assert len(caught.value.problems) == 1


def test_all_problems_at_once_and_before_a_model_is_read():
    with pytest.raises(UserError) as caught:
        lora_flux.module.check({"split_qkv": "on", "in_dims": "1", "ggpo_beta": "1"}, dim=4, ranks_from_file=False)
    assert len(caught.value.problems) == 3


def test_arguments_that_leave_nothing(models, targets):
    denoiser_only = [target for target in targets if target.part == "denoiser"]
    args = {"train_blocks": "double", "train_double_block_indices": "none"}
    with pytest.raises(UserError, match="leave no layer"):
        make(denoiser_only, models, args=args)


def test_arguments_without_effect_are_said():
    def said(from_file, **args):
        return lora_flux.module.check(args, dim=4, ranks_from_file=from_file)

    assert said(False, img_attn_dim="4", loraplus_lr_ratio="4") == []
    assert "conv_dim has no effect in networks.lora_flux" in said(False, conv_dim="4")[0]
    (line,) = said(False, train_blocks="double", train_single_block_indices="0-3")
    assert line.endswith("train_single_block_indices has no effect with train_blocks=double")
    lines = said(True, in_dims="1,1,1,1,1", single_dim="4", train_blocks="single", train_t5xxl="True", split_qkv="True")
    assert [line.split()[1] for line in lines] == ["in_dims", "single_dim", "train_blocks", "train_t5xxl"]
    assert all(line.endswith("no effect with --dim_from_weights") for line in lines)


def test_a_model_of_another_kind_is_named():
    models = dits.sd3()
    with pytest.raises(UserError, match=r"networks\.lora_flux is for another kind of model.*it is networks\.lora_sd3"):
        make(dits.sd3_targets(models), models)


def test_stable_diffusion_takes_networks_lora():
    from tests.networks import conftest

    unet = Models(conftest.tiny_unet(), {"te": conftest.tiny_text_encoder()}, {}, None)
    with pytest.raises(UserError, match=r"for this one it is networks\.lora$"):
        make(conftest.walk(unet), unet)


def test_networks_lora_takes_the_blocks(models, targets):
    network = make(targets, models, module=lora)
    assert network.counts() == {"denoiser": TRANSFORMER_ONLY, "te1": 12}
    fa = make(targets, models, module=lora_fa)
    assert {n: t.shape for n, t in fa.file_state().items()} == {n: t.shape for n, t in network.file_state().items()}
    with pytest.raises(UserError, match=r"networks\.dylora cannot adapt this model: it has fused layers"):
        make(targets, models, module=dylora)


def test_block_lists_are_for_as_many_blocks_as_the_model_has(models, targets):
    numbered = [replace(target, block=i) for i, target in enumerate(targets)]
    with pytest.raises(UserError, match=f"the lists are for 25 blocks, and this model has {len(targets)}"):
        make(numbered, models, module=lora, args={"block_dims": ",".join(["4"] * 25)})


# ---- fused layers trained in parts


def peft_copy(models, network):
    """The same values as LoRA layers of peft on each live linear layer of the denoiser."""
    from peft import LoraConfig, inject_adapter_in_model

    denoiser, values = copy.deepcopy(models.denoiser), {}
    for key, layer in network.layers().items():
        target = network.targets[key]
        for path, part in zip(target.modules, getattr(layer, "parts", [layer]), strict=True):
            values[path] = part
    config = LoraConfig(r=4, lora_alpha=2.0, target_modules=list(values))
    inject_adapter_in_model(config, denoiser)
    for path, part in values.items():
        module = denoiser.get_submodule(path)
        module.lora_A["default"].weight.data.copy_(part.lora_down.weight)
        module.lora_B["default"].weight.data.copy_(part.lora_up.weight)
    return denoiser.eval()


@pytest.mark.parametrize("trained", ["all", "single", "double"])
@pytest.mark.rows("R376", "R377")
def test_split_parts_are_lora_layers_of_their_own(models, targets, randomise, tmp_path, trained):
    unet = [target for target in targets if target.part == "denoiser"]
    bare = dits.flux_output(models.denoiser)
    network = randomise(make(unet, models, args={**SPLIT, "train_blocks": trained}))
    network.attach(models)
    live = dits.flux_output(models.denoiser)
    network.detach()
    assert (live - bare).abs().max() > 1e-2
    torch.testing.assert_close(live, dits.flux_output(peft_copy(models, network)), rtol=1e-5, atol=1e-5)

    # The file is ordinary LoRA to whoever does not know how it was trained.
    file = lora.read(write(network, tmp_path / "a.safetensors"))
    plain = lora.from_weights(unet, models, file, dropout=None, args={})
    plain.attach(models)
    torch.testing.assert_close(dits.flux_output(models.denoiser), live, rtol=1e-5, atol=1e-5)
    plain.detach()
    build.merge(unet, models, file, 1.0)
    torch.testing.assert_close(dits.flux_output(models.denoiser), live, rtol=1e-5, atol=1e-5)


def test_file_of_split_layers(models, targets, randomise, tmp_path):
    network = randomise(make(targets, models, args=SPLIT))
    state = load_file(write(network, tmp_path / "a.safetensors"))
    key = "lora_unet_single_blocks_0_linear1"
    down, up = state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"]
    assert (down.shape, up.shape, float(state[f"{key}.alpha"])) == ((16, 16), (3 * 16 + 64, 16), 8.0)
    parts = network.layers()[key].parts
    for i, (rows, part) in enumerate(zip(up.split([16, 16, 16, 64]), parts, strict=True)):
        assert torch.equal(rows[:, 4 * i : 4 * i + 4], part.lora_up.weight)
        assert torch.equal(down[4 * i : 4 * i + 4], part.lora_down.weight)
        assert (rows != 0).sum() == rows.shape[0] * 4
    assert float(state["lora_unet_double_blocks_0_img_attn_qkv.alpha"]) == 6.0
    assert float(state["lora_unet_double_blocks_0_img_attn_proj.alpha"]) == 2.0
    assert network.ranks() == {4}


@pytest.mark.parametrize("args", [{}, SPLIT], ids=["fused", "split"])
def test_diffusers_converts_the_file_to_the_same_changes(models, targets, randomise, args):
    """Of double blocks: its widths of single blocks are those of the published model."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    unet = [target for target in targets if target.part == "denoiser"]
    network = randomise(make(unet, models, args={**args, "train_blocks": "double"}))
    theirs = _convert_kohya_flux_lora_to_diffusers({k: v.clone() for k, v in network.file_state().items()})
    x, seen = torch.randn(2, 3, 16), 0
    for key, layer in network.layers().items():
        if "mlp_2" in key:
            continue  # another width of input
        for index, path in enumerate(network.targets[key].modules):
            a, b = (theirs[f"transformer.{path}.lora_{side}.weight"] for side in "AB")
            ours = layer.adapt(index, x, torch.zeros(2, 3, b.shape[0]))
            torch.testing.assert_close(x @ a.T @ b.T, ours, rtol=1e-4, atol=1e-5)
            assert len(a) == (4 if args or len(network.targets[key].modules) == 1 else layer.rank)
            seen += 1
    assert seen == 2 * (2 * 3 + 2 * 3)


@pytest.mark.parametrize("args", [{}, SPLIT], ids=["fused", "split"])
def test_files_and_states_are_read_again(models, targets, randomise, tmp_path, args):
    network = randomise(make(targets, models, args={**args, **BOTH_T5, "in_dims": "1,2,3,4,5"}))
    file = lora_flux.read(write(network, tmp_path / "a.safetensors"))
    built = lora_flux.from_weights(targets, models, file, dropout=None, args=args)
    loaded = make(targets, models, args={**args, **BOTH_T5, "in_dims": "1,2,3,4,5"}, seed=12, alpha=1.0)
    assert lora_flux.load(loaded, file) == (len(network.layers()), 0, 0)
    resumed = make(targets, models, args={**args, **BOTH_T5, "in_dims": "1,2,3,4,5"}, seed=12, alpha=1.0)
    resumed.load_state_dict(network.state_dict())
    for other in (built, loaded, resumed):
        assert other.counts() == network.counts()
        assert other.file_state().keys() == network.file_state().keys()
        assert all(torch.equal(value, network.file_state()[name]) for name, value in other.file_state().items())
        names = {name for name, _ in other.named_parameters()}
        assert any(".parts.3." in name for name in names) == bool(args)
        x, key = torch.randn(2, 3, 16), "lora_unet_single_blocks_1_linear1"
        outputs = [one.layers()[key].adapt(3, x, torch.zeros(2, 3, 64)) for one in (network, other)]
        assert torch.equal(*outputs)


@pytest.mark.rows("R377")
def test_a_file_of_split_layers_goes_on_as_an_ordinary_one(models, targets, randomise, tmp_path):
    network = randomise(make(targets, models, args=SPLIT))
    file = lora_flux.read(write(network, tmp_path / "a.safetensors"))
    plain = lora_flux.from_weights(targets, models, file, dropout=None, args={})
    assert plain.ranks() == {4, 12, 16}
    with pytest.raises(UserError, match="the file's rank is 12"):
        lora_flux.load(make(targets, models), file)


@pytest.mark.parametrize("alpha", [2.0, None], ids=["alpha 2", "alpha of the rank"])
@pytest.mark.parametrize("ranks", [{}, {"img_mlp_dim": "12"}], ids=["one rank", "a rank that is n times another"])
def test_split_files_of_sd_scripts_go_on_at_the_strength_of_their_training(
    models, targets, randomise, tmp_path, alpha, ranks
):
    """It writes the alpha of a part as the alpha of the whole."""
    network = randomise(make(targets, models, alpha=alpha, args={**SPLIT, **ranks}))
    path = write(network, tmp_path / "ours.safetensors")
    ours, theirs = load_file(path), {}
    for name, tensor in ours.items():
        layer = network.layers()[name.split(".")[0]]
        theirs[name] = tensor / len(getattr(layer, "parts", [0])) if name.endswith("alpha") else tensor
    assert theirs["lora_unet_single_blocks_0_linear1.alpha"] == (alpha or 4)
    save_file(theirs, tmp_path / "theirs.safetensors")
    for name in ("ours", "theirs"):
        file = lora_flux.read(tmp_path / f"{name}.safetensors")
        loaded = make(targets, models, alpha=1.0, args={**SPLIT, **ranks})
        lora_flux.load(loaded, file)
        for other in (loaded, lora_flux.from_weights(targets, models, file, dropout=None, args=SPLIT)):
            assert all(torch.equal(value, ours[key]) for key, value in other.file_state().items())


def test_what_split_layers_refuse(models, targets, randomise, tmp_path):
    plain = lora_flux.read(write(randomise(make(targets, models, dim=12)), tmp_path / "plain.safetensors"))
    apart = make(targets, models, args={**SPLIT, "network_reg_dims": "linear1=3,_qkv=4,_=12"})
    for action in (
        lambda: lora_flux.load(apart, plain),
        lambda: lora_flux.from_weights(targets, models, plain, dropout=None, args=SPLIT),
    ):
        with pytest.raises(UserError, match=r"was not trained with split_qkv=True: its parts share ranks"):
            action()
    odd = lora_flux.read(write(randomise(make(targets, models, dim=5)), tmp_path / "odd.safetensors"))
    with pytest.raises(UserError, match="the file's rank is 5; with split_qkv=True a rank of 1 is 3") as caught:
        lora_flux.from_weights(targets, models, odd, dropout=None, args=SPLIT)
    assert "leave split_qkv=True out" in caught.value.hint


def test_split_layers_have_norms_strengths_and_fast_parameters(models, targets, randomise):
    network = randomise(make(targets, models, args={**SPLIT, "loraplus_lr_ratio": "4"}))
    layer = network.layers()["lora_unet_double_blocks_0_txt_attn_qkv"]
    x, zero = torch.randn(2, 3, 16), torch.zeros(2, 3, 16)
    full = [layer.adapt(i, x, zero) for i in range(3)]
    network.set_multiplier(-0.5)
    for i in range(3):
        torch.testing.assert_close(layer.adapt(i, x, zero), -0.5 * full[i])
    network.limit_norms(0.5)
    state = layer.file_state()
    change = (
        state["lora_up.weight"] @ state["lora_down.weight"] * float(state["alpha"]) / len(state["lora_down.weight"])
    )
    torch.testing.assert_close(change.norm(), torch.tensor(0.5), rtol=1e-5, atol=0)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = {group["name"]: group for group in network.parameter_groups({"denoiser": 1e-3, "te1": 1e-4})}
    assert sum(len(group["params"]) for group in groups.values()) == len(names)
    assert all("lora_up" in names[id(p)] for p in groups["unet plus"]["params"])
    assert len(groups["unet plus"]["params"]) == len(groups["unet"]["params"]) == 2 * (3 + 1 + 2 + 1) * 2 + 3 * (4 + 2)


def test_the_familys_targets_are_those_of_the_files(models, targets):
    from library.families.flux.targets import text_targets, transformer_targets

    def facts(found):
        return {t.key: (t.part, t.modules, t.swap_halves, t.optional) for t in found if not t.from_file}

    assert facts(text_targets(models.text_encoders) + transformer_targets(models.denoiser)) == facts(targets)


# ---- the method with it


def method(targets, models, **given):
    given = {"network_module": "networks.lora_flux", "learning_rate": 1e-3, "seed": 5, **given}
    groups = [NetworkOptions, OptimizerOptions, SavingOptions, TrainingOptions]
    options = build_options(groups, {name: Given(value, "test") for name, value in given.items()})
    traits = SimpleNamespace(text_encoders=("te1", "te3"), block_layout=None)
    family = SimpleNamespace(traits=traits, targets=SimpleNamespace(lora=lambda _: targets))
    made = NetworkMethod(options)
    made.attach(family, models)
    return made


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"textencoder": 1e-3, "unet": 1e-3}),
        ({"text_encoder_lr": [1e-4, 1e-5]}, {"textencoder": 1e-4, "unet": 1e-3}),
        (
            {"text_encoder_lr": [1e-4, 1e-5], "network_args": ["train_t5xxl=True"]},
            {"textencoder 1": 1e-4, "textencoder 2": 1e-5, "unet": 1e-3},
        ),
        (
            {"text_encoder_lr": [1e-4], "network_args": ["train_t5xxl=True"], "unet_lr": 2e-3},
            {"textencoder 1": 1e-4, "textencoder 2": 1e-4, "unet": 2e-3},
        ),
        ({"network_train_unet_only": True}, {"unet": 1e-3}),
        (
            {"network_train_text_encoder_only": True, "network_args": ["train_t5xxl=True"]},
            {"textencoder 1": 1e-3, "textencoder 2": 1e-3},
        ),
    ],
)
@pytest.mark.rows("R372", "R374")
def test_rates_of_the_text_encoders(models, targets, given, expected):
    groups = method(targets, models, **given).parameter_groups()
    assert {group["name"]: group["lr"] for group in groups} == pytest.approx(expected)


@pytest.mark.rows("R387")
@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"network_train_unet_only": True}, set()),
        ({}, {"te1"}),
        ({"network_args": ["train_t5xxl=True"]}, {"te1", "te3"}),
    ],
)
def test_text_encoders_that_are_trained_stay_in_memory(models, targets, given, kept):
    release_text_encoders(models, keep=method(targets, models, **given).live_text_encoders())
    assert set(models.text_encoders) == kept


def test_a_file_with_t5_brings_it_back(models, targets, randomise, tmp_path):
    path = write(randomise(make(targets, models, args=BOTH_T5)), tmp_path / "a.safetensors")
    made = method(targets, models, network_weights=str(path), dim_from_weights=True)
    assert made.trainable().counts() == Counter({"te1": 12, "te3": 14, "denoiser": TRANSFORMER_ONLY})
    made.save(tmp_path / "b.safetensors", None, None)
    saved = load_file(tmp_path / "b.safetensors")
    assert saved.keys() == load_file(path).keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in load_file(path).items())


def test_t5_that_is_not_there_is_said(models, targets, caplog, monkeypatch):
    monkeypatch.setattr(LOGGER, "propagate", True)
    make([target for target in targets if target.part != "te3"], models, args=BOTH_T5)
    assert "train_t5xxl has no effect" in caplog.text
