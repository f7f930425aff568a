"""Keys of a configuration file that are no options of the script at hand, and values that GUIs write unasked.

The rule: what the ancestor accepts and ignores is accepted; what would train something else than asked is an error;
everything between is one warning. `docs/compatibility.md` explains it to users.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from library.options.base import Option
from library.options.nearest import did_you_mean

# The options of all training scripts, name -> script -> option; a function, as the answer is seldom needed.
Elsewhere = Callable[[], Mapping[str, Mapping[str, Option]]]

# Keys that no script has and that GUIs write into every file, for their own use: no word about them.
_OF_GUIS = frozenset(
    (
        *("epoch", "noise_offset_type"),  # kohya_ss
        *("enable_preview", "enable_block_weights", "enable_base_weight", "enable_mixed_resolution_training"),
        *("randomly_choice_prompt", "model_train_type"),  # SD-Trainer (lora-scripts) and its forks
        *("easy_name", "tag_occurrence", "save_toml", "save_toml_location", "tag_file_location"),  # LoRA_Easy
    )
)

# Options of newer trainers that do nothing by themselves.
_IDLE_ALONE = frozenset(("max_denoising_steps", "leco_denoise_guidance_scale"))

# Names that belong into --network_args; some GUIs have written them beside it.
_NETWORK_ARGUMENTS = frozenset(
    (
        *("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"),
        *("conv_dim", "conv_alpha", "algo", "dora_wd", "train_norm", "rank_dropout", "module_dropout"),
    )
)

# Options that GUIs write into every file, whatever is trained, with the values that they write unasked.
_ANY = object()
_GUI_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "clip_skip": (_ANY,),
    "compile_cache_size_limit": (_ANY,),
    "dynamo_backend": ("no",),
    "learning_rate_te": (_ANY,),
    "learning_rate_te1": (_ANY,),
    "learning_rate_te2": (_ANY,),
    "max_bucket_reso": (2048, 1536),
    "max_token_length": (_ANY,),
    "max_train_steps": (_ANY,),
    "model_prediction_type": ("sigma_scaled",),
    "sample_prompts": (_ANY,),
    "t5xxl_dtype": ("bf16",),
    "text_encoder_batch_size": (1,),
    "train_text_encoder": (True,),
    "wandb_run_name": (_ANY,),
}

_SURELY_A_TYPO = 0.85  # likeness above which a name is suggested for a key that may as well belong to another program
_OFF_WORDS = ("", "no", "none", "off", "false")


@dataclass(frozen=True)
class Verdict:
    """The verdict on a key: it passes, with or without a warning, or ends the run."""

    kind: Literal["silent", "warning"]
    text: str = ""


def is_off(value: Any) -> bool:
    """Whether a value asks for nothing: false, zero, empty, or a word for that."""
    return value.strip().lower() in _OFF_WORDS if isinstance(value, str) else not value


def is_gui_default(name: str, value: Any) -> bool:
    """Whether GUIs write this value of an option into every file, so that it says nothing about the user's intent."""
    return any(known is _ANY or known == value for known in _GUI_DEFAULTS.get(name, ()))


def judge(key: str, value: Any, known: Mapping[str, Option], elsewhere: Elsewhere) -> Verdict:
    """The verdict on a key that is no option of the script. `known` are the script's options by their names."""
    if key in _OF_GUIS or (is_off(value) and key not in known):
        return Verdict("silent")
    if key in _IDLE_ALONE:
        return Verdict("silent")
    if key in _NETWORK_ARGUMENTS:
        return Verdict("warning", f'ignored: an argument of the network; write it into network_args, "{key}=..."')
    others = elsewhere().get(key)
    if others is None:
        return Verdict("warning", f"ignored: no option of this script{did_you_mean(key, known, _SURELY_A_TYPO)}")
    if is_gui_default(key, value) or any(value == option.default for option in others.values()):
        return Verdict("silent")
    return Verdict("warning", f"ignored: an option of {', '.join(others)}")


def judge_flag(flag: str, known: Mapping[str, Option], elsewhere: Elsewhere) -> str:
    """The text about an unknown flag of the command line, after its name."""
    key = flag.lstrip("-")
    if key in _NETWORK_ARGUMENTS:
        return f": an argument of the network; write --network_args {key}=..."
    others = elsewhere().get(key)
    if others:
        return f": not here; an option of {', '.join(others)}"
    return did_you_mean(flag, [f"--{name}" for name in known])
