"""From options and prompt lines to single images, each with its seed and settings. Nothing heavy is imported here."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.generation.files import name_problem
from library.generation.parts import Regional
from library.generation.sources import Sources, images_seen, require_image, said_by, size_of
from library.inference.deep_shrink import DeepShrink
from library.inference.dynamic_prompts import variants
from library.inference.gradual_latent import GradualLatent
from library.inference.prompt_lines import GENERATION, PromptOption, Syntax, numbers
from library.inference.prompts import (
    FLOW_SAMPLERS,
    SamplePrompt,
    SizeConditions,
    default_prompt,
    entries,
    finish,
)
from library.runtime.logs import LOGGER
from library.runtime.seeds import derive

if TYPE_CHECKING:
    from library.generation.control import Guides
    from library.options.base import Options
    from library.options.inference_images import GradualOptions, ShrinkOptions
    from library.types import FamilyTraits

Entry = str | dict[str, Any]
Failed = Callable[[str, str], None]  # the place of a prompt that cannot be used, and why


@dataclass(frozen=True)
class Request:
    """One image that is to be made."""

    prompt: SamplePrompt  # with its seed
    raw: str  # the prompt as it was given
    file_name: str | None = None  # what --f says
    clip_prompt: str | None = None


def base_prompt(opts: Options, traits: FamilyTraits, where: str = "the options") -> SamplePrompt:
    """The prompt that the options alone describe, without a text.

    Raises: UserError: a sampler that the model does not have.
    """
    image, explicit = opts.image, opts.explicit
    flow = traits.objective == "flow"
    base = default_prompt(traits, image.sampler)
    if flow and "sampler" in explicit:
        if image.sampler.removeprefix("k_") not in FLOW_SAMPLERS:
            raise UserError(f"--sampler: {image.sampler} is none for {traits.label}; choose {', '.join(FLOW_SAMPLERS)}")
        base = replace(base, sampler=image.sampler)
    if not flow or "steps" in explicit:
        base = replace(base, steps=image.steps)
    if traits.sample_scale != 1 or "scale" in explicit:
        base = replace(base, scale=image.scale)
    sizes = SizeConditions(
        image.original_width,
        image.original_height,
        image.original_width_negative,
        image.original_height_negative,
        image.crop_top or 0,
        image.crop_left or 0,
    )
    changes: dict[str, Any] = {"negative_scale": image.negative_scale, "sizes": sizes}
    changes |= {name: value for name, value in (("width", image.W), ("height", image.H)) if value is not None}
    if flow:
        changes |= {"guidance": image.guidance_scale, "flow_shift": image.flow_shift}
    if opts.source.strength is not None:
        changes["strength"] = opts.source.strength
    base = replace(base, shrink=_deep_shrink(opts.shrink), gradual=_gradual_latent(opts.gradual))
    return finish(base, changes, traits, where, FLOW_SAMPLERS)


def _deep_shrink(options: ShrinkOptions) -> DeepShrink:
    return DeepShrink(
        options.ds_depth_1, options.ds_timesteps_1, options.ds_depth_2, options.ds_timesteps_2, options.ds_ratio
    )


def _gradual_latent(options: GradualOptions) -> GradualLatent:
    """Raises: UserError: the parameters of sharpening are no numbers."""
    unsharp = options.gradual_latent_unsharp_params
    try:
        values = numbers(unsharp) if unsharp else None
    except ValueError:
        raise UserError(
            f"--gradual_latent_unsharp_params: needs numbers with commas between them, got {unsharp!r}"
        ) from None
    return GradualLatent(
        options.gradual_latent_timesteps,
        options.gradual_latent_ratio,
        options.gradual_latent_ratio_step,
        options.gradual_latent_every_n_steps,
        options.gradual_latent_s_noise,
        values,
    )


def table_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a prompt as a table of a prompt file has them."""
    keys = {option.field: option.key for option in GENERATION}
    return {keys.get("seeds" if name == "seed" else name, name): value for name, value in fields.items()}


def entries_of(opts: Options, sources: Sources | None) -> list[tuple[str, Entry]]:
    """(place for messages, prompt line or table) of each prompt; without any, what the sources say of themselves.

    Raises: UserError: a file that cannot be read.
    """
    if opts.prompts.from_file:
        return entries(opts.prompts.from_file)
    if opts.prompts.prompt is None and sources is not None:
        asked = {"guidance" if name == "guidance_scale" else name for name in opts.explicit}  # which counts more
        return [
            (str(path), table_of({name: value for name, value in said_by(path).items() if name not in asked}))
            for path in sources.images
        ]
    return [("--prompt", opts.prompts.prompt)]


