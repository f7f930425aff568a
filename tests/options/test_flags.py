"""The flags of every script are the ecosystem's: same names, defaults, types, choices and numbers of values."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from library import cli
from library.options.base import options_of
from library.options.parsing import build_parser
from library.registry import FAMILIES, groups_for
from tests.options import flag_table
from tests.options.flag_table import described, expected, flags_of

SCRIPTS = {script: (family, method) for family in FAMILIES for script, method in FAMILIES[family].scripts.items()}
FACTS = {script: flags_of(f"{script}.py") for script in SCRIPTS if f"{script}.py" in flag_table.SCRIPTS}
COUNTS = {
    "train_network": 194,
    "train_db": 170,
    "fine_tune": 168,
    "sdxl_train_network": 197,
    "sd3_train_network": 222,
    "flux_train_network": 219,
    "sdxl_train": 177,
    "sd3_train": 205,
    "flux_train": 198,
    "train_textual_inversion": 170,
    "sdxl_train_textual_inversion": 171,
    "sd3_train_textual_inversion": 198,
    "flux_train_textual_inversion": 194,
    "train_control_net": 154,
    "train_controlnet": 154,
    "sdxl_train_control_net": 170,
    "flux_train_control_net": 197,
    "sd3_train_control_net": 191,
    "sdxl_train_control_net_lllite": 172,
    "train_textual_inversion_XTI": 169,
    "train_leco": 121,
    "sdxl_train_leco": 122,
}
# options that earlier trainers do not have
OURS = {"strict", "data_index_dir", "ema", "ema_decay", "stochastic_rounding"}
OURS |= {"save_best_validation", "early_stop_patience", "no_results_page", "notify"}
OURS |= {"plan", "plan_vram", "plan_device", "plan_json", "plan_apply"}
_SHOWING = {"show_timesteps", "show_timesteps_resolution", "show_timesteps_offset"}  # there for transformers alone
OURS |= _SHOWING
# What the ancestor has for a family that is not here.
COMPILING = {"compile", "compile_backend", "compile_mode", "compile_dynamic", "compile_fullgraph"}
COMPILING |= {"compile_cache_size_limit", "cuda_allow_tf32", "cuda_cudnn_benchmark"}
OURS |= COMPILING
OURS |= {"selective_checkpointing", "recipe"}
OURS |= {"train_inpainting"}  # which came later
VALIDATION = {"validation_split", "validation_seed", "max_validation_steps"}
VALIDATION |= {"validate_every_n_steps", "validate_every_n_epochs"}
OF_NETWORKS = {  # what earlier trainers offer for networks alone
    *("caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate", "weighted_captions"),
    *("cpu_offload_checkpointing", "fp8_base_unet", "quantize_base", "no_metadata"),
    *("initial_epoch", "initial_step", "skip_until_initial_step"),
}
OF_LECO = {  # what earlier trainers offer for networks, but not where they edit concepts
    *("scale_weight_norms", "base_weights", "base_weights_multiplier", "weighted_captions", "no_half_vae"),
    *("cpu_offload_checkpointing", "fp8_base_unet", "quantize_base"),
    *("initial_epoch", "initial_step", "skip_until_initial_step"),
    *("zero_stage", "offload_optimizer_device", "offload_optimizer_nvme_path", "offload_param_device"),
    *("offload_param_nvme_path", "zero3_init_flag", "zero3_save_16bit_model", "fp16_master_weights_and_gradients"),
    *("metadata_title", "metadata_author", "metadata_description", "metadata_license", "metadata_tags"),
    *("metadata_usage_hint", "metadata_thumbnail", "metadata_merged_from", "metadata_trigger_phrase"),
    *("metadata_preprocessor", "metadata_is_negative_embedding"),
}
OURS_OF = {  # of one method, or of one script
    "network": {"quantize_base", "token_string", "init_word", "num_vectors_per_token", "embedding_lr"},
    "finetune": VALIDATION,
    "dreambooth": VALIDATION,
    "embedding": VALIDATION | OF_NETWORKS,
    "xti": VALIDATION | OF_NETWORKS,
    "control_net": VALIDATION | {"quantize_base"},
    "lllite": VALIDATION | {"quantize_base"},
    "leco": OF_LECO,
    "sdxl_train_leco": {"blocks_to_swap"},
    "sdxl_train_network": {"text_encoder_batch_size", "blocks_to_swap"},
    "sd3_train_network": {"evict_modulation"},
    "flux_train_network": {"evict_modulation"},
    "sd3_train": {"text_encoder_lr1", "text_encoder_lr2", "text_encoder_lr3"},  # as guides print them
    "sdxl_train_textual_inversion": {"blocks_to_swap"},
    "sd3_train_textual_inversion": {"train_t5xxl"},
    "flux_train_textual_inversion": {"train_t5xxl"},
    "sdxl_train": {"text_encoder_batch_size", "blocks_to_swap", "blockwise_fused_optimizers"},
    "sdxl_train_control_net": {"text_encoder_batch_size", "blocks_to_swap"},
    "sd3_train_control_net": {"save_model_as"},
    "sdxl_train_control_net_lllite": {"text_encoder_batch_size", "blocks_to_swap"},
}
WITHOUT_IMAGES = {  # what of OURS is not there
    "leco": {"strict", "data_index_dir", "save_best_validation", "early_stop_patience", "train_inpainting", *_SHOWING}
}
SEVERAL = {"token_string", "init_word", "weights"}  # take several values now
ROOT = Path(__file__).parents[2]


def actions(script):
    parser = build_parser(groups_for(*SCRIPTS[script]), prog=f"{script}.py")
    return {action.dest: action for action in parser._actions if action.dest != "help"}


ACTIONS = {script: actions(script) for script in SCRIPTS}


def test_every_script_of_earlier_trainers_is_compared():
    assert FACTS.keys() == COUNTS.keys()


@pytest.mark.parametrize("script", FACTS)
def test_no_flag_is_missing_and_new_ones_are_known(script):
    method = SCRIPTS[script][1]
    ours = OURS - WITHOUT_IMAGES.get(method, set()) | OURS_OF.get(method, set()) | OURS_OF.get(script, set())
    assert ACTIONS[script].keys() ^ (FACTS[script].keys() | ours) == set(), "a new option? add it to OURS or OURS_OF"
    assert len(FACTS[script]) == COUNTS[script]


@pytest.mark.rows("R26", "R27", "R137", "R177", "R194", "R199", "R200", "R258", "R259", "R261", "R343", "R359")
@pytest.mark.parametrize("script", FACTS)
def test_flag_is_as_it_was(script):
    found = {dest: action for dest, action in ACTIONS[script].items() if dest in FACTS[script]}
    facts = {dest: {**fact, "nargs": "*"} if dest in SEVERAL else fact for dest, fact in FACTS[script].items()}
    saving = facts.get("save_model_as", {}).get("choices", ())
    more = {"save_model_as": {"diffusers"} - set(saving)} if SCRIPTS[script][1] == "control_net" else {}
    assert described(found, more) == expected(facts)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_is_explained_in_one_line(script):
    for group in groups_for(*SCRIPTS[script]):
        for option in options_of(group):
            words = option.details.help.split()
            assert len(words) >= 2, option.dest
            assert "\n" not in option.details.help


# Options that no line of code names: `metadata_<field>` and `text_encoder_lr<number>` are read by a name that is put
# together, and the others ask for what is always done.
READ_BY_OTHER_MEANS = re.compile(r"metadata_\w+|text_encoder_lr\d|mem_eff_save|zero3_\w+|offload_\w+_nvme_path")


def test_every_option_is_read():
    """An option that nothing reads has no effect, whatever its help says. Its declaration does not count."""
    code = (
        file.read_text(encoding="utf-8") for folder in ("library", "networks") for file in (ROOT / folder).rglob("*.py")
    )
    used = {word for text in code for word in re.findall(r"\w+", re.sub(r"(?m)^    \w+: .*? = ", "", text))}
    declared = {
        option.dest
        for script in SCRIPTS.values()
        for group in groups_for(*script)
        for option in options_of(group)
        if not option.details.alias_of and not READ_BY_OTHER_MEANS.fullmatch(option.dest)
    }
    assert declared - used == set(), "nothing reads these options: use them, or do not add them"


@pytest.mark.rows("R1", "R2", "R4")
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_flag_and_exits_with_0(script, capsys):
    with pytest.raises(SystemExit) as stop:
        build_parser(groups_for(*SCRIPTS[script]), prog=f"{script}.py").parse_args(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{dest}" in shown for dest in ACTIONS[script])


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_the_models_and_nothing_that_is_not_so(script):
    family, method = SCRIPTS[script]
    said = cli.build_parser(family, method).description
    assert FAMILIES[family].traits.label in said
    assert "metadata" not in said  # folders of images will do, too, for most


def test_parsing_and_checking_import_nothing_heavy():
    """The time is the processor's for the whole of it, measured inside: start-up of Python is not ours."""
    code = """
import sys, time
start = time.process_time()
from library.options.parsing import build_parser, parse_options
from library.registry import FAMILIES, groups_for
from library.options.validation import problems, warnings
for method in ("finetune", "dreambooth", "network"):
    groups = groups_for("sd", method)
    build_parser(groups).format_help()
opts = parse_options(groups, ["--network_dim=4"])
problems(opts, FAMILIES["sd"].traits), warnings(opts, FAMILIES["sd"].traits)
heavy = {"torch", "numpy", "diffusers", "transformers", "PIL", "accelerate", "cv2"} & set(sys.modules)
print(time.process_time() - start, *heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, *heavy = done.stdout.split()
    assert heavy == []
    assert float(seconds) < 1.0
