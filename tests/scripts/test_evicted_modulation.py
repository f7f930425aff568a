"""--evict_modulation changes where weights are, and nothing else: the same network to the bit, also after a stop."""

from __future__ import annotations

import pytest

from tests.builders.flux import write_flux, write_parts
from tests.builders.sd3 import write_tiny_sd3
from tests.scripts.starting import as_words
from tests.scripts.weights import hash_of

EVICTED = {"evict_modulation": 3}
COMMON = {
    "train_data_dir": "examples/concept",
    "output_name": "lora",
    "resolution": 64,
    "cache_latents": True,
    "cache_text_encoder_outputs": True,
    "network_train_unet_only": True,
    "network_dim": 2,
    "network_dropout": 0.2,
    "learning_rate": 1e-2,
    "max_train_steps": 4,
    "gradient_accumulation_steps": 2,
    "train_batch_size": 2,
    "max_data_loader_n_workers": 0,
    "save_precision": "float",
    "seed": 1,
    "no_results_page": True,
}
VALIDATED = {"validation_split": 0.25, "validate_every_n_steps": 2}


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("flux")
    return {
        **COMMON,
        **VALIDATED,
        "pretrained_model_name_or_path": write_flux(folder),
        **write_parts(folder),
        "network_module": "networks.lora_flux",
        "t5xxl_max_token_length": 16,
        "gradient_checkpointing": True,
    }


@pytest.fixture(scope="module")
def sd3(tmp_path_factory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("sd3")
    file = write_tiny_sd3(folder / "sd3.safetensors", "5-medium", encoders=("te1", "te2"))
    return {
        **COMMON,
        "pretrained_model_name_or_path": file,
        "network_module": "networks.lora_sd3",
        "clip_l_dropout_rate": 0.5,  # it changes the pooled text, by the batch's own randomness
        "mixed_precision": "bf16",
        "fp8_base": True,
    }


def trained(run_script, script: str, out, options: dict[str, object], **more: object) -> str:
    done = run_script(script, *as_words({**options, "output_dir": out, **more}))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def test_a_flux_lora_is_the_same_with_samples_validation_and_a_stop(run_script, flux, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red house --w 64 --h 64 --s 2 --d 7\n")
    sampled = {"sample_prompts": prompts, "sample_every_n_steps": 2}
    trained(run_script, "flux_train_network.py", tmp_path / "plain", flux, **sampled)
    saves = {"save_state": True, "save_every_n_steps": 1}
    said = trained(run_script, "flux_train_network.py", tmp_path / "evicted", flux, **sampled, **EVICTED, **saves)
    assert "--evict_modulation: saves nothing on a CPU" in said
    plain = hash_of(tmp_path / "plain" / "lora.safetensors")
    assert hash_of(tmp_path / "evicted" / "lora.safetensors") == plain
    images = [sorted((tmp_path / name / "sample").glob("*.png")) for name in ("plain", "evicted")]
    assert [len(found) for found in images] == [2, 2]
    assert [path.read_bytes()[-2000:] for path in images[0]] == [path.read_bytes()[-2000:] for path in images[1]]
    # After 2 batches of 3 that were computed together.
    resumed = {"resume": tmp_path / "evicted" / "lora-step00000001-state"}
    trained(run_script, "flux_train_network.py", tmp_path / "resumed", flux, **EVICTED, **resumed)
    assert hash_of(tmp_path / "resumed" / "lora.safetensors") == plain


def test_an_sd3_lora_is_the_same_where_the_pooled_text_is_dropped(run_script, sd3, tmp_path):
    for name, more in (("plain", {}), ("evicted", EVICTED)):
        trained(run_script, "sd3_train_network.py", tmp_path / name, sd3, max_train_steps=3, **more)
    hashes = [hash_of(tmp_path / name / "lora.safetensors") for name in ("plain", "evicted")]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"network_args": ["in_dims=[0,2,0,0,0]"]}, "--evict_modulation: lora_unet_time_in_in_layer is trained, on"),
        ({"network_module": "networks.loha"}, "--evict_modulation: networks.loha reads the weights of lora_unet_"),
        ({"blocks_to_swap": 1}, "--evict_modulation: cannot be used with --blocks_to_swap"),
        ({"torch_compile": True}, "--evict_modulation: cannot be used with --torch_compile"),
        ({"cache_latents": None}, "--evict_modulation: needs --cache_latents"),
    ],
)
def test_what_needs_the_weights_is_refused_in_one_line(run_script, flux, tmp_path, more, said):
    done = run_script("flux_train_network.py", *as_words({**flux, "output_dir": tmp_path, **EVICTED, **more}))
    assert done.returncode == 2
    assert f"error: {said}" in done.stderr, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
