"""Tokens as people read them: without the markers that tokenizers use for spaces, bytes and word pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Token:
    """A token for display: its text, whether a space stands before it, and line breaks after it."""

    text: str
    space: bool = False
    breaks: int = 0

    @property
    def spaced(self) -> str:
        """The text with the space before it: `' Paris'`."""
        return (" " if self.space else "") + self.text


def display(tokens: Sequence[str]) -> list[Token]:
    """Tokens of one text as they are shown.

    Known markers: `Ġ` and `Ċ` (byte-level BPE, whose other bytes are decoded as well), `▁` (SentencePiece),
    `##` (WordPiece), `</w>`. Plain words, as from a tokenizer without markers, get a space between them.
    """
    if any(mark in token for token in tokens for mark in "ĠĊ"):
        return [_plain(_bytes_decoded(token)) for token in tokens]
    if any(token.startswith("▁") for token in tokens):
        return [_plain(_byte_fallback(token).replace("▁", " ")) for token in tokens]
    if any(token.endswith("</w>") for token in tokens):
        ends = [False, *(token.endswith("</w>") for token in tokens)]
        return [Token(token.removesuffix("</w>"), space=end) for token, end in zip(tokens, ends, strict=False)]
    if any(token[:1].isspace() or token[-1:].isspace() for token in tokens):
        return [_plain(token) for token in tokens]
    return [Token(token.removeprefix("##"), space=False) if len(token) > 2 and token.startswith("##")
            else Token(token, space=place > 0) for place, token in enumerate(tokens)]


def visible(token: Token) -> str:
    """The text where it must not look empty: blanks as `␣`, line breaks as `⏎`."""
    return token.text + "⏎" * token.breaks or ("␣" if token.space else "∅")


def _plain(text: str) -> Token:
    """A token whose spaces and line breaks are in its text."""
    bare = text.rstrip("\r\n")
    return Token(bare.removeprefix(" "), space=bare.startswith(" "), breaks=text[len(bare):].count("\n"))


def _bytes_decoded(token: str) -> str:
    """Byte-level BPE back to text; characters cut across tokens show as �."""
    table = {character: byte for byte, character in enumerate(_byte_characters())}
    if not all(character in table for character in token):
        return token
    return bytes(table[character] for character in token).decode("utf-8", errors="replace")


def _byte_characters() -> list[str]:
    """The character that GPT-2's tokenizer writes for each byte: itself if printable, else from U+0100 on."""
    own = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in own else chr(next(others)) for byte in range(256)]


def _byte_fallback(token: str) -> str:
    """SentencePiece writes bytes it has no piece for as <0x0A>."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)]).decode("utf-8", errors="replace")
        except ValueError:
            return token
    return token
