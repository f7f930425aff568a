"""LoRA networks on a tiny Stable Diffusion. References: diffusers with peft, lycoris, merged weights."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.types import LoraTarget, Models
from networks import build, files
from networks.layers.functional import delta
from networks.targets import live_modules
from tests.networks.builders import lora


def make(targets, models, *, dim=4, alpha=2.0, dropout=None, args=None, seed=11):
    return lora.create(targets, models, dim=dim, alpha=alpha, dropout=dropout, args=args or {}, seed=seed)


def write(network, path, dtype=None):
    from safetensors.torch import save_file

    save_file({k: v.to(dtype or v.dtype).contiguous() for k, v in network.state_dict().items()}, path)
    return path


CONV = {"conv_dim": "3", "conv_alpha": "1.5"}


@pytest.mark.rows("R287", "R288", "R289")
def test_which_layers_get_lora(models, targets):
    """Without conv_dim: linears and 1x1 convolutions of the transformers. With it: resnets and samplers too."""
    plain, conv = make(targets, models), make(targets, models, args=CONV)
    plain_keys, conv_keys = set(plain.layers()), set(conv.layers())
    assert plain_keys == {t.key for t in targets if not t.conv_only}
    assert conv_keys == {t.key for t in targets}
    added = conv_keys - plain_keys
    for ending in ("_conv", "_conv1", "_conv2", "_time_emb_proj", "_conv_shortcut"):
        assert any(key.endswith(ending) for key in added), ending
    assert all(tuple(m.lora_down.weight.shape[2:]) in ((), (1, 1)) for m in plain.layers().values())
    for key, layer in conv.layers().items():
        kernel = layer.lora_down.weight.shape[2:]
        assert (layer.rank, float(layer.alpha)) == ((3, 1.5) if kernel == (3, 3) else (4, 2.0)), key
    # A network without convolutions is the same after one with them was made in this process.
    assert set(make(targets, models).layers()) == plain_keys


@pytest.mark.rows("R298")
def test_counts_on_a_full_size_stable_diffusion_1(find_targets):
    """72 + 192 layers, 278 in the U-Net with convolutions; every cross-attention matrix is among them."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        encoder = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    full = Models(unet, {"te": encoder}, {}, None)
    found = find_targets(full)
    plain, conv = make(found, full, dim=1), make(found, full, dim=1, args={"conv_dim": "1"})
    assert plain.counts() == {"te": 72, "denoiser": 192}
    assert conv.counts() == {"te": 72, "denoiser": 278}
    assert len([key for key in plain.layers() if "_attn2_to_" in key]) == 4 * 16  # q, k, v, out of 16 transformers
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q" in plain.layers()
    assert "lora_te_text_model_encoder_layers_11_mlp_fc2" in plain.layers()


def test_file_keys_and_shapes(models, targets):
    state = make(targets, models, args=CONV).state_dict()
    assert {k.partition(".")[2] for k in state} == {"alpha", "lora_down.weight", "lora_up.weight"}
    unet = models.denoiser
    for target in targets:
        module = (unet if target.part == "denoiser" else models.text_encoders["te"]).get_submodule(target.modules[0])
        down, up = state[f"{target.key}.lora_down.weight"], state[f"{target.key}.lora_up.weight"]
        assert down.shape[1:] == module.weight.shape[1:]
        assert up.shape[:2] == (module.weight.shape[0], down.shape[0])
        assert up.dim() == module.weight.dim()
        assert state[f"{target.key}.alpha"].shape == ()


@pytest.mark.parametrize(("alpha", "stored"), [(None, 4.0), (0, 4.0), (1.0, 1.0)])
@pytest.mark.rows("R297")
def test_alpha_rule(models, targets, alpha, stored):
    layer = next(iter(make(targets, models, alpha=alpha).layers().values()))
    assert (float(layer.alpha), layer.scale) == (stored, stored / 4)


def test_starts_as_the_bare_model_with_reproducible_weights(models, targets, outputs):
    before = outputs(models)
    stream = torch.random.get_rng_state()
    network = make(targets, models, args=CONV)
    assert torch.equal(torch.random.get_rng_state(), stream)
    network.attach(models)
    assert all(torch.equal(a, b) for a, b in zip(outputs(models), before, strict=True))
    other_order = make(targets[::-1], models, args=CONV).state_dict()
    other_seed = make(targets, models, args=CONV, seed=12).state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(value, other_order[name])
        assert not name.endswith("down.weight") or not torch.equal(value, other_seed[name])


