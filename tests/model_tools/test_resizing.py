"""Network files at another rank, against numpy's SVD of the whole change."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from library.model_tools import resizing
from library.options import validation
from tests.model_tools.files import SHAPES, assert_same_changes, changes, lora_tensors, write
from tests.model_tools.tools import options

KERNEL = "lora_unet_down_blocks_1_resnets_0_conv1"
WORKED = torch.tensor([10.95, 7.09, 5.49, 3.29])  # singular values of one layer


def resize(model: str, out: Path, *arguments: object) -> None:
    resizing.resize_lora(options("resize_lora", "--model", model, "--save_to", out, *arguments))


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_to_its_own_rank_it_is_itself(tmp_path):
    path = write(tmp_path / "in.safetensors", lora_tensors(rank=4, alpha=3.0))
    resize(path, tmp_path / "out.safetensors", "--new_rank", 4)
    assert_same_changes(changes(tmp_path / "out.safetensors"), changes(path))
    assert load_file(tmp_path / "out.safetensors").keys() == load_file(path).keys()


@pytest.mark.parametrize(("rank", "conv_rank"), [(2, None), (3, 1), (1, 4)])
def test_it_is_the_best_of_its_rank(tmp_path, rank, conv_rank):
    path = write(tmp_path / "in.safetensors", lora_tensors(rank=5, alpha=7.0))
    more = [] if conv_rank is None else ["--new_conv_rank", conv_rank]
    resize(path, tmp_path / "out.safetensors", "--new_rank", rank, *more)
    for layer, whole in changes(path).items():
        own = (conv_rank or rank) if layer == KERNEL else rank
        u, s, vh = np.linalg.svd(whole.double().flatten(1).numpy(), full_matrices=False)
        best = u[:, :own] * s[:own] @ vh[:own]
        new = changes(tmp_path / "out.safetensors")[layer]
        np.testing.assert_allclose(new.flatten(1), best, atol=1e-5 * s[0])
        entry = load_file(tmp_path / "out.safetensors")
        assert len(entry[f"{layer}.lora_down.weight"]) == own
        assert float(entry[f"{layer}.alpha"]) == pytest.approx(7.0 / 5 * own)


def test_a_larger_rank_is_filled_with_zeros_up_to_the_layers_size(tmp_path):
    path = write(tmp_path / "in.safetensors", lora_tensors(rank=2))
    resize(path, tmp_path / "out.safetensors", "--new_rank", 9)
    assert_same_changes(changes(tmp_path / "out.safetensors"), changes(path))
    ranks = {layer: len(load_file(tmp_path / "out.safetensors")[f"{layer}.lora_down.weight"]) for layer in SHAPES}
    assert list(ranks.values()) == [9, 8, 9, 8]


@pytest.mark.parametrize(
    ("method", "parameter", "rank"),
    # One less than sd-scripts, which keeps one singular value more than these rules ask for.
    [("sv_ratio", 3, 3), ("sv_cumulative", 0.5, 2), ("sv_fro", 0.8, 2)],
)
def test_dynamic_ranks_of_a_worked_example(method, parameter, rank):
    assert resizing.DYNAMIC_METHODS[method](WORKED, parameter) == rank


@pytest.mark.parametrize("method", resizing.DYNAMIC_METHODS)
def test_dynamic_ranks_at_their_limits(method):
    rank = resizing.DYNAMIC_METHODS[method]
    assert rank(torch.zeros(4), 1) == 1
    assert rank(WORKED, 1) == (1 if method == "sv_ratio" else 4)
    assert rank(torch.ones(4), {"sv_ratio": 2, "sv_cumulative": 0.5, "sv_fro": 0.5**0.5}[method]) == (
        4 if method == "sv_ratio" else 2
    )


@pytest.mark.parametrize(
    ("method", "parameter"), [("sv_ratio", 2.5), ("sv_cumulative", 0.7), ("sv_fro", 0.9), ("sv_fro", 0.99)]
)
def test_dynamic_ranks_of_a_file(tmp_path, method, parameter):
    """Each rule as it is put in the help, on numpy's singular values."""
    path = write(tmp_path / "in.safetensors", lora_tensors(rank=6))
    arguments = ["--new_rank", 5, "--dynamic_method", method, "--dynamic_param", parameter]
    resize(path, tmp_path / "out.safetensors", *arguments)
    found = load_file(tmp_path / "out.safetensors")
    for layer, whole in changes(path).items():
        s = np.linalg.svd(whole.double().flatten(1).numpy(), compute_uv=False)
        kept = {
            "sv_ratio": [n for n in range(1, 7) if n == 6 or s[n] <= s[0] / parameter],
            "sv_cumulative": [n for n in range(1, 7) if s[:n].sum() >= parameter * s.sum()],
            "sv_fro": [n for n in range(1, 7) if np.linalg.norm(s[:n]) >= parameter * np.linalg.norm(s)],
        }[method][0]
        assert len(found[f"{layer}.lora_down.weight"]) == min(kept, 5)
    metadata = metadata_of(tmp_path / "out.safetensors")
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("Dynamic", "Dynamic")


