"""The ControlNet method by itself: what it trains at which rate, and when the ControlNet acts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.families.sd.adapter import SdFamily
from library.families.sdxl.adapter import SdxlFamily
from library.methods.control_net import ControlNetMethod
from library.options import validation
from library.registry import FAMILIES
from tests.builders import tiny_sd
from tests.builders.options import options_for
from tests.builders.sdxl import tiny_sdxl
from tests.families.test_controlnet import batch_of, inputs_of


def attached(family="sd", **given):
    opts = options_for(family, "control_net", **given)
    adapter, models = (SdFamily(opts), tiny_sd()) if family == "sd" else (SdxlFamily(opts), tiny_sdxl())
    method = ControlNetMethod(opts)
    method.attach(adapter, models)
    return adapter, models, method


def groups_of(method):
    return {group["name"]: (group["lr"], len(group["params"])) for group in method.parameter_groups()}


@torch.no_grad()
def test_it_acts_where_the_batch_has_control_images():
    family, models, method = attached()
    method.trainable().controlnet_mid_block.bias.fill_(1.0)
    denoise = method.denoise(family, models)
    noisy, timesteps, cond, _ = inputs_of(family)
    batch = batch_of()
    plain = family.denoiser.predict(models, noisy, timesteps, cond, batch)
    assert not torch.equal(denoise(noisy, timesteps, cond, batch), plain)
    assert torch.equal(denoise(noisy, timesteps, cond, replace(batch, control=None)), plain)


def test_only_the_controlnet_gets_gradients():
    family, models, method = attached()
    noisy, timesteps, cond, _ = inputs_of(family)
    net = method.trainable()
    for name, weight in net.named_parameters():
        if not weight.any():  # the layers that begin with zeros, behind which nothing has a gradient yet
            assert name.startswith("controlnet_")
            torch.nn.init.normal_(weight.data, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    method.denoise(family, models)(noisy, timesteps, cond, batch_of()).square().mean().backward()
    sizes = {name: weight.grad.abs().max().item() for name, weight in net.named_parameters()}
    idle = {name for name, size in sizes.items() if size < 1e-6 * max(sizes.values())}  # nothing but float32's rounding
    middle = "mid_block.attentions.0.transformer_blocks.0.attn1"  # of one position here, which sees itself alone
    assert idle == {f"{middle}.to_q.weight", f"{middle}.to_k.weight"}
    for part in (models.denoiser, models.vae, *models.text_encoders.values()):
        assert all(weight.grad is None for weight in part.parameters())


def test_one_rate_or_two():
    _, _, method = attached(learning_rate=1e-4)
    count = len(list(method.trainable().parameters()))
    assert groups_of(method) == {"controlnet": (1e-4, count)}
    _, _, method = attached("sdxl", learning_rate=1e-5, control_net_lr=1e-3)
    names = [name for name, _ in method.trainable().named_parameters()]
    added = sum(name.startswith("controlnet_") for name in names)
    assert groups_of(method) == {"controlnet": (1e-3, added), "unet": (1e-5, len(names) - added)}


def test_a_rate_of_0_leaves_copied_layers_as_they_are():
    _, _, method = attached("sdxl", learning_rate=0.0)
    assert groups_of(method).keys() == {"controlnet"}
    net = method.trainable()
    assert not any(weight.requires_grad for weight in net.down_blocks.parameters())
    assert all(weight.requires_grad for weight in net.controlnet_cond_embedding.parameters())


def test_new_layers_begin_as_the_seed_says_and_nobody_elses_numbers_change():
    def first_convolution(seed):
        torch.manual_seed(0)
        _, _, method = attached(seed=seed)
        return method.trainable().controlnet_cond_embedding.conv_in.weight.detach(), torch.rand(1)

    (one, after), (same, after_same), (other, _) = map(first_convolution, (1, 1, 2))
    assert torch.equal(one, same)
    assert torch.equal(after, after_same)
    assert not torch.equal(one, other)
    torch.manual_seed(0)
    tiny_sd()
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize(
    ("family", "given", "line"),
    [
        ("sd", {"conditioning_data_dir": None}, "--conditioning_data_dir: missing; name the folder of control images"),
        ("sd", {"learning_rate": 0.0}, "--learning_rate: nothing would be trained with a rate of 0"),
        ("sdxl", {"learning_rate": 0.0, "control_net_lr": 0.0}, "--learning_rate: nothing would be trained"),
        ("sdxl", {"learning_rate": 0.0}, None),
        ("sd", {"conditioning_data_dir": None, "dataset_config": Path("data.toml")}, None),
    ],
)
def test_what_options_alone_show(tmp_path, family, given, line):
    needed = {"pretrained_model_name_or_path": "m", "output_dir": str(tmp_path), "resolution": "64"}
    needed |= {"train_data_dir": str(tmp_path), "conditioning_data_dir": str(tmp_path)}
    opts = options_for(family, "control_net", **{**needed, **given})
    problems = validation.problems(opts, FAMILIES[family].traits)
    assert [problem.startswith(line) for problem in problems] == ([True] if line else [])