def test_initial_distribution(models, targets):
    """kaiming-uniform with a = sqrt(5) is uniform in +-1/sqrt(fan_in): its standard deviation is that over sqrt(3)."""
    network = make(targets, models, dim=64, args={"conv_dim": "64"})
    for layer in network.layers().values():
        down = layer.lora_down.weight
        bound = down[0].numel() ** -0.5
        assert bound * 0.9 < down.abs().max() <= bound
        assert abs(down.std() / (bound / 3**0.5) - 1) < 0.1
        assert not layer.lora_up.weight.any()


@pytest.mark.parametrize("args", [{}, CONV], ids=["LierLa", "C3Lier"])
@pytest.mark.rows("R296", "R300")
def test_live_network_equals_merged_weights(models, targets, outputs, randomise, tmp_path, args):
    bare = outputs(models)
    network = randomise(make(targets, models, args=args))
    network.attach(models)
    live = outputs(models)
    network.detach()
    file = files.read(write(network, tmp_path / "a.safetensors"))
    assert build.merge(targets, models, file, 1.0) == (len(network.layers()), 0)
    for a, b, c in zip(live, outputs(models), bare, strict=True):
        assert (a - b).abs().max() < 1e-5  # float32, tens of layers
        assert (a - c).abs().max() > 1e-2
    build.merge(targets, models, file, -1.0)
    for a, c in zip(outputs(models), bare, strict=True):
        assert (a - c).abs().max() < 1e-5


@pytest.mark.parametrize("args", [{}, CONV], ids=["LierLa", "C3Lier"])
def test_diffusers_loads_the_file_and_computes_the_same(models, targets, outputs, randomise, tmp_path, args, caplog):
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from safetensors.torch import load_file

    network = randomise(make(targets, models, args=args))
    network.attach(models)
    ours = outputs(models)
    network.detach()
    bare = outputs(models)
    path = write(network, tmp_path / "ours.safetensors")

    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        text_encoder=models.text_encoders["te"],
        tokenizer=None,
        unet=models.denoiser,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    converted, alphas = pipe.lora_state_dict(str(path), unet_config=models.denoiser.config)
    assert len(converted) == 2 * len(network.layers())
    assert len(alphas) == len(network.layers())
    with caplog.at_level(logging.WARNING):
        pipe.load_lora_weights(str(path))
    assert not [r for r in caplog.records if "key" in r.getMessage().lower()]

    loaded = sum("lora_A" in name for part in (pipe.unet, pipe.text_encoder) for name, _ in part.named_parameters())
    assert loaded == len(network.layers()) == len(load_file(path)) // 3
    for theirs, our, plain in zip(outputs(models), ours, bare, strict=True):
        assert (theirs - our).abs().max() < 1e-5  # float32, tens of layers, other order of sums
        assert (our - plain).abs().max() > 1e-2


def test_lycoris_reads_every_layer_as_the_same_change(models, targets, randomise):
    from lycoris.modules import get_module, make_module

    network = randomise(make(targets, models, args=CONV))
    state = network.state_dict()
    for target in targets:
        layer = network.layers()[target.key]
        live = live_modules(models, target)[0]
        kind, weights = get_module(state, target.key)
        theirs = make_module(kind, weights, target.key, live)
        ours = layer.scale * delta(layer.lora_down.weight, layer.lora_up.weight)
        change = theirs.get_diff_weight(1.0, shape=live.weight.shape)[0]
        torch.testing.assert_close(change.reshape(ours.shape), ours, rtol=1e-4, atol=1e-5)  # float32 sums of <= 288


# ---- blocks and rates


@pytest.mark.rows("R294")
def test_block_wise_ranks(models, targets):
    dims, alphas = ["4"] * 25, ["1"] * 25
    dims[1], alphas[1], dims[12] = "7", "3.5", "0"
    network = make(targets, models, args={"block_dims": ",".join(dims), "block_alphas": ",".join(alphas)})
    for key, layer in network.layers().items():
        target = network.targets[key]
        if target.part == "te":
            expected = (4, 2.0)
        else:
            expected = (7, 3.5) if target.block == 1 else (4, 1.0)
        assert (layer.rank, float(layer.alpha)) == expected, key
    assert {t.block for t in network.targets.values()} == {1, None, 16, 17}  # 12 has rank 0: no layers


