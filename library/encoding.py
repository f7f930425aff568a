"""What is encoded once, before training: latents and text-encoder outputs, with the parts of a run that do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

from library.errors import UserError
from library.runtime import logs

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from library.caching.encode_missing import Encoder, OnError
    from library.data.sample.dataset import TrainingData
    from library.data.types import PromptedData
    from library.families.base import Family
    from library.methods.base import Method
    from library.options.base import Options
    from library.types import CacheLayout, FamilyTraits, Models, TextCond


def latent_cache(opts: Options, family: Family, models: Models, data: TrainingData) -> Callable[[Encoder], None] | None:
    """A function that caches the latents with a given encoder; None: images are encoded in every step.

    Metadata data sets whose latents all lie beside the images use them without being asked to: preparing them is
    what they were prepared for.
    """
    from library.caching import latents
    from library.checkpoints.hashes import weights_fingerprint

    if not opts.data.of_images:
        return None
    place = latent_place(opts, family.traits, data)
    if place is None:
        return None
    options, layout, records, on_disk = opts.data, latent_layout(family.traits), data.all_records, place == "disk"
    vae = weights_fingerprint(models.vae) if on_disk else ""  # before the weights are placed and cast

    def fill(encoder: Encoder) -> None:
        if on_disk:
            check = not options.skip_cache_check
            entries = latents.cache_on_disk(records, data.index, encoder, layout, vae, check=check).entries
        else:
            entries = latents.cache_in_memory(records, encoder, layout)
        data.set_latents(entries, in_memory=not on_disk)

    return fill


def latent_place(opts: Options, traits: FamilyTraits, data: TrainingData) -> Literal["memory", "disk"] | None:
    """Where latents are cached; None: nowhere."""
    from library.caching import latents

    options, records = opts.data, data.all_records
    if options.cache_latents_to_disk or any(not record.present for record in records):
        return "disk"
    if options.cache_latents:
        return "memory"
    prepared = data.is_prepared()
    found = prepared and next(latents.without_files(records, data.index, latent_layout(traits)), None) is None
    return "disk" if found else None


def latent_layout(traits: FamilyTraits) -> CacheLayout:
    """The layout of a family's latent files."""
    from library.types import CacheLayout

    return CacheLayout(traits.cache_suffix, traits.latent_channels, traits.cache_keys_by_size)


def latent_encoder(opts: Options, family: Family, models: Models, accelerator: Accelerator) -> Encoder:
    import torch

    from library.caching.encode_missing import Encoder
    from library.runtime.processes import Processes

    @torch.no_grad()
    def encode(pixels: torch.Tensor, rngs: list[torch.Generator]) -> torch.Tensor:
        return family.latents.encode(models, pixels.to(accelerator.device), generator=rngs)

    bar = partial(logs.progress, disable=not accelerator.is_main_process)
    processes = Processes(accelerator.process_index, accelerator.num_processes)
    return Encoder(encode, opts.data.vae_batch_size, opts.training.seed, processes, bar)


def require_texts(opts: Options, family: Family, missing: Sequence[str], data: TrainingData, *, samples: bool) -> None:
    """Finds out whether a run can do without text encoders.

    Args:
        missing: a line for each text encoder that is not given.
        samples: whether sample prompts have to be encoded.
    Raises: UserError: they are missing, and not everything that is to be encoded is in cache files.
    """
    if not missing:
        return
    if samples:
        raise UserError(*missing, hint="--sample_prompts have to be encoded even where captions need not be")
    if not opts.data.of_images:
        raise UserError(*missing, hint="prompts are encoded at the start of each run")
    from library.caching import text

    requests, layout = text.requests_of(data.all_records), family.text.layout()
    assert layout is not None, "a family that does without encoders has such files"
    lacking = text.invalid_files(requests, layout, check=not opts.data.skip_cache_check)
    for file, why in lacking.items():
        more = f" and {len(lacking) - 1} more files" if len(lacking) > 1 else ""
        raise UserError(*(f"{line}: {file} would have to be made ({why}){more}" for line in missing))


