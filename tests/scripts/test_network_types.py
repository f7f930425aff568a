"""Each type of network through the scripts: two steps, resumed in between, and the file read back, for some family.

tests/networks/test_identities.py has all types on all families.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from library import cli
from library.families.shared.unet import map_of_config
from tests.builders.flux import write_flux, write_parts
from tests.builders.hashes import tensor_hash
from tests.builders.sd3 import write_encoder_file, write_tiny_sd3
from tests.builders.sdxl import write_tiny_sdxl
from tests.scripts.starting import as_words


def _sd3(folder):
    parts = {
        flag: write_encoder_file(folder / f"{flag}.safetensors", part)
        for flag, part in {"clip_l": "te1", "clip_g": "te2"}.items()
    }
    return {"pretrained_model_name_or_path": write_tiny_sd3(folder / "sd3.safetensors"), **parts}


MODELS = {
    "train_network": None,
    "sdxl_train_network": lambda folder: {"pretrained_model_name_or_path": write_tiny_sdxl(folder / "m.safetensors")},
    "sd3_train_network": _sd3,
    "flux_train_network": lambda folder: {"pretrained_model_name_or_path": write_flux(folder), **write_parts(folder)},
}
COLUMNS = ("algo=locon", "dora_wd=True", "wd_on_output=False")
DIMS = {"boft": 64}  # the largest size of a block, into which rows must be cut
# script, network module, its arguments, and a tensor that the file has
CASES = {
    "loha": ("train_network", "networks.loha", [], "hada_w1_a"),
    "lokr": ("flux_train_network", "networks.lokr", ["factor=4"], "lokr_w1"),
    "oft": ("sdxl_train_network", "networks.oft", [], "oft_blocks"),
    "oft_flux": ("flux_train_network", "networks.oft_flux", ["enable_all_linear=True"], "oft_blocks.0"),
    "dora": ("sd3_train_network", "networks.lycoris", ["algo=locon", "dora_wd=True", "preset=attn-mlp"], "dora_scale"),
    "norms": ("train_network", "networks.lycoris", ["algo=lokr", "train_norm=True", "preset=unet-only"], "w_norm"),
    "dora of columns": ("flux_train_network", "networks.lycoris", [*COLUMNS, "preset=attn-only"], "dora_scale"),
    "convolutions": (
        "train_network",
        "networks.lycoris",
        ["algo=locon", "use_tucker=True", "conv_dim=2"],
        "lora_mid.weight",
    ),
    "diag-oft": ("flux_train_network", "networks.lycoris", ["algo=diag-oft", "preset=attn-mlp"], "oft_blocks"),
    "boft": ("train_network", "networks.lycoris", ["algo=boft", "preset=attn-only"], "oft_blocks"),
    "oft_v2": ("sdxl_train_network", "networks.oft_v2", ["coft=True", "coft_eps=1e-3"], "oft_R.weight"),
    "boft of inputs": ("train_network", "networks.boft", ["boft_n_butterfly_factor=2", "enable_conv=True"], "boft_R"),
    "glora": ("sd3_train_network", "networks.lycoris", ["algo=glora", "preset=attn-mlp"], "a1.weight"),
    "ia3": ("flux_train_network", "networks.lycoris", ["algo=ia3", "preset=attn-mlp"], "on_input"),
    "dylora": ("train_network", "networks.dylora", ["unit=1"], "lora_down.weight"),
    "lora_fa": ("train_network", "networks.lora_fa", [], "lora_up.weight"),
    "full": ("sdxl_train_network", "networks.lycoris", ["algo=full", "preset=unet-transformer-only"], "diff"),
}


@pytest.mark.rows("C59", "R316")  # by oft_flux
@pytest.mark.parametrize("case", CASES)
def test_a_type_trains_resumes_and_is_read_back(run_script, small_model, tmp_path, case):
    script, module, args, tensor = CASES[case]
    images = tmp_path / "train" / "2_a cat"
    images.mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (64, 64), (200, 90 * number, 120)).save(images / f"{number}.png")
    model = MODELS[script](tmp_path) if MODELS[script] else {"pretrained_model_name_or_path": small_model}
    given = {
        **model,
        "train_data_dir": tmp_path / "train",
        "output_name": "net",
        "resolution": 64,
        "learning_rate": 1e-2,
        "network_module": module,
        "network_dim": DIMS.get(case, 2),
        "network_args": args or None,
        "network_train_unet_only": True,
        "max_train_steps": 2,
        "max_data_loader_n_workers": 0,
        "seed": 1,
        "cache_latents": True,
        "lr_scheduler": "constant",
        "mixed_precision": "bf16",
    }
    given = {name: value for name, value in given.items() if value is not None}

    def run(folder, **more):
        done = run_script(f"{script}.py", *as_words({**given, "output_dir": tmp_path / folder, **more}))
        assert done.returncode == 0, done.stderr[-3000:]
        return tmp_path / folder / "net.safetensors"

    whole = run("whole", save_state=True, save_every_n_steps=1)
    state = load_file(whole)
    assert any(name.endswith(f".{tensor}") for name in state)
    assert sum(float(value.float().abs().sum()) for value in state.values()) > 0
    shutil.copytree(tmp_path / "whole" / "net-step00000001-state", tmp_path / "state")
    resumed = run("resumed", resume=tmp_path / "state")
    assert tensor_hash(resumed) == tensor_hash(whole)
    again = run("again", network_weights=whole, dim_from_weights=True, max_train_steps=1, learning_rate=1e-9)
    assert load_file(again).keys() == state.keys()


def test_files_of_other_programs(run_script, small_model, train_arguments, tmp_path):
    """ComfyUI's names: merged first, with norms, then trained on; one for another family is a mistake in one line."""
    _, models = cli.load_family("sd", [f"--pretrained_model_name_or_path={small_model}"])
    keys, lora, norms = map_of_config(models.denoiser.config, prefix=""), {}, {}
    for path, module in models.denoiser.named_modules():
        if path.endswith(("attn1.to_q", "attn2.to_v")):
            name = f"diffusion_model.{keys.file_name(path)}"
            lora[f"{name}.lora_down.weight"] = torch.full((2, module.in_features), 0.01)
            lora[f"{name}.lora_up.weight"] = torch.full((module.out_features, 2), 0.01)
        elif path.endswith("transformer_blocks.0.norm1"):
            norms[f"diffusion_model.{keys.file_name(path)}.diff"] = torch.full(module.weight.shape, 0.01)
            norms[f"diffusion_model.{keys.file_name(path)}.diff_b"] = torch.full(module.bias.shape, 0.01)
    save_file(lora, tmp_path / "lora.safetensors")
    save_file({**lora, **norms}, tmp_path / "with_norms.safetensors")
    given = {"base_weights": [tmp_path / "with_norms.safetensors"], "network_weights": tmp_path / "lora.safetensors"}
    given |= {"dim_from_weights": True, "network_train_unet_only": True, "max_train_steps": 1, "network_dim": None}
    done = run_script(*train_arguments(tmp_path / "out", **given))
    assert done.returncode == 0, done.stderr[-3000:]
    layers, merged = len(lora) // 2, (len(lora) + len(norms)) // 2
    assert f"{merged} layers merged into the model at 1; 0 layers of the file have no place here" in done.stderr
    assert f"{layers} layers loaded; 0 layers of the network are not in the file" in done.stderr
    names = {name.partition(".")[0] for name in load_file(tmp_path / "out" / "lora.safetensors")}
    assert len(names) == layers
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v" in names

    save_file({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(1)}, tmp_path / "flux")
    done = run_script(*train_arguments(tmp_path / "no", network_weights=tmp_path / "flux"))
    assert done.returncode == 2
    assert "is a network for FLUX.1, and the model here is Stable Diffusion" in done.stderr
    assert "flux_train_network.py" in done.stderr
    assert "Traceback" not in done.stderr
