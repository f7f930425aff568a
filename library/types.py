"""The records that pass between data, families, methods, objectives and the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from library.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


# What the images of `conditioning_data_dir` are to a method: weights of the loss, or what a ControlNet reads.
ImageRole = Literal["mask", "control"]


class Size(NamedTuple):
    """Pixels, always (width, height). Tensors are (..., height, width)."""

    width: int
    height: int


@dataclass(frozen=True)
class TextCond:
    """The text conditioning of a denoiser, by the family's own names; the batch is every tensor's first axis.

    It is also what text-encoder-output caches hold.
    """

    tensors: dict[str, Tensor]

    def map(self, change: Callable[[Tensor], Tensor]) -> TextCond:
        return TextCond({name: change(value) for name, value in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence[TextCond]) -> TextCond:
        import torch

        return TextCond({name: torch.cat([p.tensors[name] for p in parts]) for name in parts[0].tensors})

    @staticmethod
    def stack(rows: Sequence[Mapping[str, Tensor]]) -> TextCond:
        """Single items' tensors, without batch axis, to a batch. Raises: UserError: shapes of one name differ."""
        import torch

        for name in rows[0]:
            shapes = list(dict.fromkeys(tuple(row[name].shape) for row in rows))
            if len(shapes) > 1:
                raise UserError(
                    f"cached text encoder outputs of one batch differ in shape: {name} has "
                    f"{' and '.join('x'.join(map(str, shape)) for shape in shapes)}; delete the cache files that were "
                    "made with other settings, or use a batch size of 1"
                )
        return TextCond({name: torch.stack([row[name] for row in rows]) for name in rows[0]})


@dataclass(frozen=True)
class Batch:
    """B items of one bucket, ready for a training step."""

    captions: list[str]
    latents: Tensor | None  # (B, C, H/s, W/s) as caches hold them, see `Latents.encode`; None: encode `pixels`
    pixels: Tensor | None  # (B, 3, H, W) in [-1, 1], or None where latents are cached and nothing else is made of them
    loss_weights: Tensor  # (B,); prior_loss_weight for regularisation images, else 1
    masks: Tensor | None  # (B, 1, H, W) in [0, 1] at the image's or the latents' size, or None: everything counts
    original_sizes: Tensor  # (B, 2) int, (width, height) of the images on disk
    crop_top_lefts: Tensor  # (B, 2) int, (top, left) as formats record it (crop_ltrb)
    target_sizes: Tensor  # (B, 2) int, (width, height) of the bucket
    text: TextCond | None = None  # cached text-encoder outputs
    keys: list[str] = field(default_factory=list)  # the images' paths, for messages
    network_multiplier: float = 1.0  # strength of a trained network for this batch
    attributes: list[Mapping[str, Any] | None] = field(default_factory=list)  # custom_attributes of the dataset config
    guidance: float | None = None  # value fed to distilled models; None: the one of the options
    control: Tensor | None = None  # (B, 3, H, W) in [0, 1], RGB: what a ControlNet reads, cropped as the images are
    inpainting_masks: Tensor | None = (
        None  # (B, 1, H, W), 1 where a model for inpainting draws, 0 where it sees the image
    )
    # (B, 1 + C, H/s, W/s), what models for inpainting read behind noisy latents: the mask, 1 where something is to be
    # drawn, and the latents of the masked image as the denoiser sees them.
    inpainting: Tensor | None = None
    timestep_offsets: Tensor | None = None  # (B,), added to the normal numbers that times are made of; None: nothing is
    control_latents: Tensor | None = None  # (B, C, H/s, W/s): what the denoiser itself reads of a control image

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with `change` applied to every tensor."""

        def apply(value: Any) -> Any:
            if isinstance(value, TextCond):
                return value.map(change)
            return change(value) if hasattr(value, "dtype") else value

        return replace(self, **{name: apply(value) for name, value in vars(self).items()})

    def repeated(self, times: int) -> Batch:
        """The same items, all of them `times` times over."""
        lists = {"captions": self.captions, "keys": self.keys, "attributes": self.attributes}
        again = {name: items * times for name, items in lists.items()}
        return replace(self.map(lambda tensor: repeated(tensor, times)), **again)

    def to(self, device: torch.device | str) -> Batch:
        """Moves every tensor without waiting for it."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Pins every tensor, so that `to` need not wait for pageable memory. Called by DataLoader."""
        return self.map(lambda tensor: tensor.pin_memory())


