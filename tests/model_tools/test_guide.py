"""The commands of the guide's section on network files run as printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.model_tools.files import assert_same_changes, changes, lora_tensors, write

ROOT = Path(__file__).resolve().parents[2]
TEXT = {"lora_te_text_model_encoder_layers_0_mlp_fc1": (256, 64)}
BLOCK = {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (40, 30)}
FUSED = {"lora_unet_double_blocks_0_img_attn_qkv": (48, 20), "lora_unet_single_blocks_0_linear2": (16, 20)}


def commands() -> list[str]:
    text = (ROOT / "docs" / "model_tools.md").read_text("utf-8")
    section = text.partition("## Network files\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```\n(.*?)^```$", section, re.M | re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def test_the_commands(run_script, tmp_path):
    """In a folder with the files that they name; asking for words is left out, as it takes a minute."""
    write(tmp_path / "style.safetensors", lora_tensors(1, rank=16, shapes=TEXT | BLOCK))
    write(tmp_path / "character.safetensors", lora_tensors(2, rank=8, shapes=TEXT | BLOCK))
    write(tmp_path / "dylora.safetensors", lora_tensors(3, rank=12, shapes=BLOCK))
    write(tmp_path / "flux.safetensors", lora_tensors(4, rank=4, shapes=FUSED))
    found = [command for command in commands() if "lora_interrogator" not in command]
    assert len(found) == 9
    for command in found:
        python, script, *arguments = shlex.split(command)
        assert python == "python"
        done = run_script(str(ROOT / script), *arguments, folder=tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert sorted(path.name for path in tmp_path.glob("small*")) == ["small-0004.safetensors", "small-0008.safetensors"]
    parts = [changes(tmp_path / f"{name}.safetensors") for name in ("style", "character")]
    both = {layer: 0.7 * parts[0][layer] + 0.5 * parts[1][layer] for layer in parts[0]}
    assert_same_changes(changes(tmp_path / "both.safetensors"), both)
    again, before = load_file(tmp_path / "flux-again.safetensors"), load_file(tmp_path / "flux.safetensors")
    assert again.keys() == before.keys()
    assert all((again[name] == before[name]).all() for name in before)


@pytest.mark.parametrize("name", ["lora_interrogator", "merge_lora", "svd_merge_lora", "convert_flux_lora"])
def test_a_script_has_its_place_in_the_guide(name):
    assert any(f"networks/{name}.py" in command for command in commands())
