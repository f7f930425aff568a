"""The flags of the scripts beside training are the ecosystem's: names, defaults, types, choices."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

import pytest

from library.families.sd3.options import Sd3Options
from library.generation.model_options import CheckpointOptions
from library.options.base import options_of
from library.options.inference import ANY_MODEL_GROUPS
from library.options.parsing import build_parser
from library.registry import FAMILIES
from tests.options.flag_table import SCRIPTS, described, expected, flags_of
from tools.option_tables import preparation_groups, preparation_scripts

ROOT = Path(__file__).parents[2]
# Scripts that are still to come; whoever writes one takes it out.
NOT_THERE: set[str] = set()
TRAINING = {f"{script}.py" for spec in FAMILIES.values() for script in spec.scripts}
FACTS = {script: flags_of(script) for script in SCRIPTS if script not in TRAINING}
THERE = [script for script in FACTS if script not in NOT_THERE]
COUNTS = {
    "gen_img.py": 94,
    "sdxl_gen_img.py": 78,
    "gen_img_diffusers.py": 79,
    "sdxl_minimal_inference.py": 7,
    "sd3_minimal_inference.py": 21,
    "flux_minimal_inference.py": 24,
    "finetune/clean_captions_and_tags.py": 3,
    "finetune/make_captions.py": 14,
    "finetune/make_captions_by_git.py": 9,
    "finetune/merge_captions_to_metadata.py": 8,
    "finetune/merge_dd_tags_to_metadata.py": 7,
    "finetune/prepare_buckets_latents.py": 18,
    "finetune/tag_images_by_wd14_tagger.py": 32,
    "networks/check_lora_weights.py": 2,
    "networks/convert_flux_lora.py": 4,
    "networks/extract_lora_from_dylora.py": 3,
    "networks/extract_lora_from_models.py": 16,
    "networks/flux_extract_lora.py": 9,
    "networks/flux_merge_lora.py": 17,
    "networks/lora_diffusers.py": 6,
    "networks/lora_interrogator.py": 5,
    "networks/merge_lora.py": 10,
    "networks/resize_lora.py": 9,
    "networks/sdxl_merge_lora.py": 10,
    "networks/svd_merge_lora.py": 10,
    "tools/cache_latents.py": 164,
    "tools/cache_text_encoder_outputs.py": 165,
    "tools/canny.py": 4,
    "tools/convert_diffusers20_original_sd.py": 15,
    "tools/convert_diffusers_to_flux.py": 4,
    "tools/detect_face_rotate.py": 11,
    "tools/latent_upscaler.py": 7,
    "tools/merge_models.py": 8,
    "tools/merge_sd3_safetensors.py": 8,
    "tools/resize_images_to_resolution.py": 7,
    "tools/show_metadata.py": 1,
}
# options that earlier scripts do not have
OURS = {"strict", "console_log_level", "console_log_file", "console_log_simple"}
_CACHED = {"data_index_dir", "fp8_base_unet", "quantize_base", "sd3", "no_half_vae", "weighted_captions"}
_CACHED |= {"compile", "compile_backend", "compile_mode", "compile_dynamic", "compile_fullgraph"}
_CACHED |= {"compile_cache_size_limit", "cuda_allow_tf32", "cuda_cudnn_benchmark"}
_CACHED |= {"no_results_page", "notify", "train_inpainting", "recipe"}  # all of a training command may be given
_CACHED |= {option.dest for option in options_of(Sd3Options)}  # one family more than those scripts had
_GENERATING = {"grid", "image_format", "guidance_scale", "flow_shift", "clip_l", "clip_g", "t5xxl", "ae"}
_GENERATING |= {"XTI_embeddings", "clip_vision_model"}
_GENERATING |= {"t5xxl_max_token_length", "apply_lg_attn_mask", "apply_t5_attn_mask"}
_EVERY_MODEL = {option.dest for option in options_of(CheckpointOptions)}
_EVERY_MODEL |= {option.dest for group in ANY_MODEL_GROUPS for option in options_of(group)}
OURS_OF: dict[str, set[str]] = {  # of one script
    "gen_img.py": _GENERATING | FAMILIES.keys(),
    "sdxl_gen_img.py": _EVERY_MODEL,  # that script has lagged behind
    "gen_img_diffusers.py": _EVERY_MODEL,
    "networks/lora_diffusers.py": {"device", "flux", "multiplier", "output", "sd3", "steps"},
    "tools/latent_upscaler.py": {"device", "seed", "steps"},
    "tools/cache_latents.py": _CACHED,
    "tools/cache_text_encoder_outputs.py": _CACHED,
    "tools/resize_images_to_resolution.py": {"max_data_loader_n_workers", "skip_existing"},
    "tools/detect_face_rotate.py": {"max_data_loader_n_workers", "model", "score_threshold", "skip_existing"},
    "finetune/prepare_buckets_latents.py": {"family", "seed"},
    "finetune/make_captions_by_git.py": {"skip_existing"},
    "networks/merge_lora.py": {"device", "lbws", "legacy_ratio"},
    "networks/sdxl_merge_lora.py": {"device", "legacy_ratio"},
    "networks/flux_merge_lora.py": {"lbws", "legacy_ratio"},
    "networks/extract_lora_from_models.py": {"exact", "factor", "type"},
    "networks/flux_extract_lora.py": {"exact", "factor", "type"},
    "networks/resize_lora.py": {"svd_lowrank_niter"},  # which came later
    "networks/svd_merge_lora.py": {"clamp_quantile"},
    "finetune/make_captions.py": {"model", "prompt", "skip_existing"},
    "finetune/tag_images_by_wd14_tagger.py": {"skip_existing"},
}


def parser_of(script: str) -> ArgumentParser:
    return build_parser(preparation_groups(ROOT / script), prog=script)


ACTIONS = {script: {action.dest: action for action in parser_of(script)._actions} for script in THERE}


def test_every_script_is_there_or_known_to_be_missing():
    assert {script: len(facts) for script, facts in FACTS.items()} == COUNTS
    assert {script for script in FACTS if not (ROOT / script).is_file()} == NOT_THERE
    assert set(THERE) <= {path.relative_to(ROOT).as_posix() for path in preparation_scripts()}


@pytest.mark.parametrize("script", THERE)
def test_no_flag_is_missing_and_new_ones_are_known(script):
    found = ACTIONS[script].keys() - {"help"}
    assert sorted(FACTS[script].keys() - found) == []
    assert sorted(found - FACTS[script].keys() - OURS - OURS_OF.get(script, set())) == []


@pytest.mark.parametrize("script", THERE)
def test_flag_is_as_it_was(script):
    found = {dest: action for dest, action in ACTIONS[script].items() if dest in FACTS[script]}
    assert described(found) == expected(FACTS[script])


@pytest.mark.parametrize("script", THERE)
def test_positions_are_in_the_same_order(script):
    expected = [dest for dest, fact in FACTS[script].items() if fact.get("positional")]
    assert [dest for dest, action in ACTIONS[script].items() if not action.option_strings] == expected


@pytest.mark.parametrize("script", THERE)
def test_every_option_is_explained_in_one_line(script):
    for group in preparation_groups(ROOT / script):
        for option in options_of(group):
            words = option.details.help.split()
            assert len(words) >= 2, option.dest
            assert "\n" not in option.details.help


@pytest.mark.parametrize("script", THERE)
def test_help_shows_every_flag_and_exits_with_0(script, capsys):
    with pytest.raises(SystemExit) as stop:
        parser_of(script).parse_args(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all((dest if fact.get("positional") else f"--{dest}") in shown for dest, fact in FACTS[script].items())
