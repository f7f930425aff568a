"""Control LoRAs of FLUX.1 from the outside: drawing with one, merging it, what it is, and why it is not trained on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.builders.flux import IN_CHANNELS, control_lora, flux_tensors, write_flux, write_part_files
from tests.scripts.starting import as_words


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(folder, words that name the model's files)"""
    folder = tmp_path_factory.mktemp("flux")
    parts = write_part_files(folder, vocabulary=32128)  # that of the tokenizer that is bundled
    write_flux(folder)
    control_lora(folder / "canny.safetensors")
    for number, name in enumerate(("edges", "other")):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder, {name: path for name, path in parts.items() if name in ("clip_l", "t5xxl", "ae")}


def test_images_are_drawn_by_a_control_image(run_script, files, tmp_path):
    """That of --guide_image_path, or of --cn in the prompt; at a strength of 0 it is not seen."""
    folder, parts = files
    (tmp_path / "p.txt").write_text(f"a cat --f one\na cat --f two --cn {folder / 'other.png'}\na cat --am 0 --f off\n")
    given = {**parts, "ckpt": folder / "dev.safetensors", "network_weights": folder / "canny.safetensors", "steps": 2}
    given |= {"W": 64, "H": 64, "seed": 1, "from_file": tmp_path / "p.txt", "iter_same_seed": True, "outdir": tmp_path}
    given |= {"t5xxl_max_token_length": 16, "guide_image_path": folder / "edges.png"}
    done = run_script("gen_img.py", *as_words(given))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "canny.safetensors: 48 layers act; 0 have no place in this model" in done.stderr
    one, two, off = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("one", "two", "off"))
    assert np.abs(one - two).max() > 0
    assert np.abs(one - off).max() > 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ({"network_weights": "canny.safetensors"}, "no control image: give --guide_image_path, or --cn in the prompt"),
        (
            {"guide_image_path": "edges.png"},
            "--guide_image_path: nothing reads it; give --control_net_models, or a control",
        ),
    ],
)
def test_what_is_missing_is_one_line(run_script, files, tmp_path, words, line):
    folder, parts = files
    given = {**parts, "ckpt": folder / "dev.safetensors", "prompt": "a cat", "outdir": tmp_path / "out"}
    done = run_script("gen_img.py", *as_words({**given, **{name: folder / path for name, path in words.items()}}))
    assert done.returncode in (1, 2)
    assert line in done.stderr
    assert "Traceback" not in done.stderr


def test_it_is_merged_into_a_model_with_more_inputs(run_script, files, tmp_path):
    folder, _ = files
    given = {"flux_model": folder / "dev.safetensors", "models": [folder / "canny.safetensors"]}
    done = run_script("networks/flux_merge_lora.py", *as_words({**given, "save_to": tmp_path / "merged.safetensors"}))
    assert done.returncode == 0, done.stderr[-3000:]
    merged, base, network = (
        load_file(tmp_path / "merged.safetensors"),
        flux_tensors(),
        load_file(folder / "canny.safetensors"),
    )
    assert merged.keys() == base.keys()
    wide = torch.nn.functional.pad(base["img_in.weight"], (0, IN_CHANNELS))
    for layer, own in (("img_in", wide), ("single_blocks.1.linear1", base["single_blocks.1.linear1.weight"])):
        expected = own + network[f"{layer}.lora_B.weight"] @ network[f"{layer}.lora_A.weight"]
        torch.testing.assert_close(merged[f"{layer}.weight"], expected, rtol=1e-5, atol=1e-5)
        bias = base[f"{layer}.bias"] + network[f"{layer}.lora_B.bias"]
        torch.testing.assert_close(merged[f"{layer}.bias"], bias, rtol=1e-5, atol=1e-6)
    name = "double_blocks.1.txt_attn.norm.key_norm.scale"
    torch.testing.assert_close(merged[name], network[name], rtol=1e-6, atol=1e-6)


def test_what_it_is_and_who_reads_it(run_script, files):
    folder, _ = files
    done = run_script(
        "tools/verify_lora.py", *as_words({"model": folder / "dev.safetensors"}), str(folder / "canny.safetensors")
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "replaced norms" in done.stdout


def test_training_says_why_it_cannot_go_on_with_one_and_merges_it(run_script, files, tmp_path):
    folder, parts = files
    images = tmp_path / "train" / "1_cat"
    images.mkdir(parents=True)
    Image.new("RGB", (64, 64), (200, 90, 120)).save(images / "a.png")
    given = {
        **parts,
        "pretrained_model_name_or_path": folder / "dev.safetensors",
        "train_data_dir": tmp_path / "train",
        "output_dir": tmp_path / "out",
        "output_name": "net",
        "network_module": "networks.lora_flux",
        "network_dim": 2,
        "network_train_unet_only": True,
        "resolution": 64,
        "max_train_steps": 1,
        "max_data_loader_n_workers": 0,
        "t5xxl_max_token_length": 16,
        "cache_latents": True,
    }
    done = run_script("flux_train_network.py", *as_words({**given, "network_weights": folder / "canny.safetensors"}))
    assert done.returncode == 2
    assert (
        "canny.safetensors: is a control LoRA, by which the model reads a control image; training gives" in done.stderr
    )
    assert "Traceback" not in done.stderr
    done = run_script("flux_train_network.py", *as_words({**given, "base_weights": [folder / "canny.safetensors"]}))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "is a control LoRA; there is no control image here, so what 64 of the 128 inputs" in done.stderr
    assert "48 layers merged into the model at 1; 0 layers of the file have no place here" in done.stderr
