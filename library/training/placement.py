"""On which device, and in which dtype, the parts of a model are kept during training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from library.errors import UserError
from library.memory.activations import keep_gates_only
from library.memory.low_precision import quantise_to_fp8
from library.memory.norms import keep_dtype, keep_inputs_only, keep_narrow_inputs, keep_no_normed
from library.memory.offload import offloading_checkpoint
from library.memory.selective import selective_checkpoint
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    from library.families.base import Family
    from library.memory.block_swap import BlockSwap
    from library.options.base import Options
    from library.training.sharding import Shards
    from library.types import Models

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def has_trained_weights(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def loading(opts: Options, device: torch.device) -> AbstractContextManager:
    """A context for loading models: with --lowram to `device`, as torch's default device, else to the CPU.

    A model whose blocks are swapped is larger than the device, so it is loaded to the CPU all the same.
    """
    if not opts.memory.lowram:
        return nullcontext()
    if device.type == "cpu":
        LOGGER.warning("--lowram: has no effect on a CPU; the model is in CPU memory anyway")
        return nullcontext()
    if swaps(opts, device):
        LOGGER.warning("--lowram: has no effect with --blocks_to_swap, whose blocks stay in CPU memory")
        return nullcontext()
    return device


def trained_dtype(opts: Options) -> torch.dtype:
    """The dtype of what is trained, and of its gradients."""
    full = opts.memory.full_fp16 or opts.memory.full_bf16
    return WEIGHT_DTYPES[opts.memory.mixed_precision] if full else torch.float32


def place_text_encoders(
    models: Models, opts: Options, device: torch.device, *, grad_text: bool, shards: Shards | None = None
) -> None:
    """Moves text encoders to `device`; frozen ones in the dtype of mixed precision, trained ones in `trained_dtype`.

    Trained ones are sharded over the processes where there are `shards`.
    """
    for encoder in models.text_encoders.values():
        if shards is not None and has_trained_weights(encoder):
            shards.shard(encoder, None, trained_dtype(opts), _compute_dtype(opts))
        else:
            _place(encoder, opts, device, text_encoder_storage(opts))
        if opts.memory.gradient_checkpointing and grad_text:
            encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def place_vae(models: Models, opts: Options, device: torch.device) -> None:
    """Moves the VAE to `device`; in float32 with --no_half_vae and on the CPU, where half precision is slower."""
    if models.vae is not None:
        float32 = opts.model.no_half_vae or device.type == "cpu"
        models.vae.to(device, torch.float32 if float32 else WEIGHT_DTYPES[opts.memory.mixed_precision])


def place_denoiser(models: Models, opts: Options, device: torch.device, *, sharded: bool = False) -> None:
    """Moves the denoiser to `device`, in the dtypes of `place_text_encoders`, with checkpointing as the options say.

    Where blocks are swapped it stays on the CPU, until `swap_blocks`; where it is trained and to be `sharded`, it stays
    as it was read until `shard_denoiser`.
    """
    denoiser = models.denoiser
    if not (sharded and has_trained_weights(denoiser)):
        _place(
            denoiser, opts, device, _storage_format(opts), home=torch.device("cpu") if swaps(opts, device) else device
        )
    if opts.memory.gradient_checkpointing:
        offloads = opts.memory.cpu_offload_checkpointing
        if offloads and device.type == "cpu":
            LOGGER.warning("--cpu_offload_checkpointing: has no effect on a CPU; activations are in CPU memory anyway")
            offloads = False
        ratio = opts.memory.selective_checkpointing
        if ratio:
            checkpoint = selective_checkpoint(ratio)
        else:
            checkpoint = offloading_checkpoint(device) if offloads else None
        denoiser.enable_gradient_checkpointing(checkpoint)


def keep_less(family: Family, models: Models) -> None:
    """Lets the denoiser's norms and gates keep less for the backward pass.

    Norms without weights answer in the dtype of the stream where the family's own code does.
    """
    keep_gates_only(models.denoiser)
    keep_inputs_only(models.denoiser)
    keep_narrow_inputs(models.denoiser)
    if family.traits.norms_keep_dtype:
        keep_dtype(models.denoiser)
        keep_no_normed(models.denoiser)


def swaps(opts: Options, device: torch.device) -> bool:
    """Whether blocks are swapped; on a CPU there is nothing to be gained."""
    return opts.swap.count > 0 and device.type != "cpu"


def swapped_blocks(family: Family, models: Models, opts: Options, device: torch.device) -> int:
    """The number of the denoiser's blocks to swap. Raises: UserError: more than possible."""
    if not swaps(opts, device):
        return 0
    from library.memory.block_swap import NUM_BUFFERS

    each = family.traits.blocks_per_swap
    most = math.floor((len(family.denoiser.blocks(models)) - NUM_BUFFERS) / each)
    if opts.swap.count > most:
        raise UserError(f"--blocks_to_swap: {opts.swap.count} are more than this model can swap; at most {most}")
    return math.ceil(opts.swap.count * each)


