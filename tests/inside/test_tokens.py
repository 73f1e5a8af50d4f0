"""Tokens with their bytes: of any text, of other kinds of tokenizers, and of conversations."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CHAT_TEMPLATE, make_tokenizer

from jetson_ft.chat.session import ChatSession
from jetson_ft.data.chat_template import ANSWER, END, encode
from jetson_ft.errors import UserError
from jetson_ft.inside.tokens import describe_tokens, token_bytes, view_tokens

BYTE_TOKENIZER = make_tokenizer(CHAT_TEMPLATE)


def merged_tokenizer() -> Any:
    """Return a byte-level tokenizer with merges: a token for 中, and one for 国's first bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {text: n for n, text in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    first, second, third = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("中")[
        0
    ][0]
    one, two, _three = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("国")[0][0]
    merges = [(first, second), (first + second, third), (one, two)]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.Sequence([decoders.ByteLevel()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def sentencepiece_tokenizer() -> Any:
    """Return a tokenizer with "▁" for a blank, and tokens for bytes, as Llama 2 and Gemma have."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    model = models.BPE(
        vocab={piece: n for n, piece in enumerate(pieces)}, merges=[("▁", "a")],
        byte_fallback=True, unk_token="<unk>", fuse_unk=True,
    )  # fmt: skip
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<end>")


MERGED, SENTENCEPIECE = merged_tokenizer(), sentencepiece_tokenizer()


@pytest.mark.parametrize("tokenizer", [BYTE_TOKENIZER, MERGED, SENTENCEPIECE])
@given(text=st.text(st.sampled_from("ab 中国\n😀é"), max_size=12))
def test_bytes_of_the_tokens_are_those_of_the_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(token_bytes(tokenizer, ids)).decode() == text
    for token in describe_tokens(tokenizer, ids):
        part = bytes.fromhex(token.bytes)
        assert token.text is None or token.text.encode() == part


def test_piece_that_is_written_in_no_bytes_is_its_own_text() -> None:
    tokenizer = make_tokenizer(None)
    tokenizer.convert_ids_to_tokens = lambda number: "漢a"
    assert token_bytes(tokenizer, [9]) == ["漢a".encode()]


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_tokens_of_the_scripts_add_up(text: str) -> None:
    view = view_tokens(loaded_with(MERGED), text)
    scripts = dict(view.scripts)
    total = scripts.pop("all")
    assert total.characters == len(text) and total.tokens == pytest.approx(
        len(view.tokens), abs=0.01
    )
    assert sum(one.characters for one in scripts.values()) == total.characters
    assert sum(one.tokens for one in scripts.values()) == pytest.approx(total.tokens, abs=0.01)


def loaded_with(tokenizer: Any) -> ChatSession:
    import torch

    class Embedding:
        """As many embeddings as any test needs."""

        def get_input_embeddings(self) -> Any:
            return torch.nn.Embedding(1000, 1)

    return ChatSession(Embedding(), tokenizer, False, 10_000)


def test_characters_fall_apart_into_tokens() -> None:
    view = view_tokens(loaded_with(MERGED), "中国 ok 国")
    texts = [token.text for token in view.tokens]
    assert texts == ["中", None, None, " ", "o", "k", " ", None, None]
    (split,) = view.split_characters
    assert (split.character, split.bytes, split.tokens) == ("国", "e5 9b bd", [1, 2])
    assert [view.tokens[i].bytes for i in split.tokens] == ["e5 9b", "bd"]
    chinese, latin = view.scripts["chinese"], view.scripts["latin"]
    assert (chinese.characters, chinese.tokens) == (3, 5.0)
    assert chinese.tokens_per_character == pytest.approx(5 / 3, abs=1e-3)
    assert (latin.characters, latin.tokens, latin.tokens_per_character) == (2, 2.0, 1.0)
    assert view_tokens(loaded_with(MERGED), "ok").scripts["chinese"].tokens_per_character is None


def test_a_conversation_shows_what_is_trained_on(llama: ChatSession) -> None:
    view = view_tokens(llama, "你好", "好<|im_end|>", system="s")
    messages = [
        {"role": "system", "content": "s"}, {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "好<|im_end|>"},
    ]  # fmt: skip
    encoded = encode(llama.tokenizer, messages)  # type: ignore[arg-type]
    length = len(view.tokens)
    assert [token.id for token in view.tokens] == encoded.ids[:length]
    roles = {ANSWER: "answer", END: "end"}
    assert [t.role for t in view.tokens] == [
        roles.get(role, "context") for role in encoded.segments[:length]
    ]
    answer = [token for token in view.tokens if token.role == "answer"]
    assert b"".join(bytes.fromhex(t.bytes) for t in answer).decode() == "好<|im_end|>"
    assert not any(token.is_special for token in answer), "a message writes no control tokens"
    assert view.tokens[-1].role == "end" and view.tokens[-1].is_special
    assert view.scripts["chinese"].characters == 3


def test_plain_text_has_no_roles_and_its_bounds(llama: ChatSession) -> None:
    assert {token.role for token in view_tokens(llama, "你好").tokens} == {None}
    assert view_tokens(llama, "\ud800").tokens[0].text == "?"
    with pytest.raises(UserError, match="The text is empty"):
        view_tokens(llama, "")
    with pytest.raises(UserError, match="The text has 2,049 tokens"):
        view_tokens(llama, "a" * 2049)
    with pytest.raises(UserError, match="no embedding for"):
        few = loaded_with(BYTE_TOKENIZER)
        few.model.get_input_embeddings = lambda: type("E", (), {"weight": [0] * 5})
        view_tokens(few, "z")
