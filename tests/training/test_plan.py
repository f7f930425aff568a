import pytest

from library.training.plan import describe, make_plan


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


def test_batches_that_come_twice_are_told():
    def lines(batches, processes):
        return describe(make_plan(batches, processes, 1, steps=10, epochs=None, by_default=False), 10, 0)

    assert "2 batches of each epoch come twice, so that all 4 processes have as many" in lines(10, 4)
    assert not any("twice" in line for line in lines(12, 4))
