"""train_control_net.py and sdxl_train_control_net.py from the outside: tiny ControlNets learn from pairs of images."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image, ImageFilter
from safetensors import safe_open
from safetensors.torch import load_file

from tests.builders import tiny_sd
from tests.builders.sdxl import write_tiny_sdxl
from tests.scripts.starting import as_words
from tests.scripts.weights import furthest

SAMPLES = {"sample_every_n_steps": 2, "sample_at_first": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny model whose VAE gives the same latents each time, so that runs with cached ones can be compared."""
    from library.families.sd.saving import save_model

    models = tiny_sd()
    half = models.vae.quant_conv.bias.numel() // 2
    models.vae.quant_conv.weight.data[half:] = 0
    models.vae.quant_conv.bias.data[half:] = -30  # logarithm of the variance
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_model(models, path, save_as="safetensors", dtype=None, metadata={})
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Images of 80x64 and their edges, those of one at half the size, and prompts with and without edges."""
    root = tmp_path_factory.mktemp("pairs")
    for name in ("images", "edges"):
        (root / name).mkdir()
    for number, path in enumerate(sorted(Path("examples/concept/10_sks flower").glob("*.png"))[:4]):
        with Image.open(path) as opened:
            image = opened.convert("RGB").resize((80, 64))
        image.save(root / "images" / path.name)
        (root / "images" / path.with_suffix(".txt").name).write_text("a flower")
        edges = image.convert("L").filter(ImageFilter.FIND_EDGES)
        (edges.resize((40, 32)) if number == 3 else edges).save(root / "edges" / path.name)
    cn = root / "edges" / path.name
    (root / "prompts.txt").write_text(f"a --w 64 --h 64 --s 2 --d 1 --cn {cn}\na --w 64 --h 64 --s 2 --d 1\n")
    return root


def options(model: Path, pairs: Path, out: Path, **changes: object) -> dict[str, object]:
    return {
        "pretrained_model_name_or_path": model,
        "train_data_dir": pairs / "images",
        "conditioning_data_dir": pairs / "edges",
        "caption_extension": ".txt",
        "output_dir": out,
        "output_name": "net",
        "resolution": 64,
        "enable_bucket": True,
        "min_bucket_reso": 64,
        "flip_aug": True,
        "train_batch_size": 2,
        "learning_rate": 1e-3,
        "max_train_steps": 4,
        "max_data_loader_n_workers": 0,
        "seed": 1,
        **changes,
    }


@pytest.fixture(scope="module")
def train(run_script, model, pairs):
    """Runs a script with options, see `as_words`. Gives messages and, where it succeeds, a single file's weights."""

    def run(out: Path, script="train_control_net.py", status=0, processes=1, base=None, **changes) -> SimpleNamespace:
        given = as_words(options(base or model, pairs, out, **changes))
        result = run_script(script, *given, processes=processes)
        assert result.returncode == status, result.stderr[-3000:]
        file = out / "net.safetensors"
        return SimpleNamespace(said=result.stderr, file=file, weights=load_file(file) if file.is_file() else None)

    return run


@pytest.fixture(scope="module")
def plain(train, pairs, tmp_path_factory) -> SimpleNamespace:
    """A run with sample images, copies and states every two steps, and validation."""
    more = {"sample_prompts": pairs / "prompts.txt", "save_state": True, "save_every_n_steps": 2, "ema": True}
    more |= {"validation_split": 0.25, "validate_every_n_steps": 2}
    return train(tmp_path_factory.mktemp("plain"), **SAMPLES, **more)


def images_of(run: SimpleNamespace) -> dict[str, np.ndarray]:
    """By step and prompt, such as 000002_00."""
    folder = run.file.parent / "sample"
    return {path.name[4:13]: np.asarray(Image.open(path)) for path in folder.glob("net_*.png")}


def test_sample_images_show_the_controlnet(plain):
    """A new ControlNet adds nothing; a trained one acts where there is an image for it, and nowhere else."""
    images = images_of(plain)
    assert images.keys() == {f"{step:06d}_{prompt:02d}" for step in (0, 2, 4) for prompt in (0, 1)}
    assert np.array_equal(images["000000_00"], images["000000_01"])
    assert np.array_equal(images["000004_01"], images["000000_01"])
    assert not np.array_equal(images["000004_00"], images["000000_00"])
    assert plain.said.count("have no --cn; they show the base model alone") == 1
    assert plain.said.count("validation loss") == 2


def test_all_of_the_controlnet_learns_and_nothing_else(plain, model):
    base = load_file(model)
    for key, tensor in plain.weights.items():
        before = base.get(f"model.diffusion_model.{key}", torch.zeros_like(tensor))
        assert not torch.equal(tensor, before), key
    assert plain.weights["zero_convs.0.0.weight"].abs().max() > 1e-4
    with safe_open(plain.file, "pt") as opened:
        assert not opened.metadata()


def test_a_resumed_run_writes_the_same_bytes(plain, train, pairs, tmp_path):
    more = {"save_state": True, "save_every_n_steps": 2, "ema": True, "validation_split": 0.25}
    more["validate_every_n_steps"] = 2
    again = train(tmp_path, resume=plain.file.parent / "net-step00000002-state", **more)
    assert again.file.read_bytes() == plain.file.read_bytes()


