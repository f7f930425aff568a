"""What configuration files of others hold, and what becomes of it: nothing, one warning, or an error.

The rule is that of docs/compatibility.md.
"""

from __future__ import annotations

import json

import pytest

from library import registry
from library.errors import UserError
from library.options.method import MethodOptions
from library.options.optimizer import OptimizerOptions, default_rate
from library.options.parsing import build_parser, parse_options
from library.options.validation import problems, warnings
from library.registry import groups_for
from tests.builders.gui_files import TABS, written_by_gui
from tests.builders.options import options_with

NEEDED = {"pretrained_model_name_or_path": "m.safetensors", "train_data_dir": "train", "output_dir": "out"}


@pytest.fixture
def read(tmp_path):
    """Parses a configuration file of these keys; returns the options and the traits of the family."""

    def parse(keys, family="sd", method="network", *flags):
        file = tmp_path / "gui.toml"
        text = keys if isinstance(keys, str) else "\n".join(f"{key} = {json.dumps(keys[key])}" for key in keys)
        file.write_text(text, encoding="utf-8")
        parser = build_parser(groups_for(family, method))
        argv = ["--config_file", str(file), *flags]
        return parse_options(parser, argv, elsewhere=registry.options_elsewhere), registry.FAMILIES[family].traits

    return parse


def said(read, keys, *place):
    opts, traits = read({**NEEDED, **keys}, *place)
    return warnings(opts, traits)


def refused(read, keys, *place):
    with pytest.raises(UserError) as error:
        read({**NEEDED, **keys}, *place)
    return list(error.value.problems)


@pytest.mark.parametrize(("family", "method"), TABS)
def test_what_a_gui_writes_with_nothing_changed_is_no_word_worth(read, family, method):
    opts, traits = read({**written_by_gui(family, method), **NEEDED}, family, method)
    assert problems(opts, traits) == []
    assert warnings(opts, traits) == []


# ---- keys of others


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"bucket_resolution_steps": 64}, "ignored: no option of this script; did you mean 'bucket_reso_steps'?"),
        ({"batch_size": 4}, "ignored: no option of this script"),
        ({"stop_train_text_encoder": 100}, "ignored: no option of this script"),
        ({"mem_eff_save": True}, "ignored: an option of flux_train.py"),
        ({"no_token_padding": True}, "ignored: an option of train_db.py"),
        ({"conv_dim": 4}, 'ignored: an argument of the network; write it into network_args, "conv_dim=..."'),
        ({"loraplus_lr_ratio": 16}, "ignored: an argument of the network; write it into network_args, "),
        ({"config_file": "other.toml"}, "ignored; it belongs on the command line"),
    ],
)
def test_a_key_that_is_ignored_gets_one_line(read, keys, line):
    (found,) = said(read, keys)
    assert found.startswith(f"key {next(iter(keys))!r} in gui.toml: {line}")
    assert "did you mean" in line or "did you mean" not in found


@pytest.mark.parametrize(
    "keys",
    [
        {"epoch": 3},
        {"easy_name": "thing", "tag_occurrence": True, "save_toml": True},
        {"enable_preview": True, "model_train_type": "sd-lora"},
        {"any_form_switch": False, "another": "", "third": 0},
        {"no_token_padding": False},
        {"show_timesteps_resolution": "1024", "output_config": False},
    ],
)
def test_keys_of_guis_and_switches_that_are_off_pass_silently(read, keys):
    assert said(read, keys) == []


def test_a_key_that_would_train_something_else_is_an_error(read):
    assert refused(read, {"show_timesteps": "image"}) == [
        "key 'show_timesteps' in gui.toml: not available yet; without it something else would be trained: 'image'"
    ]
    assert len(refused(read, {"skip_image_resolution": "512", "show_timesteps": "image"})) == 2
    assert said(read, {"skip_image_resolution": "", "show_timesteps": ""}) == []


