"""tools/verify_lora.py: what it says of sound and broken files, and its numbers against plain products."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from library.families.sd.saving import save_model
from library.model_tools.network_blocks import block_of
from library.model_tools.network_norms import change_norm, product_norm
from library.model_tools.verification import verify
from library.model_tools.verification_output import as_json, drawn, text_lines
from library.types import Models
from networks.files import read
from networks.registry import type_of
from networks.targets import weight_of, weight_shape
from tests.builders import tiny_sd
from tests.builders.flux import write_flux, write_part_files, write_transformer_folder
from tests.builders.networks import TYPES, targets_of, write_network
from tests.networks import dits

SCRIPT = "tools/verify_lora.py"
ALGOS = {
    **TYPES,
    "locon": {"algo": "lora", "conv_dim": "2", "preset": "full"},
    "tucker": {"algo": "lora", "conv_dim": "2", "preset": "full", "use_tucker": "True"},
    "loha tucker": {"algo": "loha", "conv_dim": "2", "preset": "full", "use_tucker": "True"},
    "lokr whole": {"algo": "lokr", "factor": "4", "full_matrix": "True"},
    "full": {"algo": "full"},
    "ia3": {"algo": "ia3", "preset": "ia3"},
    "glora": {"algo": "glora"},
    "oft": {"algo": "diag-oft"},
}


@pytest.fixture(scope="module")
def sd() -> Models:
    return tiny_sd()


@pytest.fixture(scope="module")
def sd_file(sd, tmp_path_factory):
    path = tmp_path_factory.mktemp("sd") / "model.safetensors"
    save_model(sd, path, save_as="safetensors", dtype=None, metadata={})
    return path


@pytest.fixture(scope="module")
def lora(sd, tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    write_network(sd, path, ALGOS["lora"])
    return path


# ---- numbers


@pytest.mark.parametrize("algo", ALGOS)
def test_norms_are_those_of_the_products(sd, sd_file, tmp_path, algo):
    """Against the changes of the weights themselves, in float32: 1e-5."""
    path = tmp_path / "net.safetensors"
    write_network(sd, path, ALGOS[algo])
    report = verify(path, str(sd_file))
    assert report.status == 0, report.errors + report.warnings
    by_key = {target.key: target for target in targets_of(sd, "sd")}
    entries = read(path).matching(by_key.values(), lambda target: [])
    assert {layer.name for layer in report.layers} == entries.keys()
    for layer in report.layers:
        target, entry = by_key[layer.name], entries[layer.name]
        kind = type_of(entry).layer.load()
        weight = weight_of(sd, target)
        change = kind.weight_change(entry, weight_shape(sd, target), lambda weight=weight: weight)
        assert_close(layer.change, float(change.norm()), rtol=1e-5, atol=1e-7)
        assert_close(layer.relative, float(change.norm() / weight.norm()), rtol=1e-5, atol=1e-7)
    alone = {layer.name: layer.change for layer in verify(path).layers}
    needs_weight = algo in ("dora", "ia3", "glora", "oft")
    for layer in report.layers:
        assert alone[layer.name] is None if needs_weight else alone[layer.name] == pytest.approx(layer.change, rel=1e-6)


def test_a_product_is_not_made(monkeypatch):
    up, down = torch.randn(64, 3, dtype=torch.float64), torch.randn(3, 48, dtype=torch.float64)
    assert product_norm(up, down) == pytest.approx(float((up @ down).norm()), rel=1e-12)
    wide = {"lora_up.weight": torch.randn(200_000, 2), "lora_down.weight": torch.randn(2, 200_000)}
    assert change_norm(wide) > 0  # the product would have 40 billion numbers


def test_blocks_add_up(sd_file, lora):
    report = verify(lora, str(sd_file))
    blocks = report.blocks()
    assert [block.name for block in blocks if block.part == "te"] == ["layers 0", "layers 1", "layers 2"]
    order = [block.name for block in blocks if block.part == "unet"]
    assert order[0] == "down_blocks 0.0"
    assert order.index("mid_block") == order.index("up_blocks 1.0") - 1
    whole = sum(layer.change**2 for layer in report.layers)
    assert sum(block.change**2 for block in blocks) == pytest.approx(whole)
    first = [layer for layer in report.layers if layer.block == "down_blocks 0.0"]
    ratio = sum(layer.change**2 for layer in first) / sum(layer.weight**2 for layer in first)
    assert blocks[3].relative == pytest.approx(ratio**0.5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q", ("unet", "down_blocks 0.1")),
        ("lora_unet_mid_block_attentions_0_proj_in", ("unet", "mid_block")),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", ("unet", "input_blocks 4")),
        ("lora_unet_double_blocks_7_img_attn_qkv", ("unet", "double_blocks 7")),
        ("lora_unet_single_transformer_blocks_12_attn_to_q", ("unet", "single_transformer_blocks 12")),
        ("lora_te2_text_model_encoder_layers_31_mlp_fc1", ("te2", "layers 31")),
        ("lora_te3_encoder_block_5_layer_0_SelfAttention_q", ("te3", "block 5")),
        ("lora_unet_img_in", ("unet", "outside blocks")),
        ("oft_unet_joint_blocks_0_x_block_attn_qkv", ("unet", "joint_blocks 0")),
    ],
)
def test_blocks_by_name(name, expected):
    assert block_of(name) == expected


# ---- what it is, and who reads it


def test_flux_file_folder_and_names_of_diffusers(tmp_path):
    """The same network under kohya's names and diffusers', against a file and against a Diffusers folder."""
    denoiser, _ = write_transformer_folder(tmp_path / "folder", shards="600KB")
    (tmp_path / "folder" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    models = Models(denoiser, {}, {}, None)
    kohya = tmp_path / "kohya.safetensors"
    write_network(models, kohya, ALGOS["lora"], "flux")
    file = write_flux(tmp_path)
    first, second = verify(kohya, str(file)), verify(kohya, str(tmp_path / "folder"))
    assert first.status == second.status == 0
    assert {layer.name: layer.relative for layer in first.layers} == pytest.approx(
        {layer.name: layer.relative for layer in second.layers}, rel=1e-6
    )
    assert {name: read for name, (read, _) in first.programs.items()} == {
        "ComfyUI": len(first.layers),
        "Forge": len(first.layers),
        "AUTOMATIC1111": 0,
        "diffusers": len(first.layers),
    }
    single = "single_transformer_blocks.0.attn.to_q"
    rank = {"A": torch.randn(2, 64), "B": torch.randn(64, 2)}
    peft = {f"transformer.{single}.lora_{side}.weight": tensor for side, tensor in rank.items()}
    save_file(peft, tmp_path / "peft.safetensors")
    report = verify(tmp_path / "peft.safetensors", str(file))
    assert report.layout == "diffusers"
    assert [layer.name for layer in report.layers] == ["lora_unet_single_blocks_0_linear1"]
    assert report.layers[0].change == pytest.approx(float((rank["B"] @ rank["A"]).norm()), rel=1e-5)
    assert report.unmatched == []
    alone = verify(tmp_path / "peft.safetensors")
    assert (alone.family, alone.in_file, alone.unmatched) == ("flux", 1, [])


def test_text_encoders_from_files_of_their_own(tmp_path):
    file = write_flux(tmp_path)
    parts = write_part_files(tmp_path)
    down, up = 0.01 * torch.randn(2, 64), torch.randn(64, 2)
    name = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "net.safetensors")
    bare = verify(tmp_path / "net.safetensors", str(file))
    assert bare.status == 2
    assert "none of its 1 layers fits" in bare.errors[0]
    report = verify(tmp_path / "net.safetensors", str(file), {"te1": parts["clip_l"]})
    assert report.status == 0
    weight = load_file(parts["clip_l"])["text_model.encoder.layers.0.self_attn.q_proj.weight"]
    assert report.layers[0].relative == pytest.approx(float((up @ down).norm() / weight.norm()), rel=1e-5)


def test_what_diffusers_takes_is_what_the_table_says(tmp_path, sd):
    """Its own converters: they leave nothing of a LoRA over, and refuse other types."""
    from diffusers.loaders.lora_conversion_utils import (
        _convert_kohya_flux_lora_to_diffusers,
        _convert_non_diffusers_lora_to_diffusers,
    )

    for algo, read_by_it in (("lora", True), ("dora", True), ("loha", False), ("lokr", False)):
        path = tmp_path / f"{algo}.safetensors"
        write_network(sd, path, ALGOS[algo])
        report = verify(path)
        assert report.programs["diffusers"][0] == (len(report.layers) if read_by_it else 0)
        try:
            converted, _ = _convert_non_diffusers_lora_to_diffusers(load_file(path))
            modules = {name.rpartition(".lora")[0] for name in converted if ".lora" in name or "_lora" in name}
        except (ValueError, KeyError):
            modules = set()
        assert bool(modules) == read_by_it
    flux = dits.flux()
    path = tmp_path / "flux.safetensors"
    write_network(flux, path, ALGOS["lora"], "flux")
    report = verify(path)
    read, _ = report.programs["diffusers"]
    t5 = [layer for layer in report.layers if layer.part == "te3"]
    assert read == len(report.layers) - len(t5)
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("linear1.lora_up.weight")]:
        tensors[name] = torch.zeros(7 * 3072, 4)  # its converter cuts this layer by the rows of the real model
    converted = _convert_kohya_flux_lora_to_diffusers(tensors)
    assert any(name.startswith("transformer.transformer_blocks.0.attn.to_q.") for name in converted)
    assert all("te3" not in name for name in converted)


def test_families_are_known_without_a_model(sd, lora, tmp_path):
    assert verify(lora).family == "sd"
    write_network(dits.sd3(), tmp_path / "sd3.safetensors", ALGOS["lora"], "sd3")
    assert verify(tmp_path / "sd3.safetensors").family == "sd3"
    lines = list(text_lines(verify(lora)))
    assert lines[-1] == "usable"
    assert any("reads all" in line for line in lines)
    nothing = {f"lora_unet_x_y.lora_{side}.weight": torch.ones(2, 2) for side in ("down", "up")}
    save_file(nothing, tmp_path / "x.safetensors")
    report = verify(tmp_path / "x.safetensors")
    assert report.family is None
    assert report.status == 1
    assert report.programs == {}


def test_who_reads_what_is_in_the_guide():
    """docs/networks.md says the same as the table in the code."""
    from library.families.shared.network_readers import PROGRAMS
    from tests.test_docs import DOCS

    text = (DOCS / "networks.md").read_text(encoding="utf-8").partition("## Which programs read the files")[2]
    table = text.partition("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in table if line.startswith("| ")]
    documented = {name: set(types.split(", ")) for name, types in rows if name not in ("program", "LyCORIS")}
    assert documented == {program.name: set(program.types) for program in PROGRAMS}


# ---- sound and broken


def changed(lora, path, change):
    tensors = load_file(lora)
    change(tensors)
    save_file(tensors, path)
    return path


NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        (lambda t: t[f"{NAME}.lora_up.weight"].fill_(float("nan")), 2, "1 tensors hold NaN or infinite values"),
        (lambda t: t[f"{NAME}.lora_up.weight"].zero_(), 1, "1 of 138 layers are zero: " + NAME),
        (lambda t: [v.zero_() for k, v in t.items() if "lora_up" in k], 1, "changes nothing: all 138 layers are zero"),
        (lambda t: t[f"{NAME}.lora_up.weight"].mul_(50), 1, "change more than 10 times as much as its median"),
        (lambda t: [v.mul_(1000) for k, v in t.items() if "alpha" in k], 1, "times as large as the weights"),
        (
            lambda t: t.update({f"lora_unet_nothing.lora_{s}.weight": torch.ones(2, 2) for s in ("down", "up")}),
            1,
            "1 of 139 layers have no place",
        ),
        (lambda t: t.update({f"{NAME}.lora_down.weight": torch.ones(4, 7)}), 2, "does not fit"),
        (lambda t: t.update({f"{NAME}.other": torch.ones(1)}), 2, "which is not LoRA or"),
        (lambda t: t.pop(f"{NAME}.lora_up.weight"), 2, "which is not LoRA or"),
    ],
)
def test_findings(lora, sd_file, tmp_path, change, status, message):
    path = changed(lora, tmp_path / "net.safetensors", change)
    report = verify(path, str(sd_file))
    assert report.status == status, report.errors + report.warnings
    found = report.errors + report.warnings
    assert any(message in line for line in found), found
    assert json.loads(json.dumps(as_json(report), allow_nan=False))["usable"] is (status < 2)
    if report.layers:
        drawn(report)


def test_a_network_of_another_family(lora, tmp_path):
    report = verify(lora, str(write_flux(tmp_path)))
    assert report.status == 2
    assert "none of its 138 layers fits" in report.errors[0]


def test_the_script(run_script, lora, sd_file, sd, tmp_path):
    line = [SCRIPT, lora, "--model", sd_file, "--plot", tmp_path / "plot.png", "--json", tmp_path / "report.json"]
    done = run_script(*line)
    assert done.returncode == 0, done.stderr
    assert "138 of 138 layers in" in done.stdout
    assert done.stdout.rstrip().endswith("\nusable")
    facts = json.loads((tmp_path / "report.json").read_text())
    assert facts["family"] == "sd"
    assert len(facts["layers"]) == 138
    assert all(0 < layer["relative"] < 1 for layer in facts["layers"])
    image = Image.open(tmp_path / "plot.png").convert("RGB")
    longest = max(range(len(facts["blocks"])), key=lambda n: facts["blocks"][n]["relative"])
    rows = [[image.getpixel((x, 76 + 20 * row + 4)) for x in range(240, 800)] for row in range(len(facts["blocks"]))]
    bars = [sum(pixel != (255, 255, 255) for pixel in row) for row in rows]
    assert bars.index(max(bars)) == longest  # the row's bar is the longest one
    zero = changed(lora, tmp_path / "zero.safetensors", lambda t: t[f"{NAME}.lora_up.weight"].zero_())
    done = run_script(SCRIPT, zero, "--show_layers")
    assert done.returncode == 1
    assert f"{NAME}: LoRA, rank 4, change 0" in done.stdout
    (tmp_path / "cut.safetensors").write_bytes(lora.read_bytes()[:-10])
    done = run_script(SCRIPT, tmp_path / "cut.safetensors", "--json", tmp_path / "cut.json")
    assert done.returncode == 2
    assert "not usable: " in done.stdout
    assert "cut short" in done.stdout
    assert json.loads((tmp_path / "cut.json").read_text())["usable"] is False
    done = run_script(SCRIPT, lora, "--model", tmp_path / "missing")
    assert done.returncode == 2
    assert "no such file" in done.stderr
    done = run_script(SCRIPT, sd_file)
    assert done.returncode == 2
    assert "a whole model" in done.stdout
