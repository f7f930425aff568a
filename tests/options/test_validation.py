"""Problems and warnings of options and their combinations."""

from __future__ import annotations

import pytest
import torch

from library.options.optimizer import (
    OPTIMIZERS,
    SCHEDULES,
    TORCH_OPTIMIZERS,
    TORCH_SCHEDULES,
    UNUSABLE_OPTIMIZERS,
    UNUSABLE_SCHEDULES,
)
from library.options.parsing import parse_options
from library.options.validation import problems, warnings
from library.registry import FAMILIES, groups_for


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Run in an empty folder, so that relative paths name nothing."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_good_command_line_has_no_problems_and_no_warnings(valid, traits):
    assert problems(valid(), traits) == []
    assert warnings(valid(), traits) == []


def test_all_problems_come_at_once_with_their_origin(parse, traits, tmp_path):
    (tmp_path / "run.toml").write_text("network_dim = 0\nhuber_c = nan\nloss_type = 'huber'\n")
    lines = problems(parse(f"--config_file={tmp_path}/run", "--learning_rate=inf", "--train_batch_size=0"), traits)
    assert set(lines) == {
        "--pretrained_model_name_or_path: missing; give a checkpoint file, a Diffusers folder or a hub id",
        "--train_data_dir: missing; name a folder of images with it, or a file with --dataset_config",
        "--train_batch_size: must be at least 1, got 0",
        "--network_dim: must be at least 1 and at most 32768, got 0 (from run.toml)",
        "--network_module: missing; networks.lora trains a LoRA",
        "--learning_rate: must be a finite number, got inf",
        "--huber_c: must be a finite number, got nan (from run.toml)",
        "--output_dir: missing; name the folder to save to",
    }


def test_options_that_say_nothing_new_do_no_harm(valid, traits):
    assert problems(valid("--zero_stage=2", "--validation_split=0", "--dynamo_backend=inductor"), traits) == []