def repeated(tensor: Tensor, times: int) -> Tensor:
    """(B, ...) to (times * B, ...): all items, then all of them again."""
    return tensor.repeat(times, *[1] * (tensor.ndim - 1))


# Noisy latents (B, C, h, w), timesteps (B,) in the family's own units, conditioning and batch to the prediction, shaped
# like the noisy latents. A method makes it (`Method.denoise`); steps, validation and sample images call the same one.
Denoise = Callable[["Tensor", "Tensor", TextCond, Batch], "Tensor"]


# A batch and the source of all randomness (on the batch's device) to noisy latents, times, and what the prediction is
# compared with. A method that trains without images makes it (`MethodSpec.draw`).
Draw = Callable[[Batch, "torch.Generator"], "NoiseDraw"]


# What a ControlNet adds to the denoiser's hidden states, in the family's own order and shapes.
Residuals = tuple["Tensor", ...]


@dataclass(frozen=True)
class NoiseDraw:
    """One draw of noise and time for a batch of clean latents."""

    noisy: Tensor  # (B, C, h, w)
    timesteps: Tensor  # (B,), in the family's own units (DDPM: integers 0..999)
    target: Tensor  # (B, C, h, w), what the prediction is compared with
    noise: Tensor  # (B, C, h, w)

    @staticmethod
    def cat(draws: Sequence[NoiseDraw]) -> NoiseDraw:
        """Several draws as one for all of their items."""
        import torch

        names = ("noisy", "timesteps", "target", "noise")
        return NoiseDraw(**{name: torch.cat([getattr(draw, name) for draw in draws]) for name in names})


@dataclass
class Models:
    """The parts of a loaded model. `source` is the family's own note of what it must remember in order to save.

    Its `save_as` is the `save_as` of `Writer.save` that gives the kind of file or folder that was read.
    """

    denoiser: nn.Module
    text_encoders: dict[str, nn.Module]  # keys are FamilyTraits.text_encoders
    tokenizers: dict[str, Any]
    vae: nn.Module | None
    source: Any = None
    inpaints: bool = False  # whether the denoiser reads `Batch.inpainting` beside noisy latents
    longest_side: int | None = None  # pixels of the largest images that the denoiser takes; None: any

    def freeze(self) -> None:
        """Nothing of the model is trained."""
        for module in (self.denoiser, self.vae, *self.text_encoders.values()):
            if module is not None:
                module.requires_grad_(False)


@dataclass(frozen=True)
class FilePlace:
    """The place of a layer in the original model, whose structure is that of files, and not always of live models."""

    path: str  # e.g. "double_blocks.0.img_attn.qkv"
    classes: tuple[tuple[str, str], ...] = ()  # (path, class name) of what contains it, in the original's code


@dataclass(frozen=True)
class LoraTarget:
    """One entry of a LoRA file and the live modules it covers.

    Several modules mean one fused layer in the public format: they share the down matrix, the up matrix is cut by rows.
    """

    key: str  # e.g. "lora_unet_down_blocks_0_attentions_0_proj_in"
    part: str  # "denoiser", or the name of a text encoder
    modules: tuple[str, ...]  # paths inside that part, as torch's get_submodule takes them
    conv_only: bool = False  # a target only of networks that also train convolutions (resnets, samplers)
    block: int | None = None  # index for block-wise ranks and rates; None: belongs to no block
    swap_halves: bool = False  # the file has the two halves of the output rows the other way round than the module
    alias: str | None = None  # another key under which files may have it
    optional: bool = False  # a target only where a file has it, or arguments ask for it by name
    from_file: bool = False  # `optional`, and no argument asks for it
    norm: bool = False  # a norm, which few types of networks adapt
    grows: bool = False  # files may have more inputs than the live module: it reads a control image with them
    place: FilePlace | None = None  # where the live model is not laid out as files are


