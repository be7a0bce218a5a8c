"""The text of single tokens, so that a completion can be shown token by token without losing or inventing a character.

A byte-level token may hold half a character: "é" is two bytes, an emoji four. Each character goes to the token that
completes it, a token that only begins one gets a chip with its bytes ("F0 9F"), and the texts of all tokens put
together are the text of the completion.
"""

import codecs
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple


class Piece(NamedTuple):
    """What a token adds to the text, and what to show of it besides: its name if it is special, its loose bytes."""

    text: str
    chip: str = ""


class Pieces:
    """Cuts completions into pieces with a Hugging Face tokenizer."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        marked = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        self.special = {*tokenizer.all_special_ids, *marked}
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        self.byte_level = "ByteLevel" in str(decoder)
        self.alone = cache(self._alone)
        self._bytes_of = cache(self._read_bytes)

    def split(self, token_ids: Sequence[int], text: str) -> list[Piece] | None:
        """One piece a token; together they are `text`, the completion as decoded without special tokens.

        None if these tokens do not spell that text: the tokenizer is another model's.
        """
        pieces = self._by_bytes(token_ids) if self.byte_level else self._by_prefix(token_ids)
        return pieces if "".join(piece.text for piece in pieces) == text else None

    def _alone(self, token_id: int) -> Piece:
        """The piece of a token that neither ends nor begins in the middle of a character."""
        return self._by_bytes([token_id])[0]

    def _by_bytes(self, token_ids: Sequence[int]) -> list[Piece]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        last = max((i for i, t in enumerate(token_ids) if t not in self.special), default=-1)
        pieces = []
        for i, token in enumerate(token_ids):
            if token in self.special:  # left out of the text, even in the middle of a character
                pieces.append(Piece("", str(self.tokenizer.convert_ids_to_tokens(token))))
                continue
            data = self._bytes_of(token)
            text = decoder.decode(data, final=i == last)
            loose = decoder.getstate()[0][-len(data) :] if data else b""
            pieces.append(Piece(text, loose.hex(" ").upper()))
        return pieces

    def _by_prefix(self, token_ids: Sequence[int]) -> list[Piece]:
        """For tokenizers that are not byte-level: what each token adds to the text of those before it."""
        pieces, before = [], ""
        for i, token in enumerate(token_ids):
            text = self.tokenizer.decode(list(token_ids[: i + 1]), skip_special_tokens=True)
            if text.endswith("\ufffd") and i + 1 < len(token_ids):  # the character may still be completed
                text = before
            name = "" if text != before else str(self.tokenizer.convert_ids_to_tokens(token))
            pieces.append(Piece(text[len(before) :], name))
            before = text
        return pieces

    def _read_bytes(self, token_id: int) -> bytes:
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # an id beyond the vocabulary
            return b""
        table = byte_alphabet()
        if all(c in table for c in token):
            return bytes(table[c] for c in token)
        return token.encode("utf-8", errors="replace")  # an added token, written as it is


@cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes, character -> byte; all byte-level tokenizers spell tokens in them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}


def token_ranges(pieces: Sequence[Piece], spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Character spans -> [first, end) of the tokens that hold any of their characters; tokens may reach beyond."""
    ends, position = [], 0
    for piece in pieces:
        position += len(piece.text)
        ends.append(position)
    ranges = []
    for begin, end in spans:
        first = next((i for i, e in enumerate(ends) if e > begin), len(ends))
        stop = next((i for i, e in enumerate(ends) if e >= end), len(ends) - 1) + 1
        ranges.append((first, stop))
    return ranges
