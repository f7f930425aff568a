"""tools/merge_models.py: weighted sums of whole models, against the same sums done plainly."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from library.errors import UserError
from library.model_tools.model_merging import GROUPS, merge_models
from tests.builders.memory import most_memory, needs_linux
from tests.builders.options import options_with

ROOT = Path(__file__).resolve().parents[2]
UNET, TEXT, VAE = (
    "model.diffusion_model.a.weight",
    "cond_stage_model.transformer.b.weight",
    "first_stage_model.c.weight",
)
IDS, LONE = "cond_stage_model.transformer.position_ids", "model.diffusion_model.only_first.bias"


def model(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(6, 5, generator=rng).to(dtype) for name in (UNET, TEXT, VAE, LONE)}
    return {**tensors, IDS: torch.arange(4) + seed}


@pytest.fixture
def files(tmp_path):
    """Three models, of which the second lacks a tensor and has one of its own."""
    models = [model(seed) for seed in range(3)]
    del models[1][LONE]
    models[1]["model.diffusion_model.only_second.bias"] = torch.ones(3)
    paths = [tmp_path / f"m{number}.safetensors" for number in range(3)]
    for tensors, path in zip(models, paths, strict=True):
        save_file(tensors, path, {"modelspec.title": path.stem.upper(), "modelspec.architecture": "some-model"})
    return models, paths


def merge(run_script, paths, out, *more):
    return run_script("tools/merge_models.py", "--models", *paths, "--output", out, *more)


def test_weighted_sum(run_script, files, tmp_path):
    models, paths = files
    out = tmp_path / "out.safetensors"
    done = merge(run_script, paths, out, "--ratios", "0.5", "0.25", "0.25")
    assert done.returncode == 0, done.stderr
    result = load_file(out)
    assert result.keys() == models[0].keys()
    for name in (UNET, TEXT, VAE):
        expected = 0.5 * models[0][name] + 0.25 * models[1][name] + 0.25 * models[2][name]
        assert_close(result[name], expected, rtol=1e-6, atol=1e-6)
    assert_close(result[LONE], 0.75 * models[0][LONE] + 0.25 * models[2][LONE], rtol=1e-6, atol=1e-6)
    assert result[IDS].equal(models[0][IDS])
    assert "1 tensors are not in it" in done.stderr
    assert "only_second" in done.stderr


def test_equal_shares_and_only_the_unet(run_script, files, tmp_path):
    models, paths = files
    out = tmp_path / "out.safetensors"
    assert merge(run_script, paths, out, "--unet_only", "--saving_precision", "fp16").returncode == 0
    result = load_file(out)
    mean = sum(tensors[UNET].double() for tensors in models) / 3
    assert_close(result[UNET].double(), mean, rtol=2**-11, atol=1e-6)
    assert result[TEXT].equal(models[0][TEXT].half())
    assert result[VAE].equal(models[0][VAE].half())
    assert result[IDS].dtype == torch.int64


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_precision_of_the_sums(run_script, files, tmp_path, precision):
    models, paths = files
    out, dtype = tmp_path / "out.safetensors", {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert merge(run_script, paths[:2], out, "--precision", precision, "--ratios", "0.3", "0.7").returncode == 0
    expected = models[0][UNET].to(dtype) * 0.3 + models[1][UNET].to(dtype) * 0.7
    assert load_file(out)[UNET].equal(expected.float())


def test_a_single_model_comes_out_as_it_was(run_script, files, tmp_path):
    _, paths = files
    out = tmp_path / "out.safetensors"
    assert merge(run_script, paths[:1], out).returncode == 0
    assert out.read_bytes() == paths[0].read_bytes()


def test_weights_with_scales_are_merged_as_what_they_mean(run_script, tmp_path):
    weight, other, scale = torch.randn(4, 4), torch.randn(4, 4), torch.tensor(0.5)
    eight = (weight / scale).to(torch.float8_e4m3fn)
    scaled = {"double_blocks.0.x.weight": eight, "double_blocks.0.x.scale_weight": scale}
    save_file({**scaled, "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    save_file({"double_blocks.0.x.weight": other}, tmp_path / "b.safetensors")
    out = tmp_path / "out.safetensors"
    done = merge(run_script, [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], out)
    assert done.returncode == 0, done.stderr
    result = load_file(out)
    assert list(result) == ["double_blocks.0.x.weight"]
    assert_close(result["double_blocks.0.x.weight"], (eight.float() * scale + other) / 2, rtol=1e-6, atol=1e-6)


def test_the_recipe_is_in_the_metadata(run_script, files, tmp_path):
    _, paths = files
    out = tmp_path / "out.safetensors"
    assert merge(run_script, paths[:2], out, "--ratios", "0.25", "0.75").returncode == 0
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    content = out.read_bytes()
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata["modelspec.hash_sha256"] == "0x" + hashlib.sha256(tensors).hexdigest()
    assert metadata["modelspec.merged_from"] == "M0, M1"
    assert metadata["modelspec.architecture"] == "some-model"
    assert metadata["modelspec.title"] == "out"
    recipe = json.loads(metadata["sd_merge_recipe"])
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths[:2]]
    assert recipe["ratios"] == [0.25, 0.75]
    assert recipe["hashes"] == hashes
    assert list(json.loads(metadata["sd_merge_models"])) == hashes
    again = tmp_path / "again.safetensors"
    assert merge(run_script, [out, paths[2]], again).returncode == 0
    with safe_open(again, "pt") as file:
        inputs = json.loads(file.metadata()["sd_merge_models"])
    assert set(hashes) < inputs.keys()  # what the inputs were made from is still known
    assert inputs[hashlib.sha256(content).hexdigest()]["sd_merge_recipe"] == recipe


def broken(tmp_path, name: str) -> Path:
    path = tmp_path / f"{name}.safetensors"
    tensors = model(5)
    if name == "nan":
        tensors[UNET][2, 3] = float("nan")
    elif name == "huge":
        tensors[UNET][2, 3] = 1e6
    elif name == "other shape":
        tensors[UNET] = torch.zeros(6, 9)
    elif name == "other family":
        tensors = {"double_blocks.0.img_mod.lin.weight": torch.zeros(2, 2)}
    elif name == "network":
        tensors = {"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}
    save_file(tensors, path)
    if name == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", "values are NaN or infinite"),
        ("huge", "too large for this precision"),
        ("other shape", "has shape (6, 9), in"),
        ("other family", "this is a FLUX model, and"),
        ("network", "networks/merge_lora.py"),
        ("cut", "cut short"),
        ("missing", "no such file"),
    ],
)
def test_wrong_files_are_one_line_and_the_old_result_stays(run_script, files, tmp_path, name, message):
    _, paths = files
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"earlier")
    wrong = tmp_path / "missing" if name == "missing" else broken(tmp_path, name)
    done = merge(run_script, [paths[0], wrong], out, "--saving_precision", "fp16")
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in done.stderr
    assert out.read_bytes() == b"earlier"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ratios", "1"], "--ratios: 1 for 2 models"),
        (["--ratios", "1", "nan"], "--ratios: must be a finite number"),
        (["--output", "m0.safetensors"], "would replace what is read"),
        (["--output", "out.ckpt"], "must end in .safetensors"),
        (["--device", "nowhere"], "--device: nowhere cannot be used here"),
    ],
)
def test_wrong_options(run_script, files, tmp_path, more, message):
    _, paths = files
    before = paths[0].read_bytes()
    line = ["--models", *paths[:2], "--output", tmp_path / "out.safetensors"]
    done = run_script(ROOT / "tools/merge_models.py", *line, *more, folder=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert paths[0].read_bytes() == before
    assert not (tmp_path / "out.safetensors").exists()


def test_no_room_is_said_before_the_work(files, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    opts = options_with(*GROUPS, models=[str(path) for path in files[1]], output=str(tmp_path / "out.safetensors"))
    with pytest.raises(UserError, match=r"has 0\.00 GB free; make room"):
        merge_models(opts)


LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
sys.argv = ["merge_models.py", *sys.argv[1:]]
runpy.run_path("tools/merge_models.py", run_name="__main__")
"""


@needs_linux
def test_a_disk_that_refuses_leaves_the_old_file(run_script, files, tmp_path):
    """A limit on the size of files stands for a full disk: the system refuses to write more."""
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"earlier")
    done = run_script("-c", LIMITED, "--models", *files[1], "--output", out)
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert out.read_bytes() == b"earlier"
    assert not list(tmp_path.glob(".*"))


@needs_linux
def test_memory_is_that_of_a_few_tensors(tmp_path):
    """Two models of 160 MB, whose tensors have 4 MB each."""
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for number, path in enumerate(paths):
        tensors = {f"model.diffusion_model.{i}.weight": torch.full((1024, 1024), number + i) * 1.0 for i in range(40)}
        save_file(tensors, path)
    out = tmp_path / "out.safetensors"
    opts = options_with(*GROUPS, models=list(map(str, paths)), output=str(out))
    taken = most_memory(lambda: merge_models(opts))
    assert taken < 80e6, f"{taken / 1e6:.0f} MB"
    assert load_file(out)["model.diffusion_model.3.weight"].eq(3.5).all()