REFUSED = [
    ("--network_dropout=1", "--network_dropout: must be at least 0 and below 1, got 1.0"),
    ("--scale_weight_norms=-1", "--scale_weight_norms: must be above 0, got -1.0"),
    ("--caption_dropout_rate=1.5", "--caption_dropout_rate: must be at least 0 and at most 1, got 1.5"),
    ("--lr_warmup_steps=1.5 --lr_scheduler=cosine", "--lr_warmup_steps: must be a whole number of steps or a share"),
    ("--cache_latents --color_aug", "--cache_latents: cannot be used with --color_aug"),
    ("--cache_latents --random_crop", "--cache_latents: cannot be used with --random_crop"),
    ("--cache_latents --face_crop_aug_range=2,4", "--cache_latents: cannot be used with --face_crop_aug_range"),
    ("--cache_latents_to_disk --color_aug", "--cache_latents_to_disk: cannot be used with --color_aug"),
    ("--face_crop_aug_range=4,2", "--face_crop_aug_range: must be two factors"),
    ("--full_fp16", "--full_fp16: needs --mixed_precision fp16, got no"),
    ("--full_fp16 --mixed_precision=bf16", "--full_fp16: needs --mixed_precision fp16, got bf16"),
    ("--full_bf16", "--full_bf16: needs --mixed_precision bf16, got no"),
    ("--full_fp16 --full_bf16", "--full_fp16: cannot be used with --full_bf16"),
    ("--use_8bit_adam --use_lion_optimizer", "--use_8bit_adam: cannot be used with --use_lion_optimizer"),
    ("--optimizer_type=AdamW --use_8bit_adam", "--optimizer_type: cannot be used with --use_8bit_adam"),
    ("--lr_warmup_steps=10", "--lr_warmup_steps: a constant rate has no warm-up"),
    ("--network_train_unet_only --network_train_text_encoder_only", "--network_train_unet_only: cannot be used with"),
    ("--noise_offset=.1 --multires_noise_iterations=6", "--noise_offset: cannot be used with"),
    ("--adaptive_noise_scale=.1", "--adaptive_noise_scale: needs --noise_offset"),
    ("--min_timestep=500 --max_timestep=500", "--min_timestep: must be below --max_timestep, got 500 and 500"),
    ("--min_timestep=10 --max_timestep=5", "--min_timestep: must be below --max_timestep, got 10 and 5"),
    ("--min_timestep=-1", "--min_timestep: must be at least 0 and at most 999, got -1"),
    ("--min_timestep=1000", "--min_timestep: must be at least 0 and at most 999, got 1000"),
    ("--max_timestep=1001", "--max_timestep: must be at least 1 and at most 1000, got 1001"),
    ("--multires_noise_iterations=-1", "--multires_noise_iterations: must be at least 1, got -1"),
    ("--loss_type=huber --huber_c=0", "--huber_c: must be above 0, got 0.0"),
    ("--loss_type=smooth_l1 --huber_scale=-1", "--huber_scale: must be above 0, got -1.0"),
    ("--min_snr_gamma=-1", "--min_snr_gamma: must be at least 0, got -1.0"),
    ("--optimizer_args decay", "--optimizer_args: 'decay' is not name=value"),
    ("--optimizer_args decay=much", "--optimizer_args: the value in 'decay=much' must be"),
    ("--network_args conv_dim", "--network_args: 'conv_dim' is not name=value"),
    ("--lr_scheduler_args x", "--lr_scheduler_args: 'x' is not name=value"),
    ("--optimizer_type=AdmaW", "--optimizer_type: unknown optimizer 'AdmaW'"),
    ("--optimizer_type=rmsprop", "--optimizer_type: unknown optimizer 'rmsprop'; names of torch.optim are case-sens"),
    ("--optimizer_type=no_such_package.Adam", "--optimizer_type: no_such_package.Adam needs the package no_such_pack"),
    ("--optimizer_type=.Adam", "--optimizer_type: .Adam needs the package"),
    ("--optimizer_type=LBFGS", "--optimizer_type: LBFGS cannot train here: it computes the loss several times"),
    ("--optimizer_type=torch.optim.SparseAdam", "--optimizer_type: SparseAdam cannot train here"),
    ("--optimizer_type=RAdamScheduleFree --lr_scheduler=cosine", "--lr_scheduler: RAdamScheduleFree needs no schedule"),
    ("--optimizer_type=sgdschedulefree --lr_warmup_steps=5", "--lr_warmup_steps: sgdschedulefree needs no schedule"),
    ("--optimizer_type=RAdamScheduleFree --lr_scheduler_type=StepLR", "--lr_scheduler_type: RAdamScheduleFree needs"),
    ("--optimizer_type=a.BScheduleFree --lr_decay_steps=5", "--lr_decay_steps: a.BScheduleFree needs no schedule"),
    ("--lr_scheduler=adafactor", "--lr_scheduler: adafactor needs --optimizer_type AdaFactor"),
    ("--lr_scheduler=adafactor:1e-4", "--lr_scheduler: adafactor needs --optimizer_type AdaFactor"),
    (
        "--optimizer_type=AdaFactor --optimizer_args relative_step=False --lr_scheduler=adafactor",
        "--lr_scheduler: adafactor needs --optimizer_type AdaFactor with its relative_step",
    ),
    ("--optimizer_type=AdaFactor --lr_scheduler=adafactor:x", "--lr_scheduler: adafactor:rate needs a number"),
    ("--optimizer_type=AdaFactor --lr_scheduler=cosinus", "--lr_scheduler: must be one of linear"),
    ("--lr_scheduler=cosine:1e-4", "--lr_scheduler: only adafactor takes a rate after a colon"),
    ("--lr_scheduler=piecewise_constant", "--lr_scheduler_args: piecewise_constant needs step_rules="),
    ("--lr_scheduler=piecewise_constant --lr_scheduler_args step_rules=1:x,2", "--lr_scheduler_args: piecewise_const"),
    ("--lr_scheduler=piecewise_constant --lr_scheduler_args step_rules=1:5", "--lr_scheduler_args: piecewise_const"),
    ("--lr_scheduler=reduce_lr_on_plateau --lr_warmup_steps=5", "--lr_warmup_steps: reduce_lr_on_plateau has no"),
    ("--lr_scheduler_args a=1", "--lr_scheduler_args: --lr_scheduler constant takes none"),
    ("--lr_scheduler_type=StepLR --lr_warmup_steps=5", "--lr_warmup_steps: --lr_scheduler_type has no warm-up"),
    ("--lr_scheduler_type=StepL", "--lr_scheduler_type: torch.optim.lr_scheduler has no class 'StepL'"),
    ("--lr_scheduler_type=no_such_package.X", "--lr_scheduler_type: no_such_package.X needs the package no_such_pack"),
    ("--lr_scheduler_type=LambdaLR", "--lr_scheduler_type: LambdaLR cannot be used"),
    ("--lr_scheduler_type=torch.optim.lr_scheduler.SequentialLR", "--lr_scheduler_type: torch.optim.lr_scheduler.Seq"),
    ("--lr_scheduler=cosinus", "--lr_scheduler: must be one of linear, cosine"),
    ("--resolution=big", "--resolution: must be one number or width,height"),
    ("--resolution=7", "--resolution: sides must be at least 8"),
    ("--resolution=192 --enable_bucket", "--resolution: 192 is below --min_bucket_reso 256"),
    ("--resolution=512,1088 --enable_bucket", "--resolution: 512,1088 is above --max_bucket_reso 1024"),
    ("--enable_bucket --bucket_reso_steps=32", "--bucket_reso_steps: must be a multiple of 64"),
    ("--log_with=tensorboard", "--log_with: tensorboard needs --logging_dir"),
    ("--sample_prompts=none.txt --sample_at_first", "--sample_prompts: there is no file 'none.txt'"),
    ("--sample_prompts=none.yaml --sample_every_n_steps=5", "--sample_prompts: must be a .txt, .toml or .json file"),
    ("--network_weights=none.pt", "--network_weights: there is no file 'none.pt'"),
    ("--dim_from_weights", "--dim_from_weights: needs --network_weights"),
    ("--network_module=networks.nothing", "--network_module: there is no module 'networks.nothing'"),
    ("--network_module=no_such_package.x", "--network_module: there is no module 'no_such_package.x'"),
    ("--scale_v_pred_loss_like_noise_pred", "--scale_v_pred_loss_like_noise_pred: needs --v_parameterization"),
    ("--v_pred_like_loss=.1 --v_parameterization", "--v_pred_like_loss: cannot be used with --v_parameterization"),
]


