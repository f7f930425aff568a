"""ControlNets of U-Nets: what diffusers computes with the same weights, and the files that programs read."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.families.sd.adapter import SdFamily
from library.families.sd.variants import check_paths
from library.families.sdxl.adapter import SdxlFamily
from library.types import Batch, TextCond
from tests.builders import sd_options, tiny_sd, write_tiny_sd1
from tests.builders.options import options_for
from tests.builders.sdxl import POOLED, WIDTH1, WIDTH2, sdxl_options, tiny_sdxl

CASES = ("sd1", "sd2", "sdxl")
SIZE = 64  # pixels


@pytest.fixture(scope="module")
def cases():
    return {
        "sd1": (SdFamily(sd_options("m")), tiny_sd()),
        "sd2": (SdFamily(sd_options("m")), tiny_sd(v2=True)),
        "sdxl": (SdxlFamily(sdxl_options("m")), tiny_sdxl()),
    }


@pytest.fixture
def case(request, cases):
    """(family, models, a ControlNet that is no longer as it was made)."""
    family, models = cases[request.param]
    net = family.control.build(models)
    generator = torch.Generator().manual_seed(1)
    for weight in net.parameters():
        weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
    return family, models, net.eval()


def batch_of(count=2, side=SIZE):
    generator = torch.Generator().manual_seed(3)
    sizes = torch.tensor([[side, side]] * count)
    return Batch(
        captions=["a"] * count,
        latents=None,
        pixels=None,
        loss_weights=torch.ones(count),
        masks=None,
        original_sizes=sizes + 8,
        crop_top_lefts=torch.tensor([[4, 2]] * count),
        target_sizes=sizes,
        control=torch.rand(count, 3, side, side, generator=generator),
    )


def inputs_of(family, count=2):
    """(noisy latents, timesteps, conditioning, what diffusers calls the same)."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(count, *shape, generator=generator)

    noisy, timesteps = draw(4, SIZE // 8, SIZE // 8), torch.tensor([17, 803][:count])
    if isinstance(family, SdFamily):
        context = draw(77, 64)
        return noisy, timesteps, TextCond({"context": context}), {"encoder_hidden_states": context}
    first, second, pooled = draw(77, WIDTH1), draw(77, WIDTH2), draw(POOLED)
    cond = TextCond({"hidden_state1": first, "hidden_state2": second, "pool2": pooled})
    sizes = torch.tensor([[SIZE + 8.0, SIZE + 8, 4, 2, SIZE, SIZE]] * count)
    added = {"text_embeds": pooled, "time_ids": sizes}
    return noisy, timesteps, cond, {"encoder_hidden_states": torch.cat([first, second], -1), "added_cond_kwargs": added}


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, indirect=True)
def test_the_prediction_is_that_of_diffusers(case):
    """In float32; sums are in the same order, so 1e-5 of the largest value is far more than rounding needs."""
    family, models, net = case
    noisy, timesteps, cond, theirs = inputs_of(family)
    batch = batch_of()
    down, middle = net(noisy, timesteps, controlnet_cond=batch.control, return_dict=False, **theirs)
    expected = models.denoiser(
        noisy, timesteps, down_block_additional_residuals=down, mid_block_additional_residual=middle, **theirs
    ).sample
    found = family.control.predict(models, net, noisy, timesteps, cond, batch)
    plain = family.denoiser.predict(models, noisy, timesteps, cond, batch)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found - plain).abs().max() > 1e-2 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_a_new_one_copies_the_denoiser_and_changes_nothing(cases, name):
    family, models = cases[name]
    net = family.control.build(models)
    base, own = models.denoiser.state_dict(), net.state_dict()
    added = [key for key in own if key not in base]
    assert all(key.startswith("controlnet_") for key in added)
    assert all(torch.equal(own[key], base[key]) for key in own if key in base)
    noisy, timesteps, cond, _ = inputs_of(family)
    batch = batch_of()
    with_it = family.control.predict(models, net, noisy, timesteps, cond, batch)
    assert torch.equal(with_it, family.denoiser.predict(models, noisy, timesteps, cond, batch))


def reaches_the_end(embedding):
    """Whether thin lines are as strong at the last convolution of a new embedding as at the first."""
    image = torch.zeros(4, 3, SIZE, SIZE)
    for number, lines in enumerate(image):
        lines[:, 10 * number + 12] = lines[:, :, 50 - 9 * number] = 1
    found = []
    handle = embedding.conv_out.register_forward_hook(lambda _module, args, _output: found.append(args[0]))
    embedding(image)
    handle.remove()
    return found[0].std(0).mean() / found[0].abs().mean() > 0.3 and 0.1 < found[0].std() / image.std() < 10


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_a_new_one_sees_the_control_image(cases, name):
    """With PyTorch's own numbers all images would look alike behind its eight convolutions."""
    family, models = cases[name]
    torch.manual_seed(1)
    embedding = family.control.build(models).controlnet_cond_embedding
    assert reaches_the_end(embedding)
    assert not embedding.conv_out.weight.any()
    for convolution in (embedding.conv_in, *embedding.blocks):
        convolution.reset_parameters()
    assert not reaches_the_end(embedding)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("save_as", ["safetensors", "ckpt", "pt", "diffusers"])
