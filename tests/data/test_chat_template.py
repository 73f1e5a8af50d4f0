"""Conversations as ids: segments, and that training and chatting see the same ids."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jetson_ft.data.chat_template import (
    ANSWER,
    CONTEXT,
    END,
    encode,
    encode_prompt,
    end_ids,
)
from jetson_ft.data.formats import ChatMessage
from jetson_ft.errors import UserError
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.models.loading import load_tokenizer

FIRST = [("user", "你好，请问 1+1？"), ("assistant", "等于二。")]
CONVERSATIONS = {
    "single": FIRST,
    "system": [("system", "Be brief."), *FIRST],
    "multi": [*FIRST, ("user", "And 2+2?"), ("assistant", " four \n"), *FIRST],
}

# Excerpts of the templates of well-known models.
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ '(end)' }}{% endif %}"
)
FALCON = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
QWEN_3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
SHOUTING = "{% for m in messages %}{{ m['content'] | upper + eos_token }}{% endfor %}"
STRIKING = "{% for m in messages %}{{ m['content'] | replace('X', '') + eos_token }}{% endfor %}"
NO_SYSTEM = "{{ raise_exception('System role not supported') }}"


def messages_of(turns: list[tuple[str, str]]) -> list[ChatMessage]:
    return [ChatMessage(role=role, content=content) for role, content in turns]


@pytest.fixture
def chat(tiny_llama: Path) -> Any:
    """A tokenizer with a chat template."""
    return load_tokenizer(BaseModelFiles("tiny", tiny_llama))


@pytest.fixture
def plain(tiny_phi: Path) -> Any:
    """A base model's tokenizer, with the plain Human/Assistant template."""
    return load_tokenizer(BaseModelFiles("tiny", tiny_phi))