def text_made_by(opts: Options, family: Family, method: Method, models: Models) -> dict[str, str]:
    """What decides the text encoders' outputs beside the captions, by name: weights, what changes them, settings."""
    from library.checkpoints.hashes import weights_fingerprint
    from library.training import placement

    # The weights as read are at hand, those that encode may be smaller. Outputs of fp8 are shared with exact ones.
    stored = placement.text_encoder_storage(opts)
    rounded = f" in {stored}" if stored not in (None, "fp8") else ""
    made_by = {part: weights_fingerprint(module) + rounded for part, module in sorted(models.text_encoders.items())}
    # What changes an encoder is part of its own fingerprint, so that runs without it do not take these outputs.
    for part, change in method.text_fingerprint().items():
        made_by[part] = f"{made_by.get(part, '')} with {change}"
    layout = family.text.layout(models)
    assert layout is not None, "a family with these options has such files"
    return made_by | {name: str(value) for name, value in sorted(layout.settings.items())}


def caches_text(opts: Options, family: Family, method: Method) -> bool:
    """Whether the text encoders' outputs are cached. Raises: UserError: none of them stay as they are."""
    if not opts.text_cache.in_use:
        return False
    if set(family.traits.text_encoders) <= set(method.live_text_encoders()):
        raise UserError(
            "--cache_text_encoder_outputs: every text encoder is trained, so nothing can be cached; drop this option, "
            "or train the denoiser alone"
        )
    return True


def text_cache(
    opts: Options,
    family: Family,
    method: Method,
    models: Models,
    data: TrainingData,
    on_error: OnError | None = None,
) -> Callable[[Accelerator], None] | None:
    """A function that caches the text encoders' outputs; None: captions are encoded in every step.

    Args:
        on_error: see `text.cache_on_disk`.
    Raises: UserError: no text encoder's outputs stay as they are.
    """
    if not opts.data.of_images:
        return partial(_encode_prompts, family, models, data)
    options = opts.text_cache
    if not caches_text(opts, family, method):
        return None
    layout = family.text.layout(models)
    assert layout is not None, "a family with these options has such files"
    made_by = text_made_by(opts, family, method, models)

    def fill(accelerator: Accelerator) -> None:
        from library.caching import text

        requests = text.requests_of(data.all_records)
        encoder = text_encoder(opts, family, models, accelerator)
        if not options.cache_text_encoder_outputs_to_disk:
            data.set_text(text.cache_in_memory(requests, encoder))
            return
        check, skip = not opts.data.skip_cache_check, method.live_text_encoders()
        data.set_text(
            text.cache_on_disk(requests, layout, encoder, made_by, skip_encoders=skip, check=check, on_error=on_error)
        )

    return fill


def text_encoder(opts: Options, family: Family, models: Models, accelerator: Accelerator) -> Encoder:
    from library.caching.encode_missing import Encoder
    from library.runtime.processes import Processes

    def encode(captions: list[str]) -> TextCond:
        with accelerator.autocast():
            return family.text.encode(models, captions)

    return Encoder(
        encode,
        opts.text_cache.text_encoder_batch_size or opts.data.train_batch_size,
        processes=Processes(accelerator.process_index, accelerator.num_processes),
        progress=partial(logs.progress, disable=not accelerator.is_main_process),
    )


class Caches:
    """What a run caches before training, as `latent_cache` and `text_cache` do it."""

    def latents(
        self, opts: Options, family: Family, models: Models, data: TrainingData
    ) -> Callable[[Encoder], None] | None:
        """See `latent_cache`."""
        return latent_cache(opts, family, models, data)

    def text(
        self, opts: Options, family: Family, method: Method, models: Models, data: TrainingData
    ) -> Callable[[Accelerator], None] | None:
        """See `text_cache`."""
        return text_cache(opts, family, method, models, data)


def _encode_prompts(family: Family, models: Models, data: PromptedData, accelerator: Accelerator) -> None:
    """Gives data without images the conditioning of its prompts, each for one item, on the CPU."""
    import torch

    with torch.no_grad(), accelerator.autocast():
        data.set_texts(
            {text: family.text.encode(models, [text]).map(lambda tensor: tensor.cpu()) for text in data.texts}
        )