def test_dora_keeps_its_magnitudes_and_tucker_form_becomes_plain(tmp_path):
    tensors = lora_tensors(dora=True)
    layer = "lora_unet_up_blocks_0_resnets_0_conv1"
    rng = torch.Generator().manual_seed(0)
    shapes = {"lora_down": (3, 6, 1, 1), "lora_mid": (3, 3, 3, 3), "lora_up": (10, 3, 1, 1)}
    tensors |= {f"{layer}.{name}.weight": torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    tensors[f"{layer}.alpha"] = torch.tensor(6.0)
    tensors["lora_unet_conv_norm_out.w_norm"] = torch.randn(4, generator=rng)
    path = write(tmp_path / "in.safetensors", tensors)
    resize(path, tmp_path / "out.safetensors", "--new_rank", 3)
    found = load_file(tmp_path / "out.safetensors")
    assert f"{layer}.lora_mid.weight" not in found
    for name, tensor in tensors.items():
        if name.endswith(("dora_scale", "w_norm")):
            assert torch.equal(found[name], tensor)
    del tensors["lora_unet_conv_norm_out.w_norm"], found["lora_unet_conv_norm_out.w_norm"]
    assert_same_changes(
        changes(write(tmp_path / "a.safetensors", found)), changes(write(tmp_path / "b.safetensors", tensors))
    )


def test_files_of_peft_keep_their_layout_and_what_they_compute(tmp_path):
    """Rank 3 and alpha 6, which is in diffusers' metadata alone; PEFT itself says what the file does."""
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict

    torch.manual_seed(0)
    model = nn.ModuleDict({"to_q": nn.Linear(8, 8), "to_k": nn.Linear(8, 6)})
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_k"], init_lora_weights=False)
    inject_adapter_in_model(config, model)
    state = {f"transformer.{name}": tensor for name, tensor in get_peft_model_state_dict(model).items()}
    about = {"lora_adapter_metadata": json.dumps({"transformer.r": 3, "transformer.lora_alpha": 6})}
    path = write(tmp_path / "in.safetensors", state, about)
    resize(path, tmp_path / "out.safetensors", "--new_rank", 3)
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == state.keys()
    assert "lora_adapter_metadata" not in metadata_of(tmp_path / "out.safetensors")
    x = torch.randn(4, 8)
    expected = [model[name](x) for name in ("to_q", "to_k")]
    plain = nn.ModuleDict({name: model[name].base_layer for name in ("to_q", "to_k")})
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=3, target_modules=["to_q", "to_k"]), plain)
    set_peft_model_state_dict(plain, {name.removeprefix("transformer."): t for name, t in found.items()})
    for name, outputs in zip(("to_q", "to_k"), expected, strict=True):
        torch.testing.assert_close(plain[name](x), outputs, atol=1e-5, rtol=1e-5)


@pytest.mark.rows("R466")
@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_metadata_and_its_hashes_are_of_what_is_saved(tmp_path, precision, dtype):
    arguments = json.dumps({"conv_dim": "3", "conv_alpha": "1"})
    about = {"ss_training_comment": "mine", "ss_network_dim": "3", "ss_network_args": arguments, "ss_steps": "7"}
    path = write(tmp_path / "in.safetensors", lora_tensors(rank=3, alpha=3.0), about)
    out = tmp_path / "out.safetensors"
    resize(path, out, "--new_rank", 2, "--new_conv_rank", 1, "--save_precision", precision)
    found, content = metadata_of(out), out.read_bytes()
    assert found["ss_training_comment"] == "resized from rank 3 to 2; mine"
    assert (found["ss_network_dim"], found["ss_network_alpha"], found["ss_steps"]) == ("2", "2.0", "7")
    assert json.loads(found["ss_network_args"]) == {"conv_dim": "1", "conv_alpha": "1.0"}
    start = 8 + int.from_bytes(content[:8], "little")
    assert found["sshs_model_hash"] == hashlib.sha256(content[start:]).hexdigest()
    assert {tensor.dtype for tensor in load_file(out).values()} == {dtype}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model is required"),
        (["--dynamic_method", "sv_fro"], "go together"),
        (["--dynamic_param", "0.5"], "go together"),
        (["--dynamic_method", "sv_fro", "--dynamic_param", "90"], "at most 1 for sv_fro, got 90"),
        (["--dynamic_method", "sv_ratio", "--dynamic_param", "0.5"], "at least 1 for sv_ratio"),
    ],
)
def test_options_that_do_not_fit(arguments, message):
    assert any(message in line for line in validation.problems(options("resize_lora", *arguments), None))


