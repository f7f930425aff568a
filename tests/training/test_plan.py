import pytest

from library.options.training import TrainingOptions
from library.training.plan import Progress, choose_start, describe, make_plan, start_at


@pytest.mark.parametrize(
    ("batches", "processes", "accumulation", "steps_per_epoch"),
    [(10, 1, 1, 10), (10, 1, 4, 3), (10, 2, 4, 2), (10, 4, 1, 3), (1, 8, 8, 1)],
)
def test_a_step_is_an_optimizer_step(batches, processes, accumulation, steps_per_epoch):
    plan = make_plan(batches, processes, accumulation, steps=100, epochs=None, by_default=False)
    assert plan.steps_per_epoch == steps_per_epoch
    assert plan.total_steps == 100
    assert plan.epochs == -(-100 // steps_per_epoch)


def test_epochs_decide_over_steps():
    plan = make_plan(10, 1, 4, steps=1600, epochs=5, by_default=True)
    assert (plan.total_steps, plan.epochs, plan.by_default) == (15, 5, False)


def test_accumulation_does_not_multiply_epochs():
    """sd-scripts #251: with accumulation 4, 5 epochs stayed 5 epochs but the step count was that of 20."""
    plain = make_plan(12, 1, 1, steps=0, epochs=5, by_default=False)
    accumulated = make_plan(12, 1, 4, steps=0, epochs=5, by_default=False)
    assert plain.total_steps == 60
    assert accumulated.total_steps == 15
    assert accumulated.epochs == plain.epochs == 5


def test_the_default_length_is_announced():
    by_default = make_plan(10, 1, 1, steps=1600, epochs=None, by_default=True)
    assert any("1600" in line and "default" in line for line in describe(by_default, 10, 0))
    chosen = make_plan(10, 1, 1, steps=1600, epochs=None, by_default=False)
    assert not any("default" in line for line in describe(chosen, 10, 0))


def test_batches_that_come_twice_are_reported():
    def lines(batches, processes):
        return describe(make_plan(batches, processes, 1, steps=10, epochs=None, by_default=False), 10, 0)

    assert "2 batches of each epoch come twice, so that all 4 processes have as many" in lines(10, 4)
    assert not any("twice" in line for line in lines(12, 4))


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, (0, 0, 0)), (1, (1, 0, 4)), (2, (2, 0, 8)), (3, (3, 1, 10)), (7, (7, 2, 24))],
)
def test_the_place_in_the_data_follows_from_the_steps(step, expected):
    """20 batches, 2 processes, accumulation 4: 10 batches each in 3 steps per epoch, the last one of 2 batches."""
    plan = make_plan(20, 2, 4, steps=100, epochs=None, by_default=False)
    assert start_at(plan, step) == Progress(*expected)


def test_one_of_anything_is_no_plural():
    one = make_plan(1, 1, 1, steps=1, epochs=None, by_default=False)
    assert describe(one, 1, 0)[1:] == [
        "1 step per epoch (1 batch / 1 process / 1 accumulated)", "total: 1 optimizer step, 1 epoch"
    ]  # fmt: skip
    odd = make_plan(3, 2, 1, steps=4, epochs=None, by_default=False)
    assert describe(odd, 3, 0)[1:] == [
        "2 steps per epoch (3 batches / 2 processes / 1 accumulated)",
        "total: 4 optimizer steps, 2 epochs",
        "1 batch of each epoch comes twice, so that all 2 processes have as many",
    ]


def test_what_decides_over_the_start():
    plan = make_plan(10, 1, 1, steps=100, epochs=None, by_default=False)

    def start(saved=None, **given):
        found = choose_start(plan, TrainingOptions(**given), saved)
        return found.step, found.epoch, found.micro_step

    at_25 = Progress(step=25, epoch=3)
    assert start() == (0, 0, 0)
    assert start(at_25) == (25, 2, 25)
    assert start(at_25, initial_step=31) == (31, 3, 30)
    assert start(at_25, initial_step=31, skip_until_initial_step=True) == (31, 3, 31)
    assert start(initial_epoch=3) == (20, 2, 20)
    assert start(initial_epoch=3, initial_step=4) == (4, 0, 0)
    assert start(Progress(step=20, epoch=2, epoch_ended=False)) == (20, 1, 20)


def test_an_epoch_whose_end_is_still_to_come_is_ended_first():
    plan = make_plan(20, 2, 4, steps=100, epochs=None, by_default=False)
    assert start_at(plan, 6, epoch_ended=False) == Progress(6, 1, 20)  # behind all batches of the second epoch
    assert start_at(plan, 6) == Progress(6, 2, 20)
    assert start_at(plan, 7, epoch_ended=False) == start_at(plan, 7)
    assert start_at(plan, 0, epoch_ended=False) == Progress()
