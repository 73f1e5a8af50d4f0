"""What goes wrong, told in Chinese: each message has its words, and no words are left over."""

from __future__ import annotations

import re
import time
from pathlib import Path
from string import Formatter

import pytest
from said import said

import jetson_ft
from jetson_ft import recipe
from jetson_ft.errors import Problem, RecipeError, UserError
from jetson_ft.webui import translate
from jetson_ft.webui.errors_zh import ITEMS, LINES, PARTS, PHASES, WHOLE
from jetson_ft.webui.words import Words, asked

ROOT = Path(jetson_ft.__file__).parent
# Met in the terminal alone: `plan` and `bench` have no page, and a server says why it can't start
# before there is one.
TERMINAL = {"cli.py", "console.py", "chat_terminal.py", "bench", "device", "runs/forecast.py",
            "webui/server.py"}  # fmt: skip
FOUND = said(ROOT, TERMINAL)
# What the source says in ways that `said` can't follow, and the words to find there.
BY_HAND = {
    "line {}": ("data/store.py", 'f"line {row.line}"'),
    "row {}": ("data/store.py", 'f"row {row.number}"'),
    "{} line {}": ("data/store.py", 'prefix = f"{shown(path.name)} "'),
    "{} row {}": ("data/store.py", 'prefix = f"{shown(path.name)} "'),
    "title": ("runs/shelf.py", '("title", title,'),
    "notes": ("runs/shelf.py", '("notes", notes,'),
    "its machine": ("training/group.py", '["its machine"]'),
}
TABLES = {"": WHOLE, "t": PARTS, "lines": LINES, "list": ITEMS}
ALL = {**WHOLE, **PARTS, **LINES, **ITEMS}
TYPES = {re.sub("one of .*", "one of {}", recipe.type_name(f.annotation))
         for _, f in recipe.fields()}  # fmt: skip
# No language: code, options, keys, addresses, units, values.
NO_WORDS = re.compile(r"`[^`]*`|--[\w-]+|\w+\.\w+|\w+://\S+|\{\}|GiB|MiB")
ONE_WORD = re.compile(r"[\w./=<>-]*")


def has_words(text: str) -> bool:
    """Whether there is something to translate; a single word may be a name."""
    return bool(re.search("[A-Za-z]{2}", NO_WORDS.sub(" ", text)) and not ONE_WORD.fullmatch(text))


# Completeness


@pytest.mark.parametrize(
    ("name", "needed", "table"),
    [
        ("WHOLE", FOUND.whole, WHOLE),
        ("PARTS, LINES or ITEMS", FOUND.parts, ALL),
        ("PHASES", FOUND.phases, PHASES),
    ],
    ids=["whole", "parts", "phases"],
)
def test_every_message_has_its_chinese(
    name: str, needed: dict[str, str], table: dict[str, str]
) -> None:
    missing = [
        f"{place}\n    {text!r}: ...,"
        for text, place in needed.items()
        if text not in table and (has_words(text) or name == "PHASES")
    ]
    listed = "\n".join(missing)
    assert not missing, f"Add to {name} in jetson_ft/webui/errors_zh.py:\n{listed}"


def test_no_chinese_is_left_over() -> None:
    known = {**FOUND.whole, **FOUND.parts, **dict.fromkeys([*BY_HAND, *TYPES], "")}
    gone = [text for text in ALL if text not in known]
    gone += [name for name in PHASES if name not in FOUND.phases]
    assert not gone, f"Said nowhere; take out of jetson_ft/webui/errors_zh.py: {gone}"
    assert len(ALL) == sum(map(len, TABLES.values()))
    for text, (file, words) in BY_HAND.items():
        assert words in (ROOT / file).read_text(encoding="utf-8"), text


def test_the_search_finds_the_messages_wherever_they_are_put_together() -> None:
    assert len(FOUND.whole) > 200 and len(FOUND.parts) > 80
    assert "must be {}, not {}; did you mean `{}`?" in FOUND.parts  # a function's result
    assert "; most likely the kernel ended it for want of memory" in FOUND.parts  # a condition
    assert "must be at least {}, not {}" in FOUND.parts  # a table, filled by `format`
    assert "The model was unloaded, as nobody talked for a while." in FOUND.whole  # a table
    assert any("What works offline" in text for text in FOUND.whole)  # a sum


