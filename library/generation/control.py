"""ControlNets and ControlNet-LLLites while images are generated: several at once, each with its image.

Each has its strength, and the share of the steps in which it acts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError
from library.families.shared.controlnet import ResidualControl
from library.families.shared.recognition import no_controlnet, no_lllite, path_problem
from library.inference.prompts import ControlImage
from library.options.inference_images import CANNY

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from library.families.base import Family
    from library.inference.prompts import Prepare
    from library.options.base import Options
    from library.options.inference_images import ControlOptions
    from library.types import Batch, Models, TextCond

    # `Denoiser.predict` of a family with its models, or what stands in its place.
    Predict = Callable[..., Tensor]

_CANNY_LIMITS = 63, 191  # where --control_net_preps says none


@dataclass(frozen=True)
class Guides:
    """Where the control images of a run come from: for each ControlNet, or the model, files that are taken in turn."""

    files: tuple[tuple[Path, ...], ...]
    prepare: tuple[Prepare | None, ...]

    @classmethod
    def of(cls, opts: Options) -> Guides:
        """Those of the options. Raises: UserError: there are none for a ControlNet, or they are not there."""
        from library.generation.sources import files_of

        count, paths = len(opts.control.nets[1]) or 1, opts.source.guide_image_path or ()
        files = [files_of("--guide_image_path", path) for path in paths]
        if len(files) == 1:
            files *= count
        names = [*(opts.control.control_net_preps or ()), *["none"] * count][:count]
        return cls(tuple(files[:count]), tuple(map(_preparation, names)))

    def at(self, number: int, own: Path | None, where: str) -> tuple[ControlImage, ...]:
        """The control images of the image of this number. Args: own: what its prompt names, for all ControlNets.

        Raises: UserError: there is none.
        """
        found = []
        for place, prepare in enumerate(self.prepare):
            if own is None and place >= len(self.files):
                raise UserError(f"{where}: no control image: give --guide_image_path, or --cn in the prompt")
            path = own or self.files[place][number % len(self.files[place])]
            found.append(ControlImage(path, prepare=prepare))
        return tuple(found)


@dataclass
class GuidedNets(ABC):
    """Loaded networks that read control images."""

    family: Family
    models: Models
    nets: list[nn.Module]
    strengths: Sequence[float]
    shares: Sequence[float]  # of the steps, from the first on, in which each acts
    share_after: float = 0.0  # of the steps, with the present one

    def at_step(self, share: float) -> None:
        self.share_after = share

    @abstractmethod
    def denoise(self, predict: Predict, noisy: Tensor, timesteps: Tensor, cond: TextCond, batch: Batch) -> Tensor:
        """The prediction with every network that acts now, where the batch has control images."""

    def acting(self, batch: Batch, noisy: Tensor) -> Iterator[tuple[nn.Module, float, Tensor]]:
        """(network, strength, its control images, (B, 3, H, W) in [0, 1]) of those that act in the present step."""
        if batch.control is None:
            return
        controls = self._fitting(batch.control, noisy).chunk(len(self.nets), dim=1)
        for net, strength, share, control in zip(self.nets, self.strengths, self.shares, controls, strict=True):
            if self.share_after <= share and strength:
                yield net, strength, control

    def _fitting(self, control: Tensor, noisy: Tensor) -> Tensor:
        """Control images of the size that latents stand for, which is smaller where these grow."""
        from torch.nn import functional

        size = [side * self.family.traits.latent_stride for side in noisy.shape[-2:]]
        if list(control.shape[-2:]) == size:
            return control
        return functional.interpolate(control, size=size, mode="bilinear", antialias=True)


class ControlNets(GuidedNets):
    def denoise(self, predict: Predict, noisy: Tensor, timesteps: Tensor, cond: TextCond, batch: Batch) -> Tensor:
        residuals = None
        for net, strength, control in self.acting(batch, noisy):
            control_role = self.family.control
            assert isinstance(control_role, ResidualControl), "checked when they are loaded"
            given = replace(batch, control=control)
            own = control_role.residuals(self.models, net, noisy, timesteps, cond, given)
            if residuals is not None and len(own) != len(residuals):
                raise UserError("--control_net_models: these have different numbers of blocks; give one at a time")
            own = tuple(strength * residual for residual in own)
            residuals = own if residuals is None else tuple(a + b for a, b in zip(residuals, own, strict=True))
        return predict(noisy, timesteps, cond, batch, residuals)


class Lllites(GuidedNets):
    """They act through hooks on the denoiser, as their images say."""

    def denoise(self, predict: Predict, noisy: Tensor, timesteps: Tensor, cond: TextCond, batch: Batch) -> Tensor:
        for net in self.nets:
            net.image = None
        for net, strength, control in self.acting(batch, noisy):
            net.image, net.multiplier = control * 2 - 1, strength
        return predict(noisy, timesteps, cond, batch)


def check_control_nets(options: ControlOptions) -> None:
    """Raises: UserError: one of the ControlNets is none, as far as names show."""
    (option, names), problem_of = options.nets, no_lllite if options.control_net_lllite_models else no_controlnet
    problems = [path_problem(option, name, problem_of) for name in names]
    if any(problems):
        raise UserError(*filter(None, problems))


def load_control_nets(options: ControlOptions, family: Family, models: Models, dtype: torch.dtype) -> GuidedNets | None:
    """The ControlNets or ControlNet-LLLites of the options, on the denoiser's device; None: there are none.

    Raises: UserError: one cannot be read or is for another model, or there are none for this family.
    """
    option, names = options.nets
    if not names:
        return None
    role, kind = (family.lllite, Lllites) if options.control_net_lllite_models else (family.control, ControlNets)
    if role is None or (kind is ControlNets and not isinstance(role, ResidualControl)):
        raise UserError(f"{option}: there are none for {family.traits.label} here")
    device = next(models.denoiser.parameters()).device
    nets = []
    for name in names:
        try:
            nets.append(role.load(models, name).requires_grad_(False).eval().to(device, dtype))
        except UserError as error:
            raise UserError(*(f"{option}: {problem}" for problem in error.problems), hint=error.hint) from error
    return kind(
        family,
        models,
        nets,
        padded(options.control_net_multipliers, len(nets)),
        padded(options.control_net_ratios, len(nets)),
    )


def padded(values: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """`count` values, 1 where there is none."""
    given = list(values or ())[:count]
    return tuple(given + [1.0] * (count - len(given)))


def _preparation(name: str) -> Prepare | None:
    if name == "none":
        return None
    match = CANNY.fullmatch(name)
    assert match is not None, "checked with the options"
    low, high = (int(match[1]), int(match[2])) if match[1] else _CANNY_LIMITS

    def edges(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:  # white on black, as an RGB image
        import numpy as np

        from library.preparation.images.edges import canny

        return np.repeat(canny(pixels, low, high)[..., None], 3, axis=2)

    return edges
