"""The objective as a whole. Reference: written here from the definitions in float64, over the draw's own noise."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import DDPMScheduler

from library.objectives.objective import DdpmObjective
from library.options.loss import LossOptions, NoiseOptions
from library.options.parsing import parse_options
from library.registry import groups_for
from library.types import NoiseDraw
from tests.builders.host_reads import HostReads
from tests.builders.options import options_with

EVERY_NOISE = {
    "noise_offset": 0.1,
    "noise_offset_random_strength": True,
    "adaptive_noise_scale": 0.05,
    "multires_noise_iterations": 6,
    "ip_noise_gamma": 0.1,
    "ip_noise_gamma_random_strength": True,
}


def make(prediction: str = "epsilon", **changes) -> DdpmObjective:
    opts = options_with(NoiseOptions, LossOptions, **changes)
    return DdpmObjective(prediction, opts.noise, opts.loss)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LATENTS = torch.randn(6, 4, 8, 12, generator=rng(42))
PREDICTION = torch.randn(6, 4, 8, 12, generator=rng(43))
TIMES = torch.tensor([0, 1, 147, 500, 998, 999])
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0, 0.25])


def diffusers_scheduler(zero_terminal: bool) -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero_terminal
    )


@pytest.mark.parametrize("zero_terminal", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_draw_matches_diffusers(prediction, zero_terminal):
    draw = make(prediction, zero_terminal_snr=zero_terminal).draw(LATENTS, rng(), TIMES)
    theirs = diffusers_scheduler(zero_terminal)
    # float32 tables on their side; the zero-terminal one loses a little more in its subtraction
    torch.testing.assert_close(draw.noisy, theirs.add_noise(LATENTS, draw.noise, TIMES), rtol=0, atol=1e-5)
    target = draw.noise if prediction == "epsilon" else theirs.get_velocity(LATENTS, draw.noise, TIMES)
    torch.testing.assert_close(draw.target, target, rtol=0, atol=1e-5)


def test_draws_repeat_with_the_generator_and_differ_within_a_batch():
    objective = make(**EVERY_NOISE)
    one, same, other = (objective.draw(LATENTS, rng(seed)) for seed in (1, 1, 2))
    for name in ("noisy", "timesteps", "target", "noise"):
        assert torch.equal(getattr(one, name), getattr(same, name))
        assert not torch.equal(getattr(one, name), getattr(other, name))
    assert one.timesteps.unique().numel() > 1


@pytest.mark.rows("R266")
@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
def test_timesteps_within_a_batch_differ_with_huber_losses(loss_type):
    draw = make(loss_type=loss_type).draw(torch.zeros(32, 4, 8, 8), rng())
    assert draw.timesteps.unique().numel() > 20


def test_drawn_timesteps_stay_in_the_range_asked_for():
    objective = make(min_timestep=100, max_timestep=104)
    assert objective.draw(torch.zeros(500, 1, 1, 1), rng()).timesteps.unique().tolist() == [100, 101, 102, 103]


def test_validation_divides_the_range():
    assert make().validation_timesteps() == [200, 400, 600, 800]
    assert make(min_timestep=500).validation_timesteps() == [600, 700, 800, 900]


def test_an_adaptive_offset_follows_the_latents():
    """Each channel's offset has the deviation 0.1 + 0.5 |mean|, here 2.1."""
    latents = torch.full((512, 4, 4, 4), -4.0)
    draw = make(noise_offset=0.1, adaptive_noise_scale=0.5).draw(latents, rng())
    offsets = draw.noise.mean(dim=(2, 3))  # 2048 of them, each with a deviation of 1/4 from plain noise too
    assert offsets.std().item() == pytest.approx(math.hypot(2.1, 0.25), rel=0.05)


def test_tables_follow_the_latents_to_their_device():
    draw = make().draw(LATENTS, rng(), TIMES)
    elsewhere = NoiseDraw(**{name: value.to("meta") for name, value in vars(draw).items()})
    assert make().signal(elsewhere).is_meta
    assert make(min_snr_gamma=5.0).weights(elsewhere.timesteps).is_meta