class Requests:
    """Makes the images' requests of prompts, for one iteration after the other.

    Args:
        base: what prompts that say nothing else have.
        sources: what images begin with; None: noise.
        guides: what ControlNets read; None: there are none.
        syntax: the options that may stand in a prompt.
        failed: is called with the place of each prompt that cannot be used, and why.
    """

    def __init__(
        self,
        opts: Options,
        traits: FamilyTraits,
        base: SamplePrompt,
        failed: Failed,
        sources: Sources | None = None,
        guides: Guides | None = None,
        syntax: Sequence[PromptOption] = GENERATION,
    ):
        self._opts, self._traits, self._base, self._failed = opts.prompts, traits, base, failed
        self._regional = Regional.of(opts, traits)
        self._seen, self._lllites = images_seen(opts, traits), bool(opts.control.control_net_lllite_models)
        self._sources, self._guides = sources, guides
        self._sides = [name for name, side in (("width", opts.image.W), ("height", opts.image.H)) if side]  # given
        self._syntax, self._knows_regions = Syntax(syntax), syntax is GENERATION
        self._made = 0  # images so far
        self._iteration = 0

    def of(self, prompts: Sequence[tuple[str, Entry]]) -> list[Request]:
        """Those of one iteration over all prompts. Prompts that cannot be used are left out."""
        order = list(prompts)
        if self._opts.shuffle_prompts:
            self._random("order").shuffle(order)
        common = [self._common_seed(place) for place in range(self._opts.images_per_prompt)]
        found: list[Request] = []
        for number, (where, entry) in enumerate(order):
            try:
                found += self._of_entry(where, entry, number, common)
            except UserError as error:
                for problem in error.problems:
                    self._failed(where, problem.removeprefix(f"{where}: "))
        self._iteration += 1
        return found

    def _of_entry(self, where: str, entry: Entry, number: int, common: Sequence[int]) -> Iterator[Request]:
        text = entry if isinstance(entry, str) else entry.get("prompt")
        if not isinstance(text, str):
            self._syntax.parse(entry, where)  # which says what is wrong
            return
        count = self._opts.images_per_prompt
        try:
            texts = variants(text, count, self._random("choices", number))
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        for place, line in enumerate(texts):
            changes = self._syntax.parse(line if isinstance(entry, str) else {**entry, "prompt": line}, where)
            yield self._request(where, changes, text, place % count, common)

    def _request(self, where: str, changes: Mapping[str, Any], raw: str, place: int, common: Sequence[int]) -> Request:
        own = dict(changes)
        seeds, file_name, clip_prompt = (own.pop(name, None) for name in ("seeds", "file_name", "clip_prompt"))
        problem = name_problem(file_name) if file_name is not None else None
        if problem:
            raise UserError(f"{where}: --f {problem}")
        if clip_prompt is not None:
            LOGGER.warning("%s: --c has no effect but to be noted in the image's file", where)
        own["seed"] = seeds[place] if seeds and place < len(seeds) else None
        try:
            own |= self._images(own, where)
        except UserError:
            self._made += 1  # the next one has its turn, so that one image that is broken costs no others
            raise
        if own.pop("control", None) and self._guides is None:
            LOGGER.warning(
                "%s: --cn has no effect without --control_net_models, --control_net_lllite_models or a control LoRA",
                where,
            )
        prompt = finish(self._base, own, self._traits, where, FLOW_SAMPLERS)
        if prompt.shrink.depth_1 is not None and self._lllites:
            raise UserError(f"{where}: Deep Shrink cannot be used with --control_net_lllite_models")
        if prompt.seed is None:
            prompt = replace(prompt, seed=common[place] if self._opts.iter_same_seed else self._next_seed())
        self._made += 1
        return Request(prompt, raw, file_name, clip_prompt)

    def _images(self, own: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The fields that images give a prompt, or that say how it reads them. Args: own: the fields that it has.

        Raises: UserError: one of them is not there or cannot be read.
        """
        found: dict[str, Any] = {}
        if self._sources is not None:
            found["source"] = source = self._sources.at(self._made, where)
            size = size_of(source, where)
            if source.mask is not None:
                require_image(source.mask, where)
            if not {*self._sides, *own} & {"width", "height"}:
                found["width"], found["height"] = size
        if self._knows_regions:
            found |= self._regional.fields({**own, **found}, self._made, where)
        if self._seen is not None:
            found["seen"] = self._seen[self._made % len(self._seen)] if self._seen else found["source"].path
            require_image(found["seen"], where)
        if self._guides is not None:
            control = own.get("control")
            found["guides"] = self._guides.at(self._made, control and Path(control).expanduser(), where)
            for guide in found["guides"]:
                require_image(guide.path, where)
        return found

    def _next_seed(self) -> int:
        """The seed of the image that is made next: --seed for the first, for others what is derived from it."""
        seed = self._opts.seed
        if seed is None:
            return secrets.randbits(32)
        return seed if self._made == 0 else derive(seed, "image", self._made) % 2**32

    def _common_seed(self, place: int) -> int:
        """With --iter_same_seed: the seed of the images of this place among those of a prompt, for all prompts."""
        seed = self._opts.seed
        if seed is None:
            return secrets.randbits(32)
        first = place == 0 and self._iteration == 0
        return seed if first else derive(seed, "iteration", self._iteration, place) % 2**32

    def _random(self, purpose: str, number: int = 0) -> Random:
        """Random numbers for what is no image; without --seed others each time."""
        seed = self._opts.seed
        return Random() if seed is None else Random(derive(seed, purpose, self._iteration, number))