def test_flags_stay_strict(parse):
    def line(flag):
        with pytest.raises(UserError) as error:
            parse_options(groups_for("sd", "dreambooth"), [flag], elsewhere=registry.options_elsewhere)
        return error.value.problems[0]

    assert "unknown option --network_module: not here; an option of train_network.py, " in line("--network_module=x")
    assert line("--learning_rat_e=1").endswith("did you mean '--learning_rate'?")
    assert line("--show_timesteps") == "unknown option --show_timesteps: not available yet"
    assert "write --network_args conv_dim=..." in line("--conv_dim=4")


# ---- values


@pytest.mark.parametrize(
    ("keys", "name", "value"),
    [
        ({"persistent_data_loader_workers": 1}, "persistent_data_loader_workers", True),
        ({"xformers": 0}, "xformers", False),
        ({"network_dim": 64.0}, "network_dim", 64),
        ({"lr_warmup_steps": 100.0, "lr_scheduler": "cosine"}, "lr_warmup_steps", 100),
        ({"lr_warmup_steps": 1.0, "lr_scheduler": "cosine"}, "lr_warmup_steps", 1.0),
        ({"output_name": 5}, "output_name", "5"),
        ({"max_token_length": 255}, "max_token_length", 225),
        ({"dynamo_backend": "tensorrt", "torch_compile": True}, "dynamo_backend", "tensort"),
        ({"scale_weight_norms": 0}, "scale_weight_norms", None),
        ({"vae_batch_size": 0}, "vae_batch_size", 1),
        ({"multires_noise_discount": 0}, "multires_noise_discount", 0.3),
        ({"dynamo_backend": "none"}, "dynamo_backend", "inductor"),
        ({"bucket_reso_steps": 0}, "bucket_reso_steps", 64),
        ({"lr_scheduler_num_cycles": 0}, "lr_scheduler_num_cycles", 1),
    ],
)
def test_values_are_read_as_they_are_meant(read, keys, name, value):
    opts, traits = read({**NEEDED, "resolution": "512", "network_module": "networks.lora", **keys})
    assert opts.flat()[name] == value
    assert type(opts.flat()[name]) is type(value)
    assert problems(opts, traits) == []


@pytest.mark.parametrize("blank", ["", "  ", [""], ["", " "]])
@pytest.mark.parametrize("name", ["network_dim", "output_name", "vae", "network_args", "loss_type", "xformers", "seed"])
def test_an_empty_field_means_not_given(read, name, blank):
    opts, _ = read({name: blank})
    assert name not in opts.explicit
    assert opts.flat()[name] == read({})[0].flat()[name]


def test_white_space_is_a_value_of_what_separates(read):
    assert read({"caption_separator": " "})[0].data.caption_separator == " "
    assert read({"caption_separator": ""})[0].data.caption_separator == ","


@pytest.mark.parametrize(
    "flag", ["--caption_extension=", "--network_dim=", "--loss_type=", "--network_args=", "--vae= "]
)
def test_an_empty_flag_means_not_given_too(parse, flag):
    assert parse(flag).given == {}


def test_a_value_is_judged_where_its_option_has_an_effect(read):
    assert said(read, {"dynamo_backend": "fastest"}) == [
        "key 'dynamo_backend' in gui.toml: has no effect without --torch_compile"
    ]
    assert refused(read, {"dynamo_backend": "fastest", "torch_compile": True})[0].startswith(
        "key 'dynamo_backend' in gui.toml: must be one of eager"
    )
    keys = {**NEEDED, "resolution": "512", "network_module": "networks.lora", "huber_c": -1}
    opts, traits = read(keys)
    assert problems(opts, traits) == []
    assert warnings(opts, traits) == [
        "--huber_c: has no effect without --loss_type huber or --loss_type smooth_l1 (from gui.toml)"
    ]
    assert problems(read({**keys, "loss_type": "huber"})[0], traits) == [
        "--huber_c: must be above 0, got -1.0 (from gui.toml)"
    ]


# ---- repetition and surplus


