"""CSV: cells stay text, and every row its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from row_files import as_csv, block_bytes, located, quick, values, write

from jetson_ft.errors import UserError


@quick
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {
                name: st.text(st.characters(exclude_characters="\0", codec="utf-8"))
                for name in ("q", "a")
            }
        ),
        min_size=1,
        max_size=5,
    ),
    delimiter=st.sampled_from(",;\t"),
    block=st.integers(1, 30),
)
def test_written_csv_is_read_back(
    tmp_path: Path, rows: list[dict[str, str]], delimiter: str, block: int
) -> None:
    path = write(tmp_path, "a.csv", as_csv(rows, delimiter))
    with block_bytes(block):
        assert values(path, "utf-8") == rows


def test_csv_cells_stay_text_and_rows_of_other_length_are_malformed(tmp_path: Path) -> None:
    text = 'q;a;n\r\nNA;"two\nlines; here";007\r\n\r\n1;2\r\nx;y;z;w\r\n"null";true;""\r\n'
    assert located(write(tmp_path, "a.csv", text)) == [
        (2, {"q": "NA", "a": "two\nlines; here", "n": "007"}),
        (5, "2 cells where the header has 3"),
        (6, "4 cells where the header has 3"),
        (7, {"q": "null", "a": "true", "n": ""}),
    ]


def test_csv_quote_that_is_never_closed_makes_the_rest_unreadable(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'q,a\n1,2\n"3,4\n5,6\n')
    reason = "a quote that is never closed (lines after it: 1)"
    assert located(path)[1:] == [(3, f"{reason}; nothing from here on can be read")]


def test_csv_quote_that_is_closed_in_another_row_is_reported_with_its_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'q,a\n1,"2\n3,4\n5,"6\n7,8\n')
    reason = "not valid CSV (',' expected after '\"'; lines read as one row: 3)"
    assert located(path) == [(2, reason), (5, {"q": "7", "a": "8"})]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_separator_line_of_excel_names_the_delimiter(tmp_path: Path, delimiter: str) -> None:
    text = f"\ufeff\nsep={delimiter}\nq{delimiter}a\nsep=.{delimiter}2\n"
    assert located(write(tmp_path, "a.csv", text)) == [(4, {"q": "sep=.", "a": "2"})]


def test_csv_delimiters_inside_a_quoted_name_do_not_count(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", '"q;;;",a\n"1;2;3",4\n')
    assert located(path) == [(2, {"q;;;": "1;2;3", "a": "4"})]


def test_csv_columns_without_name_and_content_at_the_end_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "q,a,,\n1,2,,\n3,4\n5,6,,,\n7,8,9,\n")
    row_7 = "3 cells where the header has 2"
    assert located(path) == [
        (2, {"q": "1", "a": "2"}), (3, {"q": "3", "a": "4"}), (4, {"q": "5", "a": "6"}),
        (5, row_7),
    ]  # fmt: skip


def test_csv_text_after_a_closed_quote_makes_only_its_row_malformed(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'q,a\n"1"x,2\n3,4\n')
    invalid, valid = located(path)
    assert invalid == (2, "not valid CSV (',' expected after '\"')")
    assert valid == (3, {"q": "3", "a": "4"})


def test_csv_header_with_equal_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must name the columns") as caught:
        values(write(tmp_path, "a.csv", "\nq,q\n1,2\n"))
    assert "line 2" in str(caught.value.where)
