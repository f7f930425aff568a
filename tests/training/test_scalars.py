import torch

from library.training.scalars import ScalarQueue


def test_values_arrive_in_order_and_once():
    queue = ScalarQueue()
    for step in range(3):
        queue.push(step, {"a": torch.tensor(float(step)), "b": torch.tensor([step * 2.0])})
    assert queue.ready() == [(step, {"a": float(step), "b": step * 2.0}) for step in range(3)]
    assert queue.ready(wait=True) == []
