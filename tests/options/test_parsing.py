"""Flags, configuration files, and which of them wins."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass

import pytest

from library.errors import UserError
from library.options.base import OptionGroup, opt
from library.options.parsing import build_parser, parse_options
from library.options.validation import problems
from library.runtime.documents import parse_toml

NOT_KEPT = ("config_file", "output_config", "wandb_api_key", "huggingface_token")


def write(tmp_path, text, name="run.toml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def refused(call, *args):
    with pytest.raises(UserError) as error:
        call(*args)
    return list(error.value.problems)


@pytest.mark.rows("C86", "C87")
def test_steps_are_numbers_shares_or_percent(parse):
    assert parse("--lr_warmup_steps=100").optimizer.lr_warmup_steps == 100
    assert isinstance(parse("--lr_warmup_steps=100").optimizer.lr_warmup_steps, int)
    assert parse("--lr_warmup_steps=0.1").optimizer.lr_warmup_steps == 0.1
    assert parse("--lr_warmup_steps=10%").optimizer.lr_warmup_steps == 0.1
    assert isinstance(parse("--lr_warmup_steps=100%").optimizer.lr_warmup_steps, float)


def test_abbreviations_work_while_they_are_unique(parse):
    assert parse("--pretrained", "m.ckpt").model.pretrained_model_name_or_path == "m.ckpt"
    assert parse("--shuffle").data.shuffle_caption is True
    (line,) = refused(parse, "--save_every=1")
    assert line.startswith("ambiguous option: --save_every")


def test_a_negative_rate_needs_the_equals_sign(parse):
    assert parse("--learning_rate=-1e-7").optimizer.learning_rate == -1e-7


@dataclass(frozen=True, kw_only=True)
class PlaceOptions(OptionGroup, group="places", title="Places"):
    source: str = opt(None, "what is read", positional=True)
    target: str = opt(None, "what is written", positional=True, exists="folder")
    model: str = opt(None, "what is used", required=True)
    size: int | None = opt(None, "how large", at_least=1)


@pytest.mark.parametrize(
    "line",
    ["a b --model=m --size 3", "a --model m --size=3 b", "--size 3 --model m a b", "--model=m a --size 3 -- b"],
)
def test_positional_values_may_have_options_between_them(line):
    opts = parse_options([PlaceOptions], line.split())
    assert opts.flat() == {"source": "a", "target": "b", "model": "m", "size": 3}
    assert opts.origin("source") == "command line"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (["--model=m"], "the following arguments are required: source, target"),
        (["a", "--model=m"], "the following arguments are required: target"),
        (["a", "b"], "the following arguments are required: --model"),
        (["a", "", "--model=m"], "target: must not be empty"),
        (["a", "b", "--model="], "--model: must not be empty"),
        (["a", "b", "c", "--model=m"], "unexpected value 'c': beside source and target every value needs its option"),
        (["a", "b", "--model=m", "--sorce=x"], "unknown option --sorce"),
    ],
)
def test_what_has_to_be_given_is_asked_for(line, problem):
    (told,) = refused(parse_options, [PlaceOptions], line)
    assert told.startswith(problem)
    assert "did you mean '--source'" not in told


def test_a_positional_value_is_checked_and_named_without_dashes(tmp_path):
    opts = parse_options([PlaceOptions], ["a", str(tmp_path / "none"), "--model=m"])
    assert problems(opts, None) == [f"target: there is no folder {str(tmp_path / 'none')!r}"]


def test_help_shows_positional_values_and_what_is_required():
    text = build_parser([PlaceOptions], prog="x.py").format_help()
    assert text.startswith("usage: x.py [options] source target\n")
    assert "what is used (required)" in text


def helped(capsys, groups, *words):
    with pytest.raises(SystemExit) as ended:
        parse_options(groups, ["--help", *words])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_on_a_word_shows_its_groups_and_flags_only(capsys, groups):
    everything, found = helped(capsys, groups), helped(capsys, groups, "schedule")
    assert "--lr_scheduler_num_cycles N" in found
    assert "--pretrained_model_name_or_path" not in found
    assert "--pretrained_model_name_or_path" in everything
    assert "--train_data_dir FOLDER" in helped(capsys, groups, "data set")
    assert len(found.splitlines()) < len(everything.splitlines()) / 4
    assert refused(parse_options, groups, ["--help", "zebra"]) == [
        "--help zebra: no group of options and no flag has this word in its name"
    ]


def test_lists(parse):
    opts = parse("--text_encoder_lr", "1e-4", "2e-5", "--network_args", "conv_dim=4", "x=a=b")
    assert opts.method.text_encoder_lr == [1e-4, 2e-5]
    assert opts.method.network_args == ["conv_dim=4", "x=a=b"]


def test_a_list_behind_an_equals_sign_is_shown_how_to_be_written(parse):
    line = ("--text_encoder_lr=1e-4", "1e-5", "--seed=1")
    assert refused(parse, *line) == [
        "--text_encoder_lr: takes several values without an equals sign only, as in --text_encoder_lr A B"
    ]
    assert refused(parse, "--seed=1", "2") == ["unexpected value '2': every value needs its option before it"]


def test_unknown_flags_are_all_named_with_the_nearest_known_one(parse):
    assert refused(parse, "--lerning_rate", "1e-4", "--sead=3", "--zzz") == [
        "unknown option --lerning_rate; did you mean '--learning_rate'?",
        "unknown option --sead; did you mean '--seed'?",
        "unknown option --zzz",
    ]


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--network_dim=abc", "--network_dim: must be a whole number, got 'abc'"),
        ("--network_dim=4.5", "--network_dim: must be a whole number, got '4.5'"),
        ("--learning_rate=fast", "--learning_rate: must be a number, got 'fast'"),
        ("--loss_type=l3", "--loss_type: must be one of l1, l2, huber, smooth_l1; got 'l3'"),
        (
            "--mixed_precision=fp8",
            "--mixed_precision: must be one of no, fp16, bf16; got 'fp8'; --fp8_base keeps the weights that are not "
            "trained in 8 bits, with bf16 here",
        ),
        ("--mixed_precision=fp32", "--mixed_precision: must be one of no, fp16, bf16; got 'fp32'"),
        ("--max_token_length=77", "--max_token_length: must be one of 75, 150, 225; got 77"),
        ("--seed", "--seed: expected one argument"),
    ],
)
def test_a_bad_value_is_one_line(parse, flag, line):
    assert refused(parse, flag) == [line]


def test_empty_text_means_not_given_where_that_is_possible(parse):
    opts = parse("--vae=", "--dataset_config=", "--max_token_length=", "--optimizer_type=")
    assert opts.model.vae is None
    assert opts.data.dataset_config is None
    assert opts.family.max_token_length is None
    assert opts.optimizer.optimizer_type == ""


@pytest.mark.rows("R27")
def test_values_that_mean_off_read_as_not_given(parse):
    opts = parse("--max_token_length=75", "--noise_offset=0", "--clip_skip=0", "--min_snr_gamma=0")
    values = opts.flat()
    assert [values[n] for n in ("max_token_length", "noise_offset", "clip_skip", "min_snr_gamma")] == [None] * 4


def test_the_old_misspelling_sets_the_right_option(parse, tmp_path):
    assert parse("--caption_extention=.txt").data.caption_extension == ".txt"
    file = write(tmp_path, 'caption_extension = ".old"')
    assert parse("--config_file", file, "--caption_extention=.txt").data.caption_extension == ".txt"
    file = write(tmp_path, 'caption_extention = ".old"', "b.toml")
    assert parse("--config_file", file).data.caption_extension == ".old"
    assert parse("--config_file", file, "--caption_extension=.txt").data.caption_extension == ".txt"


@pytest.mark.parametrize("suffix", ["", ".toml"])
def test_flag_wins_over_file_and_file_over_default(parse, tmp_path, suffix):
    write(tmp_path, "[first]\nnetwork_dim = 8\nseed = 1\n[b]\nv2 = true\n")
    opts = parse(f"--config_file={tmp_path / 'run'}{suffix}", "--seed=2")
    assert (opts.method.network_dim, opts.training.seed, opts.family.v2) == (8, 2, True)
    assert opts.optimizer.learning_rate == 2e-6
    assert opts.explicit == {"network_dim", "seed", "v2", "config_file"}
    assert [opts.origin(n) for n in ("seed", "network_dim", "max_train_steps")] == [
        "command line",
        "run.toml",
        "default",
    ]


def test_file_may_begin_with_a_byte_order_mark(parse, tmp_path):
    file = write(tmp_path, '\ufeffoutput_name = "キャラ"')
    assert parse("--config_file", file).saving.output_name == "キャラ"


def test_file_values_are_typed(parse, tmp_path):
    file = write(
        tmp_path,
        'learning_rate = 1\nresolution = [512, 768]\nface_crop_aug_range = "2.0,4.0"\nlr_warmup_steps = "5%"\n'
        'network_args = ["a=1"]\ntext_encoder_lr = 1e-5\ndataset_config = "d.toml"\n',
    )
    opts = parse("--config_file", file)
    assert isinstance(opts.optimizer.learning_rate, float)
    assert opts.data.resolution == "512,768"
    assert opts.optimizer.lr_warmup_steps == 0.05
    assert opts.method.text_encoder_lr == [1e-5]
    assert opts.data.dataset_config.name == "d.toml"
    file = write(tmp_path, "resolution = 640", "square.toml")
    assert parse("--config_file", file).data.resolution == "640"


@pytest.mark.rows("C97", "C98", "C99", "C101", "C102")
def test_settings_of_notebooks(parse, tmp_path):
    file = write(
        tmp_path,
        "network_dim = 32\noptimizer_type = 'AdamW8bit'\nmax_token_length = 225\nbucket_no_upscale = false\n"
        'mixed_precision = "fp16"\n',
    )
    opts = parse("--config_file", file)
    assert opts.method.network_dim == 32
    assert opts.optimizer.optimizer_type == "AdamW8bit"
    assert opts.family.max_token_length == 225
    assert opts.data.bucket_no_upscale is False
    assert opts.memory.mixed_precision == "fp16"


@pytest.mark.rows("C27", "R200")
def test_keep_tokens_in_the_form_with_an_equals_sign(parse):
    assert parse("--keep_tokens=1").data.keep_tokens == 1
    assert parse().data.keep_tokens == 0
    assert parse().data.shuffle_caption is False


def test_everything_wrong_in_a_file_is_reported_at_once(parse, tmp_path):
    file = write(
        tmp_path,
        'learning_rate = "1e-4"\nnetwork_dim = 4.5\nv2 = 2\nseed = true\nloss_type = "l3"\nxformers = "true"\n'
        'mixed_precision = "fp8"\n',
    )
    assert refused(parse, "--config_file", file) == [
        "key 'v2' in run.toml: must be true or false, got 2",
        "key 'network_dim' in run.toml: must be a whole number, got 4.5",
        "key 'seed' in run.toml: must be a whole number, got true",
        "key 'learning_rate' in run.toml: must be a number, got the text '1e-4'; remove the quotes",
        "key 'loss_type' in run.toml: must be one of l1, l2, huber, smooth_l1; got 'l3'",
        "key 'xformers' in run.toml: must be true or false, got the text 'true'; remove the quotes",
        "key 'mixed_precision' in run.toml: must be one of no, fp16, bf16; got 'fp8'; --fp8_base keeps the weights "
        "that are not trained in 8 bits, with bf16 here",
    ]


def test_a_dataset_file_given_as_configuration_is_recognised(parse, tmp_path):
    file = write(tmp_path, "[[datasets]]\nresolution = 512\n")
    (line,) = refused(parse, "--config_file", file)
    assert "--dataset_config" in line


def test_missing_broken_and_undecodable_files(parse, tmp_path):
    (line,) = refused(parse, "--config_file", str(tmp_path / "none"))
    assert line == f"--config_file: there is no file {tmp_path / 'none.toml'}"
    (line,) = refused(parse, "--config_file", write(tmp_path, "a = = 1"))
    assert "is not valid TOML" in line
    (tmp_path / "sjis.toml").write_bytes('output_name = "キャラ"'.encode("shift_jis"))
    (line,) = refused(parse, "--config_file", str(tmp_path / "sjis.toml"))
    assert "not UTF-8" in line


def output_config(groups, tmp_path, *flags):
    path = tmp_path / "out.toml"
    with pytest.raises(SystemExit) as stop:
        parse_options(groups, ["--output_config", "--config_file", str(path), *flags])
    assert stop.value.code == 0
    return path


def test_output_config_gives_the_same_options_back(groups, tmp_path):
    flags = [
        "--pretrained_model_name_or_path=C:\\models\\xl\\new\\u00e9.safetensors",
        '--output_name=a "quoted" # name\twith\x7f\\x41 signs 🐸',
        "--dataset_config=sets/d.toml",
        "--caption_extention=.txt",
        "--learning_rate=-1e-07",
        "--lr_warmup_steps=100%",
        "--lr_decay_steps=7",
        "--text_encoder_lr", "1", "2.5e-05",
        "--network_args", "a=[1,2]", "b=c d",
        "--optimizer_args",
        "--flip_aug",
        "--max_token_length=150",
        "--sample_every_n_steps=-3",
        "--wandb_api_key=hush",
        "--huggingface_token=hush",
    ]  # fmt: skip
    path = output_config(groups, tmp_path, *flags)
    text = path.read_text(encoding="utf-8")
    assert "hush" not in text
    written, read = parse_options(groups, flags).flat(), parse_options(groups, ["--config_file", str(path)]).flat()
    for name in NOT_KEPT:
        assert name not in text
        written.pop(name), read.pop(name)
    assert read == written
    for name in ("lr_warmup_steps", "lr_decay_steps", "dataset_config"):  # where the type carries meaning
        assert type(read[name]) is type(written[name])
    assert read["output_name"] == 'a "quoted" # name\twith\x7f\\x41 signs 🐸'
    assert "lr_scheduler" in parse_toml(text, path)["optimizer"]


def test_output_config_never_overwrites(groups, tmp_path):
    path = output_config(groups, tmp_path, "--seed=1")
    before = path.read_text()
    (line,) = refused(parse_options, groups, ["--output_config", "--config_file", str(path), "--seed=2"])
    assert "exists already" in line
    assert path.read_text() == before
    (line,) = refused(parse_options, groups, ["--output_config"])
    assert "--config_file" in line


def test_options_travel_to_other_processes(parse):
    opts = parse("--seed=3", "--flip_aug")
    copy = pickle.loads(pickle.dumps(opts))
    assert copy.flat() == opts.flat()
    assert copy.origin("seed") == "command line"
    json.dumps({name: str(value) for name, value in copy.flat().items()})
