"""The scripts that merge and extract networks, as they are started: their command lines, exit statuses and memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.families.registry import TOOLS
from tests.builders.flux import flux_tensors, write_flux
from tests.builders.memory import needs_linux
from tests.scripts.starting import ROOT, as_words

LAYER = "lora_unet_single_blocks_0_linear2"
NAME = "single_blocks.0.linear2.weight"


def write_lora(path, layers=((LAYER, 64, 320),)):
    """LoRA of rank 2 and alpha 1 for layers of some sizes. Returns: the change of the last."""
    rng, tensors = torch.Generator().manual_seed(0), {}
    for layer, out, width in layers:
        down, up = torch.randn(2, width, generator=rng), torch.randn(out, 2, generator=rng)
        own = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.0)}
        tensors |= {f"{layer}.{name}": tensor for name, tensor in own.items()}
    save_file(tensors, path)
    return 0.5 * up @ down


@pytest.mark.parametrize("script", TOOLS)
def test_a_script_starts_from_any_folder_without_torch(script, tmp_path):
    """Python puts a script's folder first, and `networks` has packages with names of Python's own."""
    path = str(ROOT / f"networks/{script}.py")
    code = f"import runpy, sys; sys.argv = [{path!r}, '--help']; sys.path[0] = {os.path.dirname(path)!r}\n"
    code += f"try: runpy.run_path({path!r}, run_name='__main__')\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "False"), done.stderr


@pytest.mark.rows("C62", "R419", "R422")
def test_the_published_line_for_a_transformer(run_script, tmp_path):
    write_flux(tmp_path).rename(tmp_path / "flux1-dev.safetensors")
    change = write_lora(tmp_path / "lora1.safetensors")
    done = run_script(
        ROOT / "networks/flux_merge_lora.py",
        *("--flux_model", "flux1-dev.safetensors", "--save_to", "output.safetensors"),
        *("--models", "lora1.safetensors", "--ratios", "2.0", "--save_precision", "fp16"),
        *("--loading_device", "cuda", "--working_device", "cpu"),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    before, after = load_file(tmp_path / "flux1-dev.safetensors"), load_file(tmp_path / "output.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    for name, tensor in before.items():
        wanted = tensor + 2 * change if name == NAME else tensor
        torch.testing.assert_close(after[name].float(), wanted, rtol=1e-3, atol=1e-3)


def test_networks_alone_become_one(run_script, tmp_path):
    change = write_lora(tmp_path / "a.safetensors")
    options = {"models": ["a.safetensors"] * 2, "ratios": [0.5, 0.25], "save_to": "both.safetensors", "concat": True}
    done = run_script(ROOT / "networks/sd3_merge_lora.py", *as_words(options), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    both = load_file(tmp_path / "both.safetensors")
    up, down = (both[f"{LAYER}.lora_{side}.weight"] for side in ("up", "down"))
    found = float(both[f"{LAYER}.alpha"]) / len(down) * up @ down
    torch.testing.assert_close(found, 0.75 * change, rtol=1e-5, atol=1e-5)


@pytest.mark.rows("R410")
def test_what_was_merged_is_extracted(run_script, tmp_path):
    write_flux(tmp_path)
    change = write_lora(tmp_path / "lora.safetensors")
    files = {"flux_model": "dev.safetensors", "models": ["lora.safetensors"], "save_to": "tuned.safetensors"}
    done = run_script(ROOT / "networks/flux_merge_lora.py", *as_words(files), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    files = {"model_org": "dev.safetensors", "model_tuned": "tuned.safetensors", "save_to": "again.safetensors"}
    options = {**files, "dim": 2, "clamp_quantile": 1, "mem_eff_safe_open": True}
    done = run_script(ROOT / "networks/flux_extract_lora.py", *as_words(options), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == {f"{LAYER}.{name}" for name in ("lora_up.weight", "lora_down.weight", "alpha")}
    found = again[f"{LAYER}.lora_up.weight"] @ again[f"{LAYER}.lora_down.weight"]
    assert float((found - change).norm()) <= 1e-4 * float(change.norm())
    assert "hold 100.00% of the change" in done.stderr


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("merge_lora", {"models": ["lora.safetensors"], "save_to": None}, "--save_to is required"),
        (
            "merge_lora",
            {"sd_model": "dev.safetensors", "models": ["lora.safetensors"]},
            "this is a FLUX model; a Stable",
        ),
        ("flux_merge_lora", {"flux_model": "dev.safetensors", "models": ["dev.safetensors"]}, "dev.safetensors: holds"),
        ("extract_lora_from_models", {"model_org": "dev.safetensors"}, "--model_tuned"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(script, options, message, run_script, tmp_path):
    write_flux(tmp_path)
    write_lora(tmp_path / "lora.safetensors")
    options = {"save_to": "new.safetensors", **options}
    done = run_script(ROOT / f"networks/{script}.py", *as_words(options), folder=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "new.safetensors").exists()


def test_an_interruption_leaves_no_half_file(start_script, tmp_path):
    """The model is large enough to be met at work; what had the name before is whole."""
    others = {f"vae.{number}": torch.zeros(4_000_000) for number in range(40)}
    save_file({**flux_tensors(double=1, single=1), **others}, tmp_path / "big.safetensors")
    write_lora(tmp_path / "lora.safetensors")
    (tmp_path / "new.safetensors").write_bytes(b"earlier")
    options = {"flux_model": "big.safetensors", "models": ["lora.safetensors"], "save_to": "new.safetensors"}
    line = as_words({**options, "no_metadata": True})
    started = start_script(ROOT / "networks/flux_merge_lora.py", *line, folder=tmp_path)
    while started.is_running() and not any(path.stat().st_size for path in tmp_path.glob(".new.safetensors.*.tmp")):
        time.sleep(0.002)
    os.kill(started.pid, signal.SIGINT)
    done = started.result()
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr
    assert (tmp_path / "new.safetensors").read_bytes() == b"earlier"
    names = ["big.safetensors", "lora.safetensors", "new.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


PEAK = """
import sys, torch
from library.families.registry import TOOLS
from library.model_tools.{module} import {work}
from tests.builders.memory import most_memory
from tests.builders.options import options_with
torch.linalg.svd(torch.randn(8, 8))  # what its libraries take once
opts = options_with(TOOLS[sys.argv[1]], **{values})
print(most_memory(lambda: {work}(opts)))
"""


@pytest.mark.rows("R418", "R420")
@needs_linux
def test_memory_does_not_grow_with_the_model(run_script, tmp_path):
    """A model of 200 MB in 16 bits, whose largest layers have 9 MB in float32."""
    big = {name: tensor.bfloat16() for name, tensor in flux_tensors(double=1, single=20, width=576, head=64).items()}
    size = sum(tensor.nbytes for tensor in big.values())
    save_file(big, tmp_path / "big.safetensors")
    del big
    layers = [(f"lora_unet_single_blocks_{number}_linear1", 7 * 576, 576) for number in range(20)]
    write_lora(tmp_path / "lora.safetensors", layers)
    files = {"flux_model": str(tmp_path / "big.safetensors"), "save_to": str(tmp_path / "new.safetensors")}
    values = {**files, "models": [str(tmp_path / "lora.safetensors")], "mem_eff_load_save": True}
    done = run_script("-c", PEAK.format(module="network_into_model", work="merge", values=values), "flux_merge_lora")
    assert done.returncode == 0, done.stderr
    merging = int(done.stdout)
    files = {"model_org": files["flux_model"], "model_tuned": files["save_to"]}
    values = {**files, "save_to": str(tmp_path / "again.safetensors")}
    code = PEAK.format(module="network_from_models", work="extract", values=values)
    done = run_script("-c", code, "flux_extract_lora")
    assert done.returncode == 0, done.stderr
    extracting = int(done.stdout)
    assert len(load_file(tmp_path / "again.safetensors")) == 60
    assert size > 190e6
    assert (merging < 80e6, extracting < 160e6) == (True, True), (merging, extracting)
