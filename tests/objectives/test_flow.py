"""Rectified flow. Reference: every option written here from its definition in float64; closed-form distributions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from library.objectives import flow
from library.objectives.flow import FlowObjective, FlowSettings
from library.options.loss import LossOptions, NoiseOptions
from library.types import NoiseDraw
from tests.builders.host_reads import HostReads
from tests.builders.options import options_with

SAMPLINGS = ("sigma", "uniform", "sigmoid", "shift", "flux_shift", "discrete")
SCHEMES = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform")


def shift_by_size(height: int, width: int) -> float:
    """exp(mu) of diffusers' own mu, which counts patches of 2 x 2 latents."""
    return math.exp(calculate_shift((height // 2) * (width // 2)))


def make(sampling: str = "uniform", **changes) -> FlowObjective:
    settings = {name: changes.pop(name) for name in [f.name for f in fields(FlowSettings)] if name in changes}
    opts = options_with(NoiseOptions, LossOptions, **{"huber_schedule": "exponential", **changes})
    return FlowObjective(FlowSettings(sampling, **{"shift_of": shift_by_size, **settings}), opts.noise, opts.loss)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LATENTS = torch.randn(6, 4, 8, 12, generator=rng(42))
PREDICTION = torch.randn(6, 4, 8, 12, generator=rng(43))
TIMES = torch.tensor([0.0, 1.0, 147.25, 500.0, 998.5, 1000.0])
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0, 0.25])
MASKS = torch.rand(6, 1, 64, 96, generator=rng(3))

# --- the path ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["velocity", "clean"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_noisy_latents_and_targets(sampling, target):
    objective = make(sampling, target=target)
    for fixed in (None, TIMES):
        draw = objective.draw(LATENTS, rng(), fixed)
        sigma, clean, noise = draw.timesteps.double().view(-1, 1, 1, 1) / 1000, LATENTS.double(), draw.noise.double()
        # float32 sums of numbers up to 5
        expected = (1 - sigma) * clean + sigma * noise
        torch.testing.assert_close(draw.noisy.double(), expected, rtol=0, atol=2e-6)
        expected = noise - clean if target == "velocity" else clean
        torch.testing.assert_close(draw.target.double(), expected, rtol=0, atol=1e-6)
        assert 0.9 < draw.noise.std() < 1.1


def test_noisy_latents_match_diffusers():
    theirs = FlowMatchEulerDiscreteScheduler()
    times = theirs.timesteps[[0, 300, 500, 700, 900, 999]]
    draw = make().draw(LATENTS, rng(), times)
    torch.testing.assert_close(draw.noisy, theirs.scale_noise(LATENTS, times, draw.noise), rtol=0, atol=2e-6)


def test_the_velocity_leads_from_noise_to_image():
    """One Euler step over the whole path, as sampling makes it."""
    draw = make().draw(LATENTS, rng(), torch.full((6,), 1000))
    torch.testing.assert_close(draw.noisy - draw.target, LATENTS, rtol=0, atol=2e-6)


def test_fixed_timesteps_are_kept():
    whole = torch.tensor([200, 400, 600, 800, 1, 999])
    draw = make("discrete").draw(LATENTS, rng(), whole)
    assert draw.timesteps.dtype == torch.int64
    assert torch.equal(draw.timesteps, whole)
    draw = make("shift").draw(LATENTS, rng(), whole)
    assert draw.timesteps.dtype == torch.float32
    assert torch.equal(draw.timesteps, whole.float())
    assert make().validation_timesteps() == [200, 400, 600, 800]
    assert make(min_timestep=500).validation_timesteps() == [600, 700, 800, 900]


def test_draws_repeat_with_the_generator_and_differ_within_a_batch():
    for sampling in SAMPLINGS:
        objective = make(sampling, ip_noise_gamma=0.1, ip_noise_gamma_random_strength=True)
        one, same, other = (objective.draw(LATENTS, rng(seed)) for seed in (1, 1, 2))
        for name in ("noisy", "timesteps", "target", "noise"):
            assert torch.equal(getattr(one, name), getattr(same, name))
            assert not torch.equal(getattr(one, name), getattr(other, name))
        assert one.timesteps.unique().numel() == 6


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_types(sampling):
    draw = make(sampling, target="clean").draw(LATENTS.bfloat16(), rng())
    assert (draw.noisy.dtype, draw.target.dtype, draw.noise.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert draw.timesteps.dtype == (torch.int64 if sampling == "discrete" else torch.float32)


def test_input_perturbation_leaves_the_target_plain():
    """At one timestep, so that the gap is sigma times gamma times new noise."""
    times = torch.full((6,), 600.0)
    a, b = (make(ip_noise_gamma=gamma).draw(LATENTS, rng(), times) for gamma in (None, 0.5))
    assert torch.equal(a.target, b.target)
    assert torch.equal(a.noise, b.noise)
    assert (b.noisy - a.noisy).std() == pytest.approx(0.6 * 0.5, rel=0.05)  # 2304 numbers


def test_random_strength_of_the_perturbation_lies_between_zero_and_the_given_value():
    objective, strengths = make(ip_noise_gamma=0.5, ip_noise_gamma_random_strength=True), []
    for seed in range(200):
        draw = objective.draw(torch.zeros(2, 4, 16, 16), rng(seed), torch.full((2,), 1000.0))
        strengths.append((draw.noisy - draw.noise).std().item())
    assert 0 <= min(strengths) < 0.02
    assert 0.48 < max(strengths) < 0.53  # 2048 numbers each
    assert abs(sum(strengths) / len(strengths) - 0.25) < 0.04


# --- which moments are trained ----------------------------------------------------------------------------------------

MANY = 100_000
CONVERGED = 1.95 / math.sqrt(MANY)  # a right distribution is farther off once in 1000 seeds; these are fixed


def sigmas(objective: FlowObjective, height: int = 2, width: int = 2) -> torch.Tensor:
    return objective.draw(torch.zeros(MANY, 1, height, width), rng(5)).timesteps.double() / 1000


def distance(drawn: torch.Tensor, below: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """The largest gap between the share of draws at or below a value, and what the distribution says of it."""
    drawn = drawn.sort().values
    share = torch.arange(1, len(drawn) + 1, dtype=torch.float64) / len(drawn)
    last = torch.cat([drawn.diff() > 0, torch.tensor([True])])  # of equal ones
    return (below(drawn[last]) - share[last]).abs().max().item()


def normal_below(x: torch.Tensor) -> torch.Tensor:
    return torch.special.ndtr(x)


def unshifted(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """The y whose s y / (1 + (s - 1) y) is sigma, solved by hand."""
    return sigma / (shift - (shift - 1) * sigma)


@pytest.mark.rows("R354")
def test_uniform():
    drawn = sigmas(make("uniform", shift=7.0, weighting_scheme="logit_normal"))  # neither has a say in it
    assert distance(drawn, lambda sigma: sigma) < CONVERGED


@pytest.mark.rows("R354", "R356", "R357")
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.5])
def test_sigmoid(scale):
    drawn = sigmas(make("sigmoid", sigmoid_scale=scale, shift=7.0))
    assert distance(drawn, lambda sigma: normal_below(sigma.logit() / scale)) < CONVERGED
    assert drawn.quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist() == pytest.approx(
        [1 / (1 + math.exp(0.6745 * scale)), 0.5, 1 / (1 + math.exp(-0.6745 * scale))], abs=0.01
    )


@pytest.mark.rows("R355", "R357")
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.1582])
def test_shift(shift, scale):
    drawn = sigmas(make("shift", shift=shift, sigmoid_scale=scale))
    assert distance(drawn, lambda sigma: normal_below(unshifted(sigma, shift).logit() / scale)) < CONVERGED
    assert drawn.median().item() == pytest.approx(shift / (1 + shift), abs=0.01)