def test_the_last_of_several_counts(read):
    opts, _ = read("[a]\nclip_skip = 1\nnetwork_dim = 4\n[b]\nclip_skip = 2\nnetwork_dim = 4\n")
    assert (opts.family.clip_skip, opts.method.network_dim) == (2, 4)
    assert list(opts.remarks) == ["key 'clip_skip' in gui.toml: given in several sections; the last one counts"]
    repeated = said(read, {"network_args": ["conv_dim=1", "conv_alpha=1", "conv_dim=2", "conv_alpha=1"]})
    assert repeated == ["--network_args: conv_dim is given several times; the last one is used (from gui.toml)"]
    repeated = said(read, {"optimizer_args": ["weight_decay=0.1", "weight_decay=0.2"]})
    assert repeated == ["--optimizer_args: weight_decay is given several times; the last one is used (from gui.toml)"]


def test_surplus_rates_are_left_alone(read):
    assert said(read, {"text_encoder_lr": [1e-4, 1e-4]}) == []
    assert said(read, {"text_encoder_lr": [1e-4, 1e-5]}) == [
        "--text_encoder_lr: Stable Diffusion 1.x/2.x has 1 text encoder; the first rate counts of 2 (from gui.toml)"
    ]
    assert said(read, {"text_encoder_lr": [1e-4, 1e-5, 1e-5]}, "sdxl") == []
    assert read({"text_encoder_lr": [1e-4, 1e-5]})[0].method.text_rates(1) == [1e-4]
    assert read({"text_encoder_lr": [1e-4, 1e-5]})[0].method.text_rates(3) == [1e-4, 1e-5, 1e-5]
    assert read({})[0].method.text_rates(2) == [None, None]


@pytest.mark.parametrize(
    ("asked", "used"),
    [
        (("xformers", "sdpa"), "xformers"),
        (("xformers", "mem_eff_attn"), "mem_eff_attn"),
        (("mem_eff_attn", "sdpa"), "mem_eff_attn"),
    ],
)
def test_of_several_kinds_of_attention_one_is_used(read, asked, used):
    opts, traits = read({**NEEDED, **dict.fromkeys(asked, True)})
    assert opts.memory.attention[0] == used
    (other,) = (name for name in asked if name != used)
    assert warnings(opts, traits) == [f"--{other}: has no effect with --{used}, which is used (from gui.toml)"]


def test_the_same_optimizer_twice_is_one(read):
    keys = {**NEEDED, "resolution": "512", "network_module": "networks.lora", "use_8bit_adam": True}
    opts, traits = read({**keys, "optimizer_type": "adamw8bit"})
    assert problems(opts, traits) == []
    opts, traits = read({**keys, "optimizer_type": "Lion"})
    (line,) = problems(opts, traits)
    assert line.startswith("--optimizer_type: cannot be used with --use_8bit_adam; choose one optimizer")


# ---- a rate that nobody chose


@pytest.mark.parametrize(
    ("keys", "place", "line"),
    [
        ({}, (), "2e-06, the default; it is made for whole models, a LoRA usually wants 1e-4 (--learning_rate)"),
        ({"unet_lr": 1e-4}, (), "2e-06, the default; it is made for whole models"),
        ({"unet_lr": 1e-4, "network_train_unet_only": True}, (), None),
        ({"unet_lr": 1e-4, "text_encoder_lr": [1e-5]}, (), None),
        ({"learning_rate": 2e-6}, (), None),
        ({"optimizer_type": "Prodigy"}, (), "2e-06, the default; Prodigy finds the rate itself and wants 1"),
        ({"optimizer_type": "AdaFactor"}, (), None),
        ({}, ("sd", "dreambooth"), "2e-06, the default"),
    ],
)
def test_a_rate_that_was_not_given_is_reported(read, keys, place, line):
    opts, _ = read({**NEEDED, **keys}, *place)
    found = default_rate(opts)
    assert (found or "").startswith(f"learning rate: {line}" if line else "")
    assert (found is None) == (line is None)


def test_a_method_need_not_say_what_it_wants():
    opts = options_with(OptimizerOptions, MethodOptions)
    assert default_rate(opts) == "learning rate: 2e-06, the default"
