"""Tools on models for inpainting, whose U-Nets take 9 channels. References: diffusers, and plain sums, float32."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from library.errors import UserError
from library.families.registry import TOOLS
from library.families.sd.loading import load_model
from library.families.sd.saving import save_model as save_sd
from library.families.sdxl.saving import save_model as save_sdxl
from library.model_tools.model_layers import open_model_file
from library.model_tools.model_merging import FIRST_CONVOLUTION, GROUPS, merge_models
from library.model_tools.network_from_models import extract
from library.model_tools.network_into_model import merge
from networks.build import change_of
from networks.files import read
from tests.builders import for_inpainting, tiny_sd, write_tiny_inpainting, write_tiny_sd1
from tests.builders.options import options_with
from tests.builders.sdxl import tiny_sdxl, write_tiny_sdxl

CONVERTER = "tools/convert_diffusers20_original_sd.py"
SCRIPTS = {"sd": "merge_lora", "sdxl": "sdxl_merge_lora"}


def write(family, path, *, inpaints, seed=0):
    models = tiny_sd(False, seed) if family == "sd" else tiny_sdxl(seed)
    models = for_inpainting(models) if inpaints else models
    save = save_sd if family == "sd" else save_sdxl
    save(models, path, save_as="safetensors", dtype=None, metadata={})
    return path


def lora(path, model, family):
    """A LoRA on the denoiser's attention."""
    targets = [
        target
        for target in open_model_file(model, (family,)).targets
        if target.part == "denoiser" and "_attn" in target.key
    ]
    file, rng, tensors = open_model_file(model, (family,)), torch.Generator().manual_seed(3), {}
    for target in targets:
        rows, *inputs = file.shape(target)
        tensors[f"{target.key}.lora_down.weight"] = torch.randn(2, *inputs, generator=rng) * 0.2
        tensors[f"{target.key}.lora_up.weight"] = torch.randn(rows, 2, *[1] * (len(inputs) - 1), generator=rng) * 0.2
        tensors[f"{target.key}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)
    return path


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_folder_and_back(run_script, tmp_path):
    source = write_tiny_inpainting(tmp_path / "model.safetensors", v2=True)
    folder, again = tmp_path / "folder", tmp_path / "again.safetensors"
    for given, made in ((source, folder), (folder, again)):
        done = run_script(CONVERTER, given, made)
        assert done.returncode == 0, done.stderr
    before, after = load_file(source), load_file(again)
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    assert metadata(again)["modelspec.architecture"] == "stable-diffusion-v2-inpainting"
    pipe = StableDiffusionInpaintPipeline.from_pretrained(folder, local_files_only=True)
    own = load_model(str(source), v2=True, inpainting=True).denoiser.state_dict()
    assert pipe.unet.config.in_channels == 9
    assert all(pipe.unet.state_dict()[name].equal(value) for name, value in own.items())


@pytest.mark.parametrize("family", SCRIPTS)
def test_a_merged_lora_and_what_is_extracted_again(tmp_path, family):
    model = write(family, tmp_path / "model.safetensors", inpaints=True)
    network, merged = lora(tmp_path / "lora.safetensors", model, family), tmp_path / "merged.safetensors"
    options = {"sd_model": str(model), "models": [str(network)], "ratios": [0.5], "save_to": str(merged)}
    merge(options_with(TOOLS[SCRIPTS[family]], **options))
    version = {"sd": "v1", "sdxl": "xl-v1"}[family]
    assert metadata(merged)["modelspec.architecture"] == f"stable-diffusion-{version}-inpainting"
    before, after = load_file(model), load_file(merged)
    assert after[FIRST_CONVOLUTION].equal(before[FIRST_CONVOLUTION])
    # The same as without further inputs: no layer of the network has any.
    plain, other = write(family, tmp_path / "plain.safetensors", inpaints=False), tmp_path / "other.safetensors"
    merge(options_with(TOOLS[SCRIPTS[family]], **{**options, "sd_model": str(plain), "save_to": str(other)}))
    expected = load_file(other)
    assert expected.keys() == after.keys()
    changed = {name for name, tensor in after.items() if not tensor.equal(before[name])}
    assert len(changed) > 20
    assert all(after[name].equal(expected[name]) for name in after if name != FIRST_CONVOLUTION)

    found = tmp_path / "extracted.safetensors"
    files = {"model_org": str(model), "model_tuned": str(merged), "save_to": str(found)}
    extract(options_with(TOOLS["extract_lora_from_models"], **files, dim=2, clamp_quantile=1.0, save_precision="float"))
    assert metadata(found)["ss_train_inpainting"] == "True"
    assert metadata(found)["modelspec.architecture"].endswith("/lora")
    assert "modelspec.whole" not in metadata(found)
    given = read(network).entries
    shapes = open_model_file(model, (family,))
    for target in shapes.targets:
        if target.key in given:
            change, _ = change_of(given[target.key], shapes.shape(target), lambda: torch.zeros(1))
            again, _ = change_of(read(found).entries[target.key], shapes.shape(target), lambda: torch.zeros(1))
            assert_close(again, 0.5 * change, rtol=1e-3, atol=1e-4)


def test_diffusers_merges_the_same(tmp_path):
    model = write("sd", tmp_path / "model.safetensors", inpaints=True)
    save_sd(for_inpainting(tiny_sd()), tmp_path / "folder", save_as="diffusers", dtype=None, metadata={})
    network, merged = lora(tmp_path / "lora.safetensors", model, "sd"), tmp_path / "merged.safetensors"
    merge(
        options_with(TOOLS["merge_lora"], sd_model=str(model), models=[str(network)], ratios=[0.7], save_to=str(merged))
    )
    pipe = StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    pipe.load_lora_weights(str(network))
    pipe.fuse_lora(lora_scale=0.7)
    pipe.unload_lora_weights()
    ours = load_model(str(merged), v2=False, inpainting=True).denoiser.state_dict()
    for name, tensor in pipe.unet.state_dict().items():
        assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)


