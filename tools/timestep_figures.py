"""`python tools/timestep_figures.py` draws docs/images/timesteps.png: which timesteps flow models are trained at."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from library import registry
from library.objectives.flow import FlowObjective, FlowSettings, loss_weighting, shift_sigma
from library.options.loss import LossOptions, NoiseOptions
from library.training.timestep_chart import Curve, Panel, figure

FILE = ROOT / "docs" / "images" / "timesteps.png"
DRAWS, BINS, SEED = 2_000_000, 50, 1
LARGE = 1024 // 8  # side of the latents of an image of 1024 pixels


def drawn(name: str, sampling: Any, **settings: Any) -> Curve:
    """The density of timesteps as the objective draws them; 1 is the density of uniform ones."""
    chosen = FlowSettings(sampling, **settings)
    objective = FlowObjective(chosen, NoiseOptions(), LossOptions())
    generator = torch.Generator().manual_seed(SEED)
    timesteps = objective.draw(torch.zeros(DRAWS, 1, 1, 1), generator).timesteps.float()
    edges, whole = torch.linspace(0, 1000, BINS + 1), -0.01  # whole timesteps count to the bin that they begin
    if sampling == "sigma":  # a list of 1000 shifted levels: as many of them in each bin, or there would be false waves
        edges, whole = 1000 * shift_sigma(edges / 1000, chosen.shift), 0.01
    counts = torch.bincount(torch.bucketize(timesteps, edges[1:-1] + whole), minlength=BINS)
    heights = counts / DRAWS * 1000 / edges.diff()
    return Curve(name, list(zip(((edges[1:] + edges[:-1]) / 2).tolist(), heights.tolist(), strict=True)))


def weighed(name: str, scheme: Any) -> Curve:
    times = [1000 * place / 400 for place in range(1, 401)]
    weights = loss_weighting(scheme, torch.tensor(times) / 1000).tolist()
    return Curve(name, list(zip(times, weights, strict=True)))


def shift_by_size(height: int, width: int) -> float:
    """Of the family whose sampling takes another shift at another size."""
    for spec in registry.FAMILIES.values():
        shift = spec.traits.flow_shift
        if shift is not None and shift(64, 64) != shift(128, 128):
            return shift(height, width)
    raise LookupError("no family has a shift that depends on the size")


def panels() -> list[Panel]:
    large, small = shift_by_size(LARGE, LARGE), shift_by_size(LARGE // 2, LARGE // 2)
    density = "how often, 1 = uniform"
    return [
        Panel(
            "--timestep_sampling",
            density,
            3.0,
            (0, 1, 2, 3),
            [
                drawn("sigma (shift 3, uniform scheme)", "sigma", shift=3.0),
                drawn("uniform", "uniform"),
                drawn("sigmoid", "sigmoid"),
                drawn("shift (3)", "shift", shift=3.0),
                drawn("flux_shift (1024 x 1024)", "flux_shift", shift_of=lambda *_: large),
            ],
        ),
        Panel(
            "--sigmoid_scale and the size of images",
            density,
            4.0,
            (0, 1, 2, 3, 4),
            [
                drawn("sigmoid, scale 0.5", "sigmoid", sigmoid_scale=0.5),
                drawn("sigmoid, scale 1", "sigmoid"),
                drawn("sigmoid, scale 2", "sigmoid", sigmoid_scale=2.0),
                drawn("flux_shift (512 x 512)", "flux_shift", shift_of=lambda *_: small),
                drawn("flux_shift (1024 x 1024)", "flux_shift", shift_of=lambda *_: large),
            ],
        ),
        Panel(
            "--weighting_scheme, as a density (shift 1)",
            density,
            4.0,
            (0, 1, 2, 3, 4),
            [
                drawn("uniform, none, sigma_sqrt, cosmap", "discrete"),
                drawn("logit_normal", "discrete", weighting_scheme="logit_normal"),
                drawn("logit_normal, mean 1", "discrete", weighting_scheme="logit_normal", logit_mean=1.0),
                drawn("mode", "discrete", weighting_scheme="mode"),
            ],
        ),
        Panel(
            "--weighting_scheme, as a weight of the loss",
            "factor on the loss",
            8.0,
            (0, 2, 4, 6, 8),
            [
                weighed("sigma_sqrt (up to 1,000,000 at the left)", "sigma_sqrt"),
                weighed("cosmap", "cosmap"),
                weighed("uniform, none, logit_normal, mode", "uniform"),
            ],
        ),
    ]


if __name__ == "__main__":
    FILE.parent.mkdir(parents=True, exist_ok=True)
    figure(panels()).quantize(64).save(FILE, optimize=True)
    print(f"wrote {FILE}")
