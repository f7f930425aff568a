"""What is encoded once, before training: latents and text-encoder outputs, with the parts of a run that do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.runtime import logs
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from library.caching.latent_files import CacheLayout
    from library.families.base import Family, FamilyTraits
    from library.methods.base import Method
    from library.options.base import Options
    from library.types import TextCond


def latent_cache(opts: Options, family: Family, models: Any, data: Any) -> Any:
    """What caches the latents once it is given an encoder; None: images are encoded whenever they come up.

    Metadata data sets whose latents all lie beside the images use them without being asked to: preparing them is
    what they were prepared for.
    """
    from library.caching import latents
    from library.checkpoints.hashes import weights_fingerprint

    options, layout = opts.data, latent_layout(family.traits)
    on_disk = options.cache_latents_to_disk or any(not record.present for record in data.all_records)
    if not on_disk and not options.cache_latents and data.is_prepared():
        on_disk = latents.files_are_there(data, layout)
    if on_disk:
        vae = weights_fingerprint(models.vae)
        check = not options.skip_cache_check
        return partial(latents.cache_on_disk, data, layout=layout, vae=vae, check=check)
    return partial(latents.cache_in_memory, data) if options.cache_latents else None


def latent_layout(traits: FamilyTraits) -> CacheLayout:
    """How a family's files of latents look."""
    from library.caching.latent_files import CacheLayout

    return CacheLayout(traits.cache_suffix, traits.latent_channels, traits.cache_keys_by_size)


def latent_encoder(opts: Options, family: Family, models: Any, accelerator: Accelerator) -> Any:
    import torch

    from library.caching.latents import Encoder
    from library.runtime.processes import Processes

    @torch.no_grad()
    def encode(pixels: torch.Tensor, rngs: list[torch.Generator]) -> torch.Tensor:
        return family.encode_images(models, pixels.to(accelerator.device), generator=rngs)

    bar = partial(logs.progress, disable=not accelerator.is_main_process)
    processes = Processes(accelerator.process_index, accelerator.num_processes)
    return Encoder(encode, opts.data.vae_batch_size, opts.training.seed, processes, bar)


def require_texts(opts: Options, family: Family, missing: Sequence[str], data: Any, *, samples: bool) -> None:
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
    from library.caching import text_outputs

    items, layout = text_outputs.items_of(data.all_records), family.text_layout()
    assert layout is not None, "a family that does without encoders has such files"
    lacking = text_outputs.unusable_files(items, layout, check=not opts.data.skip_cache_check)
    for file, why in lacking.items():
        more = f" and {len(lacking) - 1} more files" if len(lacking) > 1 else ""
        raise UserError(*(f"{line}: {file} would have to be made ({why}){more}" for line in missing))


def text_cache(
    opts: Options,
    family: Family,
    method: Method,
    models: Any,
    data: Any,
    failed: Callable[[Path, str], None] | None = None,
) -> Any:
    """What caches the text encoders' outputs once they are in place; None: captions are encoded as they come up.

    Args:
        failed: see `text_outputs.cache_text_on_disk`.
    Raises: UserError: no text encoder's outputs stay as they are.
    """
    options = getattr(opts, "text_cache", None)
    if options is None or not options.in_use:
        return None
    from library.checkpoints.hashes import weights_fingerprint
    from library.training import placement

    if set(family.traits.text_encoders) <= set(method.working_text_encoders()):
        raise UserError(
            "--cache_text_encoder_outputs: every text encoder is trained, so nothing can be cached; drop this option, "
            "or train the denoiser alone"
        )
    layout = family.text_layout()
    assert layout is not None, "a family with these options has such files"
    # The weights as read are at hand, those that encode may be smaller. Outputs of fp8 are shared with exact ones.
    form = placement.text_encoder_form(opts)
    made_by = f" in {form}" if form not in (None, "fp8") else ""
    encoder = {part: weights_fingerprint(module) + made_by for part, module in sorted(models.text_encoders.items())}
    encoder |= method.text_fingerprint()
    encoder |= {name: str(value) for name, value in sorted(layout.settings.items())}
    return partial(_cache_text, opts, family, method, models, data, layout, encoder, failed)


def _cache_text(
    opts: Options,
    family: Family,
    method: Method,
    models: Any,
    data: Any,
    layout: Any,
    encoder: dict[str, str],
    failed: Callable[[Path, str], None] | None,
    accelerator: Accelerator,
) -> None:
    from library.caching import text_outputs
    from library.runtime.processes import Processes

    def encode(captions: list[str]) -> TextCond:
        with accelerator.autocast():
            return family.encode_text(models, captions)

    items = text_outputs.items_of(data.all_records)
    batch_size = opts.text_cache.text_encoder_batch_size or opts.data.train_batch_size
    bar = partial(logs.progress, disable=not accelerator.is_main_process)
    processes = Processes(accelerator.process_index, accelerator.num_processes)
    if not opts.text_cache.cache_text_encoder_outputs_to_disk:
        data.set_text(text_outputs.cache_text_in_memory(items, encode, batch_size, bar, processes))
        return
    _, reasons = text_outputs.cache_text_on_disk(
        items,
        layout,
        encode,
        encoder,
        batch_size,
        unread=method.working_text_encoders(),
        rank=processes.rank,
        world=processes.world,
        check=not opts.data.skip_cache_check,
        failed=failed,
        progress=bar,
    )
    for reason in reasons:
        LOGGER.warning("%s", reason)
    processes.wait()
    data.set_text(text_outputs.disk_store(items, layout))
