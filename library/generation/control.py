"""ControlNets while images are generated: several at once, each with its strength, its image and its share of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError
from library.families.shared.controlnet import ResidualControl
from library.families.shared.recognition import no_controlnet, path_problem
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

        count, paths = len(opts.control.control_net_models or ()) or 1, opts.source.guide_image_path or ()
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
class ControlNets:
    """Loaded ControlNets."""

    family: Family
    models: Models
    nets: list[nn.Module]
    strengths: Sequence[float]
    shares: Sequence[float]  # of the steps, from the first on, in which each acts
    share_after: float = 0.0  # of the steps, with the present one

    def at_step(self, share: float) -> None:
        self.share_after = share

    def denoise(self, noisy: Tensor, timesteps: Tensor, cond: TextCond, batch: Batch) -> Tensor:
        """The prediction with the residuals of every ControlNet that acts now, where the batch has control images."""
        residuals = None
        if batch.control is not None:
            control_role = self.family.control
            assert isinstance(control_role, ResidualControl), "checked when they are loaded"
            controls = self._fitting(batch.control, noisy).chunk(len(self.nets), dim=1)
            for net, strength, share, control in zip(self.nets, self.strengths, self.shares, controls, strict=True):
                if self.share_after > share or not strength:
                    continue
                given = replace(batch, control=control)
                own = control_role.residuals(self.models, net, noisy, timesteps, cond, given)
                if residuals is not None and len(own) != len(residuals):
                    raise UserError("--control_net_models: these have different numbers of blocks; give one at a time")
                own = tuple(strength * residual for residual in own)
                residuals = own if residuals is None else tuple(a + b for a, b in zip(residuals, own, strict=True))
        return self.family.denoiser.predict(self.models, noisy, timesteps, cond, batch, residuals)

    def _fitting(self, control: Tensor, noisy: Tensor) -> Tensor:
        """Control images of the size that latents stand for, which is smaller where these grow."""
        from torch.nn import functional

        size = [side * self.family.traits.latent_stride for side in noisy.shape[-2:]]
        if list(control.shape[-2:]) == size:
            return control
        return functional.interpolate(control, size=size, mode="bilinear", antialias=True)


def check_control_nets(options: ControlOptions) -> None:
    """Raises: UserError: one of the ControlNets is none, as far as names show."""
    names = options.control_net_models or ()
    problems = [path_problem("--control_net_models", name, no_controlnet) for name in names]
    if any(problems):
        raise UserError(*filter(None, problems))


def load_control_nets(
    options: ControlOptions, family: Family, models: Models, dtype: torch.dtype
) -> ControlNets | None:
    """The ControlNets of the options, on the denoiser's device; None: there are none.

    Raises: UserError: one cannot be read or is for another model, or there are none for this family.
    """
    names = options.control_net_models or ()
    if not names:
        return None
    if not isinstance(family.control, ResidualControl):
        raise UserError(f"--control_net_models: there are none for {family.traits.label} here")
    device = next(models.denoiser.parameters()).device
    nets = []
    for name in names:
        try:
            nets.append(family.control.load(models, name).requires_grad_(False).eval().to(device, dtype))
        except UserError as error:
            raise UserError(*(f"--control_net_models: {p}" for p in error.problems), hint=error.hint) from error
    return ControlNets(
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