@pytest.mark.parametrize("case", CASES, indirect=True)
def test_what_is_saved_is_read_again_to_the_bit(case, tmp_path, save_as):
    family, models, net = case
    path = tmp_path / ("net" if save_as == "diffusers" else f"net.{save_as}")
    family.control.save(net, path, save_as=save_as, dtype=None, metadata={})
    again = family.control.load(models, str(path))
    assert same(again.state_dict(), net.state_dict())
    assert not any(weight.requires_grad for weight in again.parameters())
    family.control.save(again, tmp_path / "second.safetensors", save_as="safetensors", dtype=None, metadata={})
    family.control.save(net, tmp_path / "first.safetensors", save_as="safetensors", dtype=None, metadata={})
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "second.safetensors").read_bytes()


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_a_folder_opens_in_diffusers(case, tmp_path):
    family, _, net = case
    family.control.save(net, tmp_path / "net", save_as="diffusers", dtype=torch.float16, metadata={})
    theirs = ControlNetModel.from_pretrained(tmp_path / "net", torch_dtype=torch.float16)
    assert same(theirs.state_dict(), net.half().state_dict())


@pytest.mark.parametrize("case", ["sd1", "sd2"], indirect=True)
def test_files_have_the_original_names(case, tmp_path):
    """diffusers' own converter of original files, given ours with its prefix, gives the same model."""
    family, _, net = case
    family.control.save(net, tmp_path / "net.safetensors", save_as="safetensors", dtype=None, metadata={"a": "b"})
    tensors = load_file(tmp_path / "net.safetensors")
    assert {key.split(".")[0] for key in tensors} == {
        *("time_embed", "input_blocks", "middle_block", "middle_block_out", "zero_convs", "input_hint_block")
    }
    assert [f"input_hint_block.{n}.weight" in tensors for n in range(16)] == [True, False] * 8
    count = len(net.controlnet_down_blocks)
    assert {f"zero_convs.{n}.0.bias" for n in range(count)} == {
        key for key in tensors if key.startswith("zero_convs") and key.endswith("bias")
    }
    assert b"__metadata__" not in (tmp_path / "net.safetensors").read_bytes()[:4096]
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    original = {f"control_model.{key}": tensor for key, tensor in tensors.items()}
    assert same(convert_controlnet_checkpoint(original, dict(net.config)), net.state_dict())


@pytest.mark.parametrize("case", ["sdxl"], indirect=True)
def test_files_have_the_names_of_diffusers(case, tmp_path):
    family, _, net = case
    metadata = {"modelspec.architecture": "stable-diffusion-xl-v1-base/controlnet"}
    family.control.save(net, tmp_path / "n.safetensors", save_as="safetensors", dtype=torch.float16, metadata=metadata)
    assert same(load_file(tmp_path / "n.safetensors"), {k: v.half() for k, v in net.state_dict().items()})
    header = (tmp_path / "n.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    assert json.loads(header[8 : 8 + length])["__metadata__"] == metadata


@pytest.mark.parametrize("case", ["sd1"], indirect=True)
def test_original_files_with_prefix_and_of_differences_are_read(case, tmp_path):
    family, models, net = case
    family.control.save(net, tmp_path / "net.safetensors", save_as="safetensors", dtype=None, metadata={})
    tensors = load_file(tmp_path / "net.safetensors")
    save_file({f"control_model.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "prefix.safetensors")
    assert same(family.control.load(models, str(tmp_path / "prefix.safetensors")).state_dict(), net.state_dict())
    base = models.denoiser.state_dict()
    less = family.control.build(models)
    less.load_state_dict({k: v - base[k] if k in base else v for k, v in net.state_dict().items()})
    family.control.save(less, tmp_path / "d.safetensors", save_as="safetensors", dtype=None, metadata={})
    tensors = {**load_file(tmp_path / "d.safetensors"), "difference": torch.zeros(1)}
    save_file(tensors, tmp_path / "d.safetensors")
    again = family.control.load(models, str(tmp_path / "d.safetensors")).state_dict()
    assert all(torch.allclose(again[key], net.state_dict()[key], atol=1e-6) for key in again)  # subtracted and added


@pytest.mark.parametrize("case", ["sdxl"], indirect=True)
@pytest.mark.parametrize("save_as", ["safetensors", "diffusers"])
def test_one_of_another_model_is_refused(case, cases, tmp_path, save_as):
    family, _, net = case
    path = tmp_path / ("net" if save_as == "diffusers" else "net.safetensors")
    family.control.save(net, path, save_as=save_as, dtype=None, metadata={})
    other, models = cases["sd1"]
    with pytest.raises(UserError, match=str(path)) as error:
        other.control.load(models, str(path))
    assert len(error.value.problems) == 1


def test_a_file_that_is_no_controlnet_is_found_without_torch(tmp_path):
    model = write_tiny_sd1(tmp_path / "model.safetensors")
    (tmp_path / "folder").mkdir()

    def line(name):
        given = {"pretrained_model_name_or_path": str(model), "controlnet_model_name_or_path": str(name)}
        (problem,) = check_paths(options_for("sd", "control_net", **given))
        return problem

    assert line(model).endswith("this is a Stable Diffusion 1.x model; a ControlNet is needed here")
    assert "config.json is missing" in line(tmp_path / "folder")
    (tmp_path / "folder" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    assert line(tmp_path / "folder").endswith("this is a UNet2DConditionModel; a ControlNetModel is needed here")
    assert "--controlnet_model_name_or_path: " in line(tmp_path / "gone.safetensors")


def test_a_batch_moves_with_its_control_images():
    batch = batch_of()
    assert batch.map(lambda tensor: tensor.double()).control.dtype == torch.float64
    assert replace(batch, control=None).to("cpu").control is None
