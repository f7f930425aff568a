"""Models that get inputs for a mask: the same predictions at first, and files that load here and in diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline

from library import registry
from library.checkpoints.reading import read_names
from library.families.shared.unet import input_problem
from library.types import Batch
from tests.builders import write_tiny_sd1
from tests.builders.options import options_for
from tests.builders.sdxl import write_tiny_sdxl

WRITE = {"sd": write_tiny_sd1, "sdxl": write_tiny_sdxl}
PIPELINES = {"sd": StableDiffusionInpaintPipeline, "sdxl": StableDiffusionXLInpaintPipeline}


def loaded(name, path, **given):
    opts = options_for(name, "network", pretrained_model_name_or_path=str(path), **given)
    family = registry.FAMILIES[name].adapter(opts)
    return family, family.loader.load()


def prediction(family, models, inpainting):
    rng = torch.Generator().manual_seed(3)
    noisy, sizes = torch.randn(2, 4, 8, 8, generator=rng), torch.full((2, 2), 64)
    batch = Batch([], None, None, torch.ones(2), None, sizes, sizes, sizes, inpainting=inpainting)
    with torch.no_grad():
        cond = family.text.encode(models, ["a red house", "blue"])
        return family.denoiser.predict(models, noisy, torch.tensor([10, 700]), cond, batch)


@pytest.mark.parametrize("name", WRITE)
def test_a_widened_model_predicts_as_before_and_loads_again(name, tmp_path):
    path = WRITE[name](tmp_path / "a.safetensors")
    family, models = loaded(name, path)
    plain = prediction(family, models, None)
    conv = models.denoiser.conv_in
    family, wide = loaded(name, path, train_inpainting=True)
    new = wide.denoiser.conv_in
    assert torch.equal(new.weight[:, :4], conv.weight)
    assert torch.equal(new.bias, conv.bias)
    assert not new.weight[:, 4:].any()
    assert (wide.inpaints, wide.denoiser.config.in_channels, new.weight.requires_grad) == (True, 9, False)
    seen = torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(4))
    assert (prediction(family, wide, seen) - plain).abs().max() < 1e-5  # sums of more terms, in another order
    new.weight.data[:, 4:] = 0.1  # as if trained
    trained = prediction(family, wide, seen)
    assert (trained - plain).abs().max() > 1e-3
    for save_as, file in (("safetensors", "b.safetensors"), ("ckpt", "b.ckpt"), ("diffusers_safetensors", "folder")):
        family.writer.save(wide, tmp_path / file, save_as=save_as, dtype=None, metadata={})
        again = loaded(name, tmp_path / file, train_inpainting=True)
        assert torch.equal(prediction(*again, seen), trained), file
        (problem,) = registry.FAMILIES[name].check_paths(
            options_for(name, "network", pretrained_model_name_or_path=str(tmp_path / file))
        )
        assert problem.endswith(
            "its U-Net takes 9 channels; --train_inpainting trains such models, where it is offered"
        )
    shapes = {key: shape for key, (_, shape) in read_names(tmp_path / "b.safetensors").items()}
    assert input_problem(shapes, inpainting=True) is None
    pipe = PIPELINES[name].from_pretrained(tmp_path / "folder", local_files_only=True)
    assert torch.equal(pipe.unet.conv_in.weight, new.weight)
    marks = family.writer.metadata(wide)
    assert marks["ss_train_inpainting"]
    assert marks["modelspec.whole"].endswith("-inpainting")
