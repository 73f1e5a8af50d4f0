"""Safe names, visible control characters, whole writes, and plain words for the disk's refusals."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jetson_ft import paths
from jetson_ft.errors import Problem, RecipeError, UserError


def test_an_error_says_what_where_and_how_to_mend_it() -> None:
    assert str(UserError("It broke.", "x.json", "Mend it.")) == (
        "It broke.\n  where: x.json\n  fix:   Mend it."
    )
    assert str(UserError("It broke.")) == "It broke."


def test_a_recipe_error_lists_every_mistake_and_keeps_them_for_the_form() -> None:
    problems = [Problem("lora.rank", 3, "too small"), Problem("", 0, "too long")]
    error = RecipeError(problems, "x.yaml")
    assert error.problems == problems
    assert str(error).startswith(
        "The recipe has 2 mistakes:\n  - line 3: too small\n  - too long\n"
    )
    assert "The recipe has a mistake:" in str(RecipeError(problems[:1], ""))


@pytest.mark.parametrize("name", ["a", "20261121-run_2.b", "x" * 100])
def test_ordinary_names_are_taken_as_they_are(name: str) -> None:
    assert paths.safe_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "-rf", ".hidden", "a\0b", "a\n", "\x1b[31m", "<b>", "x" * 101],
)
def test_names_that_could_leave_the_folder_or_trick_a_shell_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="not a usable name") as caught:
        paths.safe_name(name)
    assert "\x1b" not in str(caught.value)


@settings(deadline=None)
@given(st.text())
def test_no_name_that_passes_can_leave_its_folder(name: str) -> None:
    try:
        safe = paths.safe_name(name)
    except UserError:
        return
    assert Path("/root", safe).resolve() == Path("/root") / safe
    assert not safe.startswith("-")


def test_control_characters_become_visible_and_text_stays() -> None:
    assert paths.printable("a\x1b[2Jb\r\x00\x9b") == "a\\x1b[2Jb\\x0d\\x00\\x9b"
    assert paths.printable("中文\tline\n") == "中文\tline\n"
    assert paths.printable("x\u202egpj") == "x\\u202egpj"


@settings(deadline=None)
@given(st.text(st.characters()))
def test_printable_text_can_always_be_written_and_holds_no_escapes(text: str) -> None:
    shown = paths.printable(text)
    shown.encode("utf-8")
    controls = {*range(32), *range(0x7F, 0xA0)} - {9, 10}
    assert not controls & set(map(ord, shown))
    assert paths.printable(shown) == shown


def test_the_cache_is_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("JETSON_FT_CACHE", str(tmp_path / "own"))
    assert paths.cache_dir("a", "b") == tmp_path / "own" / "a" / "b"
    monkeypatch.setenv("JETSON_FT_CACHE", "")
    assert paths.cache_dir() == tmp_path / "xdg" / "jetson-ft"
    assert paths.cache_dir().is_dir()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert paths.cache_dir() == tmp_path / "home" / ".cache" / "jetson-ft"


def test_a_cache_that_cant_be_made_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("JETSON_FT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="A file stands where a folder is needed") as caught:
        paths.cache_dir()
    assert caught.value.where == str(tmp_path / "file" / "cache")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "disk is full"),
        (errno.EACCES, "can't be written or read"),
        (errno.EROFS, "can't be written or read"),
        (errno.ENOTDIR, "A file stands where a folder is needed"),
        (errno.ENOENT, "There is no such file or folder"),
        (errno.EIO, os.strerror(errno.EIO)),
    ],
)
def test_the_systems_refusals_are_put_in_plain_words(code: int, words: str, tmp_path: Path) -> None:
    place = tmp_path / "not" / "there"
    with pytest.raises(UserError, match=words) as caught, paths.disk_errors(place):
        raise OSError(code, os.strerror(code))
    assert caught.value.where == str(place)
    assert caught.value.fix


def test_a_full_disk_is_told_with_its_free_space_and_the_ways_out(tmp_path: Path) -> None:
    error = paths.disk_error(tmp_path / "x", OSError(errno.ENOSPC, "No space"))
    free = shutil.disk_usage(tmp_path).free / 2**20
    told = float(error.what.split("(")[1].split(" MiB")[0].replace(",", ""))
    assert abs(told - free) < max(64, free / 10)
    assert all(word in error.fix for word in ("output=", "JETSON_FT_CACHE", "HF_HOME"))


def test_a_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    paths.write_atomic(path, "很长的旧内容" * 100)
    paths.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()])
def test_a_write_that_breaks_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: BaseException
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)), paths.staged(path) as file:
        file.write(b"half")
        raise error
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_staged_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with paths.staged(path) as file:
        file.write(b"x" * 100_000)
        assert not path.exists()
    assert path.stat().st_size == 100_000


def test_a_reader_never_sees_half_a_write(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    contents = {b"a" * 300_000, b"b" * 300_000}
    paths.write_atomic(path, b"a" * 300_000)
    done = threading.Event()

    def write() -> None:
        for _ in range(20):
            for content in contents:
                paths.write_atomic(path, content)
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
    paths.write_atomic(path, "x")
    assert order == [False, True]  # the file while it is unnamed, then the folder's entry


def test_written_files_have_the_permissions_the_person_wants(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        paths.write_atomic(tmp_path / "a", "x")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_json_is_readable_and_comes_back(tmp_path: Path) -> None:
    value = {"text": "中文", "numbers": [1, 2.5, None]}
    paths.write_json(tmp_path / "a.json", value)
    assert "中文" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert paths.read_json(tmp_path / "a.json") == value


def test_nan_is_not_written_as_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        paths.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000])
def test_json_that_cant_be_read_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not valid JSON") as caught:
        paths.read_json(path)
    assert caught.value.where == str(path)
    assert caught.value.fix


def test_a_missing_json_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file") as caught:
        paths.read_json(tmp_path / "gone.json")
    assert caught.value.where == str(tmp_path / "gone.json")


def test_the_hash_covers_every_byte(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000  # more than one piece
    (tmp_path / "a").write_bytes(content)
    assert paths.sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()