def test_zero_block_rate_makes_no_layers(models, targets):
    network = make(targets, models, args={"mid_lr_weight": "0", "up_lr_weight": "zeros+0.5"})
    assert 12 not in {target.block for target in network.targets.values()}
    groups = {group["name"]: group["lr"] for group in network.parameter_groups({"denoiser": 1e-3, "te": 1e-4})}
    assert groups == {"textencoder": 1e-4, "unet block 1": 1e-3, "unet block 16": 5e-4, "unet block 17": 5e-4}


@pytest.mark.parametrize(
    ("args", "unet", "text"),
    [
        ({"loraplus_lr_ratio": "16"}, 16, 16),
        ({"loraplus_unet_lr_ratio": "16", "loraplus_text_encoder_lr_ratio": "4"}, 16, 4),
        ({"loraplus_lr_ratio": "16", "loraplus_text_encoder_lr_ratio": "4"}, 16, 4),
    ],
)
@pytest.mark.rows("R291", "R292", "C89", "C90", "C91")
def test_lora_plus_raises_the_up_side(models, targets, args, unet, text):
    network = make(targets, models, args=args)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = {group["name"]: group for group in network.parameter_groups({"denoiser": 1e-3, "te": 1e-4})}
    rates = {name: group["lr"] for name, group in groups.items()}
    assert rates == pytest.approx(
        {"unet": 1e-3, "unet plus": unet * 1e-3, "textencoder": 1e-4, "textencoder plus": text * 1e-4}
    )
    for name, group in groups.items():
        side = "lora_up" if name.endswith("plus") else "lora_down"
        prefix = "lora_unet" if name.startswith("unet") else "lora_te"
        assert all(side in names[id(p)] and names[id(p)].startswith(prefix) for p in group["params"])
    assert sum(len(group["params"]) for group in groups.values()) == len(names)


def test_several_text_encoders_are_told_apart():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

    models = Models(Root(), {"te1": Root(), "te2": Root()}, {}, None)
    targets = [LoraTarget(f"lora_{part}_layer", part, ("layer",)) for part in ("te1", "te2", "denoiser")]
    groups = make(targets, models).parameter_groups({"te1": 1e-4, "te2": 0.0, "denoiser": 1e-3})
    assert [(g["name"], g["lr"], len(g["params"])) for g in groups] == [("textencoder 1", 1e-4, 2), ("unet", 1e-3, 2)]


def test_text_encoders_have_the_numbers_of_their_rates_also_where_one_is_missing():
    models = Models(
        nn.Sequential(nn.Linear(4, 4)), {part: nn.Sequential(nn.Linear(4, 4)) for part in ("te1", "te3")}, {}, None
    )
    targets = [LoraTarget(f"lora_{part}_0", part, ("0",)) for part in ("te1", "te3", "denoiser")]
    groups = make(targets, models).parameter_groups({"te1": 1e-4, "te2": 2e-4, "te3": 3e-4, "denoiser": 1e-3})
    assert {g["name"]: g["lr"] for g in groups} == {"textencoder 1": 1e-4, "textencoder 3": 3e-4, "unet": 1e-3}


def test_block_args_need_blocks():
    models = Models(nn.ModuleDict({"layer": nn.Linear(4, 4)}), {}, {}, None)
    with pytest.raises(UserError, match="nothing that is trained here has numbered blocks"):
        make([LoraTarget("k", "denoiser", ("layer",))], models, args={"mid_lr_weight": "0.5"})


# ---- files back in


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt"])
def test_dim_from_weights_rebuilds_the_network(models, targets, randomise, tmp_path, suffix):
    mixed = {**CONV, "block_dims": ",".join(["5"] * 13 + ["6"] * 12)}
    network = randomise(make(targets, models, args=mixed))
    path = tmp_path / f"a{suffix}"
    if suffix == ".safetensors":
        write(network, path)
    else:
        torch.save(network.state_dict(), path)
    again = lora.from_weights(targets, models, files.read(path), dropout=None, args={})
    assert list(again.state_dict()) == list(network.state_dict())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in network.state_dict().items())
    assert again.ranks() == {3, 4, 5, 6}
    scales = {key: layer.scale for key, layer in network.layers().items()}
    assert {key: layer.scale for key, layer in again.layers().items()} == scales


