"""The catalogues are complete, and texts pass through them and through JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from babel.messages.catalog import Catalog
from script_modules import SCRIPTS, load_script

from jetson_ft import i18n
from jetson_ft.errors import Message, Problem, RecipeError, UserError, joined

CATALOGUES = sorted(i18n.FOLDER.glob("*.po"))
HAN = "\u4e00-\u9fff"


@pytest.fixture(scope="module")
def messages() -> Any:
    return load_script("messages")


@pytest.fixture(scope="module")
def template(messages: Any) -> Any:
    return messages.extract()


# Catalogues


def test_source_texts_from_python_and_templates_are_extracted(template: Any) -> None:
    texts = {message.id for message in template}
    assert {"where:", "Train", "Resume", "paused until the device has cooled"} <= texts


@pytest.mark.parametrize("path", CATALOGUES, ids=lambda path: path.stem)
def test_each_catalogue_has_every_text_and_no_other(
    path: Path, messages: Any, template: Any
) -> None:
    assert not list(messages.check(path, template))


def test_check_mode_passes_and_writes_nothing() -> None:
    before = [path.read_bytes() for path in CATALOGUES]
    done = subprocess.run(
        [sys.executable, SCRIPTS / "messages.py", "--check"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert [path.read_bytes() for path in CATALOGUES] == before


@pytest.mark.parametrize("path", CATALOGUES, ids=lambda path: path.stem)
def test_updating_a_complete_catalogue_keeps_its_bytes(
    path: Path, messages: Any, template: Any, tmp_path: Path
) -> None:
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    messages.update(copy, template)
    assert copy.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ('msgid "{size} bytes"\nmsgstr "{size} 字节"', None),
        ('msgid "other"\nmsgstr "x"', "not in the source: 'other'"),
        ('msgid "{size} bytes"\nmsgstr ""', "without translation: '{size} bytes'"),
        ('#, fuzzy\nmsgid "{size} bytes"\nmsgstr "{size}"', "fuzzy: '{size} bytes'"),
        ('msgid "{size} bytes"\nmsgstr "{n} 字节"', "other fields in the translation"),
        ('msgid "{size} bytes"\nmsgstr "{size 字节"', "other fields in the translation"),
        ('msgid "{size} bytes"\nmsgstr "{} 字节"', "other fields in the translation"),
    ],
)
def test_a_faulty_entry_is_reported(
    entry: str, fault: str | None, messages: Any, tmp_path: Path
) -> None:
    source = Catalog()
    source.add("{size} bytes")
    path = tmp_path / "zh_CN.po"
    path.write_text(f"{messages.HEADER.format(language='zh_CN')}{entry}\n", encoding="utf-8")
    faults = list(messages.check(path, source))
    assert faults[0].startswith(fault) if fault else not faults


def test_a_reworded_text_keeps_its_translation_as_fuzzy(messages: Any, tmp_path: Path) -> None:
    path = tmp_path / "zh_CN.po"
    entry = 'msgid "Run {name} not found."\nmsgstr "没有任务 {name}。"'
    path.write_text(f"{messages.HEADER.format(language='zh_CN')}{entry}\n", encoding="utf-8")
    source = Catalog()
    source.add("The run {name} is not found.")
    messages.update(path, source)
    (fault,) = messages.check(path, source)
    assert fault.startswith("fuzzy") and "没有任务" in path.read_text(encoding="utf-8")


def test_chinese_text_has_chinese_punctuation_and_spaces_around_latin(messages: Any) -> None:
    for message in messages.read(i18n.FOLDER / "zh_CN.po"):
        text = str(message.string) if message.id else ""
        assert not re.search(f"[{HAN}][,;:!?.()]|[,;!?(][{HAN}]", text), text
        assert not re.search(f"[{HAN}][A-Za-z0-9`]|[A-Za-z0-9`][{HAN}]", text), text


# Translation


def test_languages_are_listed_by_their_own_names() -> None:
    assert i18n.languages() == {"en": "English", "zh_CN": "简体中文"}


def test_a_text_without_translation_stays_english() -> None:
    chinese = i18n.translator("zh_CN")
    assert (chinese("Train"), chinese("no such text"), chinese("")) == ("训练", "no such text", "")
    assert i18n.translator("xx")("Train") == "Train"


def test_a_nested_message_is_translated_and_its_values_are_not() -> None:
    message = Message("{time} left", {"time": Message("base model")})
    assert message.format(i18n.translator("zh_CN")) == "剩余 基座模型"
    value = Message("{time} left", {"time": "base model"})
    assert value.format(i18n.translator("zh_CN")) == "剩余 base model"


@pytest.mark.parametrize(
    ("seconds", "english", "chinese"),
    [
        (0.4, "0 s", "0 秒"),
        (245, "4 min 05 s", "4 分 05 秒"),
        (3725, "1 h 02 min", "1 小时 02 分"),
    ],
)
def test_durations_have_two_units(seconds: float, english: str, chinese: str) -> None:
    message = i18n.duration(seconds)
    assert (str(message), message.format(i18n.translator("zh_CN"))) == (english, chinese)


# JSON


@pytest.mark.parametrize(
    "message",
    [
        Message("plain"),
        Message("{size:.2f} GiB", {"size": 1.5}),
        Message("{a}: {b}", {"a": "x", "b": Message("{c}", {"c": Message("deep")})}),
        joined([Message("one"), Message("{n}", {"n": 2})], ", "),
    ],
)
def test_messages_survive_json(message: Message) -> None:
    data = json.loads(json.dumps(message.as_json()))
    assert Message.from_json(data) == message and str(Message.from_json(data)) == str(message)


def test_errors_survive_json_and_are_translated_afterwards() -> None:
    problems = [
        Problem("lora.rank", 3, Message("{key} is wrong", {"key": "lora.rank"})),
        Problem("", 0, Message("not text")),
    ]
    error = RecipeError(problems, "/a/recipe.yaml")
    copy = UserError.from_json(json.loads(json.dumps(error.as_json())))
    assert str(copy) == str(error)
    lines = copy.format(i18n.translator("zh_CN")).splitlines()
    assert lines[0] == "配方有 2 处错误："
    assert lines[1] == "  - 第 3 行：lora.rank is wrong"
    assert lines[3].startswith("  位置：") and lines[3].endswith(" /a/recipe.yaml")


def test_an_error_without_place_and_fix_is_one_line() -> None:
    assert str(UserError("{thing} not found.", thing="It")) == "It not found."
