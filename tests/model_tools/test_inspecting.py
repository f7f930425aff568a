"""What the small tools say about network files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library import cli
from library.errors import UserError
from library.model_tools import inspecting
from tests.model_tools.files import changes, lora_tensors, write
from tests.model_tools.tools import options

ROOT = Path(__file__).resolve().parents[2]
MODEL = "examples/tiny_model/tiny-sd.safetensors"
MINE = (
    "check_lora_weights",
    "convert_flux_lora",
    "convert_lora",
    "extract_lora_from_dylora",
    "lora_interrogator",
    "resize_lora",
    "svd_merge_lora",
)


@pytest.mark.parametrize("script", MINE)
def test_a_script_starts_in_a_process_of_its_own(script):
    """Its folder has packages named types and select, which must not be taken for Python's."""
    done = subprocess.run(
        [sys.executable, f"networks/{script}.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {script}.py")


def test_weights_are_shown(run_script, tmp_path):
    shapes = {"lora_unet_a": (4, 3), "lora_unet_b": (5, 4, 3, 3)}
    tensors = lora_tensors(rank=2, shapes=shapes)
    path = write(tmp_path / "a b.safetensors", tensors, {"ss_network_dim": "2"})
    done = run_script("networks/check_lora_weights.py", path)
    assert done.returncode == 0, done.stderr
    down = tensors["lora_unet_a.lora_down.weight"].abs()
    expected = f"lora_unet_a.lora_down.weight: 2x3 float32, mean |x| {down.mean():.4g}, max |x| {down.max():.4g}"
    assert expected in done.stdout.splitlines()
    assert "2 layers: 2 LoRA" in done.stdout
    assert "ss_network_dim: 2" in done.stdout
    assert "alpha" not in done.stdout.replace("ss_network_alpha", "")
    done = run_script("networks/check_lora_weights.py", path, "-s")
    assert "lora_unet_a.alpha: number float32, mean |x| 2, max |x| 2" in done.stdout


def test_what_is_wrong_with_weights(capsys, tmp_path):
    tensors = lora_tensors(shapes={"lora_unet_a": (4, 3)}) | {"lora_unet_a.alpha": torch.tensor(float("inf"))}
    path = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(UserError, match=r"1 tensors hold NaN or infinite values, the first is lora_unet_a\.alpha"):
        inspecting.check_weights(options("check_lora_weights", path))
    assert "lora_unet_a.alpha: number float32, mean |x| inf" in capsys.readouterr().out
    other = write(tmp_path / "b.safetensors", {"model.diffusion_model.out.2.weight": torch.ones(2)})
    with pytest.raises(UserError, match=r"has no layer of a network\. Its names are those of a whole model"):
        inspecting.check_weights(options("check_lora_weights", other))


@pytest.mark.parametrize("clip_skip", [None, 2])
def test_the_words_of_a_network(capsys, monkeypatch, tmp_path, clip_skip):
    """Against transformers' own encoder, whose weights are changed by hand. A few hundred tokens, for time."""
    shapes = {"lora_te_text_model_encoder_layers_0_mlp_fc1": (256, 64)}
    path = write(tmp_path / "a.safetensors", lora_tensors(shapes=shapes))
    words = inspecting._words
    monkeypatch.setattr(inspecting, "_words", lambda tokenizer: words(tokenizer)[1000:1300])
    more = [] if clip_skip is None else ["--clip_skip", clip_skip]
    inspecting.interrogate(
        options("lora_interrogator", "--sd_model", MODEL, "--model", path, "--batch_size", 64, *more)
    )
    lines = capsys.readouterr().out.splitlines()
    found = [re.fullmatch(r"\[ *(\d+)\] +(\d+) (\S+) +([\d.]+)", line).groups() for line in lines[1:]]
    assert len(found) == 100
    _, models = cli.load_family("sd", [f"--pretrained_model_name_or_path={MODEL}"])
    encoder, tokenizer = models.text_encoders["te"], models.tokenizers["te"]
    ids = torch.tensor([[49406, token, 49407] for token in range(1000, 1300)])

    def states() -> torch.Tensor:
        with torch.no_grad():
            hidden = encoder(ids, output_hidden_states=True).hidden_states[-(clip_skip or 1)]
            norm = next(module for name, module in encoder.named_modules() if name.endswith("final_layer_norm"))
            return norm(hidden)[:, 1:]

    before = states()
    layer = next(module for name, module in encoder.named_modules() if name.endswith("layers.0.mlp.fc1"))
    layer.weight.data += next(iter(changes(path).values()))
    expected = (states() - before).abs().mean((1, 2))
    order = expected.argsort(descending=True)[:100] + 1000
    assert [int(token) for _, token, _, _ in found] == order.tolist()
    assert [name for _, _, name, _ in found] == tokenizer.convert_ids_to_tokens(order.tolist())
    sizes = torch.tensor([float(size) for *_, size in found])
    torch.testing.assert_close(sizes, expected[order - 1000], atol=2e-5, rtol=0)


def test_a_network_without_text_encoders_has_no_words(tmp_path):
    path = write(tmp_path / "a.safetensors", lora_tensors(shapes={"lora_unet_a": (4, 3)}))
    with pytest.raises(UserError, match="adapts no text encoder"):
        inspecting.interrogate(options("lora_interrogator", "--sd_model", MODEL, "--model", path))
