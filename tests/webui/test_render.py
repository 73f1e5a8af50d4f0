"""The language of the page and of responses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folders import make_run

from jetson_ft.errors import Message, UserError
from jetson_ft.i18n import duration
from jetson_ft.webui.fragments import Fragments
from jetson_ft.webui.render import Locale, preferred_language, request_language


@pytest.mark.parametrize(
    ("accepted", "language"),
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh_CN"), ("en-GB,en;q=0.9", "en"),
        ("fr,zh;q=0.3,en;q=0.5", "en"), ("zh-Hans-CN", "zh_CN"), ("", "en"), ("de", "en"),
        ("zh;q=oops, en", "en"),
    ],
)  # fmt: skip
def test_the_browsers_first_language_with_a_catalogue_is_preferred(
    accepted: str, language: str
) -> None:
    assert preferred_language(accepted) == language


@pytest.mark.parametrize(
    ("path", "headers", "language"),
    [
        ("/live/zh_CN/runs/a", {"accept-language": "en"}, "zh_CN"),
        ("/runs/zh_CN/stop", {"referer": "http://a:7860/en/?run=zh_CN", "accept-language": "zh"},
         "en"),
        ("/runs/a/stop", {"referer": "http://a/zh_CN/", "cookie": "jetson-ft-language=en"},
         "zh_CN"),
        ("/runs/a/stop", {"cookie": "jetson-ft-language=zh_CN", "accept-language": "en"}, "zh_CN"),
        ("/runs/a/stop", {"cookie": "jetson-ft-language=fr", "accept-language": "zh-CN"}, "zh_CN"),
        ("/zh_CN", {"referer": "http://["}, "en"),
        ("/", {}, "en"),
    ],
)  # fmt: skip
def test_a_response_has_the_language_of_its_page(
    path: str, headers: dict[str, str], language: str
) -> None:
    assert request_language(path, headers) == language


def test_texts_messages_and_errors_are_put_into_the_language() -> None:
    t = Locale("zh_CN")
    assert t.tag == "zh-CN"
    assert t("step {step:,}", step=3) == t(Message("step {step:,}", {"step": 3})) == "第 3 步"
    assert t(UserError("File not found.")) == "没有这个文件。"
    assert t(duration(3725)) == "1 小时 02 分"


@pytest.mark.parametrize("language", ["xx", "../en", "zh"])
def test_a_language_without_catalogue_becomes_english(language: str) -> None:
    t = Locale(language)
    assert t.language == "en" and t(duration(245)) == "4 min 05 s"


def test_report_without_a_comparison_is_linked(tmp_path: Path) -> None:
    run = make_run(tmp_path, "uncompared")
    link = f'href="/runs/{run.name}/report.html"'
    assert link not in Fragments(tmp_path).run_head("en", run.name, "overview")
    (run.path / "report.json").write_text(json.dumps({"eval": None}))
    (run.path / "report.html").write_text("<p>")
    assert link in Fragments(tmp_path).run_head("en", run.name, "overview")