@pytest.fixture(params=["chat", "plain"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def text_of(tokenizer: Any, messages: list[ChatMessage], segment: int) -> str:
    """The text of the tokens of one segment."""
    encoded = encode(tokenizer, messages)
    pairs = zip(encoded.ids, encoded.segments, strict=True)
    return str(tokenizer.decode([token for token, other in pairs if other == segment]))


# Training and chatting see the same ids


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_ids_before_each_answer_are_those_of_its_prompt(tokenizer: Any, name: str) -> None:
    messages = messages_of(CONVERSATIONS[name])
    ids, segments = encode(tokenizer, messages).ids, encode(tokenizer, messages).segments
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = encode_prompt(tokenizer, messages[:index])
            assert ids[: len(prompt)] == prompt
            assert segments[len(prompt) - 1 : len(prompt) + 1] == [CONTEXT, ANSWER]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_training_ids_are_prompt_answer_end_and_layout(tokenizer: Any, name: str) -> None:
    messages = messages_of(CONVERSATIONS[name])
    rest = encode(tokenizer, messages).ids[len(encode_prompt(tokenizer, messages[:-1])) :]
    answer = tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
    assert rest[: len(answer) + 1] == [*answer, tokenizer.eos_token_id]
    assert tokenizer.decode(rest[len(answer) + 1 :]).strip() == ""


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_exactly_the_answers_are_answer_tokens(tokenizer: Any, name: str) -> None:
    messages = messages_of(CONVERSATIONS[name])
    answers = "".join(m["content"] for m in messages if m["role"] == "assistant")
    assert text_of(tokenizer, messages, ANSWER) == answers
    assert encode(tokenizer, messages).characters == len(answers)


def test_last_answer_needs_one_rendering_besides_the_whole(
    chat: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    render, rendered = chat.apply_chat_template, []
    monkeypatch.setattr(
        chat, "apply_chat_template", lambda *a, **k: rendered.append(0) or render(*a, **k)
    )
    encode(chat, messages_of(FIRST))
    assert len(rendered) == 2


def test_end_of_each_turn_is_trained_on_and_text_after_it_is_not(tokenizer: Any) -> None:
    messages = messages_of(CONVERSATIONS["multi"])
    assert text_of(tokenizer, messages, END) == tokenizer.eos_token * 3
    encoded = encode(tokenizer, messages)
    assert encoded.segments[-1] == CONTEXT


def test_the_plain_template_is_human_and_assistant(plain: Any) -> None:
    ids = encode(plain, messages_of([("system", "S"), ("user", "Q"), ("assistant", "A")])).ids
    assert plain.decode(ids) == "S\n\nHuman:\nQ\n\nAssistant:\nA<|endoftext|>\n\n"


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), st.sampled_from(["llama", "phi"]))
def test_any_text_is_encoded_unchanged_and_any_prompt_is_a_prefix(
    tiny_llama: Path, tiny_phi: Path, pairs: list[tuple[str, str]], model: str
) -> None:
    tokenizer = load_tokenizer(BaseModelFiles("tiny", tiny_llama if model == "llama" else tiny_phi))
    turns = [t for q, a in pairs for t in (("user", q), ("assistant", a))]
    messages = messages_of(turns)
    ids = encode(tokenizer, messages).ids
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = encode_prompt(tokenizer, messages[:-1])
    assert ids[: len(prompt)] == prompt


# Templates of other models


@pytest.mark.parametrize("template", [PHI_3, QWEN_3])
def test_template_that_rewrites_earlier_turns_trains_on_the_last_answer_only(
    chat: Any, template: str
) -> None:
    chat.chat_template = template
    messages = messages_of(
        [("user", "a"), ("assistant", "bb"), ("user", "c"), ("assistant", "ddd")]
    )
    assert text_of(chat, messages, ANSWER) == "ddd"
    assert encode(chat, messages).characters == 3
    prompt = encode_prompt(chat, messages[:-1])
    assert encode(chat, messages).ids[: len(prompt)] == prompt


def test_one_rewritten_turn_trains_on_the_last_answer_only(chat: Any) -> None:
    chat.chat_template = STRIKING
    turns = [("user", "a"), ("assistant", "X"), ("user", "a"), ("assistant", "b")]
    messages = messages_of([*turns, ("user", "a"), ("assistant", "c")])
    assert text_of(chat, messages, ANSWER) == "c"
    prompt = encode_prompt(chat, messages[:-1])
    assert encode(chat, messages).ids[: len(prompt)] == prompt


def test_rewritten_turn_does_not_stop_a_chat(chat: Any) -> None:
    chat.chat_template = SHOUTING
    prompt = encode_prompt(chat, messages_of([("user", "a"), ("assistant", "b"), ("user", "c")]))
    assert chat.decode(prompt) == "A<|im_end|>B<|im_end|>C<|im_end|>"


def test_answer_changed_by_the_template_is_refused(chat: Any) -> None:
    chat.chat_template = SHOUTING
    with pytest.raises(UserError, match="doesn't put the last answer unchanged"):
        encode(chat, messages_of([*FIRST[:1], ("assistant", "quiet")]))


def test_blanks_around_an_answer_are_trained_on_and_end_no_turn(chat: Any) -> None:
    chat.chat_template = LLAMA_2
    messages = messages_of(
        [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", " d\n")]
    )
    assert text_of(chat, messages, CONTEXT) == "[INST] a [/INST][INST] c [/INST]"
    assert text_of(chat, messages, ANSWER) == " b  d "
    assert end_ids(chat) == [chat.eos_token_id]


def test_template_without_end_of_turn_gets_the_end_token(chat: Any) -> None:
    chat.chat_template = FALCON
    messages = messages_of([("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")])
    ids = encode(chat, messages).ids
    assert chat.decode(ids) == (
        "user: a\nassistant: b<|im_end|>\nuser: c\nassistant: d<|im_end|>\n"
    )
    assert text_of(chat, messages, END) == "<|im_end|>" * 2
    prompt = encode_prompt(chat, messages[:-1])
    assert ids[: len(prompt)] == prompt


def test_template_with_enable_thinking_is_rendered_without_thinking(chat: Any) -> None:
    chat.chat_template = QWEN_3
    assert chat.decode(encode_prompt(chat, messages_of(FIRST[:1]))).endswith(
        "<think>\n\n</think>\n\n"
    )
    assert text_of(chat, messages_of(FIRST), ANSWER) == FIRST[-1][1]


# What ends a reply


def test_replies_end_by_the_template_the_tokenizer_and_the_model(chat: Any) -> None:
    chat.eos_token = "<|endoftext|>"
    assert end_ids(chat) == [0, 2]
    config = SimpleNamespace(eos_token_id=1)
    assert end_ids(chat, SimpleNamespace(generation_config=config)) == [0, 1, 2]
    config.eos_token_id = [1, 5]
    assert end_ids(chat, SimpleNamespace(generation_config=config)) == [0, 1, 2, 5]


# Templates that are hostile, or refuse


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('touch hacked') }}",
        "{{ messages.append(1) }}",
        "{{ lipsum.__globals__['os'].system('touch hacked') }}",
        "{% include '/etc/passwd' %}",
        "{{ range(1000000000) | list }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{% for",
    ],
)
def test_hostile_template_is_refused_and_runs_nothing(
    chat: Any, template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chat.chat_template = template
    with pytest.raises(UserError, match="chat template refuses a conversation"):
        encode(chat, messages_of(FIRST))
    assert list(tmp_path.iterdir()) == []


def test_template_that_refuses_system_messages_is_reported(chat: Any) -> None:
    chat.chat_template = NO_SYSTEM
    with pytest.raises(UserError) as caught:
        encode(chat, messages_of(CONVERSATIONS["system"]))
    assert "System role not supported" in str(caught.value.what)
    assert str(caught.value.where) == "roles: system, user, assistant"
    assert "no system message" in str(caught.value.fix)
