"""Sample prompts: one line, or a .txt, .toml or .json file, to `SamplePrompt`s. Nothing heavy is imported here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from library.errors import UserError
from library.inference.deep_shrink import DeepShrink
from library.inference.gradual_latent import GradualLatent
from library.inference.prompt_lines import Syntax
from library.options.nearest import did_you_mean
from library.options.sampling import Sampler
from library.runtime.documents import parse_json, parse_toml, read_text
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from library.types import FamilyTraits

SAMPLERS: tuple[str, ...] = get_args(Sampler)
FLOW_SAMPLER = "euler"  # of flow models, if no other is asked for
FLOW_SAMPLERS = (FLOW_SAMPLER, "heun", "dpmsolver++")  # those that flow models have; "k_" before them changes nothing
MIN_SIDE = 64  # pixels
MAX_SIDE = 8192  # pixels; larger images fit into no memory
MAX_STEPS = 1000
RANDOM_SEED = -1  # as in web interfaces: another one each time
MAX_SEED = 2**64 - 1  # what torch's generators take


_SWITCHED_ON = {"shrink", "gradual"}
Prepare = Callable[["NDArray[np.uint8]"], "NDArray[np.uint8]"]  # RGB (H, W, 3) to one of the same shape


@dataclass(frozen=True)
class ControlImage:
    """The image of --cn; `control_images.with_control` reads it."""

    path: Path
    pixels: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)  # (height, width, 3), as sampled
    prepare: Prepare | None = None  # what makes the control image of the one in the file; None: it is one


@dataclass(frozen=True)
class SourceImage:
    """The image that drawing begins with, and what of it is drawn again; `source_images.with_source` reads both."""

    path: Path
    mask: Path | None = None  # bright is drawn again, dark is kept; None: all is drawn again
    pixels: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)  # (height, width, 3), as sampled
    mask_pixels: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)  # (height, width)
    latents: Tensor | None = field(default=None, compare=False, repr=False)  # in place of pixels: (C, h, w), scaled
    pinned: bool = False  # after each step, what is kept is put back, also where the model sees it anyway

    @property
    def is_masked(self) -> bool:
        """Whether a part of it is kept."""
        return self.mask is not None or self.mask_pixels is not None


@dataclass(frozen=True)
class RegionMask:
    """The image that says where each part of a prompt counts; `regions.read_masks` reads it."""

    path: Path
    colors: int | None = None  # parts that have a color of their own; None: red, green and blue are the first three


@dataclass(frozen=True)
class SizeConditions:
    """What a model with size conditioning is given in place of the image's own size, in pixels; None: that."""

    original_width: int | None = None
    original_height: int | None = None
    negative_width: int | None = None  # of the negative prompt; None: as above
    negative_height: int | None = None
    crop_top: int = 0
    crop_left: int = 0


@dataclass(frozen=True)
class SamplePrompt:
    """The prompt and settings of one image."""

    prompt: str
    negative_prompt: str
    width: int  # pixels, a multiple of the family's pixel_multiple
    height: int
    seed: int | None  # None: the caller chooses one
    steps: int  # denoising steps, 1..1000
    scale: float  # classifier-free guidance; 1 = none
    sampler: str  # one of SAMPLERS
    guidance: float | None = None  # guidance value fed to distilled flow models
    flow_shift: float | None = None  # shift of a flow model's noise levels, above 0; None: the family's own
    control: ControlImage | None = None  # what a ControlNet reads
    negative_scale: float | None = None  # own scale of the negative prompt, beside an empty one; None: there is none
    multipliers: tuple[float, ...] | None = None  # strengths of the networks; None: those of the options
    sizes: SizeConditions = SizeConditions()
    source: SourceImage | None = None  # None: drawing begins with noise
    guides: tuple[ControlImage, ...] = ()  # one for each of several ControlNets, in place of `control`
    strength: float = 0.8  # with a source: share of the steps that are made, 0..1
    parts: tuple[str, ...] = ()  # of a prompt of several, each of which is read by itself; (): it is one text
    regions: RegionMask | None = None  # where each part counts; None: all of them count everywhere
    seen: Path | None = None  # the image that CLIP sees in place of the pooled text; None: there is none
    shrink: DeepShrink = field(default_factory=DeepShrink)
    gradual: GradualLatent = field(default_factory=GradualLatent)

    @property
    def steps_made(self) -> int:
        """The steps that are made of `steps`."""
        return self.steps if self.source is None else min(int(self.steps * self.strength), self.steps)


