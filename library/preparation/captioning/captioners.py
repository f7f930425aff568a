"""Captioning models: BLIP, GIT, and whatever transformers loads as image-text-to-text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from library.errors import UserError
from library.preparation.captioning.blip_weights import build_blip, read_original_blip, word_count
from library.preparation.captioning.nucleus_sampling import NucleusSampling
from library.preparation.captioning.pretrained import fetched, load, load_model, placed
from library.runtime.logs import LOGGER
from library.types import Size

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn

BLIP_PROMPT = "a picture of "  # the prompt that BLIP was trained with
ASKING = "Describe this picture in one sentence."
BERT = "google-bert/bert-base-uncased"  # whose vocabulary the original BLIP files are for
_SPARE = 2  # how many times as large as the model's image a decoded one is at least; it is shrunk well from there
_BLIP_PENALTY = 1.1  # on repeated words where words are drawn, as the original has it
_CAPTION_TASK = "<CAPTION>"  # Florence-2 is asked by task


class Captioner(Protocol):
    """A model that is ready to caption."""

    def enough(self, size: Size) -> Size:
        """The smallest size at which an image of this size must be decoded; see `images.read_reduced`."""

    def prepare(self, image: NDArray[np.uint8]) -> Any:
        """The model's input of an image (H, W, 3). Called in several threads."""

    def caption(self, prepared: Sequence[Any], names: Sequence[str]) -> list[str]:
        """One line of text for each of a batch of images.

        Args:
            names: one for each image, from which its random stream is derived.
        """


@dataclass(frozen=True)
class Search:
    """The decoding settings of captions: beam search, sampling or greedy search, and lengths."""

    max_length: int  # tokens
    min_length: int = 0
    num_beams: int = 1
    top_p: float | None = None  # None: the likeliest words, or beams of them
    seed: int = 0

    def arguments(self, names: Sequence[str]) -> dict[str, Any]:
        """The arguments for `generate` of transformers."""
        from transformers import LogitsProcessorList

        found: dict[str, Any] = {"do_sample": False, "num_beams": self.num_beams}
        if self.top_p is not None:
            found["logits_processor"] = LogitsProcessorList([NucleusSampling(self.top_p, self.seed, names)])
        return found


@dataclass(frozen=True)
class _Ours:
    """A model whose class is known, with what it needs."""

    model: nn.Module
    tokenizer: Any
    image_processor: Any
    search: Search
    prompt: str

    def enough(self, size: Size) -> Size:
        to = self.image_processor.size  # what the image is shrunk to: both sides, or only the shorter one
        sides = [to["shortest_edge"]] * 2 if "shortest_edge" in to else [to["width"], to["height"]]
        return Size(*(_SPARE * side for side in sides))

    def prepare(self, image: NDArray[np.uint8]) -> Tensor:
        # As a Pillow image: the axes of an array that is 3 pixels high could be mistaken.
        return self.image_processor(Image.fromarray(image), return_tensors="pt").pixel_values[0]

    def _continued(self, prepared: Sequence[Tensor], names: Sequence[str], ids: Tensor, penalty: float = 1.0) -> Tensor:
        """The tokens that the model gives for images after `ids`, (B, length), with them."""
        import torch

        with torch.inference_mode():
            return self.model.generate(
                pixel_values=torch.stack(list(prepared)).to(self.model.device, self.model.dtype),
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_length=self.search.max_length,
                min_length=self.search.min_length,
                repetition_penalty=penalty,
                **self.search.arguments(names),
            )


class Blip(_Ours):
    """BLIP, which continues a prompt."""

    def caption(self, prepared: Sequence[Tensor], names: Sequence[str]) -> list[str]:
        import torch

        tokens = self.tokenizer(self.prompt).input_ids
        # `generate` puts BLIP's own start in place of the first token, and leaves out the last, an end.
        ids = torch.tensor([tokens] * len(prepared), device=self.model.device)
        found = self._continued(prepared, names, ids, 1.0 if self.search.top_p is None else _BLIP_PENALTY)
        return _texts(self.tokenizer, found[:, len(tokens) - 1 :])


class Git(_Ours):
    """GIT starts from nothing, or continues a prompt."""

    def caption(self, prepared: Sequence[Tensor], names: Sequence[str]) -> list[str]:
        import torch

        tokens = self.tokenizer(self.prompt, add_special_tokens=False).input_ids
        ids = torch.tensor([[self.model.config.bos_token_id, *tokens]] * len(prepared), device=self.model.device)
        return _texts(self.tokenizer, self._continued(prepared, names, ids)[:, ids.shape[1] :])


