"""Sample images while training: when they are due, and their files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from library.data.sample.inpainting_masks import wobbly_ellipse
from library.errors import UserError
from library.inference.control_images import with_control
from library.inference.images import png_text, save_png
from library.inference.placement import evaluating, on_device
from library.inference.prompts import FLOW_SAMPLER, SamplePrompt, flow_sampler_note, load_prompts
from library.inference.source_images import with_source
from library.options.saving import sample_place
from library.runtime.durable import fitting
from library.runtime.limits import exhausted
from library.runtime.logs import LOGGER
from library.runtime.seeds import derive
from library.types import Size

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import nn

    from library.families.base import Family
    from library.options.base import Options
    from library.types import Denoise, Models, TextCond


class PreviewImage(NamedTuple):
    prompt: SamplePrompt  # with the seed that was used
    path: Path
    image: Image


class Preview:
    """The run's sample images. Only one process of a run should render.

    Args:
        opts: reads the groups sampling, saving, training, memory, model and noise.
        prompts: the images of one occasion, see `load_prompts`.
    """

    def __init__(self, opts: Options, family: Family, prompts: Sequence[SamplePrompt]):
        self.opts, self.family, self.prompts = opts, family, list(prompts)
        self._cached: dict[str, TextCond] | None = None
        self.at_first: bool = opts.sampling.sample_at_first
        self.every_n_steps = opts.sampling.sample_every_n_steps
        self.every_n_epochs = opts.sampling.sample_every_n_epochs

    @classmethod
    def from_options(cls, opts: Options, family: Family, *, takes_control: bool = False) -> Preview:
        """Reads --sample_prompts; without that option, or any occasion for images, the preview is never due.

        Args: takes_control: whether what is trained reads control images, those of --cn.
        Raises: UserError: a bad prompt file, or a control image that cannot be read.
        """
        sampling = opts.sampling
        prompts = []
        if sampling.draws:
            chosen = sampling.sample_sampler
            unused = family.traits.objective == "flow" and chosen.removeprefix("k_") != FLOW_SAMPLER
            if unused and "sample_sampler" in opts.explicit:
                LOGGER.warning(f"--sample_sampler {chosen} has no effect: {flow_sampler_note(family.traits)}")
            file = sampling.sample_prompts
            prompts = load_prompts(file, family.traits, sampling.sample_sampler)
            given = sum(prompt.control is not None for prompt in prompts)
            if takes_control:
                if given < len(prompts):
                    LOGGER.warning(
                        "%s: %d of %d prompts have no --cn; they show the base model alone",
                        *(file, len(prompts) - given, len(prompts)),
                    )
                prompts = [with_control(prompt) for prompt in prompts]
            elif given:
                LOGGER.warning("%s: --cn (controlnet_image) has no effect, as no ControlNet is trained here", file)
                prompts = [replace(prompt, control=None) for prompt in prompts]
            if opts.method.network_module is None and any(prompt.multipliers for prompt in prompts):
                what = "--am (additional_network_multiplier) has no effect, as no network is trained here"
                LOGGER.warning("%s: %s", file, what)
                prompts = [replace(prompt, multipliers=None) for prompt in prompts]
            prompts = _with_sources(prompts, file, inpaints=opts.data.train_inpainting)
        return cls(opts, family, prompts)

    def due(self, step: int, epoch_end: int | None = None) -> bool:
        """Whether to render sample images now.

        Args:
            step: optimizer steps done; 0 means before the first.
            epoch_end: the epoch (from 1) that has just ended, None within epochs. An epoch's last step is asked about
                twice, once as a step and once as an epoch's end.
        """
        if not self.prompts:
            return False
        if step == 0:
            return self.at_first and epoch_end is None
        if self.every_n_epochs is not None:  # overrides steps
            return epoch_end is not None and epoch_end % self.every_n_epochs == 0
        return self.every_n_steps is not None and epoch_end is None and step % self.every_n_steps == 0

    def encode_prompts(self, models: Models, device: torch.device) -> None:
        """Encodes all prompts now, so that text encoders which are not trained may go."""
        from library.inference.generate import encode_texts

        if self.prompts:
            dtype = _mixed_precision(self.opts.memory.mixed_precision)
            self._cached = encode_texts(self.family, models, self.prompts, dtype, device)

    def render(
        self,
        models: Models,
        step: int,
        epoch: int | None,
        *,
        dtype: torch.dtype | None = None,
        denoise: Denoise | None = None,
        trained: nn.Module | None = None,
        device: torch.device | None = None,
        set_strength: Callable[[float], None] | None = None,
        write: bool = True,
    ) -> list[PreviewImage]:
        """Makes and writes the images, and leaves models, modes, devices and random state as they were.

        Args:
            models: text encoders and VAE come to the denoiser's device for the time being.
            epoch: names the files by epoch; None names them by step.
            dtype: computing precision; None takes --mixed_precision.
            denoise: computes the prediction; None: the family's denoiser alone.
            trained: what is trained beside the models (a network), to be in evaluation mode as well.
            device: where to compute; None: where the denoiser is.
            set_strength: sets the strength of what is trained, to that of each prompt's --am, and to 1 in the end.
            write: without it nothing is written: this process is only needed for the others' work.
        Raises: UserError: the folder cannot be written to.
        """
        from library.inference.generate import generate, total_steps
        from library.runtime.logs import progress

        prompts = [self._seeded(prompt, step, index) for index, prompt in enumerate(self.prompts)]
        device = device or next(models.denoiser.parameters()).device
        assert models.vae is not None, "sample images need the VAE: keep it when --sample_prompts is given"
        helpers = [*models.text_encoders.values(), models.vae]
        modules = [models.denoiser, *helpers, *([] if trained is None else [trained])]
        try:
            with (
                evaluating(modules),
                on_device(helpers, device),
                progress(total_steps(prompts), "sample images", unit="steps", leave=False) as bar,
            ):
                images = []
                for strength, group in groupby(prompts, key=_strength):
                    if set_strength is not None:
                        set_strength(strength)
                    images += generate(
                        self.family,
                        models,
                        list(group),
                        device,
                        dtype or _mixed_precision(self.opts.memory.mixed_precision),
                        vae_float32=self.opts.model.no_half_vae,
                        zero_terminal_snr=self.opts.noise.zero_terminal_snr,
                        cached=self._cached,
                        denoise=denoise,
                        progress=bar.update,
                    )
        except (MemoryError, RuntimeError) as error:
            memory = exhausted(error)
            if memory is None:
                raise
            LOGGER.warning("no sample images: not enough %s; choose smaller ones in --sample_prompts", memory)
            return []
        finally:
            if set_strength is not None:
                set_strength(1.0)
        return self._write(prompts, images, step, epoch) if write else []

    def _write(
        self, prompts: Sequence[SamplePrompt], images: Sequence[Image], step: int, epoch: int | None
    ) -> list[PreviewImage]:
        now = time.strftime("%Y%m%d%H%M%S")
        made = []
        for index, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
            path = self._path(step, epoch, index, now)
            try:
                save_png(image, path, png_text(prompt))
            except OSError as error:
                raise UserError(f"{path}: cannot write the sample image ({error.strerror})") from error
            made.append(PreviewImage(prompt, path, image))
        return made

    def _path(self, step: int, epoch: int | None, index: int, now: str) -> Path:
        """The path of an image; a name that is too long is shortened."""
        folder, start = sample_place(self.opts.saving)
        moment = f"{step:06d}" if epoch is None else f"e{epoch:06d}"
        seed = self.prompts[index].seed
        end = "" if seed is None else f"_{seed}"
        return folder / fitting(start, f"{moment}_{index:02d}_{now}{end}.png")

    def _seeded(self, prompt: SamplePrompt, step: int, index: int) -> SamplePrompt:
        """A prompt without a seed looks different every time, yet the same when a run is repeated or resumed.

        The seed decides the mask too, where a part of a source is drawn again.
        """
        if prompt.seed is None:
            prompt = replace(prompt, seed=derive(self.opts.training.seed or 0, "preview", step, index) % 2**32)
        if prompt.source is None:
            return prompt
        mask = wobbly_ellipse(Size(prompt.width, prompt.height), prompt.seed)
        return replace(prompt, source=replace(prompt.source, mask_pixels=mask.astype("uint8") * 255))


def _with_sources(prompts: Sequence[SamplePrompt], file: Path | str, *, inpaints: bool) -> list[SamplePrompt]:
    """The prompts with their sources read, where the model is one for inpainting; without sources elsewhere.

    A source that cannot be read is left out, with a warning.
    """
    given = sum(prompt.source is not None for prompt in prompts)
    if not inpaints:
        if given:
            LOGGER.warning("%s: --i (image) has no effect without --train_inpainting", file)
        return [replace(prompt, source=None) for prompt in prompts]
    read = []
    for prompt in prompts:
        try:
            read.append(with_source(replace(prompt, strength=1.0)))
        except UserError as error:
            LOGGER.warning("%s: --i %s; the sample is drawn without it", file, error)
            read.append(replace(prompt, source=None))
    if given < len(prompts):
        LOGGER.warning(
            "%s: %d of %d prompts have no --i (image); their samples are drawn as a whole, as of an image that is "
            "masked everywhere",
            *(file, len(prompts) - given, len(prompts)),
        )
    return read


def _strength(prompt: SamplePrompt) -> float:
    """The first multiplier of --am, which is that of the network that is trained."""
    return prompt.multipliers[0] if prompt.multipliers else 1.0


def _mixed_precision(name: str | None) -> torch.dtype:
    import torch

    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(name or "no", torch.float32)