def default_prompt(traits: FamilyTraits, sampler: str) -> SamplePrompt:
    """The defaults of a prompt: the family's size, steps and scale, and --sample_sampler.

    Flow models have a sampler of their own, whatever `sampler` is.
    """
    side = traits.default_resolution
    sampler = FLOW_SAMPLER if traits.objective == "flow" else sampler
    return SamplePrompt("", "", side, side, None, traits.sample_steps, traits.sample_scale, sampler)


def flow_sampler_note(traits: FamilyTraits, samplers: tuple[str, ...] = (FLOW_SAMPLER,)) -> str:
    """Why a flow model does not take another sampler, to end a message with."""
    if len(samplers) == 1:
        return f"images of {traits.label} are always made with {samplers[0]}"
    return f"{traits.label} has the samplers {', '.join(samplers)}; {FLOW_SAMPLER} is used"


def load_prompts(path: str | Path, traits: FamilyTraits, sampler: str) -> list[SamplePrompt]:
    """The prompts of a file, in its order; see `entries`.

    Raises: UserError: an unreadable file, another type, or a bad entry, with the file and the line or entry.
    """
    base, syntax = default_prompt(traits, sampler), Syntax()
    return [finish(base, syntax.parse(entry, where), traits, where) for where, entry in entries(path)]


def parse_prompt(line: str, traits: FamilyTraits, sampler: str, where: str = "prompt") -> SamplePrompt:
    """One prompt line, e.g. ``a cat --n blurry --w 768 --h 512 --d 1 --s 28 --l 7.5``.

    Dashes with a blank behind them are part of the text before them. Options that are not known are left out, with a
    warning.

    Args:
        where: names the line in messages, e.g. "prompts.txt, line 3".
    Raises: UserError: a bad value, or an option that is not available yet.
    """
    return finish(default_prompt(traits, sampler), Syntax().parse(line, where), traits, where)


def entries(path: str | Path) -> list[tuple[str, str | dict[str, Any]]]:
    """(place for messages, prompt line or table) of each prompt in a file.

    .txt: one prompt line each; blank lines and lines that start with # are skipped. .toml: a [prompt] table of shared
    keys with [[prompt.subset]] tables. .json: a list of prompt lines or tables.

    Raises: UserError: an unreadable file, another type, or no prompt in it.
    """
    path = Path(path)
    if path.suffix.lower() not in (".txt", ".toml", ".json"):
        raise UserError(f"{path}: a prompt file must be .txt, .toml or .json")
    text = read_text(path, "the prompt file")
    if path.suffix.lower() == ".txt":
        lines = enumerate(map(str.strip, text.split("\n")), start=1)
        found = [(f"{path}, line {number}", line) for number, line in lines if line and not line.startswith("#")]
    else:
        if path.suffix.lower() == ".toml":
            shared = parse_toml(text, path).get("prompt")
            if not isinstance(shared, dict):
                raise UserError(f"{path}: needs a [prompt] table, with [[prompt.subset]] tables for several prompts")
            subsets = shared.pop("subset", [{}])
            if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
                raise UserError(f"{path}: `subset` must be [[prompt.subset]] tables")
            tables = [{**shared, **subset} for subset in subsets]
        else:
            tables = parse_json(text, path)
            if not isinstance(tables, list):
                raise UserError(f"{path}: must hold a list of prompt lines or tables")
        found = [(f"{path}, prompt {number}", entry) for number, entry in enumerate(tables, start=1)]
        for where, entry in found:
            if not isinstance(entry, (str, dict)):
                raise UserError(f"{where}: must be a prompt line or a table, got {entry!r}")
    if not found:
        raise UserError(f"{path}: the file holds no prompt")
    return found