@dataclass(frozen=True)
class ImageTextModel:
    """Any model of transformers that takes images and text, asked as its processor has it."""

    model: nn.Module
    processor: Any
    search: Search
    prompt: str | None

    def enough(self, size: Size) -> Size:
        return size  # some of these see all that there is

    def prepare(self, image: NDArray[np.uint8]) -> Image.Image:
        return Image.fromarray(image)

    def caption(self, prepared: Sequence[Image.Image], names: Sequence[str]) -> list[str]:
        import torch

        inputs = self._inputs(prepared).to(self.model.device, self.model.dtype)
        if "token_type_ids" not in signature(self.model.forward).parameters:
            inputs.pop("token_type_ids", None)  # some tokenizers make them for models that have no use for them
        with torch.inference_mode():
            found = self.model.generate(
                **inputs,
                max_new_tokens=self.search.max_length,
                min_new_tokens=self.search.min_length,
                **self.search.arguments(names),
            )
        asked = inputs["input_ids"]
        length = asked.shape[1]
        if found.shape[1] >= length and torch.equal(found[:, :length], asked):
            found = found[:, length:]  # this model repeats what it was asked
        return _texts(self.processor.tokenizer, found)

    def _inputs(self, images: Sequence[Image.Image]) -> Any:
        if getattr(self.processor, "chat_template", None):
            asked = {"type": "text", "text": ASKING if self.prompt is None else self.prompt}
            chats = [[{"role": "user", "content": [{"type": "image", "image": one}, asked]}] for one in images]
            return self.processor.apply_chat_template(
                chats,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        tasks = getattr(self.processor, "task_prompts_without_inputs", ())
        prompt = self.prompt
        if prompt is None:
            prompt = _CAPTION_TASK if _CAPTION_TASK in tasks else ""
        texts = [prompt] * len(images)
        return self.processor(images=list(images), text=texts, padding=True, return_tensors="pt")


def load_blip(weights: str, search: Search, prompt: str | None) -> Blip:
    """BLIP from a hub id, a folder, an original weight file or the address of one; on this process's device.

    Raises: UserError: it cannot be had or is something else, or `search` runs for longer than the model can.
    """
    prompt = BLIP_PROMPT if prompt is None else prompt
    if weights.lower().startswith(("http://", "https://")):
        model, tokenizer, image_processor = _original_blip(fetched(weights))
    elif Path(weights).is_file():
        model, tokenizer, image_processor = _original_blip(Path(weights))
    else:
        from transformers import BlipForConditionalGeneration

        _require_type(weights, "blip", "BLIP")
        model = load_model(weights, BlipForConditionalGeneration, "a BLIP captioning model", dtype="float32")
        processor = _processor(weights)
        tokenizer, image_processor = processor.tokenizer, processor.image_processor
    _require_room(weights, search, model.config.text_config.max_position_embeddings)
    return Blip(_on_device(model, weights), tokenizer, image_processor, search, prompt)


def load_git(name: str, search: Search, prompt: str | None = None) -> Git:
    """GIT from a hub id or a folder, on this process's device. Raises: UserError: as `load_blip`."""
    from transformers import GitForCausalLM

    _require_type(name, "git", "GIT")
    model = load_model(name, GitForCausalLM, "a GIT model", dtype="float32")
    processor = _processor(name)
    _require_room(name, search, model.config.max_position_embeddings)
    return Git(_on_device(model, name), processor.tokenizer, processor.image_processor, search, prompt or "")


def load_image_text_model(name: str, search: Search, prompt: str | None) -> Captioner:
    """Any model from a hub id or a folder, on this process's device. Code that it brings is not run.

    Raises: UserError: it cannot be had or is of another kind.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    kind = _model_type(name, "an image-text-to-text model")
    if kind in _BY_TYPE:
        return _BY_TYPE[kind](name, search, prompt)
    device = _logged_device(name)
    dtype = torch.float32
    if device.type == "cuda":  # such models are made in bfloat16; not all of them stay finite in float16
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    what = "an image-text-to-text model"
    model = load_model(name, AutoModelForImageTextToText, what, dtype=dtype, trust_remote_code=False)
    processor = _processor(name, model.config)
    if not model.config.is_encoder_decoder:
        processor.tokenizer.padding_side = "left"  # what is generated continues where the text ends
    return ImageTextModel(model.to(device), processor, search, prompt)


def _original_blip(path: Path) -> tuple[nn.Module, Any, Any]:
    tensors = read_original_blip(path)
    tokenizer = _bert_tokenizer(path.parent)
    if len(tokenizer) != word_count(tensors):
        raise UserError(
            f"{path}: its weights know {word_count(tensors)} tokens, but the vocabulary has {len(tokenizer)}; put the "
            f"vocab.txt that belongs to it into {path.parent}"
        )
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = build_blip(tensors, special, str(path))
    side = model.config.vision_config.image_size
    return model, tokenizer, _blip_image_processor(side)


def _bert_tokenizer(folder: Path) -> Any:
    """BERT's tokenizer with BLIP's two further tokens: from `folder` if it has a vocabulary, or from the hub."""
    from transformers import BertTokenizer

    def loader(name: str, **where: Any) -> Any:
        tokenizer = BertTokenizer.from_pretrained(name, **where)
        # Where there are no files at all, transformers makes a tokenizer that knows no words and says nothing.
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise OSError("no vocabulary found")
        return tokenizer

    beside = any((folder / name).is_file() for name in ("vocab.txt", "tokenizer.json"))
    try:
        tokenizer = load(str(folder) if beside else BERT, loader, "a BERT tokenizer")
    except UserError as error:
        raise UserError(
            f"original BLIP weights need BERT's vocabulary; put vocab.txt of {BERT} into {folder.absolute()} ({error})"
        ) from None
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokenizer


def _blip_image_processor(side: int) -> Any:
    """BLIP's: a square of `side` pixels, whatever the image's proportions, bicubic; CLIP's mean and deviation."""
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    return BlipImageProcessorPil(size={"height": side, "width": side})


def _processor(name: str, config: Any = None) -> Any:
    """The processor that makes a model's inputs of images and text; without torchvision, one without videos.

    Args:
        config: the model's, where it may be one for videos too.
    """
    from transformers import AutoProcessor
    from transformers.utils import is_torchvision_available

    loader: Callable[..., Any] = AutoProcessor.from_pretrained
    if config is not None and not is_torchvision_available():
        loader = _for_images_only(type(config)) or loader

    def without_code(name: str, **where: Any) -> Any:
        return loader(name, trust_remote_code=False, **where)

    processor = load(name, without_code, "a processor of images and text")
    for part in ("tokenizer", "image_processor"):
        if not hasattr(processor, part):
            raise UserError(f"{name}: its files have no {part}, so it cannot be given images and text")
    return processor


def _for_images_only(config_class: type) -> Callable[..., Any] | None:
    """`from_pretrained` of a model's processor, without its part for videos; None if it has none."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    if config_class not in PROCESSOR_MAPPING:
        return None
    whole = PROCESSOR_MAPPING[config_class]
    if "video_processor" not in whole.get_attributes():
        return None

    class ForImagesOnly(whole):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

    return ForImagesOnly.from_pretrained


# Models that have to be asked in a way of their own.
_BY_TYPE: dict[str, Callable[[str, Search, str | None], Captioner]] = {"blip": load_blip, "git": load_git}


def _model_type(name: str, what: str) -> str:
    from transformers import AutoConfig

    def loader(name: str, **where: Any) -> Any:
        return AutoConfig.from_pretrained(name, trust_remote_code=False, **where)

    return load(name, loader, what).model_type


def _require_type(name: str, wanted: str, title: str) -> None:
    kind = _model_type(name, f"a {title} model")
    if kind != wanted:
        raise UserError(f"{name}: a {kind} model, not {title}; make_captions.py takes it as --model {name}")


def _require_room(name: str, search: Search, positions: int) -> None:
    if search.max_length > positions:
        raise UserError(f"--max_length {search.max_length}: {name} can count to {positions} tokens only")


def _on_device(model: nn.Module, name: str) -> nn.Module:
    import torch

    device = _logged_device(name)
    return model.to(device, torch.float16) if device.type == "cuda" else model.to(device)


def _logged_device(name: str) -> torch.device:
    """This process's device, which is logged: on the wrong one, captions take hours."""
    device = placed()
    LOGGER.info("captioning with %s on the %s", name, "CPU" if device.type == "cpu" else "GPU")
    return device


def _texts(tokenizer: Any, ids: Tensor) -> list[str]:
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)
    return [" ".join(text.split()) for text in texts]