@pytest.mark.rows("R505")
def test_an_option_of_sd_scripts_that_has_no_effect_here():
    lines = list(validation.warnings(options("resize_lora", "--svd_lowrank_niter", 4), None))
    assert lines == ["--svd_lowrank_niter has no effect: singular values are exact here, and faster"]
    assert not list(validation.warnings(options("resize_lora"), None))


# ---- the script


def test_the_script(run_script, tmp_path):
    path = write(tmp_path / "in.safetensors", lora_tensors(rank=4))
    out = tmp_path / "new folder" / "out.safetensors"
    done = run_script("networks/resize_lora.py", f"--model={path}", f"--save_to={out}", "--new_rank=2", "--verbose")
    assert done.returncode == 0, done.stderr
    assert f"{KERNEL}: rank 4 -> 2, Frobenius norm kept" in done.stderr
    assert "4 layers of rank 2; Frobenius norm kept" in done.stderr
    assert len(load_file(out)) == 12


def _mistaken(tmp_path: Path) -> dict[str, tuple[str, str]]:
    whole = {"model.diffusion_model.out.2.weight": torch.ones(2, 2)}
    hada = {f"lora_unet_a.hada_w{end}": torch.ones(2, 2) for end in ("1_a", "1_b", "2_a", "2_b")}
    broken = tmp_path / "cut.safetensors"
    broken.write_bytes(Path(write(tmp_path / "whole.safetensors", lora_tensors())).read_bytes()[:-100])
    nan = lora_tensors() | {f"{KERNEL}.lora_up.weight": torch.full((10, 3, 1, 1), float("nan"))}
    alone = lora_tensors()
    del alone[f"{KERNEL}.lora_up.weight"]
    return {
        "model": (write(tmp_path / "1.safetensors", whole), "this is a whole model"),
        "loha": (write(tmp_path / "2.safetensors", hada), "lora_unet_a is LoHa; only LoRA, LoCon"),
        "cut": (str(broken), "cut short"),
        "nan": (write(tmp_path / "3.safetensors", nan), f"{KERNEL}.lora_up.weight: 30 of 30 values are NaN"),
        "half": (write(tmp_path / "4.safetensors", alone), f"holds {KERNEL}.lora_down.weight, which is not LoRA"),
        "missing": (str(tmp_path / "none.safetensors"), "none.safetensors"),
    }


@pytest.mark.parametrize("case", ["model", "loha", "cut", "nan", "half", "missing"])
def test_a_wrong_file_is_one_line_and_the_old_result_stays(run_script, tmp_path, case):
    path, message = _mistaken(tmp_path)[case]
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"as it was")
    done = run_script("networks/resize_lora.py", f"--model={path}", f"--save_to={out}")
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert out.read_bytes() == b"as it was"


@pytest.mark.skipif(sys.platform == "win32", reason="sets a limit that Windows has not")
def test_no_room_for_the_result(run_script, tmp_path):
    path = write(tmp_path / "in.safetensors", lora_tensors())
    code = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000));"
        "sys.argv = ['resize_lora.py', *sys.argv[1:]]; runpy.run_path('networks/resize_lora.py', run_name='__main__')"
    )
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"as it was")
    done = run_script("-c", code, f"--model={path}", f"--save_to={out}")
    assert done.returncode == 2, done.stderr
    assert f"error: {out}: cannot be written (" in done.stderr.splitlines()[-1]
    assert out.read_bytes() == b"as it was"
    assert sorted(os.listdir(tmp_path)) == ["in.safetensors", "out.safetensors"]
