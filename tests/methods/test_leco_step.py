"""A training step of concept editing against a plain one with diffusers' schedulers, and the batches it is made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from library import registry
from library.errors import UserError
from library.methods.leco import goal_of, make_draw
from library.methods.leco_data import PromptData, drawn_size
from library.methods.leco_pairs import PromptPair
from library.methods.leco_spec import LECO
from library.methods.network import NetworkMethod
from library.options.parsing import parse_options
from library.training.step import StepParts, training_step
from library.types import Size
from tests.training.test_step import FILES

PAIR = """
resolution = 64
[[prompts]]
target = "a red house"
positive = "red"
unconditional = "blue"
neutral = "a house"
guidance_scale = 1.5
batch_size = 2
multiplier = 0.7
weight = 0.5
"""
SCALE = 3.0  # of the guidance on the way
STEPS, MADE = 5, 3  # of so many steps
# The only time in between is that after three of the five steps.
ONE_TIME = {"sd": (300, 500), "sdxl": (300, 500), "sd3": (650, 700), "flux": (450, 600)}
SHIFT = {"sd3": 3.0, "flux": float(np.exp(0.5 + (1.15 - 0.5) / (4096 - 256) * (16 - 256)))}  # 16 tokens


@pytest.fixture(scope="module")
def leco(tmp_path_factory) -> Callable[..., SimpleNamespace]:
    """All that a step needs, with a network that changes much; the text encoders have done their work."""

    def build(name: str, *more: str, prompts: str = PAIR, processes: int = 1) -> SimpleNamespace:
        folder = tmp_path_factory.mktemp(name)
        (folder / "prompts.toml").write_text(prompts, encoding="utf-8")
        model, *files = FILES[name](folder)
        line = [f"--pretrained_model_name_or_path={model}", *files, f"--prompts_file={folder / 'prompts.toml'}"]
        line += [f"--max_denoising_steps={STEPS}", "--learning_rate=1e-3", "--seed=1", *more]
        line += ["--t5xxl_max_token_length=16"] if name in SHIFT else []
        opts = LECO.complete_options(parse_options(registry.groups_for(name, "leco"), line))
        family = registry.FAMILIES[name].adapter(opts)
        models = family.loader.load()
        data = PromptData(opts, family.traits, processes)
        with torch.no_grad():
            texts = {text: family.text.encode(models, [text]) for text in data.texts}
        data.set_texts(texts)
        method = NetworkMethod(opts)
        method.attach(family, models)
        models.text_encoders.clear()
        rng = torch.Generator().manual_seed(3)
        for weight in method.trainable().parameters():
            weight.data += 0.3 * torch.randn(weight.shape, generator=rng)
        method.trainable().train()
        denoise, objective = method.denoise(family, models), family.denoiser.objective()
        draw = make_draw(method, family, objective, denoise)
        parts = StepParts(family, models, denoise, objective, False, draw)
        (batch,) = islice(data.loader(1), 1)
        method.set_strength(batch.network_multiplier)
        return SimpleNamespace(**locals())

    return build


def one_time(name):
    low, high = ONE_TIME[name]
    return f"--min_timestep={low}", f"--max_timestep={high}"


def stream():
    return torch.Generator().manual_seed(5)


def plain_loss(run, name, prediction_type="epsilon") -> torch.Tensor:
    """The step as the module's docstring states it, text by text and with diffusers' scheduler."""
    net, rng, pair = run.method.trainable(), stream(), run.data.pairs[0]

    def e(text, x, time, multiplier):
        net.set_multiplier(multiplier)
        cond = run.texts[text].map(lambda tensor: tensor.repeat(2, *[1] * (tensor.ndim - 1)))
        return run.family.denoiser.predict(run.models, x, time.expand(2), cond, run.batch)

    x = torch.randn((2, run.family.traits.latent_channels, 8, 8), generator=rng)
    if name in SHIFT:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT[name])
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS))
        drawn = {}
    else:
        scheduler = DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            prediction_type=prediction_type,
        )
        scheduler.set_timesteps(timesteps=[999 - 200 * step for step in range(STEPS)])
        drawn = {"generator": rng}
    with torch.no_grad():
        for time in scheduler.timesteps[:MADE]:
            away, towards = (e(text, x, time, pair.multiplier) for text in (pair.unconditional, pair.target))
            x = scheduler.step(away + SCALE * (towards - away), time, x, **drawn).prev_sample
        time = scheduler.timesteps[MADE]
        neutral, positive, other = (e(text, x, time, 0.0) for text in (pair.neutral, pair.positive, pair.unconditional))
        sign = {"erase": -1, "enhance": 1}[pair.action]
        goal = neutral + sign * pair.guidance_scale * (positive - other)
    losses = (e(pair.target, x, time, pair.multiplier) - goal).square().mean((1, 2, 3)) * pair.weight
    if name == "sd3":  # its loss compares clean images: velocities times sigma
        return losses * (time / 1000).square()
    if name == "flux":
        return losses
    signal = scheduler.alphas_cumprod[time.long()]
    ratio = signal / (1 - signal)
    return losses * ratio.clamp(max=0.5) / (ratio + 1 if prediction_type == "v_prediction" else ratio)


CASES = {
    "sd": ("--min_snr_gamma=0.5",),
    "sd v": ("--min_snr_gamma=0.5", "--v_parameterization"),
    "sdxl": ("--min_snr_gamma=0.5",),
    "sd3": (),
    "flux": ("--model_prediction_type=raw",),
}


LOUD = {"sd": 100, "sdxl": 1000}  # to random U-Nets texts make little difference


@pytest.mark.parametrize(
    ("case", "action"), [*((case, "erase") for case in CASES), ("sd", "enhance"), ("flux", "enhance")]
)
def test_the_loss_is_that_of_a_plain_step(leco, case, action):
    name = case.split()[0]
    prompts = PAIR.replace("guidance_scale = 1.5", f"guidance_scale = {LOUD.get(case, 1.5)}")
    run = leco(name, *CASES[case], *one_time(name), prompts=f"{prompts}action = '{action}'\n")
    ours = training_step(run.parts, run.batch, stream())
    plain = plain_loss(run, name, "v_prediction" if case == "sd v" else "epsilon")
    assert torch.allclose(ours.losses, plain, atol=1e-5, rtol=1e-5), (ours.losses, plain)
    assert plain.min() > 1e-3, "there is something to compare"


@pytest.mark.rows("R511")
def test_only_the_last_prediction_has_gradients(leco):
    run, seen = leco("sd", *one_time("sd")), []
    run.models.denoiser.register_forward_pre_hook(lambda _, args: seen.append((len(args[0]), torch.is_grad_enabled())))
    training_step(run.parts, run.batch, stream()).losses.mean().backward()
    assert seen == [(4, False)] * MADE + [(6, False), (2, True)]
    assert all(weight.grad.isfinite().all() for weight in run.method.trainable().parameters())


def test_equal_texts_are_predicted_once(leco):
    run, seen = leco("sd", prompts="resolution = 64\n[[prompts]]\ntarget = 'a red house'"), []
    run.models.denoiser.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    goal = goal_of(run.denoise, torch.zeros(1, 4, 8, 8), torch.tensor([500]), run.batch)
    assert seen == [2]
    assert goal.shape == (1, 4, 8, 8)


def test_gradients_survive_autocast(leco):
    """Autocast keeps the weights that it has cast, and those cast without gradients give none later."""
    run = leco("sd", *one_time("sd"))
    with torch.autocast("cpu", torch.bfloat16):
        loss = training_step(run.parts, run.batch, stream()).losses.mean()
    loss.backward()
    grads = [weight.grad for weight in run.method.trainable().parameters()]
    # Queries and keys of the coarsest level have none: its one position sees itself alone.
    assert sum(grad is not None and bool(grad.any()) for grad in grads) > 0.9 * len(grads)


def test_images_are_begun_without_dropout(leco):
    run, found = leco("sd", "--network_dropout=0.5"), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(run.draw(run.batch, stream()))
    assert torch.equal(found[0].noisy, found[1].noisy)
    assert torch.equal(found[0].target, found[1].target)
    assert run.method.trainable().training


def test_the_times_in_between_are_all_drawn_and_no_others(leco):
    run = leco("sd")
    drawn = {int(run.draw(run.batch, torch.Generator().manual_seed(seed)).timesteps[0]) for seed in range(24)}
    assert drawn == {799, 599, 399, 199}


def test_a_range_without_a_time_is_refused(leco):
    with pytest.raises(
        UserError, match=r"--min_timestep: of 5 steps .* none but the first begins at a timestep from 0"
    ):
        leco("sd", "--max_timestep=100")
    run = leco("sd3", "--max_timestep=100")
    with pytest.raises(UserError, match="none but the first begins"):
        run.draw(run.batch, stream())


MODULES = {
    "networks.lora": ["conv_dim=2"],
    "networks.lora_fa": [],
    "networks.dylora": ["unit=2"],
    "networks.loha": [],
    "networks.lokr": [],
    "networks.oft": [],
    "networks.lycoris": ["algo=locon", "dora_wd=True"],
    "networks.hypernetwork": [],
}


@pytest.mark.parametrize("module", MODULES)
def test_every_network_type(leco, module):
    args = ["--network_args", *MODULES[module]] if MODULES[module] else []
    run = leco("sd", f"--network_module={module}", *args)
    training_step(run.parts, run.batch, stream()).losses.mean().backward()
    grads = [weight.grad for weight in run.method.trainable().parameters() if weight.requires_grad]
    assert grads
    assert any(grad is not None and grad.any() for grad in grads)
    noisy, time = torch.randn(2, 4, 8, 8, generator=stream()), torch.tensor([500, 500])
    with torch.no_grad():
        bare_goal = run.draw(run.batch, stream())
        run.method.trainable().set_multiplier(0.0)
        off = run.denoise(noisy, time, run.batch.text, run.batch)
        bare = run.family.loader.load()
        plain = run.family.denoiser.predict(bare, noisy, time, run.batch.text, run.batch)
    assert torch.allclose(off, plain, atol=1e-5)
    assert bare_goal.target.isfinite().all()


# ---- batches

THREE = "resolution = 64\n" + "".join(f"[[prompts]]\ntarget = '{text}'\n" for text in ("a red house", "blue", "a cat"))


def texts_of(loader):
    return [batch.captions[0] for batch in loader]


def test_an_epoch_has_a_step_for_each_pair(leco):
    data = leco("sd", "--gradient_accumulation_steps=2", prompts=THREE, processes=2).data
    assert data.batches_per_epoch == 12
    own = [texts_of(data.loader(1, rank=rank, world=2)) for rank in (0, 1)]
    assert sorted(own[0] + own[1]) == sorted(["a red house", "blue", "a cat"] * 4)
    assert texts_of(data.loader(1, 4, rank=1, world=2)) == own[1][4:]
    assert own[0] + own[1] != [text for rank in (0, 1) for text in texts_of(data.loader(2, rank=rank, world=2))]


def test_what_a_batch_holds(leco):
    batch = leco("sd", prompts=PAIR.replace("resolution = 64", "resolution = [64, 128]")).batch
    assert batch.captions == ["a red house"] * 2
    assert (batch.size, batch.network_multiplier) == (Size(128, 64), 0.7)
    assert batch.loss_weights.tolist() == [0.5, 0.5]
    assert batch.original_sizes.tolist() == batch.target_sizes.tolist() == [[128, 64]] * 2
    assert batch.crop_top_lefts.tolist() == [[0, 0]] * 2
    assert not torch.equal(batch.positive.tensors["context"], batch.neutral.tensors["context"])


def test_sizes_that_vary():
    class Counting:
        def choice(self, choices):
            self.choices = list(choices)
            return self.choices[0]

    def choices(side, **more):
        rng = Counting()
        drawn_size(PromptPair("", "", "", "", size=Size(side, side), dynamic_resolution=True, **more), rng)
        return rng.choices

    assert choices(512) == [256, 320, 384, 448, 512]
    assert choices(96) == [64]
    assert choices(32) == [32]
    fixed = PromptPair("", "", "", "", size=Size(128, 64), dynamic_resolution=True)
    assert drawn_size(fixed, Counting()) == Size(128, 64)


def test_crops_of_larger_images(leco):
    data = leco("sd", prompts=f"dynamic_crops = true\n{PAIR}").data
    batches = [batch for epoch in range(1, 13) for batch in data.loader(epoch)]
    for batch in batches:
        (width, height), (top, left) = batch.original_sizes[0].tolist(), batch.crop_top_lefts[0].tolist()
        assert width == height
        assert 64 <= width <= 192
        assert 0 <= top <= height - 64
        assert 0 <= left <= width - 64
        assert batch.target_sizes[0].tolist() == [64, 64]
    assert len({int(batch.original_sizes[0, 0]) for batch in batches}) > 6


@pytest.mark.rows("R511")
def test_metadata_and_report(leco):
    data = leco("sd").data
    facts = data.metadata()
    assert (facts["ss_leco_prompt_count"], facts["ss_leco_prompts_file"]) == (1, "prompts.toml")
    assert json.loads(facts["ss_leco_preview"]) == [
        {
            "target": "a red house",
            "positive": "red",
            "unconditional": "blue",
            "neutral": "a house",
            "action": "erase",
            "multiplier": 0.7,
            "weight": 0.5,
        }
    ]
    assert "  'a red house' at 0.7 -> 'a house' - 1.5 x ('red' - 'blue'), 64x64" in data.report()
