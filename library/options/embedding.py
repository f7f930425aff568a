"""Training of the embedding of a new word (Textual Inversion)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from library.options.base import Options, opt
from library.options.large_models import BlockSwapOptions, LargeModelOptions, TextCacheOptions
from library.options.method import MethodOptions
from library.options.models import ModelOptions
from library.options.saving import SavingOptions
from library.options.words import WordFields
from library.text.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES, fill

if TYPE_CHECKING:
    from library.types import FamilyTraits


@dataclass(frozen=True, kw_only=True)
class EmbeddingOptions(WordFields, MethodOptions, title="Textual Inversion"):
    usual_rate: ClassVar[str] = "it is made for whole models, an embedding usually wants 5e-4 to 5e-3"

    weights: list[str] | None = opt(None, "embedding to continue training; of several words, one for each in turn")
    use_object_template: bool = opt(
        False, 'replace captions by texts about an object, such as "a photo of a", and the word'
    )
    use_style_template: bool = opt(
        False, 'replace captions by texts about a style, such as "a painting in the style of", and the word'
    )

    @property
    def caption_templates(self) -> tuple[str, ...]:
        """The texts that replace captions, with the word in them; none: captions are used as they are."""
        templates = STYLE_TEMPLATES if self.use_style_template else ()
        templates = OBJECT_TEMPLATES if self.use_object_template else templates
        return fill(templates, self.caption_words[0]) if self.caption_words else ()

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        words = self.caption_words
        if not words:
            yield "--token_string: missing; give the new word that captions and prompts will use"
        yield from self.word_problems()
        if len(words) > 1 and (self.use_object_template or self.use_style_template):
            flag = "object" if self.use_object_template else "style"
            yield f"--use_{flag}_template: its texts hold one word only; with several, write captions"
        if len(self.weights or ()) > len(words):
            yield f"--weights: there are {len(self.weights or ())} files for {len(words)} of --token_string"

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.use_object_template and self.use_style_template:
            yield "--use_style_template: has no effect with --use_object_template"
        if len(self.weights or ()) >= len(self.caption_words) and self.init_word:
            yield "--init_word: has no effect with --weights, whose vectors are the start"
        yield from self.word_warnings()


@dataclass(frozen=True, kw_only=True)
class T5EmbeddingOptions(EmbeddingOptions):
    """Where T5 may have vectors of its own."""

    train_t5xxl: bool = opt(
        False, "train vectors for T5 too; without it T5 reads the word as it is written, and only CLIP learns it"
    )

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from super().check(opts, traits)
        if self.train_t5xxl and opts.text_cache.in_use:
            yield "--train_t5xxl: needs T5 in every step; drop it or --cache_text_encoder_outputs"


@dataclass(frozen=True, kw_only=True)
class EmbeddingSaving(SavingOptions):
    output_name: str | None = opt(None, "file name without ending of what is saved; the (first) word if not given")
    save_model_as: Literal["ckpt", "pt", "safetensors"] | None = opt("pt", "file format of what is saved")


@dataclass(frozen=True, kw_only=True)
class XtiSaving(EmbeddingSaving):
    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from super().warnings(opts, traits)
        if "save_model_as" in opts.explicit and self.save_model_as != "safetensors":
            yield f"--save_model_as: {self.save_model_as} has no effect; these embeddings are .safetensors files"


class XtiModelOptions(ModelOptions, without=("no_half_vae",)):
    pass


EMBEDDING_GROUPS = (EmbeddingOptions, EmbeddingSaving)
XTI_GROUPS = (EmbeddingOptions, XtiSaving, XtiModelOptions)
TWO_ENCODER_EMBEDDING_GROUPS = (LargeModelOptions, BlockSwapOptions)
T5_EMBEDDING_GROUPS = (T5EmbeddingOptions, LargeModelOptions, TextCacheOptions, BlockSwapOptions)