@pytest.mark.rows("R40", "R181", "R183")
@pytest.mark.parametrize(("flags", "beginning"), REFUSED, ids=[flags for flags, _ in REFUSED])
def test_what_cannot_work_is_refused(valid, traits, files, flags, beginning):
    lines = problems(valid(*flags.split()), traits)
    assert any(line.startswith(beginning) for line in lines), lines


@pytest.mark.rows("R262", "R263")
@pytest.mark.parametrize(
    ("family", "flags", "beginning"),
    [
        ("flux", "--loss_type=huber", "--huber_schedule: snr does not exist for FLUX.1"),
        ("sd3", "--loss_type=smooth_l1", "--huber_schedule: snr does not exist for Stable Diffusion 3/3.5"),
        ("flux", "--discrete_flow_shift=0", "--discrete_flow_shift: must be above 0, got 0.0"),
        ("sd3", "--training_shift=-1", "--training_shift: must be above 0, got -1.0"),
    ],
)
def test_what_rectified_flow_cannot_follow_is_refused(family, flags, beginning):
    opts = parse_options(groups_for(family, "network"), flags.split())
    lines = problems(opts, FAMILIES[family].traits)
    assert any(line.startswith(beginning) for line in lines), lines


ACCEPTED = [
    "--v2", "--v_parameterization", "--v2 --v_parameterization", "--cache_latents --flip_aug",
    "--zero_terminal_snr --v_parameterization --min_snr_gamma=5", "--min_snr_gamma=5 --debiased_estimation_loss",
    "--optimizer_type=adamw8bit", "--optimizer_type=AdamW", "--optimizer_type=sgdnesterov", "--optimizer_type=RMSprop",
    "--lr_scheduler=constant_with_warmup --lr_warmup_steps=10", "--lr_scheduler=cosine --lr_warmup_steps=10%",
    '--optimizer_args weight_decay=0.1 betas=0.9,0.99 amsgrad=True mode="x"', "--resolution=448,640",
    "--resolution=520 --enable_bucket", "--resolution=192 --enable_bucket --bucket_no_upscale",
    "--resolution=1088 --enable_bucket --max_bucket_reso=1280", "--learning_rate=-1e-7", "--unet_lr=0",
    "--text_encoder_lr 1e-5", "--multires_noise_iterations=6 --noise_offset=0", "--max_timestep=500",
    "--mixed_precision=bf16 --xformers", "--log_with=tensorboard --logging_dir=logs",
    "--network_dim=1 --network_alpha=1", "--network_dim=64 --network_alpha=64", "--network_dim=64 --network_alpha=1",
    "--network_dim=3 --network_alpha=2.5", "--optimizer_type=AdaFactor --max_grad_norm=0",
    "--optimizer_type=adafactor --max_grad_norm=0 --lr_scheduler=adafactor:1e-4",
    "--optimizer_type=AdaFactor --max_grad_norm=0 --optimizer_args relative_step=False --lr_scheduler=cosine",
    "--lr_scheduler_type=CosineAnnealingLR --lr_scheduler_args T_max=100",
    "--lr_scheduler_type=torch.optim.lr_scheduler.StepLR --lr_scheduler_args step_size=9",
    "--lr_scheduler=piecewise_constant --lr_scheduler_args step_rules=1:500,0.1:800,1e-3",
    "--lr_scheduler=reduce_lr_on_plateau --lr_scheduler_args patience=3 factor=0.5",
    "--lr_scheduler=cosine_with_min_lr --lr_scheduler_args min_lr=1e-7",
]  # fmt: skip