def test_another_models_knowledge_for_a_model_for_inpainting(run_script, tmp_path):
    """Inpainting + (custom - base): the inputs for the mask stay those of the first model."""
    wide = write("sd", tmp_path / "inpainting.safetensors", inpaints=True)
    custom, base = (write_tiny_sd1(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (1, 2))
    out = tmp_path / "out.safetensors"
    done = run_script(
        "tools/merge_models.py", "--models", wide, custom, base, "--ratios", "1", "1", "-1", "--output", out
    )
    assert done.returncode == 0, done.stderr
    assert metadata(out)["modelspec.architecture"].endswith("-inpainting")
    found, first, one, two = map(load_file, (out, wide, custom, base))
    own = found.pop(FIRST_CONVOLUTION)
    assert own[:, 4:].equal(first[FIRST_CONVOLUTION][:, 4:])
    expected = first[FIRST_CONVOLUTION][:, :4] + one[FIRST_CONVOLUTION] - two[FIRST_CONVOLUTION]
    assert_close(own[:, :4], expected, rtol=1e-5, atol=1e-6)
    for name, tensor in found.items():
        if tensor.is_floating_point():
            assert_close(tensor, first[name] + one[name] - two[name], rtol=1e-5, atol=1e-5)
    two_wide = write("sd", tmp_path / "second.safetensors", inpaints=True, seed=3)
    options = {"models": [str(wide), str(two_wide)], "output": str(out), "ratios": [0.25, 0.75]}
    merge_models(options_with(*GROUPS, **options))
    mean = 0.25 * first[FIRST_CONVOLUTION] + 0.75 * load_file(two_wide)[FIRST_CONVOLUTION]
    assert_close(load_file(out)[FIRST_CONVOLUTION], mean, rtol=1e-5, atol=1e-6)


def test_the_model_for_inpainting_comes_first(tmp_path):
    wide = write("sdxl", tmp_path / "inpainting.safetensors", inpaints=True)
    plain = write_tiny_sdxl(tmp_path / "plain.safetensors")
    with pytest.raises(
        UserError, match=r"inpainting.safetensors: this is a model for inpainting, and .* give it as the"
    ):
        merge_models(options_with(*GROUPS, models=[str(plain), str(wide)], output=str(tmp_path / "out.safetensors")))