def test_noisy_keeps_the_latents_type_and_all_else_is_computed_in_float32():
    objective, latents = make("v_prediction", noise_offset=0.1, adaptive_noise_scale=0.5), LATENTS.bfloat16()
    draw, exact = (objective.draw(given, rng()) for given in (latents, latents.float()))
    assert (draw.noisy.dtype, draw.target.dtype, draw.noise.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert torch.equal(draw.noise, exact.noise)
    assert torch.equal(draw.target, exact.target)


def test_input_perturbation_leaves_the_target_plain():
    plain, perturbed = make(), make(ip_noise_gamma=0.5)
    a, b = plain.draw(LATENTS, rng(), TIMES), perturbed.draw(LATENTS, rng(), TIMES)
    assert torch.equal(a.target, b.target)
    gap = (b.noisy - a.noisy).flatten(1).std(1)
    alpha_bar = diffusers_scheduler(False).alphas_cumprod[TIMES]
    torch.testing.assert_close(gap, 0.5 * (1 - alpha_bar).sqrt(), rtol=0.15, atol=0)  # 384 numbers each


@pytest.mark.rows("R272", "R273")
@pytest.mark.parametrize("kind", ["noise_offset", "ip_noise_gamma"])
def test_random_strength_lies_between_zero_and_the_given_value(kind):
    latents, fixed, strengths = torch.zeros(8, 4, 16, 16), torch.full((8,), 999), []
    objective = make(**{kind: 0.5, f"{kind}_random_strength": True})
    for seed in range(200):
        draw = objective.draw(latents, rng(seed), fixed)
        added = draw.noisy / math.sqrt(1 - 0.00466) - torch.randn(latents.shape, generator=rng(seed))
        strengths.append(added.std().item())
    assert 0 <= min(strengths) < 0.05
    assert 0.4 < max(strengths) < 0.5 * 1.5  # 32 offsets: the spread of a batch is itself spread by an eighth
    assert abs(sum(strengths) / len(strengths) - 0.25) < 0.04


# --- losses -----------------------------------------------------------------------------------------------------------


def reference_loss(prediction: str, draw, masks, **opts) -> torch.Tensor:
    """The weighted loss from its definition, item by item in float64."""
    opts = options_with(NoiseOptions, LossOptions, **opts).flat()
    low, high = math.sqrt(0.00085), math.sqrt(0.012)
    plain = torch.cumprod(1 - torch.linspace(low, high, 1000, dtype=torch.float64) ** 2, 0)
    level = plain.sqrt()
    fixed = ((level - level[-1]) * level[0] / (level[0] - level[-1])) ** 2 if opts["zero_terminal_snr"] else plain
    v, out = prediction == "v_prediction", []
    for i, t in enumerate(draw.timesteps.tolist()):
        d = (PREDICTION[i].double() - draw.target[i].double()).abs()
        hc, scale = opts["huber_c"], opts["huber_scale"]
        sigma = ((1 - fixed[t]) / fixed[t]).sqrt()
        c = {
            "constant": hc * scale,
            "exponential": hc ** (t / 1000) * scale,
            "snr": ((1 - hc) / (1 + sigma) ** 2 + hc) * scale,
        }[opts["huber_schedule"]]
        root = (d**2 + c**2).sqrt() - c
        loss = {"l2": d**2, "l1": d, "huber": 2 * c * root, "smooth_l1": 2 * root}[opts["loss_type"]]
        if masks is not None:
            h, w = loss.shape[-2:]
            loss = loss * masks[i, 0].double().reshape(h, 8, w, 8).mean((1, 3))
        value, snr = loss.mean() * WEIGHTS[i].double(), plain[t] / (1 - plain[t])
        capped = snr.clamp(max=1000)
        if opts["min_snr_gamma"]:
            value = value * min(snr, opts["min_snr_gamma"]) / (snr + 1 if v else snr)
        if opts["scale_v_pred_loss_like_noise_pred"]:
            value = value * capped / (capped + 1)
        if opts["v_pred_like_loss"]:
            value = value + opts["v_pred_like_loss"] * value / (capped / (capped + 1))
        if opts["debiased_estimation_loss"]:
            value = value * (1 / (capped + 1) if v else 1 / capped.sqrt())
        out.append(value)
    return torch.stack(out)


MASKS = torch.rand(6, 1, 64, 96, generator=rng(3))
COMBINATIONS = [
    ("epsilon", {}),
    ("epsilon", {"loss_type": "l1", "min_snr_gamma": 5.0}),
    ("epsilon", {"loss_type": "huber", "debiased_estimation_loss": True}),
    ("epsilon", {"loss_type": "huber", "huber_schedule": "exponential", "huber_scale": 2.0, "v_pred_like_loss": 0.3}),
    ("epsilon", {"loss_type": "smooth_l1", "huber_schedule": "constant", "huber_c": 0.4, "min_snr_gamma": 1.0}),
    (
        "epsilon",
        {"loss_type": "smooth_l1", "huber_scale": 3.0, "v_pred_like_loss": 0.1, "debiased_estimation_loss": True},
    ),
    (
        "epsilon",
        {"zero_terminal_snr": True, "min_snr_gamma": 5.0, "debiased_estimation_loss": True, "loss_type": "huber"},
    ),
    ("v_prediction", {"min_snr_gamma": 5.0}),
    ("v_prediction", {"debiased_estimation_loss": True}),
    ("v_prediction", {"scale_v_pred_loss_like_noise_pred": True, "loss_type": "smooth_l1"}),
    ("v_prediction", {"zero_terminal_snr": True, "min_snr_gamma": 5.0, "scale_v_pred_loss_like_noise_pred": True}),
]


@pytest.mark.rows("R274")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("prediction", "changes"), COMBINATIONS)
def test_loss_matches_its_definition(prediction, changes, masked):
    objective, masks = make(prediction, **changes), MASKS if masked else None
    draw = objective.draw(LATENTS, rng(), TIMES)
    loss = objective.loss(PREDICTION, draw, WEIGHTS, masks)
    assert (loss.shape, loss.dtype) == ((6,), torch.float32)
    # float32 means of 384 numbers, and weights through a square root
    torch.testing.assert_close(loss.double(), reference_loss(prediction, draw, masks, **changes), rtol=5e-6, atol=1e-8)