def test_the_search_knows_every_kind_of_error() -> None:
    kinds = set()
    for path in ROOT.rglob("*.py"):
        kinds |= set(re.findall(r"class (\w+)\((?:User|Row)Error\)", path.read_text("utf-8")))
    assert kinds == {
        "OutOfMemory",
        "RecipeError",
        "_BadByte",
    }  # a new one has to be put into said.py, and here


@pytest.mark.parametrize("field", sorted(TYPES))
def test_every_type_of_a_recipe_key_has_its_name(field: str) -> None:
    assert field in PARTS or not has_words(field)


# Translation


def values_of(template: str) -> list[str]:
    """As many values as it has places, none of them translatable."""
    count = sum(name is not None for _, name, *_ in Formatter().parse(template))
    return [f"«值{number} a/b_{number}»" for number in range(count)]


@pytest.mark.parametrize(
    ("wanted", "english"), [(wanted, text) for wanted, table in TABLES.items() for text in table]
)
def test_a_message_comes_back_in_chinese_with_its_values(wanted: str, english: str) -> None:
    values = values_of(english)
    chinese = ALL[english]
    plain = re.sub(r":(t|lines|list)}", "}", chinese)
    told = translate._translated(english.format(*values), wanted, 0)
    assert told == plain.format(*values)
    places = [name for _, name, *_ in Formatter().parse(chinese) if name is not None]
    numbers = {int(name) if name else at for at, name in enumerate(places)}
    left_out = set(range(len(values))) - numbers
    assert not left_out or english == "{} column{}"  # a plural's ending


@pytest.mark.parametrize("chinese", [*ALL.values(), *PHASES.values()])
def test_no_english_punctuation_stands_between_chinese_words(chinese: str) -> None:
    assert not re.search("[\u4e00-\u9fff][,;:!?.()]|[,;!?(][\u4e00-\u9fff]", chinese)
    assert not re.search("[\u4e00-\u9fff][A-Za-z0-9`]|[A-Za-z0-9`][\u4e00-\u9fff]", chinese)


def in_chinese(text: str) -> str:
    return Words("zh").said(text)


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("--set: `lora.rank`: must be at least 1, not 0", "`lora.rank`：不能小于 1，现在是 0"),
        ('`quantize`: must be one of none, int8, nf4, not "nf5"; did you mean `nf4`?',
         '`quantize`：必须是以下之一：none, int8, nf4，不能是 "nf5"；是不是想写 `nf4`？'),
        ("unknown key `rnak`; did you mean `lora.rank`?",
         "没有键 `rnak`；是不是想写 `lora.rank`？"),
        ("The hub is out of reach, so the data set 'a/b' can't be fetched.",
         "无法连接 Hub，无法获取数据集 a/b。"),
        ("The hub knows no model 'a/b', or it is private.", "Hub 上没有模型 a/b，或者它是私有的。"),
        ("3 of 9 rows can't be used:\n  - field `output` missing: 2 (line 1, line 4)\n"
         "  - 1 column where the header has 2: 1 (b.csv line 7)",
         "9 条数据中有 3 条无法使用：\n  - 缺少字段 `output`：2 条（第 1 行、第 4 行）\n"
         "  - 1 列，而列名有 2 列：1 条（b.csv 第 7 行）"),
        ("crashed (signal 9); most likely the kernel ended it for want of memory",
         "已崩溃（信号 9）；很可能是内存不足，被内核终止"),
        ("Process 1 on machine 1 (b) stopped answering; training has ended, the last checkpoint "
         "is kept.", "进程 1（1 号机器 b）没有响应；训练已结束，最后一个检查点已保留。"),
        ("/runs/a/checkpoints/step-3/x is missing; the checkpoint before it is used",
         "缺少 /runs/a/checkpoints/step-3/x；改用它之前的检查点"),
        ("The held-out loss became infinite at step 7; training has stopped. The last good "
         "checkpoint is kept.",
         "第 7 步的留出损失变为无穷大，训练已停止。最后一个完好的检查点已保留。"),
        # A value that looks like one of our words stays as it is.
        ("`model`: must be text, not 3", "`model`：必须是文本，不能是 3"),
        ("There is no run 'training'.", "没有任务 'training'。"),
        ("What an older version said.", "What an older version said."),
        ("", ""),
    ],
)  # fmt: skip
def test_messages_with_values_and_other_messages_in_them(english: str, chinese: str) -> None:
    assert in_chinese(english) == chinese
    assert Words("en").said(english) == english


