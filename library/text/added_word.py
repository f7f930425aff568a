"""A word of several trained vectors in captions: where it stands, and the tokens that it becomes."""

from __future__ import annotations

import copy
import re
from typing import Any

from library.errors import UserError

# Characters that no text has stand for the tokens: no vocabulary has them, and none is part of a longer word.
_PRIVATE_USE = 0xF0000
_MOST = 0xFFFD  # code points of that plane


def word_pattern(word: str) -> re.Pattern[str]:
    """Finds `word` in a caption in any case, but not inside a longer word of Latin letters, digits and underscores."""
    before = r"(?<![A-Za-z0-9_])" if re.match(r"\w", word, re.ASCII) else ""
    after = r"(?![A-Za-z0-9_])" if re.search(r"\w\Z", word, re.ASCII) else ""
    return re.compile(before + re.escape(word) + after, re.IGNORECASE)


class AddedWordTokenizer:
    """A tokenizer to which a word is added: `word` becomes `count` tokens of its own, one after the other.

    It is called as the tokenizer of transformers that it wraps, and has its attributes. The wrapped one stays as it is.

    Attributes:
        first_id: the id of the word's first token; those of the others follow it.
    Raises: UserError: the tokenizer has the word already.
    """

    def __init__(self, tokenizer: Any, word: str, count: int):
        from tokenizers import AddedToken

        vocabulary = tokenizer.get_vocab()
        taken = sum(len(token) == 1 and _PRIVATE_USE <= ord(token) <= _PRIVATE_USE + _MOST for token in vocabulary)
        assert 0 < count <= _MOST - taken
        if not is_new(vocabulary, word):
            raise UserError(token_is_known(word))
        self._tokenizer = copy.deepcopy(tokenizer)
        self._pattern = word_pattern(word)
        names = [chr(_PRIVATE_USE + number) for number in range(taken, taken + count)]  # after those of other words
        # Without the blanks around them, of which T5 would make tokens.
        self._tokenizer.add_tokens([AddedToken(name, normalized=False, lstrip=True, rstrip=True) for name in names])
        self.first_id, *others = self._tokenizer.convert_tokens_to_ids(names)
        assert others == list(range(self.first_id + 1, self.first_id + count)), "added tokens have neighbouring ids"
        self._tokens = "".join(names)

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        """See the wrapped tokenizer."""
        if isinstance(text, str):
            return self._tokenizer(self._expanded(text), **options)
        return self._tokenizer([self._expanded(one) for one in text], **options)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying asks for such before there is anything to ask
            raise AttributeError(name)
        return getattr(self.__dict__["_tokenizer"], name)

    def _expanded(self, text: str) -> str:
        return self._pattern.sub(self._tokens, text)


def is_new(vocabulary: Any, word: str) -> bool:
    """Whether a word is no token of a vocabulary yet, in the case in which it is written or in small letters."""
    return word not in vocabulary and word.lower() not in vocabulary


def token_is_known(word: str) -> str:
    """What is said where `is_new` is not so."""
    return f"--token_string: {word!r} is a token of the text encoder already; choose a word that it does not know"
