"""New words whose vectors are trained: by themselves (Textual Inversion), or beside a network (pivotal tuning)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.options.base import OptionGroup, Options, opt

if TYPE_CHECKING:
    from library.types import FamilyTraits

_MOST_VECTORS = 75  # tokens of a caption
_IN_PROMPTS = "()[]"  # which weigh words there


@dataclass(frozen=True, kw_only=True)
class WordFields:
    """What says which words are trained and how they begin."""

    token_string: list[str] | None = opt(
        None, "word that is trained, or several; captions and prompts use it, and it must be new to the text encoder"
    )
    init_word: list[str] | None = opt(
        None,
        "word or words whose vectors the new ones start from, in quotes where there are several; one for each of "
        "--token_string or one for all; random vectors like those of words if not given",
    )
    num_vectors_per_token: int = opt(
        1, "vectors of a word, as many tokens in a caption", at_least=1, at_most=_MOST_VECTORS
    )

    @property
    def caption_words(self) -> tuple[str, ...]:
        """The words that captions must hold for anything to be learned from them."""
        return tuple(word.strip() for word in self.token_string or () if word.strip())

    @property
    def first_words(self) -> tuple[str | None, ...]:
        """For each word, the words whose vectors it starts from; None: random ones."""
        given = self.init_word or [None]
        return tuple(given) * len(self.caption_words) if len(given) == 1 else tuple(given)

    def word_problems(self) -> Iterable[str]:
        words = self.caption_words
        for word in words:
            if not word.isprintable():
                yield f"--token_string: must be a word, got {word!r}"
        for word in dict.fromkeys(word for word in words if [one.lower() for one in words].count(word.lower()) > 1):
            yield f"--token_string: {word} is given twice; capitals make no other word"
        if words and len(self.first_words) != len(words):
            yield (
                f"--init_word: {len(self.init_word or ())} are given for {len(words)} of --token_string; give one for "
                "each, in quotes where it has blanks, or one for all"
            )

    def word_warnings(self) -> Iterable[str]:
        for word in self.caption_words:
            if any(sign in word for sign in _IN_PROMPTS):
                yield f"--token_string: {word} has brackets, which weigh words in prompts; choose another word"


@dataclass(frozen=True, kw_only=True)
class WordOptions(WordFields, OptionGroup, group="words", title="New words beside the network", always=True):
    """Words that are trained together with a network."""

    embedding_lr: float = opt(1e-3, "learning rate of the vectors of --token_string", above=0)

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from self.word_problems()
        for word in self.caption_words:
            if "." in word:
                yield f"--token_string: {word} has a dot, which divides names in network files; choose another word"

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from self.word_warnings()
        if not self.caption_words:
            for name in ("init_word", "num_vectors_per_token", "embedding_lr"):
                if name in opts.explicit:
                    yield f"--{name}: has no effect without --token_string"
