"""Tokens of a text: ids and bytes, tokens per character, and which tokens are trained on."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jetson_ft.data.chat_template import ANSWER, CONTEXT, END
from jetson_ft.inference.metrics import is_cjk
from jetson_ft.inside.model import DECIMALS, LoadedModel, View, answered, conversation, text_ids

MAX_TOKENS = 4096  # of a text
_MAX_SPLIT_CHARACTERS = 100  # listed
_ROLES = {CONTEXT: "context", ANSWER: "answer", END: "end"}
SCRIPTS = ("chinese", "latin", "other")


@dataclass(frozen=True)
class Token(View):
    """One token of a text."""

    id: int
    text: str | None  # None: its bytes are no whole characters
    bytes: str  # hexadecimal: "e4 bd"
    is_special: bool  # a control token, which stands for no text
    role: str | None = None  # `answer` and `end` are trained on, `context` is not; None: no roles


@dataclass(frozen=True)
class ScriptCount(View):
    """The characters of a script, and the tokens that they take.

    A token counts for each script by its share of the token's bytes, so that the scripts' tokens
    add up to those of the text.
    """

    characters: int
    tokens: float
    tokens_per_character: float | None  # None: there is no such character


@dataclass(frozen=True)
class SplitCharacter(View):
    """A character whose bytes are in several tokens."""

    character: str
    bytes: str  # hexadecimal
    tokens: list[int]  # positions in the text


@dataclass(frozen=True)
class TokensView(View):
    """The tokens of a text; control tokens count for no script."""

    tokens: list[Token]
    scripts: dict[str, ScriptCount]  # `all`, `chinese`, `latin` and `other`
    split_characters: list[SplitCharacter]  # each once, in the order of the text


def view_tokens(
    loaded: LoadedModel, text: str, answer: str | None = None, system: str = ""
) -> TokensView:
    """Return the tokens of a text.

    Args:
        answer: show the conversation of a row, where `text` is the question, as training reads it;
            None: show `text` as it is.

    Raises:
        UserError: the text is empty or too long, or the chat template refuses the conversation.
    """
    roles: list[str | None]
    if answer is None:
        ids = text_ids(loaded, text, MAX_TOKENS)
        roles = [None] * len(ids)
    else:
        encoded = answered(loaded, conversation(text, system), answer, MAX_TOKENS)
        ids, roles = encoded.ids, [_ROLES[role] for role in encoded.segments]
    tokens = describe_tokens(loaded.tokenizer, ids, roles)
    return TokensView(tokens, *_characters(tokens))


def describe_tokens(
    tokenizer: Any, ids: Sequence[int], roles: Sequence[str | None] | None = None
) -> list[Token]:
    """Return each token with its text, its bytes and its role."""
    special = set(tokenizer.all_special_ids)
    tokens = []
    for index, (number, content) in enumerate(zip(ids, token_bytes(tokenizer, ids), strict=True)):
        try:
            text: str | None = content.decode()
        except UnicodeDecodeError:
            text = None
        role = roles[index] if roles else None
        tokens.append(Token(number, text, content.hex(" "), number in special, role))
    return tokens


def token_bytes(tokenizer: Any, ids: Sequence[int]) -> list[bytes]:
    """Return the bytes of each token, which may be a part of a character."""
    added = tokenizer.added_tokens_decoder
    backend = getattr(tokenizer, "backend_tokenizer", None)
    is_byte_level = "ByteLevel" in str(backend and backend.decoder)
    byte_of = _byte_level_bytes() if is_byte_level else {}
    result = []
    for number in ids:
        piece = tokenizer.convert_ids_to_tokens(number)
        if number in added or piece is None:
            content = added[number].content if number in added else ""
            result.append(content.encode())
        elif is_byte_level and byte_of.keys() >= set(piece):  # a vocabulary can have other pieces
            result.append(bytes(byte_of[character] for character in piece))
        elif piece.startswith("<0x") and piece.endswith(">") and len(piece) == 6:
            result.append(bytes([int(piece[3:5], 16)]))  # SentencePiece's byte tokens
        else:
            result.append(piece.replace("▁", " ").encode())
    return result


def _byte_level_bytes() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Printable bytes are their own character; the others are numbered from 256. Source: GPT-2's
    encoder (Radford et al., Language Models are Unsupervised Multitask Learners, 2019).
    """
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(b): b for b in own} | {chr(256 + n): b for n, b in enumerate(others)}


def _characters(
    text: Sequence[Token],
) -> tuple[dict[str, ScriptCount], list[SplitCharacter]]:
    """Return the counts by script, and the characters that several tokens share."""
    content, owners = b"", []  # the bytes of the text, and the token of each
    for index, token in enumerate(text):
        if not token.is_special:
            part = bytes.fromhex(token.bytes)
            content += part
            owners += [index] * len(part)
    sizes = Counter(owners)
    characters = dict.fromkeys(SCRIPTS, 0)
    tokens = dict.fromkeys(SCRIPTS, 0.0)
    split: dict[str, SplitCharacter] = {}
    place = 0
    # A byte that is no part of a character (the text can be cut) counts as a character of its own.
    for character in content.decode(errors="surrogateescape"):
        own_bytes = character.encode(errors="surrogateescape")
        covering = owners[place : place + len(own_bytes)]
        place += len(own_bytes)
        script = _script(character)
        characters[script] += 1
        tokens[script] += sum(1 / sizes[index] for index in covering)
        if len(set(covering)) > 1:
            positions = sorted(set(covering))
            split.setdefault(character, SplitCharacter(character, own_bytes.hex(" "), positions))
    characters["all"], tokens["all"] = sum(characters.values()), sum(tokens.values())
    counts = {
        name: ScriptCount(
            characters[name],
            round(tokens[name], DECIMALS),
            round(tokens[name] / characters[name], DECIMALS) if characters[name] else None,
        )
        for name in ("all", *SCRIPTS)
    }
    return counts, list(split.values())[:_MAX_SPLIT_CHARACTERS]


def _script(character: str) -> str:
    if is_cjk(character):
        return "chinese"
    is_latin = character.isalpha() and unicodedata.name(character, "").startswith("LATIN")
    return "latin" if is_latin else "other"
