"""Networks merged into the weights of models: the result acts as the model with the networks attached."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch.func import functional_call

from library.families.registry import TOOLS
from library.model_tools.model_layers import ModelFile, open_model_file
from library.model_tools.network_into_model import merge
from networks.targets import live_modules
from tests.builders.mixed_networks import attached_networks, file_of, input_of, layer_outputs
from tests.builders.model_files import CASES
from tests.builders.options import options_with

MODEL_OPTION = {"sd": "sd_model", "sdxl": "sd_model", "flux": "flux_model", "sd3": "sd3_model"}
SCRIPTS = {"sd": "merge_lora", "sdxl": "sdxl_merge_lora", "flux": "flux_merge_lora", "sd3": "sd3_merge_lora"}


def run(family, **values):
    merge(options_with(TOOLS[SCRIPTS[family]], **values))


def merged_outputs(file: ModelFile, models, targets):
    """What the layers of `models` give with the weights of a file."""
    outputs = {}
    for target in targets:
        rows, found = file.rows(target), {}
        for name in ("weight", "bias"):
            if file.has(target, name):
                whole = file.weight(target, name)
                whole = whole.roll(len(whole) // 2, 0) if target.swap_halves else whole
                found[name] = whole.split(rows)
        outputs[target.key] = [
            functional_call(module, {name: parts[index] for name, parts in found.items()}, input_of(module))
            for index, module in enumerate(live_modules(models, target))
        ]
    return outputs


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "flux-bundle", "flux-diffusers", "sd3-bundle"])
@torch.no_grad()
def test_the_merged_model_acts_as_the_model_with_networks_of_every_type(name, tmp_path):
    case = CASES[name]
    path = case.write(tmp_path / "model.safetensors")
    models, targets = case.models(path)
    made = attached_networks(case.family, targets, models)
    save_file(file_of(made), tmp_path / "network.safetensors")
    for network in made:
        network.set_multiplier(0.7)
    wanted = layer_outputs(models, targets)
    for network in made:
        network.detach()
    bare = layer_outputs(models, targets)
    option = MODEL_OPTION[case.family]
    values = {"models": [str(tmp_path / "network.safetensors")], "ratios": [0.7]}
    run(case.family, **{option: str(path)}, save_to=str(tmp_path / "merged.safetensors"), **values)
    file = open_model_file(tmp_path / "merged.safetensors", (case.family,))
    found = merged_outputs(file, models, file.targets)
    changed = set()
    for key, outputs in found.items():
        for ours, theirs, before in zip(outputs, wanted[key], bare[key], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")
            if not torch.equal(before, theirs):
                changed.add(key)
    adapted = {key for network in made for key in network.layers()} & found.keys()
    assert changed == adapted
    kinds = {type(layer).__name__ for network in made for layer in network.layers().values()}
    assert len(kinds) >= 9, kinds
