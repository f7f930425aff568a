"""Pure half precision: unbiased rounding, any optimizer on float32 copies, states, and the fp16 scaler."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch

from library.options.optimizer import OptimizerOptions
from library.runtime import seeds
from library.training.optimizers import make_optimizer
from library.training.precision import HalfGradScaler, StochasticRounding, round_stochastically

pytestmark = pytest.mark.filterwarnings("ignore")  # of paged optimizers on a CPU


def neighbours(value: float) -> tuple[float, float]:
    """The bf16 numbers below and above a float32 number."""
    bits = torch.tensor(value).view(torch.int32)
    down = bits & -(1 << 16)
    up = down + (1 << 16) if bits != down else down
    low, high = sorted((float(down.view(torch.float32)), float(up.view(torch.float32))))
    return low, high


@pytest.mark.parametrize("value", [1.001, -1.001, 0.3, 1e-30, 3e-39, -7e-40, 65504.123, 1.0039, 255.99])
def test_the_mean_of_many_roundings_is_the_number(value):
    count = 200_000
    number = torch.tensor(value)
    rng = torch.Generator().manual_seed(1)
    drawn = round_stochastically(number.expand(count).contiguous(), rng)
    low, high = neighbours(float(number))
    assert set(drawn.double().unique().tolist()) == {low, high}
    share = (float(number) - low) / (high - low)
    error = (high - low) * math.sqrt(share * (1 - share) / count)  # standard deviation of the mean
    assert abs(float(drawn.double().mean()) - float(number.double())) < 5 * error


def test_exact_numbers_infinities_and_nan_stay():
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-133, 3.3895e38, math.inf, -math.inf]).bfloat16().float()
    for seed in range(20):
        rounded = round_stochastically(values, torch.Generator().manual_seed(seed))
        assert torch.equal(rounded.float().view(torch.int32), values.view(torch.int32))
    strange = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    assert round_stochastically(strange, torch.Generator().manual_seed(0)).isnan().all()


def test_the_stream_is_its_own():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    first, second, other = (
        round_stochastically(values, seeds.generator("cpu", 1, "rounding", step, 0)) for step in (3, 3, 4)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def made(name: str, weights: list[torch.Tensor], rate: float = 1e-3, **more) -> torch.optim.Optimizer:
    options = OptimizerOptions(optimizer_type=name, learning_rate=rate, **more)
    half = len(weights) // 2
    groups = [
        {"params": weights[:half], "lr": rate, "name": "a"},
        {"params": weights[half:], "lr": rate, "name": "b"},
    ]
    return make_optimizer(groups, options)


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    rng = torch.Generator().manual_seed(0)
    values = [torch.randn(64, 64, generator=rng).bfloat16() for _ in range(4)]
    return [torch.nn.Parameter(value.to(dtype)) for value in values]


def set_gradients(weights, step: int) -> None:
    rng = torch.Generator().manual_seed(100 + step)
    for weight in weights:
        weight.grad = torch.randn(64, 64, generator=rng).bfloat16().to(weight.dtype)


NAMES = ["AdamW", "SGD", "Adagrad", "Muon", "AdamW8bit", "Lion", "Prodigy", "DAdaptAdam", "AdaFactor"]


@pytest.mark.parametrize("name", NAMES)
def test_one_step_is_the_float32_step_rounded(name):
    rate = 1.0 if name in ("Prodigy", "DAdaptAdam") else 1e-3
    more = {"optimizer_args": ["relative_step=False"]} if name == "AdaFactor" else {}
    wide, narrow = parameters(torch.float32), parameters(torch.bfloat16)
    reference, optimizer = made(name, wide, rate, **more), made(name, narrow, rate, **more)
    rounding = StochasticRounding(optimizer, seed=7)
    memory = [weight.data_ptr() for weight in narrow]
    for step in range(2):
        set_gradients(wide, step), set_gradients(narrow, step)
        rounding.step = step
        reference.step(), optimizer.step()
        for place, (exact, weight) in enumerate(zip(wide, narrow, strict=True)):
            assert weight.dtype == weight.grad.dtype == torch.bfloat16
            rng = seeds.generator("cpu", 7, "rounding", step, place)
            assert torch.equal(weight.data, round_stochastically(exact.data, rng))
            exact.data = weight.data.float()
        optimizer.zero_grad()
    assert [weight.data_ptr() for weight in narrow] == memory


def test_steps_too_small_for_bf16_are_not_lost():
    """float32 moves by 1000 * 1e-5; bf16 near 1 has steps of 1/128 and 1/256 and does not move without rounding."""
    start = torch.ones(4096)
    moved = {}
    for rounds in (False, True):
        weight = torch.nn.Parameter(start.bfloat16())
        optimizer = torch.optim.SGD([weight], lr=1e-5)
        rounding = StochasticRounding(optimizer, seed=3) if rounds else None
        for step in range(1000):
            weight.grad = torch.ones_like(weight)
            if rounding:
                rounding.step = step
            optimizer.step()
        moved[rounds] = 1 - float(weight.detach().double().mean())
    assert moved[False] == 0
    # A walk of steps of 1/256 with chance 1e-5 * 256: variance 1e-5 / 256 per step, over 4096 weights.
    deviation = math.sqrt(1000 * 1e-5 / 256 / 4096)
    assert abs(moved[True] - 0.01) < 5 * deviation


def test_a_resumed_run_goes_on_to_the_bit():
    def run(optimizer, weights, steps):
        rounding = StochasticRounding(optimizer, seed=1)
        for step in steps:
            set_gradients(weights, step)
            rounding.step = step
            optimizer.step()

    through = parameters(torch.bfloat16)
    run(made("AdamW", through), through, range(4))

    first = parameters(torch.bfloat16)
    optimizer = made("AdamW", first)
    run(optimizer, first, range(2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = [torch.nn.Parameter(weight.detach().clone()) for weight in first]
    optimizer = made("AdamW", second)
    rounding = StochasticRounding(optimizer, seed=1)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert all(weight.dtype == torch.bfloat16 for weight in second)
    assert all(state["exp_avg"].dtype == torch.float32 for state in optimizer.state.values())
    for step in range(2, 4):
        set_gradients(second, step)
        rounding.step = step
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(through, second, strict=True))


def test_weights_without_gradients_and_float32_weights_are_left_alone():
    frozen, wide = torch.nn.Parameter(torch.ones(8).bfloat16()), torch.nn.Parameter(torch.ones(8))
    optimizer = torch.optim.SGD([frozen, wide], lr=0.1)
    StochasticRounding(optimizer, seed=0)
    wide.grad = torch.full((8,), 0.001)
    optimizer.step()
    assert torch.equal(frozen.data, torch.ones(8).bfloat16())
    assert torch.equal(wide.data, torch.full((8,), 1.0) - 0.1 * torch.tensor(0.001))


# ---- fp16


@pytest.mark.rows("R182")
def test_gradients_in_fp16_are_unscaled_and_overflow_skips_the_step():
    weight = torch.nn.Parameter(torch.ones(8, dtype=torch.float16))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scaler = HalfGradScaler("cpu", init_scale=1024.0)
    scaler.scale((weight.float() * 2e-6).sum()).backward()  # 2e-6 is below what fp16 holds in full
    assert weight.grad.dtype == torch.float16
    copied = copy.deepcopy(weight.grad)
    scaler.unscale_(optimizer)
    torch.testing.assert_close(weight.grad.float(), copied.float() / 1024, rtol=1e-3, atol=2**-24)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    before = weight.detach().clone()
    scaler.scale((weight.float() * 1000).sum()).backward()  # times 1024: more than fp16 holds
    assert weight.grad.isinf().all()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight.detach(), before)
    assert scaler.get_scale() == 512


@pytest.mark.rows("R182")
def test_torchs_own_scaler_refuses_them():
    """If this fails, HalfGradScaler is no longer needed."""
    weight = torch.nn.Parameter(torch.ones(8, dtype=torch.float16))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(weight.float().sum()).backward()
    with pytest.raises(ValueError, match="FP16"):
        scaler.unscale_(optimizer)