def swap_blocks(family: Family, models: Models, opts: Options, device: torch.device) -> BlockSwap | None:
    """Divides the denoiser between `device` and CPU memory; None: it is on `device` as a whole.

    Compile before it, and let the optimizer know it. Raises: UserError: more blocks than can be swapped.
    """
    count = swapped_blocks(family, models, opts, device)
    if not count:
        if opts.swap.count:
            LOGGER.warning("--blocks_to_swap: has no effect on a CPU; the model is in CPU memory anyway")
        return None
    from library.memory.block_swap import BlockSwap

    swap = BlockSwap(family.denoiser.blocks(models), count, device)
    swap.attach()
    models.denoiser.to(device)  # all but the swapped blocks
    return swap


def shard_denoiser(family: Family, models: Models, opts: Options, shards: Shards) -> None:
    """Shards the denoiser over the processes, if it is trained."""
    if has_trained_weights(models.denoiser):
        shards.shard(models.denoiser, family.denoiser.blocks(models), trained_dtype(opts), _compute_dtype(opts))


def _compute_dtype(opts: Options) -> torch.dtype | None:
    """The dtype of gathered weights, and of the computation with them; None: the dtype that they are stored in."""
    return None if opts.memory.mixed_precision == "no" else WEIGHT_DTYPES[opts.memory.mixed_precision]


def text_encoder_storage(opts: Options) -> str | None:
    """The storage format of frozen text encoders, as `--quantize_base` names it; None: not quantised."""
    return None if opts.memory.fp8_base_unet else _storage_format(opts)


def _storage_format(opts: Options) -> str | None:
    """The storage format of frozen weights, as `--quantize_base` names it; None: the dtype of mixed precision."""
    return opts.memory.quantize_base or ("fp8" if opts.memory.fp8_base or opts.memory.fp8_base_unet else None)


def _place(
    part: nn.Module, opts: Options, device: torch.device, storage_format: str | None, home: torch.device | None = None
) -> None:
    """Moves `part` to `home`, by default `device`, on which it is quantised."""
    trained = has_trained_weights(part)
    if storage_format is not None and not trained:
        # Before it is cast or moved, so that it is rounded once, and small when it arrives.
        if storage_format == "fp8":
            layers = quantise_to_fp8(part)
        else:
            from library.memory.quantised import quantise_frozen_to

            layers = quantise_frozen_to(part, storage_format, device)  # a GPU does it many times faster
        LOGGER.info("%s: the weights of %d layers are kept in %s", type(part).__name__, layers, storage_format)
    dtype = trained_dtype(opts) if trained else WEIGHT_DTYPES[opts.memory.mixed_precision]
    part.to(home or device, dtype)


def place_trained(trained: nn.Module, opts: Options, device: torch.device, shards: Shards | None = None) -> None:
    """Moves what is trained beside the model to `device`, in `trained_dtype`; sharded where there are `shards`.

    Buffers, such as alphas, keep their dtype.
    """
    if shards is not None:
        shards.shard(trained, None, trained_dtype(opts), _compute_dtype(opts))
        return
    trained.to(device)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(trained_dtype(opts))


def training_modes(models: Models, trained: nn.Module, *, grad_text: bool) -> None:
    """Train mode where it matters: what is trained, and what recomputes its activations, which asks for it."""
    models.denoiser.train()
    for encoder in models.text_encoders.values():
        encoder.train(grad_text)
    trained.train()


def release_text_encoders(models: Models, *, keep: Iterable[str]) -> None:
    """Drops the text encoders that are not in `keep`: their outputs are cached."""
    for name in set(models.text_encoders) - set(keep):
        del models.text_encoders[name]
    _empty_cache()


def offload(part: nn.Module | None, opts: Options) -> None:
    """Moves a part to the CPU that is needed only for sample images now; --highvram keeps it on the device."""
    if part is not None and not opts.memory.highvram:
        part.to("cpu")
        _empty_cache()


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
