"""Networks extracted from the difference of two models: what was merged comes back, and nothing better is to be had."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoints.reading import read_header
from library.checkpoints.writing import write_safetensors
from library.errors import UserError
from library.families.registry import TOOLS
from library.model_tools import low_rank
from library.model_tools.model_layers import open_model_file
from library.model_tools.network_from_models import extract, lokr_entry, lora_entry
from networks.build import change_of
from networks.factors import factors
from networks.files import read
from networks.layers.functional import kronecker
from tests.builders.flux import flux_tensors
from tests.builders.hashes import tensor_hash
from tests.builders.model_files import CASES
from tests.builders.options import options_with

SCRIPTS = {
    "sd": "extract_lora_from_models",
    "sdxl": "extract_lora_from_models",
    "flux": "flux_extract_lora",
    "sd3": "sd3_extract_lora",
}


def run(family, folder, **values):
    """Extracts from model.safetensors and tuned.safetensors of a folder. Returns: the network file and its metadata."""
    files = {"model_org": str(folder / "model.safetensors"), "model_tuned": str(folder / "tuned.safetensors")}
    extract(options_with(TOOLS[SCRIPTS[family]], **{**files, "save_to": str(folder / "network.safetensors"), **values}))
    return read(folder / "network.safetensors"), read_header(folder / "network.safetensors")[0]


def change_with(file, target, rank, seed):
    shape = file.shape(target)
    rng = torch.Generator().manual_seed(seed)
    up, down = torch.randn(shape[0], rank, generator=rng), torch.randn(rank, math.prod(shape[1:]), generator=rng)
    return (0.02 * up @ down).reshape(shape)


def tuned(path, family, rank=3, *, chosen=lambda target: True):
    """Writes tuned.safetensors, in which layers have changes of a rank. Returns: these, by the layers' keys."""
    file = open_model_file(path, (family,))
    targets = [target for target in file.targets if not target.norm and not target.optional and chosen(target)]
    changes = {target.key: change_with(file, target, rank, seed) for seed, target in enumerate(targets)}
    edits = {
        (target.key, "weight"): lambda target=target: file.weight(target) + changes[target.key] for target in targets
    }
    write_safetensors(path.with_name("tuned.safetensors"), file.with_edits(edits, None))
    return changes


def changes_of(network):
    """The changes of a file's entries as matrices."""
    found = {}
    for key, entry in network.entries.items():
        if "lora_up.weight" in entry:
            up, down = (entry[f"lora_{side}.weight"] for side in ("up", "down"))
            shape = torch.Size((len(up), *down.shape[1:]))
        else:
            sizes = [entry[name].shape for name in ("lokr_w1", "lokr_w2")]
            shape = torch.Size((sizes[0][0] * sizes[1][0], sizes[0][1] * sizes[1][1], *sizes[1][2:]))
        found[key], _ = change_of(entry, shape, lambda: None)
    return found


def assert_relative(found, wanted, tolerance):
    assert found.shape == wanted.shape
    assert float((found - wanted).norm()) <= tolerance * float(wanted.norm())


@pytest.mark.rows("R410", "R462")
@pytest.mark.parametrize("name", ["sd2", "flux-bundle", "sd3-bundle"])
def test_what_was_merged_comes_back(name, tmp_path):
    family = CASES[name].family
    path = CASES[name].write(tmp_path / "model.safetensors")
    changes = tuned(path, family)
    conv = {"conv_dim": 3} if family in ("sd", "sdxl") else {}
    network, metadata = run(family, tmp_path, dim=3, clamp_quantile=1.0, model_org=str(path), **conv)
    found = changes_of(network)
    assert found.keys() == changes.keys()
    for key, change in found.items():
        assert_relative(change, changes[key], 1e-4)
    assert metadata["ss_network_dim"] == "3"
    assert metadata["ss_network_alpha"] == "3.0"
    assert metadata["modelspec.architecture"].endswith("/lora")


# --- decompositions ---------------------------------------------------------------------------------------------------


def noisy(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(90, 120), (60, 8, 3, 3), (70, 50, 1, 1)])
@pytest.mark.parametrize("decompose", [low_rank.truncated_svd, low_rank.exact_svd])
def test_lora_is_the_best_approximation_of_its_rank(shape, decompose):
    change = noisy(*shape)
    entry, held = lora_entry(change, 6, decompose, clamp=1.0)
    assert entry["lora_up.weight"].shape == (shape[0], 6, *[1] * (len(shape) - 2))
    assert entry["lora_down.weight"].shape == (6, *shape[1:])
    found, _ = change_of(entry, change.shape, lambda: change)
    values = np.linalg.svd(change.flatten(1).double().numpy(), compute_uv=False) ** 2
    assert held == pytest.approx(values[:6].sum(), rel=low_rank.TOLERANCE)
    assert float((change - found).double().square().sum()) == pytest.approx(values.sum() - held, rel=1e-5)