@pytest.mark.rows("R258", "R259", "R261")
@pytest.mark.parametrize(
    ("flags", "meaning"),
    [
        ((), {"loss_type": "l2"}),
        (("--loss_type=huber",), {"loss_type": "huber", "huber_schedule": "snr", "huber_c": 0.1}),
        (("--loss_type=smooth_l1",), {"loss_type": "smooth_l1", "huber_schedule": "snr", "huber_c": 0.1}),
        (
            ("--loss_type=huber", "--huber_schedule=exponential"),
            {"loss_type": "huber", "huber_schedule": "exponential", "huber_c": 0.1},
        ),
        (
            ("--loss_type=smooth_l1", "--huber_schedule=constant", "--huber_c=0.3"),
            {"loss_type": "smooth_l1", "huber_schedule": "constant", "huber_c": 0.3},
        ),
    ],
)
def test_what_flags_alone_ask_for(flags, meaning):
    """The flags as they are parsed, with the defaults of all that is left out."""
    opts = parse_options(groups_for("sd", "network"), flags)
    objective = DdpmObjective("epsilon", opts.noise, opts.loss)
    draw = objective.draw(LATENTS, rng(), TIMES)
    loss = objective.loss(PREDICTION, draw, WEIGHTS)
    # float32 means of 384 numbers, and weights through a square root
    torch.testing.assert_close(loss.double(), reference_loss("epsilon", draw, None, **meaning), rtol=5e-6, atol=1e-8)


def test_every_accepted_combination_is_finite():
    leaf = PREDICTION.clone().requires_grad_()
    for prediction, zero_terminal in itertools.product(("epsilon", "v_prediction"), (False, True)):
        draw = make(prediction, zero_terminal_snr=zero_terminal, **EVERY_NOISE).draw(LATENTS, rng(), TIMES)
        own = {"epsilon": {"v_pred_like_loss": 0.1}, "v_prediction": {"scale_v_pred_loss_like_noise_pred": True}}
        for kind, schedule, gamma, debiased, weighted in itertools.product(
            ("l2", "l1", "huber", "smooth_l1"), ("constant", "exponential", "snr"), (None, 5.0), *[(False, True)] * 2
        ):
            if schedule != "snr" and kind in ("l2", "l1"):
                continue  # has no effect
            objective = make(
                prediction,
                loss_type=kind,
                huber_schedule=schedule,
                zero_terminal_snr=zero_terminal,
                min_snr_gamma=gamma,
                debiased_estimation_loss=debiased,
                **own[prediction] if weighted else {},
            )
            loss = objective.loss(leaf, draw, WEIGHTS)
            (gradient,) = torch.autograd.grad(loss.mean(), leaf)
            assert loss.isfinite().all()
            assert gradient.isfinite().all()


EVERY_LOSS = {"loss_type": "huber", "min_snr_gamma": 5.0, "debiased_estimation_loss": True}


def test_a_step_reads_no_value_back():
    objective = make("v_prediction", zero_terminal_snr=True, **EVERY_NOISE, **EVERY_LOSS)
    with HostReads() as reads:
        objective.loss(PREDICTION, objective.draw(LATENTS, rng()), WEIGHTS, MASKS)
    assert reads.seen == []
    with HostReads() as reads:
        assert PREDICTION.sum() != 0
    assert reads.seen  # the watcher does see such a read


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_step_does_not_wait_for_the_gpu():
    objective = make("v_prediction", zero_terminal_snr=True, **EVERY_NOISE, **EVERY_LOSS)
    latents, prediction, weights, masks = (x.cuda() for x in (LATENTS, PREDICTION, WEIGHTS, MASKS))
    generator = torch.Generator("cuda").manual_seed(0)
    objective.draw(latents, generator)  # the tables move once
    torch.cuda.set_sync_debug_mode("error")
    try:
        objective.loss(prediction, objective.draw(latents, generator), weights, masks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
