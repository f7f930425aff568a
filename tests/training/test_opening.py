"""The lines before the first step say the rates that the steps will have."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from library.training.opening import describe_run
from library.training.plan import make_plan
from tests.builders.options import options_for

AT_TWO_RATES = [("unet", 0.5), ("textencoder", 0.25)]


@pytest.mark.parametrize(
    ("cls", "given", "said"),
    [
        (torch.optim.SGD, {"optimizer_type": "SGD"}, "unet 0.5, textencoder 0.25; constant"),
        (
            torch.optim.SGD,
            {"optimizer_type": "SGD", "lr_scheduler": "cosine", "lr_warmup_steps": 1},
            "unet 0.5, textencoder 0.25; cosine after a warm-up of 1 step",
        ),
        (Adafactor, {"optimizer_type": "AdaFactor"}, "computed by AdaFactor in each step"),
        (
            Adafactor,
            {"optimizer_type": "AdaFactor", "optimizer_args": ["relative_step=False"]},
            "unet 0.5, textencoder 0.25; constant",
        ),
    ],
)
def test_rates_are_those_of_the_optimizer(cls, given, said):
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": rate, "name": name} for name, rate in AT_TWO_RATES]
    optimizer = cls(groups, **({"relative_step": False} if cls is Adafactor else {}))
    plan = make_plan(4, 1, 1, steps=4, epochs=None, by_default=False)
    assert dict(describe_run(options_for("sd", "network", **given), optimizer, plan, [1]))["rates"] == said