def finish(
    base: SamplePrompt,
    changes: Mapping[str, Any],
    traits: FamilyTraits,
    where: str,
    flow_samplers: tuple[str, ...] = (FLOW_SAMPLER,),
) -> SamplePrompt:
    """The prompt `base` with the values of `Syntax.parse`, as it is drawn.

    Args: flow_samplers: those that a flow model takes; others have no effect.
    Raises: UserError: a value that no image can be made with.
    """
    prompt = _changed(base, changes)
    if prompt.sampler not in SAMPLERS:
        near = did_you_mean(prompt.sampler, SAMPLERS)
        raise UserError(f"{where}: unknown sampler {prompt.sampler!r}{near}; choose one of {', '.join(SAMPLERS)}")
    if prompt.seed == RANDOM_SEED:
        prompt = replace(prompt, seed=None)
    if prompt.seed is not None and not 0 <= prompt.seed <= MAX_SEED:
        raise UserError(f"{where}: the seed must be from 0 to {MAX_SEED}, got {prompt.seed}")
    numbers = {"scale": prompt.scale, "guidance": prompt.guidance, "negative scale": prompt.negative_scale}
    for name, value in numbers.items():
        if value is not None and not math.isfinite(value):
            raise UserError(f"{where}: the {name} must be a finite number, got {value}")
    if not 0 <= prompt.strength <= 1:
        raise UserError(f"{where}: the strength must be from 0 to 1, got {prompt.strength}")
    if prompt.flow_shift is not None and not 0 < prompt.flow_shift < math.inf:
        raise UserError(f"{where}: the flow shift must be a finite number above 0, got {prompt.flow_shift}")
    for problem in (*prompt.shrink.problems(traits), *prompt.gradual.problems(traits, prompt.sampler)):
        raise UserError(f"{where}: {problem}")
    if traits.objective == "flow":
        if prompt.sampler.removeprefix("k_") not in flow_samplers:
            LOGGER.warning(f"{where}: --ss (sample_sampler) has no effect: {flow_sampler_note(traits, flow_samplers)}")
            prompt = replace(prompt, sampler=FLOW_SAMPLER)
        prompt = replace(prompt, sampler=prompt.sampler.removeprefix("k_"))
    else:
        without_effect = {"--g (guidance_scale)": prompt.guidance, "--fs (flow_shift)": prompt.flow_shift}
        for name, value in without_effect.items():
            if value is not None:
                LOGGER.warning(f"{where}: {name} has no effect with {traits.label}")

    return replace(
        prompt,
        width=_side("width", prompt.width, traits.pixel_multiple, where),
        height=_side("height", prompt.height, traits.pixel_multiple, where),
        steps=min(max(prompt.steps, 1), MAX_STEPS),
    )


def _changed(base: SamplePrompt, changes: Mapping[str, Any]) -> SamplePrompt:
    """The prompt with other values; "sizes.crop_top" is a field of its field `sizes`.

    Where a prompt says anything of a way of drawing that can be off, it is on.
    """
    own = {name: value for name, value in changes.items() if "." not in name}
    if "control" in own:
        own["control"] = ControlImage(Path(own["control"]).expanduser())
    if isinstance(own.get("source"), str):  # where programs give one, it is made already
        own["source"] = SourceImage(Path(own["source"]).expanduser())
    for name, value in changes.items():
        if "." in name:
            group, _, field_name = name.partition(".")
            own[group] = replace(own.get(group, getattr(base, group)), **{field_name: value})
    for group in _SWITCHED_ON & own.keys():
        own[group] = own[group].switched_on()
    return replace(base, **own)


def _side(name: str, pixels: int, multiple: int, where: str) -> int:
    """A side as it is drawn: a multiple of what the family needs, and at least `MIN_SIDE`. Raises: UserError."""
    if pixels > MAX_SIDE:
        raise UserError(f"{where}: the {name} must be at most {MAX_SIDE} pixels, got {pixels}")
    if pixels < 0:
        LOGGER.warning("%s: the %s %d is no size; %d is used", where, name, pixels, MIN_SIDE)
    return max(MIN_SIDE, pixels // multiple * multiple)