def test_values_are_cut_off_at_a_quantile():
    change = noisy(40, 50)
    entry, _ = lora_entry(change, 4, low_rank.exact_svd, clamp=0.9)
    whole, _ = lora_entry(change, 4, low_rank.exact_svd, clamp=1.0)
    names = ("lora_up.weight", "lora_down.weight")
    limit = np.quantile(np.concatenate([whole[name].numpy().ravel() for name in names]), 0.9)
    for name in names:
        np.testing.assert_allclose(entry[name], np.clip(whole[name].numpy(), -limit, limit), atol=1e-6)


@pytest.mark.parametrize("shape", [(48, 60), (24, 16, 3, 3)])
@pytest.mark.parametrize("factor", [-1, 4])
def test_a_kronecker_product_comes_back(shape, factor):
    (l, k), (m, n) = factors(shape[0], factor), factors(shape[1], factor)  # noqa: E741
    change = kronecker(noisy(l, m), noisy(k, n, *shape[2:], seed=1))
    entry, held = lokr_entry(change, 1000, low_rank.truncated_svd, factor=factor)
    assert entry["lokr_w1"].shape == (l, m)
    found, _ = change_of(entry, change.shape, lambda: change)
    assert_relative(found, change, 1e-5)
    assert held == pytest.approx(float(change.square().sum()), rel=1e-5)


@pytest.mark.parametrize("rank", [2, 1000])
def test_lokr_is_the_nearest_kronecker_product(rank):
    """By Van Loan and Pitsianis, with numpy: a singular pair of the blocks, then the second factor at the rank."""
    change = noisy(24, 40)
    entry, held = lokr_entry(change, rank, low_rank.truncated_svd, factor=4)
    places = [(row, column) for row in range(0, 24, 6) for column in range(0, 40, 10)]
    blocks = np.stack([change[row : row + 6, column : column + 10].numpy().ravel() for row, column in places])
    _, values, vh = np.linalg.svd(blocks.astype(np.float64), full_matrices=False)
    second = np.linalg.svd(vh[0].reshape(6, 10), compute_uv=False)[:rank] ** 2
    assert held == pytest.approx(values[0] ** 2 * second.sum(), rel=2 * low_rank.TOLERANCE)
    found, _ = change_of(entry, change.shape, lambda: change)
    assert float((change - found).square().sum()) == pytest.approx(float(change.square().sum()) - held, rel=1e-4)


# --- scripts ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sd1(tmp_path):
    return CASES["sd1"].write(tmp_path / "model.safetensors")


def test_without_conv_dim_a_network_has_the_layers_of_transformers(sd1, tmp_path):
    changes = tuned(sd1, "sd")
    network, metadata = run("sd", tmp_path, dim=3)
    assert network.entries.keys() == {key for key in changes if "resnets" not in key and "samplers" not in key}
    assert "ss_network_args" not in metadata
    network, metadata = run("sd", tmp_path, dim=3, conv_dim=2)
    assert network.entries.keys() == changes.keys()
    ranks = {key: len(entry["lora_down.weight"]) for key, entry in network.entries.items()}
    assert ranks["lora_unet_mid_block_resnets_0_conv1"] == 2
    assert ranks["lora_unet_mid_block_resnets_0_time_emb_proj"] == 3
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "2.0"}
    assert metadata["ss_network_dim"] == "3"


@pytest.mark.parametrize(("least", "kept"), [(0.01, False), (0.0, True)])
def test_a_text_encoder_that_hardly_differs_is_left_out(least, kept, sd1, tmp_path):
    file = open_model_file(sd1, ("sd",))
    edits = {
        (target.key, "weight"): lambda target=target: file.weight(target) + (0.004 if target.part == "te" else 0.1)
        for target in file.targets
        if target.part == "te" or "attn1_to_q" in target.key
    }
    write_safetensors(tmp_path / "tuned.safetensors", file.with_edits(edits, None))
    network, _ = run("sd", tmp_path, min_diff=least)
    assert any(key.startswith("lora_te_") for key in network.entries) == kept
    assert any(key.startswith("lora_unet_") for key in network.entries)


def test_two_layouts_of_one_model_can_be_compared(tmp_path):
    CASES["flux"].write(tmp_path / "dev.safetensors").rename(tmp_path / "model.safetensors")
    changes = tuned(CASES["flux-diffusers"].write(tmp_path / "theirs.safetensors"), "flux")
    network, metadata = run("flux", tmp_path, dim=3, clamp_quantile=1.0)
    found = changes_of(network)
    assert found.keys() == changes.keys()
    for key, change in found.items():
        assert_relative(change, changes[key], 1e-4)
    assert metadata["ss_network_module"] == "networks.lora_flux"