def test_load_reports_what_fits(models, targets, randomise, tmp_path):
    text = [t for t in targets if t.part == "te"]
    unet = [t for t in targets if t.part == "denoiser"]
    file = files.read(write(randomise(make(text + unet[:40], models, args=CONV)), tmp_path / "a.safetensors"))
    network = make(unet, models)
    plain = {t.key for t in unet if not t.conv_only}
    shared = plain & set(file.entries)
    assert 0 < len(shared) < len(plain)
    counts = lora.load(network, file)
    assert counts == (len(shared), len(plain) - len(shared), len(file.entries) - len(shared))
    for key, layer in network.layers().items():
        assert bool(layer.lora_up.weight.any()) == (key in shared)


def test_a_lora_of_another_model_is_refused(models, targets, tmp_path):
    from safetensors.torch import save_file

    key = "lora_unet_double_blocks_0_img_attn_qkv"
    path = tmp_path / "flux.safetensors"
    save_file({f"{key}.lora_down.weight": torch.zeros(4, 8), f"{key}.lora_up.weight": torch.zeros(24, 4)}, path)
    file = files.read(path)
    for action in (
        lambda: lora.load(make(targets, models), file),
        lambda: lora.from_weights(targets, models, file, dropout=None, args={}),
        lambda: build.merge(targets, models, file, 1.0),
    ):
        with pytest.raises(UserError, match=r"flux\.safetensors: none of its 1 layers fits.*double_blocks_0") as caught:
            action()
        assert "another kind of model" in str(caught.value)


def test_another_rank_or_width_is_refused(models, targets, tmp_path):
    file = files.read(write(make(targets, models, dim=6), tmp_path / "a.safetensors"))
    with pytest.raises(UserError, match="the file's rank is 6") as caught:
        lora.load(make(targets, models, dim=4), file)
    assert "--dim_from_weights" in caught.value.hint
    wide = Models(nn.ModuleDict({"layer": nn.Linear(99, 16)}), {}, {}, None)
    target = LoraTarget(targets[0].key, "denoiser", ("layer",))
    for action in (
        lambda: lora.from_weights([target], wide, file, dropout=None, args={}),
        lambda: build.merge([target], wide, file, 1.0),
    ):
        with pytest.raises(UserError, match=rf"{targets[0].key}.*does not fit"):
            action()


def test_proj_in_as_convolution_and_as_linear_read_each_other(tmp_path):
    """SD 2 files have proj_in as 1x1 convolutions or linears, depending on how the model was loaded."""
    x = torch.randn(2, 6)
    conv = Models(nn.ModuleDict({"proj_in": nn.Conv2d(6, 8, 1)}), {}, {}, None)
    linear = Models(nn.ModuleDict({"proj_in": nn.Linear(6, 8)}), {}, {}, None)
    linear.denoiser.proj_in.weight.data = conv.denoiser.proj_in.weight.data[:, :, 0, 0]
    linear.denoiser.proj_in.bias.data = conv.denoiser.proj_in.bias.data
    target = LoraTarget("k", "denoiser", ("proj_in",))
    network = make([target], conv)
    nn.init.normal_(network.k.lora_up.weight)
    assert network.k.lora_down.weight.shape == (4, 6, 1, 1)
    file = files.read(write(network, tmp_path / "a.safetensors"))
    other = lora.from_weights([target], linear, file, dropout=None, args={})
    assert other.k.lora_down.weight.shape == (4, 6)
    network.attach(conv)
    other.attach(linear)
    expected = conv.denoiser.proj_in(x[:, :, None, None])[:, :, 0, 0]
    torch.testing.assert_close(linear.denoiser.proj_in(x), expected, rtol=1e-5, atol=1e-6)
    other.detach()
    build.merge([target], linear, file, 1.0)
    torch.testing.assert_close(linear.denoiser.proj_in(x), expected, rtol=1e-5, atol=1e-6)


def test_state_dict_of_a_resumed_run_brings_its_scale(models, targets):
    saved = make(targets, models, alpha=3.0).state_dict()
    network = make(targets, models, alpha=1.0)
    network.load_state_dict(saved)
    assert {layer.scale for layer in network.layers().values()} == {0.75}