@pytest.mark.parametrize("how", ["cache_latents", "cache_latents_to_disk"])
def test_cached_latents_give_the_same(train, pairs, tmp_path, how):
    """But for float32 sums in another order, with plain gradient steps.

    At 64 pixels the last level would be one pixel, whose groups of two values are normalised to signs.
    """
    common = {"optimizer_type": "SGD", "learning_rate": 0.1, "max_grad_norm": 0, "max_train_steps": 2}
    common["resolution"] = 128
    cached, encoded = train(tmp_path / "cached", **common, **{how: True}), train(tmp_path / "encoded", **common)
    for file in (pairs / "images").glob("*.npz"):
        file.unlink()
    moved = encoded.weights["zero_convs.0.0.weight"].abs().max().item()
    assert moved > 1e-3
    assert furthest(cached.weights, encoded.weights) < 1e-3 * moved


def test_the_caching_tool_prepares_such_a_dataset(run_script, train, model, pairs, tmp_path):
    """Its latents are those of the images, whatever belongs to them."""
    config = tmp_path / "pairs.toml"
    subset = f'image_dir = "{pairs}/images"\nconditioning_data_dir = "{pairs}/edges"\nflip_aug = true\n'
    config.write_text(f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n{subset}")
    given = {"pretrained_model_name_or_path": model, "dataset_config": config}
    done = run_script("tools/cache_latents.py", *as_words(given))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 done" in done.stderr
    more = {"dataset_config": config, "train_data_dir": None, "conditioning_data_dir": None, "max_train_steps": 1}
    said = train(tmp_path / "out", cache_latents_to_disk=True, **more).said
    for file in (pairs / "images").glob("*.npz"):
        file.unlink()
    assert "latents on disk: 4 used as they are\n" in said


def test_two_processes_train_as_one_that_accumulates(train, tmp_path):
    common = {"max_train_steps": 2, "cache_latents": True, "optimizer_type": "SGD", "learning_rate": 0.1}
    one = train(tmp_path / "one", gradient_accumulation_steps=2, **common)
    two = train(tmp_path / "two", processes=2, **common)
    assert one.weights["zero_convs.0.0.weight"].any()
    assert furthest(one.weights, two.weights) < 1e-6


@pytest.mark.rows("R334")
def test_training_goes_on_from_a_file_or_folder(plain, train, tmp_path):
    """With a rate that changes nothing much, what is read is what is saved again; float16 halves the file."""
    kept = {"learning_rate": 1e-12, "max_train_steps": 1, "controlnet_model_name_or_path": plain.file}
    again = train(tmp_path / "file", **kept)
    assert furthest(again.weights, plain.weights) < 1e-9
    train(tmp_path / "folder", **kept, save_model_as="diffusers", save_precision="fp16")
    folder = tmp_path / "folder" / "net"
    theirs = ControlNetModel.from_pretrained(folder, torch_dtype=torch.float16).state_dict()
    assert torch.equal(theirs["controlnet_mid_block.weight"], plain.weights["middle_block_out.0.weight"].half())
    from_folder = train(tmp_path / "again", **{**kept, "controlnet_model_name_or_path": folder})
    assert furthest(from_folder.weights, {k: v.half().float() for k, v in plain.weights.items()}) < 1e-9


@pytest.mark.rows("R335")
def test_the_old_name_says_so_and_does_the_same(train, tmp_path):
    new = train(tmp_path / "new", max_train_steps=1)
    old = train(tmp_path / "old", script="train_controlnet.py", max_train_steps=1, gradient_checkpointing=True)
    assert old.file.read_bytes() == new.file.read_bytes()
    assert old.said.startswith("train_controlnet.py: deprecated; use train_control_net.py\n")


def test_mistakes_are_one_line_before_the_model_is_read(train, pairs, tmp_path):
    def line(**changes):
        said = train(tmp_path / "out", status=2, **changes).said
        assert "loaded " not in said
        return [text for text in said.splitlines() if text.startswith("error: ")]

    lonely = tmp_path / "edges"
    lonely.mkdir()
    for path in sorted((pairs / "edges").iterdir())[:3]:
        os.link(path, lonely / path.name)
    (error,) = line(conditioning_data_dir=lonely)
    assert error.startswith(f"error: {lonely}: no control image for 1 images of {pairs / 'images'}: flower_03.png")
    (error,) = line(masked_loss=True)
    assert error.startswith("error: unknown option --masked_loss: not here; an option of train_network.py")
    (tmp_path / "prompts.txt").write_text("a --cn gone.png\n")
    (error,) = line(sample_prompts=tmp_path / "prompts.txt", sample_at_first=True)
    assert error == "error: --cn gone.png: the control image cannot be read (No such file or directory)"


def test_the_recipe_of_the_guide_runs(run_script, tmp_path):
    """As printed, but in another folder, with fewer images and steps."""
    guide = Path("docs/controlnet.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```\n(python examples/.*?)```", guide, flags=re.DOTALL)
    changes = {"pairs/": f"{tmp_path}/", "--count=800": "--count=8", "--max_train_steps=500": "--max_train_steps=1"}
    changes |= {"--count=24 --steps=10": "--count=2 --steps=2", "--lr_warmup_steps=30": "--lr_warmup_steps=1"}
    for old, new in changes.items():
        assert old in block
        block = block.replace(old, new)
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        if "train_control_net.py" in words:
            words.append("--max_data_loader_n_workers=0")
        done = run_script(*words[1:])
        assert done.returncode == 0, done.stderr[-3000:]
    found = r"with the ControlNet: edges agree to 0\.\d\d; figures overlap to 0\.\d\d; \d of 2 shapes are right"
    assert re.search(found, done.stdout)
    assert Image.open(tmp_path / "sheet.png").width > 100


# ---- a large family


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    return write_tiny_sdxl(tmp_path_factory.mktemp("model") / "tiny-xl.safetensors")


def test_a_large_controlnet_with_all_that_is_cached_has_two_rates(train, pairs, large, tmp_path):
    """Steps of an optimizer whose first step is as long as the rate, so that files show rates.

    What is copied has no gradient before the first step, as all that the ControlNet adds is zero.
    """
    more = {"cache_latents": True, "cache_text_encoder_outputs": True, "learning_rate": 1e-4, "control_net_lr": 1e-3}
    more |= {"optimizer_type": "AdamW", "optimizer_args": ["weight_decay=0"], "max_train_steps": 1}
    more |= {"script": "sdxl_train_control_net.py", "base": large}
    first = train(tmp_path / "first", **more, sample_prompts=pairs / "prompts.txt", sample_every_n_steps=1)
    second = train(tmp_path / "second", **more, controlnet_model_name_or_path=first.file, blocks_to_swap=2)
    moved = {"added": 0.0, "copied": 0.0}
    for key, tensor in second.weights.items():
        kind = "added" if key.startswith("controlnet_") else "copied"
        moved[kind] = max(moved[kind], (tensor - first.weights[key]).abs().max().item())
    assert moved == {"added": pytest.approx(1e-3, rel=0.01), "copied": pytest.approx(1e-4, rel=0.01)}
    with safe_open(second.file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/controlnet"
    assert metadata["modelspec.title"] == "net"
    assert not any(key.startswith("ss_") for key in metadata)
    assert len(images_of(first)) == 2


# ---- ControlNet-LLLite

LLLITE = {"script": "sdxl_train_control_net_lllite.py", "network_dim": 8, "cond_emb_dim": 8, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def lllite(train, pairs, large, tmp_path_factory) -> SimpleNamespace:
    """A run with everything cached, dropout, sample images, states, an average and validation."""
    more = {"cache_latents": True, "cache_text_encoder_outputs": True, "ema": True, "validation_split": 0.25}
    more |= {"validate_every_n_steps": 2, "save_state": True, "save_every_n_steps": 2, "network_dropout": 0.1}
    more |= {"gradient_checkpointing": True, "disable_mmap_load_safetensors": True}
    out = tmp_path_factory.mktemp("lllite")
    run = train(out, base=large, **LLLITE, **more, **SAMPLES, sample_prompts=pairs / "prompts.txt")
    return SimpleNamespace(options=more, **vars(run))


@pytest.mark.rows("R332", "R333")
def test_a_lllite_learns_and_acts_where_there_is_a_control_image(lllite):
    images = images_of(lllite)
    assert np.array_equal(images["000000_00"], images["000000_01"])
    assert np.array_equal(images["000004_01"], images["000000_01"])
    assert not np.array_equal(images["000004_00"], images["000000_00"])
    before = load_file(lllite.file.parent / "net-step00000002.safetensors")
    still = {key.partition(".")[0] for key in before if torch.equal(before[key], lllite.weights[key])}
    assert all("middle_block" in name and "attn1_to_" in name for name in still), still  # one position, seen by itself
    assert {key.partition(".")[2] for key in before} >= {"conditioning1.0.weight", "down.0.bias", "mid.0.weight"}
    with safe_open(lllite.file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/control-net-lllite"
    assert lllite.said.count("validation loss") == 2


def test_a_resumed_lllite_is_the_same(lllite, train, large, tmp_path):
    state = lllite.file.parent / "net-step00000002-state"
    again = train(tmp_path, base=large, **LLLITE, **lllite.options, resume=state)
    assert furthest(again.weights, lllite.weights) == 0


def test_a_lllite_goes_on_from_its_file(lllite, train, large, tmp_path):
    """With the widths of the file; other ones are refused before the model is read."""
    kept = {**LLLITE, "network_dim": None, "cond_emb_dim": None, "network_weights": lllite.file, "base": large}
    again = train(tmp_path, **{**kept, "learning_rate": 1e-12, "max_train_steps": 1}, fp8_base=True)
    assert furthest(again.weights, lllite.weights) < 1e-9
    said = train(tmp_path / "no", **{**kept, "network_dim": 4}, status=2).said
    assert "its --network_dim is 8, not 4; leave the option out" in said
    assert "loaded " not in said
