"""Training a model for inpainting from the outside: begun with one that reads no mask."""

from __future__ import annotations

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from library.checkpoints.reading import read_metadata
from tests.builders.sdxl import write_tiny_sdxl
from tests.scripts.starting import as_words
from tests.scripts.weights import furthest

INPUT = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.fixture
def train(run_script, tmp_path):
    """Runs a script of whole models on four images; gives what it said."""
    images = tmp_path / "images" / "2_figure"
    images.mkdir(parents=True)
    for number, colour in enumerate(("red", "green", "blue", "white")):
        image = Image.new("RGB", (64, 64), "black")
        ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill=colour)
        image.save(images / f"{number}.png")
    common = {
        "train_data_dir": images.parent, "resolution": 64, "train_batch_size": 2, "learning_rate": 1e-3, "seed": 1,
        "max_train_steps": 2, "output_name": "model", "train_inpainting": True, "save_precision": "float",
        "max_data_loader_n_workers": 0,
    }  # fmt: skip

    def run(script: str, out: str, status: int = 0, **options: object) -> str:
        done = run_script(f"{script}.py", *as_words({**common, "output_dir": tmp_path / out, **options}))
        assert done.returncode == status, done.stderr[-3000:]
        assert "Traceback" not in done.stderr
        return done.stderr

    return run


def test_it_is_trained_resumed_and_drawn_with(train, run_script, small_model, tmp_path):
    """With cached latents, flips and sample images, of which one has a source."""
    source = tmp_path / "images" / "2_figure" / "0.png"
    (tmp_path / "prompts.txt").write_text(f"a figure --w 64 --h 64 --s 2 --i {source}\na figure --w 64 --h 64 --s 2\n")
    model = {"pretrained_model_name_or_path": small_model, "cache_latents": True, "flip_aug": True}
    samples = {"sample_prompts": tmp_path / "prompts.txt", "sample_every_n_steps": 2}
    said = train("train_db", "whole", **model, **samples, save_state=True, save_every_n_steps=1)
    assert "the U-Net gets 9 inputs in place of 4" in said
    assert "1 of 2 prompts have no --i" in said
    assert len(list((tmp_path / "whole/sample").glob("*.png"))) == 2
    file = tmp_path / "whole/model.safetensors"
    weight = load_file(file)[INPUT]
    assert weight.shape[1] == 9
    assert weight[:, 4:].any(), "masks are trained"
    assert read_metadata(file)["modelspec.architecture"] == "stable-diffusion-v1-inpainting"
    (state,) = (tmp_path / "whole").glob("*000001-state")
    train("train_db", "resumed", **model, resume=state)
    assert furthest(load_file(tmp_path / "resumed/model.safetensors"), load_file(file)) == 0
    mask = tmp_path / "mask.png"
    Image.new("L", (64, 64), 255).save(mask)
    line = {"ckpt_path": file, "image": source, "mask": mask, "width": 64, "height": 64, "steps": 2, "seed": 1}
    done = run_script("inpainting_minimal_inference.py", *as_words({**line, "output_dir": tmp_path / "drawn"}))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 1


def test_masks_decide_what_is_learned(train, small_model, tmp_path):
    """Weights differ by the masks of the data set; a model for inpainting is refused without the option."""
    for number in range(4):
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.new("L", (64, 64), 255).save(tmp_path / f"masks/{number}.png")
    model = {"pretrained_model_name_or_path": small_model, "max_train_steps": 1}
    train("train_db", "random", **model)
    train("train_db", "given", **model, conditioning_data_dir=tmp_path / "masks")
    random, given = (load_file(tmp_path / name / "model.safetensors")[INPUT] for name in ("random", "given"))
    assert not torch.equal(random, given)
    again = {**model, "pretrained_model_name_or_path": tmp_path / "given/model.safetensors"}
    said = train("train_db", "refused", status=2, **again, train_inpainting=None)
    assert "--train_inpainting trains such models, where it is offered" in said


def test_a_network_on_sdxl(train, tmp_path):
    model = write_tiny_sdxl(tmp_path / "sdxl.safetensors")
    network = {"network_module": "networks.lora", "network_dim": 2, "network_train_unet_only": True}
    said = train("sdxl_train_network", "out", pretrained_model_name_or_path=model, max_train_steps=1, **network)
    assert "the base model has no inputs for a mask" in said
    assert read_metadata(tmp_path / "out/model.safetensors")["ss_train_inpainting"] == "True"


@pytest.mark.parametrize(("script", "label"), [("flux_train", "FLUX"), ("sd3_train", "Stable Diffusion 3")])
def test_families_without_such_models_say_so(train, small_model, script, label):
    said = train(script, "out", status=2, pretrained_model_name_or_path=small_model)
    assert "--train_inpainting: no model of" in said
    assert label in said