@pytest.mark.parametrize(("dim", "names"), [(2, {"lokr_w2_a", "lokr_w2_b"}), (64, {"lokr_w2"})])
def test_lokr(dim, names, tmp_path):
    CASES["flux"].write(tmp_path / "dev.safetensors").rename(tmp_path / "model.safetensors")
    tuned(tmp_path / "model.safetensors", "flux", chosen=lambda target: "linear2" in target.key)
    network, metadata = run("flux", tmp_path, dim=dim, type="lokr", factor=4)
    assert {frozenset(entry) for entry in network.entries.values()} == {frozenset({"lokr_w1", "alpha"} | names)}
    assert metadata["ss_network_module"] == "networks.lokr"
    assert json.loads(metadata["ss_network_args"]) == {"factor": "4"}
    assert len(network.entries) == 2
    for entry in network.entries.values():
        change_of(entry, torch.Size((64, 320)), lambda: None)  # it fits


def test_what_the_network_does_not_hold_is_said(sd1, tmp_path, caplog):
    tensors = load_file(sd1)
    for key in tensors:
        if key.endswith(("norm1.weight", "conv_in.bias")) or "attn1.to_q" in key:
            tensors[key] = tensors[key] + 0.1
    save_file(tensors, tmp_path / "tuned.safetensors")
    with caplog.at_level("INFO"):
        run("sd", tmp_path)
    others = [key for key in tensors if key.endswith(("norm1.weight", "conv_in.bias"))]
    assert f"{len(others)} other tensors differ, which the network does not hold" in caplog.text
    assert "denoiser: 10 layers, which hold 100.00% of the change" in caplog.text
    assert "at most 0.1% of that more" in caplog.text


def test_precisions_and_metadata(sd1, tmp_path):
    tuned(sd1, "sd", chosen=lambda target: "attn1_to_q" in target.key)
    _, metadata = run("sd", tmp_path, save_precision="bf16", dim=8)
    saved = load_file(tmp_path / "network.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert metadata["sshs_model_hash"] == tensor_hash(tmp_path / "network.safetensors")
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("8", "8.0")
    assert (metadata["ss_base_model_version"], metadata["ss_network_module"]) == ("sd_v1", "networks.lora")
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.prediction_type"] == "epsilon"
    made = json.loads(metadata["ss_merge_recipe"])
    assert [model["name"] for model in made["models"]] == ["model.safetensors", "tuned.safetensors"]
    assert made["models"][0]["sha256"] == hashlib.sha256(sd1.read_bytes()).hexdigest()
    _, metadata = run("sd", tmp_path, no_metadata=True, v_parameterization=True)
    assert metadata["modelspec.prediction_type"] == "v"
    assert "ss_merge_recipe" not in metadata
    assert "sshs_model_hash" in metadata


def test_models_are_compared_in_the_precision_that_is_asked_for(sd1, tmp_path):
    tensors, key = load_file(sd1), "model.diffusion_model.middle_block.1.proj_in.weight"
    tensors[key] = tensors[key].bfloat16().float()
    save_file(tensors, sd1)
    save_file({**tensors, key: tensors[key] * (1 + 1e-4)}, tmp_path / "tuned.safetensors")
    network, _ = run("sd", tmp_path)
    assert network.entries.keys() == {"lora_unet_mid_block_attentions_0_proj_in"}
    with pytest.raises(UserError, match="do not differ in any layer that networks adapt"):
        run("sd", tmp_path, load_precision="bf16")


def test_mistakes(sd1, tmp_path):
    with pytest.raises(UserError, match=r"--model_tuned: .*no such file"):
        run("sd", tmp_path)
    CASES["sdxl"].write(tmp_path / "tuned.safetensors")
    with pytest.raises(UserError, match="are models of different families"):
        run("sd", tmp_path)
    with pytest.raises(UserError, match=r"--model_tuned: .*: this is an SDXL model; a FLUX model is needed here"):
        run("flux", tmp_path, model_org=str(CASES["flux"].write(tmp_path / "dev.safetensors")))
    with pytest.raises(UserError, match="would replace what is read"):
        run("sd", tmp_path, save_to=str(sd1))
    tensors = load_file(sd1)
    save_file(tensors, tmp_path / "tuned.safetensors")
    with pytest.raises(UserError, match="do not differ"):
        run("sd", tmp_path)
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    tensors[key][0, 0] = math.nan
    save_file(tensors, tmp_path / "tuned.safetensors")
    with pytest.raises(UserError, match="attn1_to_q: the models' difference has values that are no numbers"):
        run("sd", tmp_path)
    assert not (tmp_path / "network.safetensors").exists()


def test_models_of_other_sizes(tmp_path):
    CASES["flux"].write(tmp_path / "dev.safetensors").rename(tmp_path / "model.safetensors")
    save_file(flux_tensors(single=1), tmp_path / "tuned.safetensors")
    with pytest.raises(UserError, match=r"lora_unet_single_blocks_1_linear1 is missing, .*; give two models of one"):
        run("flux", tmp_path)
    save_file(flux_tensors(width=96), tmp_path / "tuned.safetensors")
    with pytest.raises(UserError, match=r"img_mod_lin is \(576, 96\), in .* it is \(384, 64\)"):
        run("flux", tmp_path)