@pytest.mark.rows("R355", "R356")
def test_shift_by_size():
    drawn = sigmas(make("flux_shift", shift=7.0), 8, 4)
    mu = 0.5 + (8 - 256) * (1.15 - 0.5) / (4096 - 256)  # 8 patches
    # the published form of it: e^mu / (e^mu + 1/y - 1)
    assert distance(drawn, lambda s: normal_below((1 / ((1 / s - 1) * math.exp(mu) + 1)).logit())) < CONVERGED


@pytest.mark.rows("R504")
@pytest.mark.parametrize("sampling", ["sigmoid", "shift", "flux_shift"])
def test_offsets_move_the_mean_of_the_normal_numbers(sampling):
    """Before the scale is applied, as the numbers are N(offset, 1) then; each item has its own."""
    scale, shift = 1.5, {"sigmoid": 1.0, "shift": 3.0, "flux_shift": shift_by_size(8, 4)}[sampling]
    offsets = torch.tensor([-0.5, 0.0, 1.0]).repeat_interleave(MANY // 3)
    objective = make(sampling, sigmoid_scale=scale, shift=3.0)
    drawn = objective.draw(torch.zeros(len(offsets), 1, 8, 4), rng(5), offsets=offsets).timesteps.double() / 1000
    for offset in (-0.5, 0.0, 1.0):
        own = drawn[offsets == offset]
        far = distance(own, lambda s, o=offset: normal_below(unshifted(s, shift).logit() / scale - o))
        assert far < 1.95 / math.sqrt(len(own))
    bare = objective.draw_timesteps(len(offsets), (8, 4), rng(5))
    with_noise = make(sampling, sigmoid_scale=scale, shift=3.0).draw_timesteps(len(offsets), (8, 4), rng(5), offsets)
    assert torch.equal(bare[offsets == 0], with_noise[offsets == 0])  # the same numbers, moved or not


@pytest.mark.rows("R504")
@pytest.mark.parametrize("sampling", ["uniform", "sigma", "discrete"])
def test_offsets_do_nothing_where_no_normal_numbers_are_drawn(sampling):
    objective = make(sampling, weighting_scheme="logit_normal")
    bare, moved = (objective.draw_timesteps(50, (8, 8), rng(3), offsets) for offsets in (None, torch.ones(50)))
    assert torch.equal(bare, moved)


@pytest.mark.rows("R355")
@pytest.mark.parametrize(
    ("height", "width", "sigma"), [(32, 32, 0.62246), (64, 64, 0.65249), (128, 128, 0.75951), (256, 64, 0.75951)]
)
def test_shift_by_size_has_the_published_values(height, width, sigma):
    """With a scale of 0 the sigmoid is 0.5: L = 256, 1024 and 4096 patches."""
    draw = make("flux_shift", sigmoid_scale=0.0).draw(torch.zeros(2, 1, height, width), rng())
    assert draw.timesteps.tolist() == pytest.approx([1000 * sigma] * 2, abs=0.005)


def test_the_size_is_given_height_then_width():
    seen = []
    make("flux_shift", shift_of=lambda *size: seen.append(size) or 1.0).draw(LATENTS, rng())
    assert seen == [(8, 12)]


def mode_below(x: torch.Tensor, m: float) -> torch.Tensor:
    """The share of uniform u whose 1 - u - m (cos²(πu/2) - 1 + u) is at most x: the falling function, inverted."""
    low, high = torch.zeros_like(x), torch.ones_like(x)
    for _ in range(60):
        u = (low + high) / 2
        above = 1 - u - m * (torch.cos(math.pi * u / 2) ** 2 - 1 + u) > x
        low, high = torch.where(above, u, low), torch.where(above, high, u)
    return 1 - low


def _plain(value: object) -> str:
    """Names of cases must be the same in every process, so a function's is left out."""
    return "density" if callable(value) else str(value)


DENSITIES = [
    ({"weighting_scheme": "logit_normal"}, lambda u: normal_below(u.logit())),
    (
        {"weighting_scheme": "logit_normal", "logit_mean": 0.5, "logit_std": 0.7},
        lambda u: normal_below((u.logit() - 0.5) / 0.7),
    ),
    ({"weighting_scheme": "mode"}, lambda u: mode_below(u, 1.29)),
    ({"weighting_scheme": "mode", "mode_scale": -0.5}, lambda u: mode_below(u, -0.5)),
    *(({"weighting_scheme": scheme}, lambda u: u) for scheme in ("sigma_sqrt", "cosmap", "none", "uniform")),
]


@pytest.mark.rows("R354")
@pytest.mark.parametrize(("settings", "below"), DENSITIES, ids=_plain)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sigma_is_drawn_from_a_shifted_list(settings, below, shift):
    """Place ⌊1000 u⌋ of a list from 1 down to 0.001: at most k / 1000 where u is at least (1000 - k) / 1000."""
    drawn = sigmas(make("sigma", shift=shift, sigmoid_scale=9.0, **settings))
    k = (unshifted(drawn, shift) * 1000).round()
    table = shift * k / 1000 / (1 + (shift - 1) * k / 1000)
    torch.testing.assert_close(drawn, table, rtol=1e-6, atol=0)
    assert 1 <= k.min() <= k.max() <= 1000
    assert distance(k / 1000, lambda level: 1 - below(1 - level)) < CONVERGED


@pytest.mark.rows("R440", "R441")
@pytest.mark.parametrize(("settings", "below"), DENSITIES, ids=_plain)
@pytest.mark.parametrize("shift", [0.7, 1.0, 3.0])
@pytest.mark.parametrize(("low", "high"), [(None, None), (100, 900)])
def test_whole_timesteps(settings, below, shift, low, high):
    """⌊u' (high - low) + low⌋ of a shifted u: at most t where u' is below (t + 1 - low) / (high - low)."""
    objective = make("discrete", shift=shift, min_timestep=low, max_timestep=high, **settings)
    drawn = objective.draw(torch.zeros(MANY, 1, 2, 2), rng(5)).timesteps
    low, high = low or 0, high or 1000
    assert low <= drawn.min() < drawn.max() < high
    share_below = lambda t: below(unshifted((t + 1 - low) / (high - low), shift))  # noqa: E731
    assert distance(drawn.double(), share_below) < CONVERGED


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_range_of_timesteps(sampling):
    whole, part = (make(sampling, shift=3.0, min_timestep=a, max_timestep=b) for a, b in ((None, None), (200, 600)))
    drawn, within = sigmas(whole), sigmas(part)
    assert 0.2 <= within.min() < 0.24
    assert 0.56 < within.max() <= 0.6
    if sampling != "discrete":  # linearly, so that the distribution keeps its shape
        torch.testing.assert_close(within, 0.2 + 0.4 * drawn, rtol=0, atol=1e-6)


def test_extremes_stay_on_the_list():
    """A logit of +-100 is 0 or 1 in float32; the ends belong to the list and to the range."""
    levels = torch.linspace(0, 1, MANY)
    for shift in (1e-3, 1 / 3, math.exp(1.15), 1e3):
        moved = flow.shift_sigma(levels, shift)
        assert (moved[0], moved[-1]) == (0, 1)
        assert moved.max() == 1
    for mean, sigma_end, discrete_end in ((100.0, 0.001, 999), (-100.0, 1.0, 0)):
        settings = {"weighting_scheme": "logit_normal", "logit_mean": mean, "logit_std": 0.0}
        assert sigmas(make("sigma", **settings)).unique().tolist() == pytest.approx([sigma_end])
        assert (sigmas(make("discrete", **settings)) * 1000).unique().tolist() == [discrete_end]
    for sampling, scheme in itertools.product(SAMPLINGS, SCHEMES):
        settings = {"weighting_scheme": scheme, "logit_std": 50.0, "mode_scale": 40.0, "sigmoid_scale": 50.0}
        for shift in (1e-3, 1 / 3, math.exp(1.15), 1e3):
            objective = make(sampling, shift=shift, shift_of=lambda h, w, s=shift: s, **settings)
            drawn = objective.draw(torch.zeros(5000, 1, 1, 1), rng(5)).timesteps
            assert 0 <= drawn.min() <= drawn.max() <= 1000


# --- losses -----------------------------------------------------------------------------------------------------------


def reference_loss(draw, masks, *, prediction="raw", weighting_scheme="uniform", **opts) -> torch.Tensor:
    """The weighted loss from its definition, item by item in float64."""
    opts = options_with(LossOptions, **{"huber_schedule": "exponential", **opts}).flat()
    out = []
    for i, t in enumerate(draw.timesteps.double().tolist()):
        sigma, raw, noisy = t / 1000, PREDICTION[i].double(), draw.noisy[i].double()
        read = {"raw": raw, "additive": raw + noisy, "sigma_scaled": raw * (-sigma) + noisy}[prediction]
        d = (read - draw.target[i].double()).abs()
        hc, scale = opts["huber_c"], opts["huber_scale"]
        c = {"constant": hc * scale, "exponential": math.exp(t * math.log(hc) / 1000) * scale}[opts["huber_schedule"]]
        root = (d**2 + c**2).sqrt() - c
        loss = {"l2": d**2, "l1": d, "huber": 2 * c * root, "smooth_l1": 2 * root}[opts["loss_type"]]
        if masks is not None:
            h, w = loss.shape[-2:]
            loss = loss * masks[i, 0].double().reshape(h, 8, w, 8).mean((1, 3))
        value = loss.mean() * WEIGHTS[i].double()
        if prediction == "sigma_scaled" and weighting_scheme == "sigma_sqrt":
            value = value * max(sigma, 0.001) ** -2
        if prediction == "sigma_scaled" and weighting_scheme == "cosmap":
            value = value * 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
        out.append(value)
    return torch.stack(out)


HUBER = [
    {"loss_type": kind, "huber_schedule": schedule, "huber_c": c, "huber_scale": scale}
    for kind in ("huber", "smooth_l1")
    for schedule, c, scale in (("constant", 0.4, 1.0), ("exponential", 0.1, 2.0))
]


@pytest.mark.rows("R358", "R262", "R263")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("loss", [{}, {"loss_type": "l1"}, *HUBER], ids=str)
@pytest.mark.parametrize("target", ["velocity", "clean"])
@pytest.mark.parametrize("prediction", ["raw", "additive", "sigma_scaled"])
def test_loss_matches_its_definition(prediction, target, loss, masked):
    masks = MASKS if masked else None
    for scheme in SCHEMES:
        objective = make(prediction=prediction, target=target, weighting_scheme=scheme, **loss)
        draw = objective.draw(LATENTS, rng(), TIMES)
        actual = objective.loss(PREDICTION, draw, WEIGHTS, masks)
        assert actual.shape == (6,)
        assert actual.dtype == torch.float32
        expected = reference_loss(draw, masks, prediction=prediction, weighting_scheme=scheme, **loss)
        # float32 means of 384 numbers. A clean target at sigma near 0 is a difference of nearly equal numbers: what
        # rounding leaves of it, 1e-7 squared, is weighed by up to a million.
        torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.rows("R358")
def test_the_right_velocity_has_no_loss_where_target_and_prediction_agree():
    for prediction, target in (("raw", "velocity"), ("sigma_scaled", "clean")):
        objective = make(prediction=prediction, target=target)
        draw = objective.draw(LATENTS, rng(), TIMES)
        assert objective.loss(draw.noise - LATENTS, draw, WEIGHTS).max() < 1e-12  # rounding, squared
    objective = make(prediction="sigma_scaled", target="velocity")  # the older default, which does not agree
    draw = objective.draw(LATENTS, rng(), TIMES)
    assert objective.loss(draw.noise - LATENTS, draw, torch.ones(6)).min() > 0.5


def test_weights_by_scheme_have_known_values():
    sigma = torch.tensor([0.0, 0.0005, 0.001, 0.25, 0.5, 1.0])
    assert flow.loss_weighting("sigma_sqrt", sigma).tolist() == pytest.approx([1e6, 1e6, 1e6, 16, 4, 1])
    expected = [2 / math.pi / share for share in (1, 0.9990005, 0.998002, 0.625, 0.5, 1)]
    assert flow.loss_weighting("cosmap", sigma).tolist() == pytest.approx(expected)
    for scheme in ("logit_normal", "mode", "none", "uniform"):
        assert flow.loss_weighting(scheme, sigma).tolist() == [1] * 6


def test_timestep_0_has_a_finite_loss_with_a_weight_by_sigma():
    """The exact prediction leaves a loss of 0 there, which an infinite weight would make a NaN."""
    objective = make("discrete", prediction="sigma_scaled", target="clean", weighting_scheme="sigma_sqrt")
    draw = objective.draw(LATENTS, rng(), torch.zeros(6, dtype=torch.long))
    leaf = PREDICTION.clone().requires_grad_()
    loss = objective.loss(leaf, draw, WEIGHTS)
    loss.mean().backward()
    assert loss.tolist() == [0] * 6
    assert leaf.grad.isfinite().all()


def test_every_accepted_combination_is_finite():
    """A loss sees the draws of every sampling with its scheme and target at once, as one large batch."""
    latents = LATENTS[:, :2, :4, :4]
    kinds = [{"loss_type": "l2"}, {"loss_type": "l1"}, *HUBER]
    ends = torch.tensor([0, 1, 2, 500, 998, 999])
    for scheme, target in itertools.product(SCHEMES, ("velocity", "clean")):
        draws = []
        for sampling, gamma in itertools.product(SAMPLINGS, (None, 0.1)):
            objective = make(sampling, weighting_scheme=scheme, target=target, shift=3.0, ip_noise_gamma=gamma)
            draws += [objective.draw(latents, rng(len(draws)), times) for times in (None, ends)]
        draw = NoiseDraw(**{name: torch.cat([getattr(d, name) for d in draws]) for name in vars(draws[0])})
        prediction = torch.randn(draw.noisy.shape, generator=rng(7)).requires_grad_()
        for read, loss in itertools.product(("raw", "additive", "sigma_scaled"), kinds):
            objective = make(weighting_scheme=scheme, prediction=read, target=target, **loss)
            value = objective.loss(prediction, draw, torch.ones(len(draw.noisy)))
            (gradient,) = torch.autograd.grad(value.mean(), prediction)
            assert value.isfinite().all()
            assert gradient.isfinite().all()


# --- waiting ----------------------------------------------------------------------------------------------------------

WORK = {"ip_noise_gamma": 0.1, "ip_noise_gamma_random_strength": True, "loss_type": "huber", "target": "clean"}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_step_reads_no_value_back(sampling, scheme):
    objective = make(sampling, weighting_scheme=scheme, prediction="sigma_scaled", **WORK)
    with HostReads() as reads:
        objective.loss(PREDICTION, objective.draw(LATENTS, rng()), WEIGHTS, MASKS)
    assert reads.seen == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_step_does_not_wait_for_the_gpu(sampling):
    objective = make(sampling, weighting_scheme="cosmap", prediction="sigma_scaled", **WORK)
    latents, prediction, weights, masks = (x.cuda() for x in (LATENTS, PREDICTION, WEIGHTS, MASKS))
    generator = torch.Generator("cuda").manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        draw = objective.draw(latents, generator)
        objective.loss(prediction, draw, weights, masks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert draw.timesteps.is_cuda
