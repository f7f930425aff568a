"""Networks extracted from the difference of two models: what was merged comes back, and nothing better is to be had."""

from __future__ import annotations

import math

import pytest
import torch

from library.checkpoints.reading import read_header
from library.checkpoints.writing import write_safetensors
from library.families.registry import TOOLS
from library.model_tools.model_layers import open_model_file
from library.model_tools.network_from_models import extract
from networks.build import change_of
from networks.files import read
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


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "flux-bundle", "flux-diffusers", "sd3-bundle"])
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