@dataclass(frozen=True)
class BlockLayout:
    """The number of blocks of a U-Net for block-wise lists. `edge` blocks at the start and at the end are fixed."""

    down: int
    mid: int
    up: int
    edge: int = 0

    @property
    def total(self) -> int:
        return self.down + self.mid + self.up + 2 * self.edge


@dataclass(frozen=True)
class FamilyTraits:
    """Numbers and words that code outside the family may need. Never ask for `label` to decide anything."""

    label: str  # for messages, e.g. "Stable Diffusion 1.x/2.x"
    text_encoders: tuple[str, ...]  # names of the parts, and LoRA prefixes: ("te",), ("te1", "te2"), ("te1", "te3")
    latent_channels: int
    pixel_multiple: int  # sides of images are floored to this
    bucket_step: int  # bucket sizes must be multiples of this
    objective: Literal["ddpm", "flow"]
    cache_suffix: str  # of latent cache files, e.g. "_sd.npz"
    default_resolution: int  # pixels; side of sample images when nothing is said
    sample_steps: int
    sample_scale: float
    # Sides of sample images in training are floored to this, and at least this; None: `pixel_multiple`, and 64 pixels.
    sample_multiple: int | None = None
    latent_stride: int = 8  # pixels per latent position, each way
    cache_keys_by_size: bool = False  # no trainer wrote latent files without the size of the latents in the names
    # By text encoder: the name of its vectors in files of Textual Inversion embeddings.
    embedding_keys: Mapping[str, str] = field(default_factory=dict)
    block_layout: BlockLayout | None = None  # how block-wise lists of networks are divided; None: there are no such
    text_regions: bool = False  # whether parts of a text can be read by parts of an image, see `Family.text_layers`
    pooled_by_image: bool = False  # whether an image, as CLIP sees it, can stand for the text as a whole
    hypernetworks: bool = False  # whether image programs load hypernetworks for such models
    blocks_per_swap: float = 1.0  # that --blocks_to_swap counts as one
    extra_graphs: int = 0  # kinds of blocks whose first one gets its inputs laid out otherwise than those after it
    tokens_in_a_row: bool = False  # blocks see how many latents there are, and not in how many rows and columns
    inpaints: bool = False  # whether there are models for inpainting, see `Models.inpaints`
    norms_keep_dtype: bool = False  # the authors' code computes layer norms in the dtype of the stream, not in float32
    # Flow models: (height, width) of the latents -> s; sampling takes sigma' = s sigma / (1 + (s - 1) sigma).
    flow_shift: Callable[[int, int], float] | None = None


@dataclass(frozen=True)
class CacheLayout:
    """The names and contents of a family's files of cached latents."""

    suffix: str  # of file names, e.g. "_sd.npz"
    channels: int  # of the latents
    keys_by_size: bool  # array names always end in the size of the latents; else those of old files may not
    as_prepared: bool = False  # new files are named as preparing by metadata file has always named them
    stride: int = 8  # pixels per position of the latents


@dataclass(frozen=True)
class TextLayout:
    """The names and contents of a family's files of cached text-encoder outputs.

    Arrays are named as the tensors of its TextCond, one row each, without batch axis.
    """

    suffix: str  # of file names, e.g. "_te_outputs.npz"
    keys: tuple[str, ...]
    flags: Mapping[str, bool] = field(default_factory=dict)  # 0-dim bool arrays that say how the rows were made
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of keys whose rows all have one shape
    settings: Mapping[str, Any] = field(default_factory=dict)  # what, beside the weights, decides what encoders give
    reject_foreign: str | None = None  # why files of earlier trainers are of no use; None: they may be
