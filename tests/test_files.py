"""Safe names, visible control characters, whole writes, and plain words for the disk's refusals."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jetson_ft import files
from jetson_ft.chat.target import resolve_target
from jetson_ft.cli.chat import Terminal
from jetson_ft.data.sources import resolve_source
from jetson_ft.errors import Message, Problem, RecipeError, UserError
from jetson_ft.inference.generate import Sampling
from jetson_ft.models.files import resolve_model
from jetson_ft.recipe import Recipe
from jetson_ft.runs import manager, store

UNUSED: Any = None


def test_error_has_what_where_and_fix() -> None:
    assert str(UserError("It broke.", "x.json", "Fix it.")) == (
        "It broke.\n  where: x.json\n  fix:   Fix it."
    )
    assert str(UserError("It broke.")) == "It broke."


def test_recipe_error_lists_all_mistakes_and_has_them_as_problems() -> None:
    problems = [Problem("lora.rank", 3, Message("too small")), Problem("", 0, Message("too long"))]
    error = RecipeError(problems, "x.yaml")
    assert error.problems == problems
    assert str(error).startswith(
        "The recipe has 2 mistakes:\n  - line 3: too small\n  - too long\n"
    )
    assert "The recipe has a mistake:" in str(RecipeError(problems[:1], ""))


@pytest.mark.parametrize(
    "resolve",
    [
        files.expand_user,
        resolve_model,
        resolve_source,
        lambda name: resolve_target(name, Path("runs")),
        lambda name: store.find_run(name, Path("runs")),
        lambda name: store.create_run(Recipe(output_dir=name), "x"),
        lambda name: manager.launch(Recipe(output_dir=name), "x"),
        lambda name: manager.check_recipe(Recipe(model=name)),
        lambda name: manager.check_recipe(Recipe.model_validate({"data": {"heldout": name}})),
        lambda name: Terminal(UNUSED, Sampling())._run_command(f"/examples {name}"),
    ],
)
def test_path_of_an_unknown_user_is_refused(resolve: Callable[[str], Any]) -> None:
    with pytest.raises(UserError, match="user") as caught:
        resolve("~nobody-here/x")
    assert "~nobody-here/x" in str(caught.value.where) and "./" in str(caught.value.fix)


def test_user_is_expanded_at_the_start_of_a_path_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    texts = "~", "~/x", "./~x", "a/~/b", "", "/~"
    paths = "/home/me", "/home/me/x", "~x", "a/~/b", ".", "/~"
    assert [str(files.expand_user(text)) for text in texts] == [*paths]


@pytest.mark.parametrize("text", ["~a\0b", "~\ud800", "~" + "x" * 5000])
def test_impossible_user_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="user"):
        files.expand_user(text)


@pytest.mark.parametrize("name", ["a", "20261121-run_2.b", "x" * 100])
def test_ordinary_name_is_unchanged(name: str) -> None:
    assert files.safe_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "-rf", ".hidden", "a\0b", "a\n", "\x1b[31m", "<b>", "x" * 101],
)
def test_unsafe_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="not a usable name") as caught:
        files.safe_name(name)
    assert "\x1b" not in str(caught.value)


@settings(deadline=None)
@given(st.text())
def test_safe_name_stays_in_its_folder(name: str) -> None:
    try:
        safe = files.safe_name(name)
    except UserError:
        return
    assert Path("/root", safe).resolve() == Path("/root") / safe
    assert not safe.startswith("-")


def test_control_characters_become_visible_and_text_stays() -> None:
    assert files.printable("a\x1b[2Jb\r\x00\x9b") == "a\\x1b[2Jb\\x0d\\x00\\x9b"
    assert files.printable("中文\tline\n") == "中文\tline\n"
    assert files.printable("x\u202egpj") == "x\\u202egpj"


@settings(deadline=None)
@given(st.text(st.characters()))
def test_printable_text_can_always_be_written_and_holds_no_escapes(text: str) -> None:
    shown = files.printable(text)
    shown.encode("utf-8")
    controls = {*range(32), *range(0x7F, 0xA0)} - {9, 10}
    assert not controls & set(map(ord, shown))
    assert files.printable(shown) == shown


def test_cache_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("JETSON_FT_CACHE", str(tmp_path / "own"))
    assert files.cache_dir("a", "b") == tmp_path / "own" / "a" / "b"
    monkeypatch.setenv("JETSON_FT_CACHE", "")
    assert files.cache_dir() == tmp_path / "xdg" / "jetson-ft"
    assert files.cache_dir().is_dir()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert files.cache_dir() == tmp_path / "home" / ".cache" / "jetson-ft"


def test_cache_folder_that_cant_be_created_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("JETSON_FT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="Expected a folder, found a file") as caught:
        files.cache_dir()
    assert str(caught.value.where) == str(tmp_path / "file" / "cache")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "disk is full"),
        (errno.EACCES, "can't be written or read"),
        (errno.EROFS, "can't be written or read"),
        (errno.ENOTDIR, "Expected a folder, found a file"),
        (errno.ENOENT, "File or folder not found"),
        (errno.EIO, os.strerror(errno.EIO)),
    ],
)
def test_operating_system_error_becomes_a_plain_message(
    code: int, words: str, tmp_path: Path
) -> None:
    place = tmp_path / "not" / "there"
    with pytest.raises(UserError, match=words) as caught, files.disk_errors(place):
        raise OSError(code, os.strerror(code))
    assert str(caught.value.where) == str(place)
    assert str(caught.value.fix)


def test_full_disk_is_reported_with_free_space_and_fixes(tmp_path: Path) -> None:
    error = files.disk_error(tmp_path / "x", OSError(errno.ENOSPC, "No space"))
    free = shutil.disk_usage(tmp_path).free / 2**20
    reported = float(str(error.what).split("(")[1].split(" MiB")[0].replace(",", ""))
    assert abs(reported - free) < max(64, free / 10)
    assert all(word in str(error.fix) for word in ("output_dir=", "JETSON_FT_CACHE", "HF_HOME"))


def test_a_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_atomic(path, "很长的旧内容" * 100)
    files.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()])
def test_failed_write_keeps_the_old_file_and_nothing_else(
    tmp_path: Path, error: BaseException
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)), files.staged(path) as file:
        file.write(b"half")
        raise error
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_staged_file_has_its_name_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with files.staged(path) as file:
        file.write(b"x" * 100_000)
        assert not path.exists()
    assert path.stat().st_size == 100_000


def test_a_reader_never_sees_half_a_write(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    contents = {b"a" * 300_000, b"b" * 300_000}
    files.write_atomic(path, b"a" * 300_000)
    done = threading.Event()

    def write() -> None:
        for _ in range(20):
            for content in contents:
                files.write_atomic(path, content)
        done.set()

    threading.Thread(target=write).start()
    seen = set()
    while not done.is_set():
        seen.add(path.read_bytes())
    assert seen <= contents


def test_the_content_is_on_the_disk_before_its_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, order = tmp_path / "a", []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append(path.exists()), sync(handle)))
    files.write_atomic(path, "x")
    assert order == [False, True]  # the file while it is unnamed, then the folder's entry


def test_written_file_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        files.write_atomic(tmp_path / "a", "x")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_written_json_is_read_back_with_text_unescaped(tmp_path: Path) -> None:
    value = {"text": "中文", "numbers": [1, 2.5, None]}
    files.write_json(tmp_path / "a.json", value)
    assert "中文" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert files.read_json(tmp_path / "a.json") == value


def test_nan_is_not_written_as_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000])
def test_invalid_json_file_is_reported(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not valid JSON") as caught:
        files.read_json(path)
    assert str(caught.value.where) == str(path)
    assert str(caught.value.fix)


def test_missing_json_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found") as caught:
        files.read_json(tmp_path / "gone.json")
    assert str(caught.value.where) == str(tmp_path / "gone.json")


def test_the_hash_covers_every_byte(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000  # more than one block
    (tmp_path / "a").write_bytes(content)
    assert files.sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_cached_hash_is_computed_again_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JETSON_FT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.json"
    path.write_text("[1]")
    first = files.cached_sha256(path)
    with monkeypatch.context() as patch:
        patch.setattr(files, "sha256_file", lambda path: pytest.fail("hashed again"))
        assert files.cached_sha256(path) == first
    path.write_text("[1, 2]")
    assert files.cached_sha256(path) != first
