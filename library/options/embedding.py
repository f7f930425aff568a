"""Training of the embedding of a new word (Textual Inversion)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from library.options.base import Options, opt
from library.options.large_models import BlockSwapOptions, LargeModelOptions, TextCacheOptions
from library.options.method import MethodOptions
from library.options.saving import SavingOptions
from library.text.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES, fill

if TYPE_CHECKING:
    from library.types import FamilyTraits

_MOST_VECTORS = 75  # tokens of a caption
_IN_PROMPTS = "()[]"  # which weigh words there


@dataclass(frozen=True, kw_only=True)
class EmbeddingOptions(MethodOptions, title="Textual Inversion"):
    usual_rate: ClassVar[str] = "it is made for whole models, an embedding usually wants 5e-4 to 5e-3"

    token_string: str | None = opt(
        None, "word that is trained; captions and prompts use it, and it must be new to the text encoder"
    )
    init_word: str | None = opt(
        None, "word or words whose vectors the new ones start from; random vectors like those of words if not given"
    )
    num_vectors_per_token: int = opt(
        1, "vectors of the word, as many tokens in a caption", at_least=1, at_most=_MOST_VECTORS
    )
    weights: str | None = opt(None, "embedding to continue training", exists="file")
    use_object_template: bool = opt(
        False, 'replace captions by texts about an object, such as "a photo of a", and the word'
    )
    use_style_template: bool = opt(
        False, 'replace captions by texts about a style, such as "a painting in the style of", and the word'
    )

    @property
    def caption_word(self) -> str | None:
        """The word that captions must hold for anything to be learned from them."""
        return (self.token_string or "").strip() or None

    @property
    def caption_templates(self) -> tuple[str, ...]:
        """The texts that replace captions, with the word in them; none: captions are used as they are."""
        templates = STYLE_TEMPLATES if self.use_style_template else ()
        templates = OBJECT_TEMPLATES if self.use_object_template else templates
        return fill(templates, self.caption_word or "")

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.caption_word is None:
            yield "--token_string: missing; give the new word that captions and prompts will use"
        elif not self.caption_word.isprintable():
            yield f"--token_string: must be a word, got {self.token_string!r}"

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.use_object_template and self.use_style_template:
            yield "--use_style_template: has no effect with --use_object_template"
        if self.weights and self.init_word:
            yield "--init_word: has no effect with --weights, whose vectors are the start"
        if any(sign in (self.token_string or "") for sign in _IN_PROMPTS):
            yield f"--token_string: {self.token_string} has brackets, which weigh words in prompts; choose another word"


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
    output_name: str | None = opt(None, "file name without ending of what is saved; --token_string if not given")
    save_model_as: Literal["ckpt", "pt", "safetensors"] | None = opt("pt", "file format of what is saved")


EMBEDDING_GROUPS = (EmbeddingOptions, EmbeddingSaving)
TWO_ENCODER_EMBEDDING_GROUPS = (LargeModelOptions, BlockSwapOptions)
T5_EMBEDDING_GROUPS = (T5EmbeddingOptions, LargeModelOptions, TextCacheOptions, BlockSwapOptions)
