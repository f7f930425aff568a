"""A loaded model that images are generated with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from library.checkpoints.sizes import with_size
from library.errors import UserError
from library.generation.control import GuidedNets, load_control_nets
from library.generation.networks import Networks, attach_rest, check_files, merge_first
from library.generation.regions import Regions
from library.generation.vision import Vision, load_vision
from library.generation.words import add_words_by_place, read_words
from library.inference.regions import Reading, Text, read_masks, words_of
from library.memory.attention import set_attention
from library.methods.xti import read_by_place
from library.runtime.logs import LOGGER
from library.training import placement
from library.types import TextCond

if TYPE_CHECKING:
    from torch import nn

    from library.families.base import Family
    from library.families.spec import FamilySpec
    from library.inference.prompts import SamplePrompt
    from library.options.base import Options
    from library.types import Denoise, Models

_MOST_TEXTS = 4096  # whose conditioning is kept, on the CPU


@dataclass
class Model:
    """A family's model on its device, with the networks and words of the options."""

    family: Family
    models: Models
    training: Options  # as the family's parts see them
    device: torch.device
    dtype: torch.dtype
    networks: Networks
    control: GuidedNets | None = None
    offload: bool = False  # only what computes is on the device
    second_text: str | None = None  # what all text encoders but the first read in place of prompts
    vision: Vision | None = None  # what sees images in place of pooled texts
    _texts: dict[tuple[Text, tuple[float, ...]], TextCond] = field(default_factory=dict)
    _regions: Regions | None = None

    @property
    def denoise(self) -> Denoise:
        predict = partial(self.family.denoiser.predict, self.models)
        if self._regions is not None:
            predict = self._regions.predict
        return predict if self.control is None else partial(self.control.denoise, predict)

    def confine_networks(self) -> Regions:
        """Prepares for prompts of several regions, once. Raises: UserError: they are not possible."""
        if self._regions is None:
            self._regions = Regions(self.family, self.models, self.networks.attached())
        return self._regions

    @contextmanager
    def in_regions_of(self, prompt: SamplePrompt) -> Iterator[None]:
        """Within it, parts of prompts and networks act where the prompt says. Raises: UserError: not possible."""
        if prompt.regions is None:
            yield
            return
        masks = read_masks(prompt.regions, len(prompt.parts), self.device)
        with self.confine_networks().use(masks):
            yield

    @property
    def without_texts(self) -> Models:
        """The models as they are for those who have the conditioning of texts."""
        return replace(self.models, text_encoders={})

    @torch.no_grad()
    def conditioning(self, texts: Sequence[Text]) -> dict[Text, TextCond]:
        """The conditioning of each text with the networks as they are, or as it says, encoded once."""
        strengths = self.networks.strengths
        wanted = dict.fromkeys(texts)
        missing = [text for text in wanted if (text, strengths) not in self._texts]
        if len(self._texts) + len(missing) > _MOST_TEXTS:
            self._texts.clear()
            missing = list(wanted)
        if missing:
            self.bring(*self.models.text_encoders.values())
        for text in missing:
            number = text.network if isinstance(text, Reading) else None
            with nullcontext() if number is None else self.networks.only(number):
                self._texts[text, strengths] = self._with_image(text, self._encode(words_of(text)))
        return {text: self._texts[text, strengths] for text in wanted}

    def _with_image(self, text: Text, cond: TextCond) -> TextCond:
        """The conditioning of a text as it is read: with an image in place of the pooled text, where it has one."""
        if isinstance(text, str) or text.image is None or self.vision is None:
            return cond
        return self.family.text.with_pooled(cond, self.vision.see(text.image))

    def _encode(self, text: str) -> TextCond:
        """On the CPU."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            found = self.family.text.encode(self.models, [text], emphasis=True)
            if self.second_text is not None and text:
                layout = self.family.text.layout()
                assert layout is not None, "a family with two text encoders has cache files"
                other = self.family.text.encode(self.models, [self.second_text], emphasis=True)
                # The first of the arrays is the first text encoder's.
                found = TextCond({**other.tensors, layout.keys[0]: found.tensors[layout.keys[0]]})
        return found.map(lambda tensor: tensor.cpu())

    def use_networks(self, networks: Networks) -> None:
        """Takes other networks in place of those that are attached."""
        self.networks.detach()
        self.networks, self._regions = networks, None
        self._texts.clear()

    def bring(self, *wanted: nn.Module | None) -> None:
        """With offloading: these parts come to the device, and all others leave it."""
        if not self.offload:
            return
        kept = {id(part) for part in wanted}
        parts = [self.models.denoiser, self.models.vae, *self.models.text_encoders.values()]
        for part in parts:
            if id(part) not in kept:
                part.to("cpu")
        for part in parts:
            if id(part) in kept:
                part.to(self.device)


def load_model(opts: Options, spec: FamilySpec, training: Options, *, offload: bool = False) -> Model:
    """Loads the model that the options name, with its networks and words.

    Args:
        training: see `model_options.training_options`.
        offload: see `Model.bring`.
    Raises: UserError: a file that cannot be used.
    """
    if training.memory.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise UserError("--fp16: needs a GPU, and torch finds none; use --bf16, or neither")
    files = check_files(opts.networks)
    words = read_words(opts.texts.textual_inversion_embeddings or (), opts.texts.XTI_embeddings or ())
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    family = spec.adapter(training)
    LOGGER.info("loading %s", with_size(opts.checkpoint.ckpt))
    models = family.loader.load()
    models.freeze()
    merge_first(opts.networks, files, family, models)
    offload = offload and device.type != "cpu"
    home = torch.device("cpu") if offload else device  # of what waits
    placement.place_text_encoders(models, training, home, grad_text=False)
    placement.place_vae(models, training, home)
    placement.place_denoiser(models, training, home)
    set_attention(models.denoiser, training.memory)
    if opts.precision.opt_channels_last:
        models.denoiser.to(memory_format=torch.channels_last)
    places = add_words_by_place(family, models, words)
    for module in (models.denoiser, models.vae, *models.text_encoders.values()):
        module.eval()
    networks = attach_rest(opts.networks, files, family, models, device)
    dtype = placement.WEIGHT_DTYPES[training.memory.mixed_precision]
    control = load_control_nets(opts.control, family, models, dtype)
    for net in control.nets if control is not None and places else ():
        read_by_place(net, places)
    return Model(
        family,
        models,
        training,
        device,
        dtype,
        networks,
        control,
        offload,
        vision=load_vision(opts.source, family.traits, device, dtype),
    )