def test_a_wrong_recipe_is_told_line_by_line() -> None:
    mistakes = [Problem("lora.rank", 3, "`lora.rank`: must not be empty, not \"\""),
                Problem("", 0, "not UTF-8 text")]  # fmt: skip
    told = Words("zh").error_text(RecipeError(mistakes, "/a/recipe.yaml")).splitlines()
    assert told[:4] == [
        "配方有 2 处错误：", '  - 第 3 行：`lora.rank`：不能为空，现在是 ""', "  - 不是 UTF-8 文本",
        "位置：/a/recipe.yaml",
    ]  # fmt: skip
    assert told[4].startswith("办法：`jetson-ft recipe schema`")


def test_every_mistake_that_a_form_can_make_is_told_in_chinese() -> None:
    values = {"": "", "x y": "", "-1": "", "0": "", "1e99": "", ".nan": "", "[]": "", "a\x01": ""}
    for key, _ in recipe.fields():
        for value in values:
            try:
                recipe.parse("", "", [f"{key}={value}"])
            except RecipeError as error:
                (problem,) = error.problems
                told = in_chinese(problem.message)
                assert told.startswith(f"`{key}`：") and re.search("[\u4e00-\u9fff]", told[9:])
                assert not re.search("must|not ", told.replace(value, ""))


def test_an_error_without_place_or_remedy_is_one_line() -> None:
    assert Words("zh").error_text(UserError("There is no such file.")) == "没有这个文件。"
    assert Words("en").error_text(UserError("No.", "x", "Do.")) == "No.\nwhere: x\nfix: Do."


def test_unknown_phases_keep_their_name() -> None:
    assert [Words("zh").phase(name) for name in ("model", "dancing")] == ["加载模型", "dancing"]
    assert Words("en").phase("model") == "model"


@pytest.mark.parametrize(
    "piece", ["`", "a", "` : ", "`x`: ", " on ", ", not ", "{}", "\n  - x: 1 ("]
)
def test_long_messages_take_no_time(piece: str) -> None:
    in_chinese("no such thing")  # the table is made once
    long = piece * (20_000 // len(piece))
    for text in (long, f"--set: `{long}", f"3 of 9 rows can't be used:{long}"):
        started = time.perf_counter()
        in_chinese(text)
        assert time.perf_counter() - started < 2


# The language of an answer


@pytest.mark.parametrize(
    ("path", "headers", "language"),
    [
        ("/live/zh/runs/a", {"accept-language": "en"}, "zh"),
        ("/runs/zh/stop", {"referer": "http://a:7860/en/?run=zh", "accept-language": "zh"}, "en"),
        ("/runs/a/stop", {"referer": "http://a/zh/", "cookie": "jetson-ft-language=en"}, "zh"),
        ("/runs/a/stop", {"cookie": "jetson-ft-language=zh", "accept-language": "en"}, "zh"),
        ("/runs/a/stop", {"cookie": "jetson-ft-language=fr", "accept-language": "zh-CN"}, "zh"),
        ("/zh", {"referer": "http://["}, "en"),
        ("/", {}, "en"),
    ],
)  # fmt: skip
def test_an_answer_speaks_the_pages_language(
    path: str, headers: dict[str, str], language: str
) -> None:
    assert asked(path, headers) == language
