"""The small inference scripts, as users run them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from library.families.flux.minimal import FluxMinimalOptions
from library.families.sd3.minimal import Sd3MinimalOptions
from library.families.sdxl.minimal import SdxlMinimalOptions
from library.generation.minimal import groups_of, run
from library.runtime.logs import LOGGER
from tests.builders.flux import WIDTH, write_flux, write_part_files
from tests.builders.options import options_with
from tests.builders.sd3 import write_tiny_sd3
from tests.builders.sdxl import write_tiny_sdxl

T5_VOCABULARY = 32128  # of the tokenizer that is bundled


@pytest.fixture(scope="module")
def flux_files(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("flux")
    place = "lora_unet_double_blocks_0_img_attn_qkv"
    torch.manual_seed(0)
    network = {f"{place}.lora_down.weight": torch.randn(2, WIDTH), f"{place}.lora_up.weight": torch.randn(3 * WIDTH, 2)}
    save_file(network, folder / "lora-flux-name.safetensors")
    return write_flux(folder, "dev"), write_part_files(folder, T5_VOCABULARY)


@pytest.fixture
def draw_here(tmp_path, monkeypatch):
    """Runs a script in this process, and gives its exit status and the images it made, in their order."""
    monkeypatch.setattr(LOGGER, "handlers", [])

    def draw(options, family: str, *words: str) -> tuple[int, list[Path]]:
        status: object = 0
        try:
            run("Generates.", groups_of(options), family, argv=[f"--output_dir={tmp_path / 'out'}", *words])
        except SystemExit as end:
            status = end.code
        assert isinstance(status, int)
        return status, sorted((tmp_path / "out").iterdir()) if (tmp_path / "out").is_dir() else []

    return draw


@pytest.mark.rows("C60", "R1", "R2", "R427")
def test_the_published_flux_command(run_script, flux_files, tmp_path):
    model, parts = flux_files
    words = ["--ckpt", model, "--clip_l", parts["clip_l"], "--t5xxl", parts["t5xxl"], "--ae", parts["ae"]]
    words += ["--dtype", "bf16", "--prompt", "a cat holding a sign that says hello world", "--out", tmp_path, "--seed"]
    words += ["1", "--flux_dtype", "fp8", "--offload", "--lora", f"{model.parent / 'lora-flux-name.safetensors'};1.0"]
    result = run_script("flux_minimal_inference.py", *words, "--width=64", "--height=64", "--steps=1")
    assert result.returncode == 0, result.stderr
    assert "kept in fp8" in result.stderr
    (path,) = tmp_path.glob("*.png")
    with Image.open(path) as image:
        assert image.size == (64, 64)
        assert (image.text["seed"], image.text["guidance"], image.text["scale"]) == ("1", "3.5", "1.0")
        assert "<lora:lora-flux-name:1>" in image.text["parameters"]


@pytest.mark.rows("R322")
def test_oft_of_flux_is_drawn_with(draw_here, flux_files):
    """In the layout of `networks.oft_flux`: blocks of each module of a fused layer, by number."""
    model, parts = flux_files
    place = "oft_unet_double_blocks_0_img_attn_qkv"
    blocks = {f"{place}.oft_blocks.{number}": torch.randn(4, 16, 16) for number in range(3)}
    save_file({**blocks, f"{place}.alpha": torch.tensor(1.0)}, model.parent / "oft.safetensors")
    given = [f"--{name}={value}" for name, value in {**parts, "ckpt_path": model, "prompt": "a cat"}.items()]
    drawn = []
    for strength in (1.0, 0.0):
        words = [*given, "--dtype=fp32", "--width=64", "--height=64", "--steps=1", "--seed=1"]
        words.append(f"--lora={model.parent / 'oft.safetensors'};{strength}")
        status, found = draw_here(FluxMinimalOptions, "flux", *words)
        assert status == 0
        with Image.open(found[-1]) as image:
            drawn.append(image.tobytes())
        found[-1].unlink()
    assert drawn[0] != drawn[1]


@pytest.mark.rows("R453")
def test_sd3_asks_for_prompts(draw_here, tmp_path, monkeypatch):
    """Without T5, whose output is zeros then."""
    model = write_tiny_sd3(tmp_path / "sd3.safetensors", encoders=("te1", "te2"))
    monkeypatch.setattr("sys.stdin", io.StringIO("a {red} cat --w 96 --d 7 --s 1\nb --n - --c 2 --m 0.5 --s 2\n"))
    words = [f"--ckpt_path={model}", "--width=64", "--height=64", "--negative_prompt=ugly", "--interactive"]
    status, (first, second) = draw_here(Sd3MinimalOptions, "sd3", *words)
    assert status == 0
    with Image.open(first) as one, Image.open(second) as two:
        assert (one.size, two.size) == ((96, 64), (64, 64))
        assert (one.text["seed"], one.text["negative-prompt"], one.text["scale"]) == ("7", "ugly", "5.0")
        assert (two.text["negative-prompt"], two.text["scale"], two.text["steps"]) == ("", "2.0", "2")


def test_sdxl_asks_for_prompts(draw_here, tmp_path, monkeypatch):
    """What the second prompt does is compared with diffusers elsewhere."""
    model = write_tiny_sdxl(tmp_path / "xl.safetensors")
    monkeypatch.setattr("sys.stdin", io.StringIO("a cat --w 64 --h 64 --s 1 --d 3\n"))
    words = [f"--ckpt_path={model}", "--interactive", "--prompt2=a blue house"]
    status, (path,) = draw_here(SdxlMinimalOptions, "sdxl", *words)
    assert status == 0
    with Image.open(path) as one:
        assert (one.text["sampler"], one.text["seed"]) == ("euler", "3")


def test_files_and_strengths_of_networks():
    group = options_with(FluxMinimalOptions, lora_weights=["a.safetensors;0.8", "b.safetensors", "c;d.safetensors;-1"])
    assert group.minimal.networks() == (["a.safetensors", "b.safetensors", "c;d.safetensors"], [0.8, 1.0, -1.0])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--lora_weights", "a;much"], "--lora_weights: 'much' behind the semicolon of 'a;much' is no number"),
        (["--model_type=chroma"], "--model_type: chroma is not supported"),
        (["--dtype=int4"], "--dtype: must be bf16, fp16 or fp32, got 'int4'"),
        (["--flux_dtype=int4"], "--flux_dtype: is no dtype that is known here: 'int4'"),
        (["--width=100"], "--width: must be a multiple of 16 with FLUX.1, got 100; 96 and 112 are nearest"),
        (["--lora_weights", "gone.safetensors"], "--lora_weights: gone.safetensors: no such file"),
        (["--ae=gone.safetensors"], "--ae: there is no file 'gone.safetensors'"),
        (["--ckpt_path=gone.safetensors"], "--ckpt_path: gone.safetensors: no such file or folder"),
    ],
)
def test_mistakes_are_one_line(draw_here, flux_files, capsys, words, line):
    model, parts = flux_files
    given = {"--ckpt_path": str(model), **{f"--{name}": path for name, path in parts.items()}}
    given = {name: value for name, value in given.items() if not words[0].startswith(f"{name}=")}
    status, found = draw_here(FluxMinimalOptions, "flux", *(f"{n}={v}" for n, v in given.items()), *words)
    assert (status, found) == (2, [])
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") <= 3
