"""Prompts of several parts: their masks, layers in regions against formulas written out, and guidance without masks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from library.errors import UserError
from library.families.flux.adapter import FluxFamily
from library.families.registry import FAMILIES
from library.families.sd.adapter import SdFamily
from library.families.sdxl.adapter import SdxlFamily
from library.generation.control import ControlNets
from library.generation.model import Model
from library.generation.networks import Networks, attach_rest, check_files
from library.generation.regions import Regions
from library.generation.requests import Requests, base_prompt
from library.inference.generate import sample_latents
from library.inference.guidance import Guidance, texts_read
from library.inference.prompts import ControlImage, RegionMask, SamplePrompt
from library.inference.regions import NO_NETWORK, CoupledText, Reading, read_masks
from library.options.inference import NetworksOptions
from library.types import Batch, TextCond
from networks.third_party import ThirdPartyNetwork
from tests.builders import sd_options, tiny_sd
from tests.builders.options import options_for
from tests.builders.sdxl import tiny_sdxl
from tests.generation.test_networks_and_words import files  # noqa: F401 - a fixture

CPU = torch.device("cpu")
PROMPT = SamplePrompt("a red house AND a cat", "", 64, 64, 7, 2, 3.0, "ddim", parts=("a red house", "a cat"))
CLOSE = 1e-5  # of float32 values of order 1, summed in another order


@pytest.fixture
def model(files):  # noqa: F811
    """With two networks, at strengths that differ."""
    options, family, models = NetworksOptions(network_weights=files), SdFamily(sd_options("")), tiny_sd()
    networks = attach_rest(options, check_files(options), family, models, CPU)
    networks.use(None, (0.7, 1.2))
    return Model(family, models, sd_options(""), CPU, torch.float32, networks)


def halves(height: int = 8, width: int = 8) -> Tensor:
    """The left half for the first part, the right half for the second, of which a corner is nobody's."""
    masks = torch.zeros(2, height, width)
    masks[0, :, : width // 2] = 1
    masks[1, height // 2 :, width // 2 :] = 1
    return masks


def coupled(model: Model, *texts: str) -> CoupledText:
    """Each part with the network of its number."""
    parts = [Reading(text, number) for number, text in enumerate(texts)]
    return CoupledText.of([model.conditioning([part])[part] for part in parts])


def noisy_latents(seed: int = 3) -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


TIME = torch.tensor([500])

# --- masks ------------------------------------------------------------------------------------------------------------


def saved(tmp_path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def test_channels_are_the_regions_of_the_first_three_parts(tmp_path):
    """The third channel is empty, which means everywhere, and so does a fourth part."""
    pixels = np.zeros((4, 6, 3))
    pixels[:, :2, 0], pixels[:, 2:, 1] = 255, 51
    found = read_masks(RegionMask(saved(tmp_path, pixels)), 4, CPU)
    expected = torch.tensor(pixels / 255).permute(2, 0, 1).float()
    assert found.shape == (4, 4, 6)
    assert torch.allclose(found[:2], expected[:2])
    assert torch.equal(found[2:], torch.ones(2, 4, 6))


def test_colors_are_the_bits_of_the_numbers_of_parts(tmp_path):
    """Nearly the color is enough, as formats that lose something change it."""
    colors = [(255, 0, 0), (0, 255, 0), (250, 240, 9), (0, 0, 255), (255, 0, 255), (10, 255, 255), (0, 0, 0)]
    pixels = np.array([colors])
    found = read_masks(RegionMask(saved(tmp_path, pixels), colors=6), 7, CPU)
    assert torch.equal(found[:6, 0, :], torch.eye(7)[:6])
    assert torch.equal(found[6], torch.ones(1, 7))


def test_a_mask_that_is_no_image_is_said(tmp_path):
    (tmp_path / "mask.png").write_text("no image")
    with pytest.raises(UserError, match=r"mask\.png: the mask cannot be read"):
        read_masks(RegionMask(tmp_path / "mask.png"), 2, CPU)


# --- layers -----------------------------------------------------------------------------------------------------------


def changed_weight(network, key: str, module: nn.Module) -> Tensor:
    """strength * alpha / rank * up down, in the shape of the module's weight."""
    tensors, strength = network.file_state(), network.layers()[key].multiplier
    down, up = tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"]
    change = up.flatten(1) @ down.flatten(1) * tensors[f"{key}.alpha"] / len(down) * strength
    return change.reshape(module.weight.shape)


def calls_of(models, path: str) -> list[tuple[tuple, dict, Tensor]]:
    """What goes in and out of a module from now on."""
    found: list = []
    models.denoiser.get_submodule(path).register_forward_hook(
        lambda _, args, words, output: found.append((args, words, output)), with_kwargs=True
    )
    return found


@torch.no_grad()
def test_networks_act_in_their_regions_layer_by_layer(model):
    """For a linear layer and a convolution: the layer's own output, and where a mask is 1 that network's change."""
    regions = model.confine_networks()
    keys = [
        f"lora_unet_{place}"
        for place in (
            "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
            "down_blocks_0_attentions_0_proj_in",
            "mid_block_attentions_0_transformer_blocks_0_ff_net_2",
        )
    ]
    first, second = model.networks.attached()
    calls = {key: calls_of(model.models, first.targets[key].modules[0]) for key in keys}
    with regions.use(halves()):
        regions.predict(noisy_latents(), TIME, coupled(model, "a", "a cat"))
    for key in keys:
        module = model.models.denoiser.get_submodule(first.targets[key].modules[0])
        (x,), _, output = calls[key][0]
        side = output.shape[-1] if output.ndim == 4 else math.isqrt(output.shape[1])
        masks = F.interpolate(halves()[None], size=(side, side), mode="area")[0]
        apply = F.conv2d if isinstance(module, nn.Conv2d) else F.linear
        bare, expected = apply(x, module.weight, module.bias), 0
        for network, mask in zip((first, second), masks, strict=True):
            mask = mask if output.ndim == 4 else mask.flatten()[:, None]
            expected = expected + apply(x, changed_weight(network, key, module)) * mask
        assert expected.abs().max() > 0.005, key
        assert (output - bare - expected).abs().max() < CLOSE * output.abs().max(), key
        nobody = (masks.sum(0) == 0).expand(output.shape) if output.ndim == 4 else (masks.sum(0) == 0).flatten()
        untouched = output[nobody] if output.ndim == 4 else output[:, nobody]
        assert untouched.numel() or side == 1
        assert torch.equal(untouched, bare[nobody] if output.ndim == 4 else bare[:, nobody]), key


def attention(layer: nn.Module, network, key: str, x: Tensor, text: Tensor) -> Tensor:
    """softmax(q k / sqrt(d)) v with the weights of one network, or bare ones."""

    def weight(name: str) -> Tensor:
        module = layer.get_submodule(name)
        if network is None:
            return module.weight
        return module.weight + changed_weight(network, f"{key}_{name.replace('.', '_')}", module)

    q, k, v = x @ weight("to_q").T, text @ weight("to_k").T, text @ weight("to_v").T
    q, k, v = (part.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in (q, k, v))
    found = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
    return found.transpose(1, 2).flatten(2) @ weight("to_out.0").T + layer.to_out[0].bias


@torch.no_grad()
def test_the_text_is_read_part_by_part(model):
    """Where nobody's mask is, both texts in equal parts, and without networks."""
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    regions, calls, cond = model.confine_networks(), calls_of(model.models, path), coupled(model, "a red house", "cat")
    with regions.use(halves()):
        regions.predict(noisy_latents(), TIME, cond)
    (args, words, output), layer = calls[0], model.models.denoiser.get_submodule(path)
    texts = [part.tensors["context"] for part in cond.parts]
    assert torch.equal(words["encoder_hidden_states"], torch.stack(texts, dim=1))
    left, right = halves().flatten(1)
    nobody = ((left + right) == 0).float()
    expected = 0
    for network, mask, text in zip(model.networks.attached(), (left, right), texts, strict=True):
        own = attention(layer, network, f"lora_unet_{path.replace('.', '_')}", args[0], text)
        bare = attention(layer, None, "", args[0], text)
        assert (own - bare).abs().max() > 0.01
        expected = expected + own * mask[:, None] + bare * nobody[:, None] / 2
    assert (output - expected).abs().max() < CLOSE * output.abs().max()


@torch.no_grad()
def test_a_part_that_has_all_of_the_image_is_alone(model):
    """The prediction is that of its text and network by themselves; without a network, of the bare model."""
    regions, latents = model.confine_networks(), noisy_latents()
    whole = torch.stack([torch.ones(8, 8), torch.zeros(8, 8)])
    cond = coupled(model, "a red house", "cat")
    with regions.use(whole):
        found = regions.predict(latents, TIME, cond)
    with model.networks.only(0):
        alone = model.family.denoiser.predict(model.models, latents, TIME, cond.parts[0])
        both_off = model.family.denoiser.predict(tiny_sd(), latents, TIME, cond.parts[0])
    assert (found - alone).abs().max() < CLOSE * alone.abs().max()
    assert (found - both_off).abs().max() > 0.01
    model.networks.use(None, (0.0, 0.0))
    with regions.use(halves()):
        found = regions.predict(latents, TIME, cond)
    model.networks.use(None, (1.0, 1.0))
    bare = Model(model.family, tiny_sd(), model.training, CPU, torch.float32, Networks())
    with bare.confine_networks().use(halves()):
        expected = bare.confine_networks().predict(latents, TIME, cond)
    assert (found - expected).abs().max() < CLOSE * expected.abs().max()


@torch.no_grad()
def test_outside_of_prompts_with_regions_all_is_as_before(model, files):  # noqa: F811
    model.confine_networks()
    cond = model.conditioning(["a"])["a"]
    found = model.denoise(noisy_latents(), TIME, cond, None)
    options = NetworksOptions(network_weights=files)
    models = tiny_sd()
    attach_rest(options, check_files(options), model.family, models, CPU).use(None, (0.7, 1.2))
    assert torch.equal(found, model.family.denoiser.predict(models, noisy_latents(), TIME, cond))


@torch.no_grad()
def test_sdxl_reads_the_last_part_as_a_whole():
    """Its pooled text; with one region over all, the prediction is that of the first part with the pooled last."""
    family, models = SdxlFamily(options_for("sdxl", "network")), tiny_sdxl()
    model = Model(family, models, family.opts, CPU, torch.float32, Networks())
    texts = {text: family.text.encode(models, [text]) for text in ("a red house", "cat")}
    noisy = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(1))
    with model.confine_networks().use(torch.stack([torch.ones(2, 3), torch.zeros(2, 3)])):
        found = model.denoise(noisy, TIME, CoupledText.of(list(texts.values())), None)
    mixed = TextCond({**texts["a red house"].tensors, "pool2": texts["cat"].tensors["pool2"]})
    expected = family.denoiser.predict(models, noisy, TIME, mixed)
    assert (found - expected).abs().max() < CLOSE * expected.abs().max()
    other = family.denoiser.predict(models, noisy, TIME, texts["cat"])
    assert (found - other).abs().max() > 1e-3


@torch.no_grad()
def test_control_nets_read_the_last_part(model):
    net = model.family.control.build(model.models)
    torch.manual_seed(0)
    for name, weight in net.named_parameters():
        if name.startswith("controlnet_"):
            weight.data = 0.05 * torch.randn_like(weight)
    pixels = np.full((64, 64, 3), 200, np.uint8)
    prompt = replace(PROMPT, guides=(ControlImage(Path("x"), pixels),), regions=RegionMask(Path("m")), scale=1.0)
    model.control = ControlNets(model.family, model.models, [net.eval()], (1.0,), (1.0,))
    regions, cond = model.confine_networks(), coupled(model, *PROMPT.parts)
    batch = Guidance.of(model.family, model.models, [prompt], CPU, None, model.denoise).together
    assert isinstance(batch, Batch)
    with regions.use(halves()):
        found = model.denoise(noisy_latents(), TIME, cond, batch)
        residuals = model.family.control.residuals(model.models, net, noisy_latents(), TIME, cond.parts[1], batch)
        expected = regions.predict(noisy_latents(), TIME, cond, batch, residuals)
    assert torch.equal(found, expected)


def test_the_families_that_say_so_have_layers_that_read_text(model):
    assert {name for name, spec in FAMILIES.items() if spec.traits.text_regions} == {"sd", "sdxl"}
    assert len(model.family.text_layers(model.models)) > 3
    flow = FluxFamily(options_for("flux", "network"))
    with pytest.raises(UserError, match=r"prompts of several regions: not possible with FLUX"):
        Regions(flow, model.models, [])


def test_networks_of_other_packages_and_too_many_are_refused(model):
    other = ThirdPartyNetwork.__new__(ThirdPartyNetwork)
    with pytest.raises(UserError, match="network 1 acts on the whole image"):
        Regions(model.family, model.models, [other])
    with (
        pytest.raises(UserError, match="the prompt has 1 parts joined by AND, and there are 2 networks"),
        model.confine_networks().use(torch.ones(1, 8, 8)),
    ):
        pass


# --- whole drawings ---------------------------------------------------------------------------------------------------


def drawn(model: Model, *prompts: SamplePrompt) -> Tensor:
    texts = model.conditioning([text for prompt in prompts for text in texts_read(prompt)])
    with model.in_regions_of(prompts[0]):
        return sample_latents(model.family, model.without_texts, prompts, CPU, cached=texts, denoise=model.denoise)


def test_regions_reach_the_latents_and_a_batch_is_its_images(model, tmp_path):
    pixels = np.zeros((100, 50, 3))
    pixels[:, :25, 0], pixels[:, 25:, 1] = 255, 255
    regional = replace(PROMPT, regions=RegionMask(saved(tmp_path, pixels)))
    other = replace(regional, parts=("a cat", "blue"), seed=8)
    together = drawn(model, regional, other)
    assert (together - torch.cat([drawn(model, regional), drawn(model, other)])).abs().max() < 1e-3
    assert (drawn(model, replace(regional, parts=PROMPT.parts[::-1])) - together[:1]).abs().max() > 0.1
    assert texts_read(regional) == [Reading("a red house", 0), Reading("a cat", 1), Reading("", NO_NETWORK)]


@torch.no_grad()
@pytest.mark.parametrize("own_scale", [None, 0.5])
@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_without_masks_predictions_are_put_together(model, scale, own_scale):
    """negative + sum of scale * (part - negative), Liu et al. 2022; with a scale of its own, around an empty text."""
    prompt = replace(PROMPT, scale=scale, negative_prompt="ugly", negative_scale=own_scale)
    texts = model.conditioning(texts_read(prompt))
    guidance = Guidance.of(model.family, model.without_texts, [prompt], CPU, texts, model.denoise)
    one, two, negative, empty = (
        model.denoise(noisy_latents(), TIME, model.conditioning([text])[text], None)
        for text in ("a red house", "a cat", "ugly", "")
    )
    if own_scale is None:
        expected = negative + scale * (one - negative) + scale * (two - negative)
    else:
        expected = empty + scale * (one - empty) + scale * (two - empty) - own_scale * (negative - empty)
    found = guidance.predict(noisy_latents(), TIME[0])
    assert (found - expected).abs().max() < 1e-3  # three times differences of predictions of order 1
    assert (found - expected + scale * (two - negative)).abs().max() > 0.01


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(options, tmp_path, caplog):
    saved(tmp_path, np.zeros((4, 4, 3)))

    def asked(line: str, family: str = "sd", **values):
        opts, failed = options(prompt=line, **values), {}
        traits = FAMILIES[family].traits
        requests = Requests(opts, traits, base_prompt(opts, traits), failed.__setitem__)
        return requests.of([("--prompt", line)]), failed

    return asked


def test_parts_and_masks_of_prompts(asked, tmp_path, caplog):
    mask = {"mask_path": str(tmp_path / "mask.png")}
    (plain,), _ = asked("a cat AND a dog --n ugly AND old")
    assert (plain.prompt.parts, plain.prompt.regions) == (("a cat", "a dog"), None)
    assert (plain.prompt.prompt, plain.prompt.negative_prompt) == ("a cat AND a dog", "ugly AND old")
    (regional,), _ = asked("a AND b AND c AND d", **mask, network_regional_mask_max_color_codes=4)
    assert regional.prompt.regions == RegionMask(tmp_path / "mask.png", 4)
    (flow,), failed = asked("a AND b", "flux")
    assert (flow.prompt.parts, failed) == (("a", "b"), {})
    (whole,), _ = asked("a brand", **mask)
    assert whole.prompt.parts == ()
    assert "--prompt: --mask_path has no effect" in caplog.text


@pytest.mark.parametrize(
    ("line", "family", "values", "problem"),
    [
        ("a AND ", "sd", {}, None),
        ("AND a", "sd", {}, None),
        ("a AND  AND b", "sd", {}, "there is no text before or behind an AND"),
        ("a AND b", "flux", {}, "--mask_path: FLUX.1 has no regions; without it parts count everywhere"),
        ("a AND b", "sd", {"network_weights": ["x"] * 3}, "the prompt has 2 parts joined by AND, and there are 3"),
        ("a AND b", "sd", {"network_weights": ["x"] * 3, "network_merge": True}, None),
        ("a AND b", "sd", {"network_weights": ["x"], "network_pre_calc": True}, "--network_pre_calc: cannot be used"),
    ],
)
def test_parts_that_cannot_be_drawn_are_said(asked, tmp_path, line, family, values, problem):
    found, failed = asked(line, family, mask_path=str(tmp_path / "mask.png"), **values)
    assert bool(found) == (problem is None)
    assert problem is None or problem in failed["--prompt"]


def test_a_mask_that_cannot_be_read_is_said_at_the_prompt(asked, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    found, failed = asked("a AND b", mask_path=str(tmp_path / "bad.png"))
    assert not found
    assert "bad.png: the image cannot be read" in failed["--prompt"]
