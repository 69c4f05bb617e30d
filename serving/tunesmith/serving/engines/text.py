"""From tokens to text: characters that several tokens share, and stop strings that begin in one piece."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one answer, as its tokens come.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        stop: strings before which the answer ends.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._tokens: list[int] = []
        self._decoded = ""
        self._sent = 0
        self.is_stopped = False

    def add(self, token: int) -> str:
        """New text that no stop string can begin in any more; sets `is_stopped` once one was found."""
        self._tokens.append(token)
        self._decoded += self._step(token)
        found = [at for word in self._stop if (at := self._decoded.find(word, max(0, self._sent - len(word)))) >= 0]
        if found:
            self.is_stopped = True
            return self._take(max(self._sent, min(found)))
        held = max((overlap(self._decoded, word) for word in self._stop), default=0)
        return self._take(max(self._sent, len(self._decoded) - held))

    def rest(self) -> str:
        """What was held back, and what is left of a character that never became whole; for an answer that has ended."""
        if self.is_stopped:
            return ""
        whole = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        if whole.startswith(self._decoded):
            self._decoded = whole
        return self._take(len(self._decoded))

    def _step(self, token: int) -> str:
        try:
            return self._decoder.step(self._tokenizer, token) or ""
        except Exception as error:
            if "Invalid prefix" not in str(error):
                raise
            # the library loses its place over some sequences of special tokens and broken characters
            self._decoder = DecodeStream(skip_special_tokens=True)
            return self._decoder.step(self._tokenizer, token) or ""

    def _take(self, end: int) -> str:
        text = self._decoded[self._sent : end]
        self._sent = end
        return text


def spelled(token: int, tokenizer: Any) -> tuple[str, bytes]:
    """A token's text as it stands alone, and its bytes, which may be a part of a character only.

    Vocabularies write such parts as `<0xE2>`, or a byte for a character as GPT-2 does.
    """
    text: str = tokenizer.decode([token])
    if "\ufffd" not in text:
        return text, text.encode()
    written = tokenizer.convert_ids_to_tokens(token)
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", written):
        return text, bytes.fromhex(byte[1])
    if all(character in _gpt2_bytes() for character in written):
        return text, bytes(_gpt2_bytes()[character] for character in written)
    return text, text.encode()


@cache
def _gpt2_bytes() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


def overlap(text: str, word: str) -> int:
    """Characters at the end of a text that a word, which is not in it yet, may begin with."""
    return next((n for n in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:n])), 0)
