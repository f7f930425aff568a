import pytest
import torch

from library.training.scalars import ScalarQueue, all_finite


def test_values_arrive_in_order_and_once():
    queue = ScalarQueue()
    for step in range(3):
        queue.push(step, {"a": torch.tensor(float(step)), "b": torch.tensor([step * 2.0])})
    assert queue.ready() == [(step, {"a": float(step), "b": step * 2.0}) for step in range(3)]
    assert queue.ready(wait=True) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_found(value):
    good = torch.ones(3, dtype=torch.bfloat16)
    assert all_finite([good, torch.zeros(2, 2)])
    assert not all_finite([good, torch.tensor([[0.0, value]])])
