"""Conversations as ids: segments, and that training and chatting see the same ids."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chat_templates import (
    FALCON, GEMMA_3, LLAMA_2, LLAMA_3, NO_PROMPT, PHI_3, QWEN_3, QWEN_3_THINKING, R1, SHOUTING,
    STRIKING,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st

from jetson_ft.data import render_template
from jetson_ft.data.chat_template import (
    ANSWER,
    CONTEXT,
    END,
    encode,
    encode_prompt,
    end_ids,
    prompt_and_reference,
)
from jetson_ft.data.formats import ChatMessage
from jetson_ft.data.templates import TEMPLATES
from jetson_ft.errors import UserError
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.models.loading import load_tokenizer

FIRST = [("user", "你好，请问 1+1？"), ("assistant", "等于二。")]
CONVERSATIONS = {
    "single": FIRST,
    "system": [("system", "Be brief."), *FIRST],
    "multi": [*FIRST, ("user", "And 2+2?"), ("assistant", " four \n"), *FIRST],
}


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
    render, rendered = render_template.render, []
    monkeypatch.setattr(
        render_template,
        "render",
        lambda requests: rendered.extend(len(r.renderings) for r in requests) or render(requests),
    )
    encode(chat, messages_of(FIRST))
    assert rendered == [2]


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


@pytest.mark.parametrize("template", [PHI_3, QWEN_3, QWEN_3_THINKING])
def test_template_that_rewrites_earlier_turns_trains_on_the_last_answer_only(
    chat: Any, template: str
) -> None:
    chat.chat_template = template
    messages = messages_of(
        [("user", "a"), ("assistant", "bb"), ("user", "c"), ("assistant", "ddd")]
    )
    assert text_of(chat, messages, ANSWER) == "ddd"
    assert encode(chat, messages).characters == 3
    assert encode(chat, messages).context_answers == 1
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


def test_open_thought_of_the_prompt_is_closed_in_training_as_in_chatting(chat: Any) -> None:
    chat.chat_template = R1
    chat.bos_token = "<|endoftext|>"
    prompt = encode_prompt(chat, messages_of(FIRST[:1]))
    assert chat.decode(prompt) == (
        f"<|endoftext|><User>{FIRST[0][1]}<Assistant><think>\n\n</think>\n\n"
    )
    encoded = encode(chat, messages_of(FIRST))
    assert encoded.ids[: len(prompt)] == prompt
    assert text_of(chat, messages_of(FIRST), ANSWER) == FIRST[1][1]
    assert text_of(chat, messages_of(FIRST), END) == "<|im_end|>"
    assert encode(chat, messages_of([*FIRST, *FIRST])).context_answers == 1


@pytest.mark.parametrize("template", [R1, QWEN_3_THINKING])
def test_answer_with_a_thought_that_the_template_moves_is_refused_with_a_way_out(
    chat: Any, template: str
) -> None:
    chat.chat_template = template
    messages = messages_of([("user", "q"), ("assistant", "<think>\nt\n</think>\n\na")])
    with pytest.raises(UserError, match="doesn't put the last answer unchanged") as caught:
        encode(chat, messages)
    assert "data.chat_template" in str(caught.value.fix) and "chatml" in str(caught.value.fix)
    chat.chat_template = TEMPLATES["chatml"]
    assert text_of(chat, messages, ANSWER) == messages[1]["content"]


def test_template_without_generation_prompt_opens_the_turn_in_training_and_chat(chat: Any) -> None:
    chat.chat_template = NO_PROMPT
    messages = messages_of([*FIRST, ("user", "c"), ("assistant", "d")])
    prompt = encode_prompt(chat, messages[:-1])
    assert chat.decode(prompt).endswith("<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n")
    assert encode(chat, messages).ids[: len(prompt)] == prompt
    assert text_of(chat, messages, ANSWER) == FIRST[1][1] + "d"


def test_system_message_before_the_first_question_is_kept(chat: Any) -> None:
    chat.chat_template = GEMMA_3
    messages = messages_of(CONVERSATIONS["system"])
    assert "user\nBe brief.\n\n" in chat.decode(encode(chat, messages).ids)
    assert not encode(chat, messages).system_dropped


def test_system_message_that_the_template_drops_is_noticed(chat: Any) -> None:
    chat.chat_template = NO_PROMPT.replace("messages %}", "messages if m['role'] != 'system' %}", 1)
    assert encode(chat, messages_of(CONVERSATIONS["system"])).system_dropped
    assert not encode(chat, messages_of(FIRST)).system_dropped


@pytest.mark.parametrize("name", TEMPLATES)
def test_shipped_templates_train_on_every_answer(chat: Any, name: str) -> None:
    chat.chat_template = TEMPLATES[name]
    messages = messages_of([("system", "S"), *CONVERSATIONS["multi"]])
    encoded = encode(chat, messages)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert text_of(chat, messages, ANSWER) == "".join(answers)
    assert (encoded.context_answers, encoded.system_dropped) == (0, False)
    prompt = encode_prompt(chat, messages[:-1])
    assert encoded.ids[: len(prompt)] == prompt


def test_thought_that_the_template_opens_before_every_answer_stays_open(chat: Any) -> None:
    opened = "{{ '<Assistant><think>\\n' + m['content'] + eos_token }}"
    chat.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<User>' + m['content'] }}"
        f"{{% else %}}{opened}{{% endif %}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<Assistant><think>\\n' }}{% endif %}"
    )
    messages = messages_of([("user", "q"), ("assistant", "t</think>a")] * 2)
    prompt = encode_prompt(chat, messages[:-1])
    assert chat.decode(prompt).endswith("<think>\n")
    assert encode(chat, messages).ids[: len(prompt)] == prompt
    assert text_of(chat, messages, ANSWER) == "t</think>a" * 2


# Answers that are not trained on


def test_answer_that_is_not_to_be_trained_on_is_context(chat: Any) -> None:
    messages = messages_of(CONVERSATIONS["multi"])
    whole = encode(chat, messages)
    for message, train in zip(messages, [None, False, None, True, None, None], strict=True):
        message.update({"train": train})  # type: ignore[typeddict-item]
    encoded = encode(chat, messages)
    assert encoded.ids == whole.ids
    assert text_of(chat, messages, ANSWER) == " four \n等于二。"
    assert text_of(chat, messages, END) == "<|im_end|>" * 2
    assert encoded.characters == whole.characters - len(FIRST[1][1])
    assert encoded.context_answers == 0, "only what the template rewrites"


def test_messages_after_the_last_trained_answer_are_left_out(chat: Any) -> None:
    chat.chat_template = QWEN_3
    messages = messages_of([*FIRST, ("user", "c"), ("assistant", "d")])
    messages[-1].update({"train": False})  # type: ignore[typeddict-item]
    assert encode(chat, messages).ids == encode(chat, messages_of(FIRST)).ids
    prompt, reference = prompt_and_reference(chat, messages)
    assert (prompt, reference) == (encode_prompt(chat, messages[:1]), FIRST[1][1])


# Tools

CALL = json.dumps(
    [{"type": "function", "function": {"name": "humidity", "arguments": {"room": 3}}}]
)
TOOLS = json.dumps([{"type": "function", "function": {"name": "humidity", "parameters": {}}}])
CALLING: list[Any] = [
    {"role": "user", "content": "三号仓库？", "tool_calls": None, "train": None},
    {"role": "assistant", "content": "", "tool_calls": CALL, "train": None},
    {"role": "tool", "content": '{"percent": 61}', "tool_calls": None, "train": None},
    {"role": "assistant", "content": "61%。", "tool_calls": None, "train": None},
]
CHATML_CALL = '<tool_call>\n{"name": "humidity", "arguments": {"room": 3}}\n</tool_call>'


@pytest.mark.parametrize(
    ("template", "call"),
    [
        (TEMPLATES["chatml"], CHATML_CALL),
        (LLAMA_3, '{"name": "humidity", "parameters": {"room": 3}}'),
    ],
)
def test_tool_calls_are_trained_on_and_tools_and_results_are_context(
    chat: Any, template: str, call: str
) -> None:
    chat.chat_template = template
    encoded = encode(chat, CALLING, TOOLS)
    pairs = list(zip(encoded.ids, encoded.segments, strict=True))
    assert chat.decode([i for i, role in pairs if role == ANSWER]) == call + "61%。"
    assert chat.decode([i for i, role in pairs if role == END]) == "<|im_end|>" * 2
    context = chat.decode([i for i, role in pairs if role == CONTEXT])
    assert "parameters" in context and "61}" in context
    for count in (1, 3):
        prompt = encode_prompt(chat, CALLING[:count], TOOLS)
        assert encoded.ids[: len(prompt)] == prompt
    prompt, reference = prompt_and_reference(chat, CALLING[:2], TOOLS)
    assert (prompt, reference) == (encode_prompt(chat, CALLING[:1], TOOLS), call)


def test_tool_call_that_the_template_rewrites_is_context(chat: Any) -> None:
    chat.chat_template = QWEN_3_THINKING
    encoded = encode(chat, CALLING, TOOLS)
    assert encoded.context_answers == 1
    pairs = zip(encoded.ids, encoded.segments, strict=True)
    assert chat.decode([i for i, role in pairs if role == ANSWER]) == "61%。"
    call = encode(chat, CALLING[:2], TOOLS)
    pairs = zip(call.ids, call.segments, strict=True)
    assert "humidity" in chat.decode([i for i, role in pairs if role == ANSWER])


def test_text_before_a_tool_call_is_trained_on_with_it(chat: Any) -> None:
    chat.chat_template = TEMPLATES["chatml"]
    call = {**CALLING[1], "content": "Let me look."}
    encoded = encode(chat, [CALLING[0], call], TOOLS)
    answer = [i for i, role in zip(encoded.ids, encoded.segments, strict=True) if role == ANSWER]
    assert chat.decode(answer) == f"Let me look.\n{CHATML_CALL}"


def test_bare_tools_are_given_in_the_form_of_openai(chat: Any) -> None:
    chat.chat_template = TEMPLATES["chatml"]
    bare = json.dumps([tool["function"] for tool in json.loads(TOOLS)])
    assert encode(chat, CALLING, bare).ids == encode(chat, CALLING, TOOLS).ids


@pytest.mark.parametrize(
    "tools", ["{", "3", "[3]", '["a"]', "[{}]", '[{"function": "name"}]', "null"]
)
def test_malformed_tools_are_refused(chat: Any, tools: str) -> None:
    with pytest.raises(UserError, match="not a JSON list of named functions"):
        encode(chat, messages_of(FIRST), tools)


@pytest.mark.parametrize(
    ("messages", "tools", "what"),
    [
        (CALLING[:1] + CALLING[3:], TOOLS, "renders no tools"),
        (CALLING, "", "renders no tool calls"),
        (CALLING[:1] + CALLING[2:], "", "renders no tool results"),
    ],
)
def test_template_without_tools_is_refused_with_a_way_out(
    plain: Any, messages: list[Any], tools: str, what: str
) -> None:
    with pytest.raises(UserError, match=what) as caught:
        encode(plain, messages, tools)
    assert "data.chat_template" in str(caught.value.fix)


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
    chat.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(UserError) as caught:
        encode(chat, messages_of(CONVERSATIONS["system"]))
    assert "System role not supported" in str(caught.value.what)
    assert str(caught.value.where) == "roles: system, user, assistant"
    assert "no system message" in str(caught.value.fix)