@pytest.mark.rows("R39", "R181", "R275", "R299")
@pytest.mark.parametrize("flags", ACCEPTED)
def test_what_works_gives_neither_problem_nor_warning(valid, traits, flags):
    opts = valid(*flags.split())
    assert problems(opts, traits) == []
    assert warnings(opts, traits) == []


@pytest.mark.rows("R162")
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_accepted(valid, traits, name):
    needed = {
        "adafactor": ["--optimizer_type=AdaFactor"],
        "piecewise_constant": ["--lr_scheduler_args", "step_rules=1:9,0.1"],
    }
    assert problems(valid(f"--lr_scheduler={name}", *needed.get(name, ())), traits) == []


@pytest.mark.rows("R161", "R166", "R167", "R168", "R169", "C40", "C85")
@pytest.mark.parametrize(
    "name",
    [
        *OPTIMIZERS,
        *map(str.lower, OPTIMIZERS),
        *TORCH_OPTIMIZERS,
        "bitsandbytes.optim.AdEMAMix8bit",
        "bitsandbytes.optim.PagedAdEMAMix8bit",
        "prodigyplus.ProdigyPlusScheduleFree",
    ],
)
def test_optimizers_are_accepted(valid, traits, name):
    assert problems(valid(f"--optimizer_type={name}"), traits) == []


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("Lion", "-r requirements/optimizers.txt"),
        ("Prodigy", "-r requirements/optimizers.txt"),
        ("AdamW8bit", "-r requirements/optimizers.txt"),
        ("prodigyplus.ProdigyPlusScheduleFree", "prodigy-plus-schedule-free"),
    ],
)
def test_a_missing_package_is_named_before_anything_is_loaded(valid, traits, monkeypatch, name, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    lines = [line for line in problems(valid(f"--optimizer_type={name}"), traits) if "--optimizer_type" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"--optimizer_type: {name} needs the package ")
    assert lines[0].endswith(f"-m pip install {package}")


def test_the_package_of_a_network_module_is_named(valid, traits, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (line,) = (line for line in problems(valid("--network_module=lycoris.other"), traits) if "network_module" in line)
    assert line.startswith("--network_module: there is no module 'lycoris.other'; run: ")
    assert line.endswith("-m pip install lycoris-lora")


@pytest.mark.parametrize(("wrong", "meant"), [("lycoris.koya", "lycoris.kohya"), ("networks.lorra", "networks.lora")])
def test_the_network_module_that_was_meant(valid, traits, wrong, meant):
    lines = [line for line in problems(valid(f"--network_module={wrong}"), traits) if "network_module" in line]
    assert lines == [f"--network_module: there is no module {wrong!r}; did you mean {meant!r}?"]


def test_ours_stands_for_a_network_module_that_is_not_installed(valid, traits, monkeypatch):
    from library.options import network

    monkeypatch.setattr(network, "find_module", lambda name: name.startswith("networks."))
    opts = valid("--network_module=lycoris.kohya")
    assert not [line for line in problems(opts, traits) if "network_module" in line]
    assert [line for line in opts.method.warnings(opts, traits) if "network_module" in line] == [
        "--network_module: lycoris.kohya is not installed; networks.lycoris is used in its place"
    ]


@pytest.mark.rows("C25", "C26", "C27", "C33", "C36", "C41", "C86", "C87", "C89", "C90", "C91", "C93")
@pytest.mark.parametrize(
    "flags",
    [
        "--logging_dir=logs",
        "--logging_dir=logs --log_prefix=fine_tune_style1",
        "--logging_dir=logs --log_prefix=db_style1_",
        "--keep_tokens=1",
        "--optimizer_type=AdamW8bit",
        "--loss_type huber",
        "--lr_warmup_steps=0.1 --lr_scheduler=linear",
        "--lr_warmup_steps=10% --lr_scheduler=linear",
        "--network_args loraplus_lr_ratio=16",
        "--network_args loraplus_unet_lr_ratio=16 loraplus_text_encoder_lr_ratio=4",
        "--network_args loraplus_lr_ratio=16 loraplus_text_encoder_lr_ratio=4",
        "--loss_type smooth_l1 --huber_schedule snr --huber_c 0.1",
    ],
)
def test_published_fragments_are_accepted(valid, traits, flags):
    assert problems(valid(*flags.split()), traits) == []


def test_the_list_of_torch_optimizers_is_complete():
    """Adafactor is left out: that name has always meant the one of transformers."""
    classes = {n for n, c in vars(torch.optim).items() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)}
    assert classes - {"Optimizer", "Adafactor"} <= {*TORCH_OPTIMIZERS, *UNUSABLE_OPTIMIZERS}


def test_the_list_of_torch_schedules_is_complete():
    module = torch.optim.lr_scheduler
    classes = {n for n in module.__all__ if isinstance(getattr(module, n), type)}
    assert classes - {"LRScheduler"} <= {*TORCH_SCHEDULES, *UNUSABLE_SCHEDULES}


WARNED = [
    ("--v2 --clip_skip=2", "--clip_skip: 2.x models always use"),
    ("--zero_terminal_snr", "--zero_terminal_snr: meant for --v_parameterization"),
    ("--zero_terminal_snr --min_snr_gamma=5", "--zero_terminal_snr: meant for --v_parameterization"),
    ("--sample_every_n_steps=-1", "--sample_every_n_steps: must be at least 1, got -1; ignored"),
    ("--sample_every_n_epochs=-2", "--sample_every_n_epochs: must be at least 1, got -2; ignored"),
    ("--caption_extention=.txt", "--caption_extention: deprecated; use --caption_extension"),
    ("--use_8bit_adam", "--use_8bit_adam: deprecated; use --optimizer_type AdamW8bit"),
    ("--noise_offset_random_strength", "--noise_offset_random_strength: has no effect without --noise_offset"),
    ("--ip_noise_gamma_random_strength", "--ip_noise_gamma_random_strength: has no effect"),
    ("--sample_at_first", "--sample_at_first: no sample images without --sample_prompts"),
    ("--log_prefix=x", "--log_prefix: has no effect without --logging_dir"),
    ("--save_last_n_epochs=2", "--save_last_n_epochs: has no effect without --save_every_n_epochs"),
    ("--save_last_n_steps=2", "--save_last_n_steps: has no effect without --save_every_n_steps"),
    ("--save_every_n_epochs=2 --save_n_epoch_ratio=3", "--save_every_n_epochs: has no effect"),
    ("--use_lion_optimizer", "--use_lion_optimizer: deprecated; use --optimizer_type Lion"),
    ("--lr_decay_steps=5", "--lr_decay_steps: has no effect"),
    (
        "--lr_scheduler_min_lr_ratio=.5",
        "--lr_scheduler_min_lr_ratio: has no effect without cosine_with_min_lr, cosine_wa",
    ),
    (
        "--lr_scheduler=piecewise_constant --lr_scheduler_args step_rules=1:9,0 --lr_warmup_steps=5",
        "--lr_warmup_steps: has no effect with --lr_scheduler piecewise_constant",
    ),
    (
        "--lr_scheduler=cosine --lr_scheduler_type=StepLR --lr_scheduler_args step_size=9",
        "--lr_scheduler: has no effect with --lr_scheduler_type",
    ),
    ("--optimizer_type=AdaFactor", "--max_grad_norm: AdaFactor limits its steps itself; 0 is the usual value"),
    ("--optimizer_type=AdaFactor --max_grad_norm=0 --lr_scheduler=cosine", "--lr_scheduler: has no effect; AdaFactor"),
    ("--optimizer_type=AdaFactor --max_grad_norm=0 --lr_warmup_steps=9", "--lr_warmup_steps: has no effect; AdaFactor"),
    (
        "--optimizer_type=AdaFactor --max_grad_norm=0 --optimizer_args warmup_init=True relative_step=False",
        "--optimizer_args: warmup_init=True needs relative_step=True, which is used",
    ),
    ("--network_train_unet_only --text_encoder_lr 1e-5", "--text_encoder_lr: has no effect"),
    ("--network_train_text_encoder_only --unet_lr=1e-5", "--unet_lr: has no effect"),
    (
        "--persistent_data_loader_workers --max_data_loader_n_workers=0",
        "--persistent_data_loader_workers: has no effect",
    ),
    ("--max_train_epochs=2 --max_train_steps=9", "--max_train_steps 9: has no effect"),
]


@pytest.mark.rows("R21", "R281")
@pytest.mark.parametrize(("flags", "beginning"), WARNED, ids=[flags for flags, _ in WARNED])
def test_what_is_probably_not_meant_is_said_but_allowed(valid, traits, flags, beginning):
    opts = valid(*flags.split())
    assert problems(opts, traits) == []
    (line,) = warnings(opts, traits)
    assert line.startswith(beginning)


def test_ignored_sampling_periods_are_gone(valid):
    assert valid("--sample_every_n_steps=0").sampling.sample_every_n_steps is None
    assert valid("--sample_every_n_epochs=-2").sampling.sample_every_n_epochs is None


@pytest.mark.rows("R223")
def test_a_data_set_file_needs_no_folder_and_no_resolution(parse, traits):
    base = ("--pretrained_model_name_or_path=m.ckpt", "--output_dir=o", "--network_module=networks")
    assert problems(parse(*base, "--dataset_config=d.toml"), traits) == []
    assert len(problems(parse(*base, "--dataset_config=d.yaml"), traits)) == 1
    (line,) = problems(parse(*base, "--train_data_dir=p"), traits)
    assert line == "--resolution: missing; give one number, or width,height"


def test_sample_prompts_that_exist_are_accepted(valid, traits, files):
    (files / "p.txt").write_text("a cat")
    assert problems(valid("--sample_prompts=p.txt", "--sample_every_n_steps=5"), traits) == []


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("cosin", "cosine"), ("Cosine_with_restart", "cosine_with_restarts"), ("polinomial", "polynomial"),
        ("constant_with_warmpu", "constant_with_warmup"), ("adafaktor:1e-4", "adafactor"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("optimizer", ["AdamW", "AdaFactor"])
def test_a_misspelled_schedule_gets_the_nearest_name(valid, traits, name, near, optimizer):
    (line,) = problems(valid(f"--lr_scheduler={name}", f"--optimizer_type={optimizer}"), traits)
    assert line.startswith("--lr_scheduler: must be one of ")
    assert line.endswith(f"; got {name!r}; did you mean {near!r}?")


def test_a_schedule_like_no_other_gets_no_name(valid, traits):
    (line,) = problems(valid("--lr_scheduler=zigzag"), traits)
    assert line.endswith("; got 'zigzag'")
