"""Quoted as csv or not: by hand, over whatever a csv writer writes, and where a file is both."""

import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanorec.base.errors import InputError
from hanorec.datasets.fields import read_fields

QUICK = settings(max_examples=100, deadline=None, derandomize=True, database=None)
TEXT = st.text(st.sampled_from('ab ,"|\t\n;\'\u00e9\u6771\U0001f3ac\u00a0'), max_size=12)


def read(folder, text, separator=",", count=2, rest=True):
    """(quoted, rows as (line, fields)) of a file with this text."""
    path = folder / "table.txt"
    path.write_bytes(text.encode())
    quoted, rows = read_fields(path, separator, count, rest=rest)
    return quoted, list(rows)


def raw_lines(text):
    """As it was read before: everything after the first comma, quotes and all."""
    return [(n, line.split(",", 1)) for n, line in enumerate(text.splitlines(), 1)]


QUOTED = (
    'item,title\n2,"A dish, with chili"\n3,"He said ""no"""\n4,Plain\n5,"Two\r\nlines"\n6,nan\n'
)


def test_a_quoted_file_by_hand(tmp_path, capsys):
    """Commas, doubled quotes, a line break inside quotes; numbers are those of the first lines."""
    quoted, rows = read(tmp_path, QUOTED)
    assert quoted and rows == [
        (1, ["item", "title"]), (2, ["2", "A dish, with chili"]), (3, ["3", 'He said "no"']),
        (4, ["4", "Plain"]), (5, ["5", "Two lines"]), (7, ["6", "nan"]),
    ]
    assert "1 fields of table.txt hold line breaks" in capsys.readouterr().out
    # control: raw lines keep the quotes and tear the fifth row
    assert raw_lines(QUOTED)[1] == (2, ["2", '"A dish, with chili"'])
    assert raw_lines(QUOTED)[5][1] == ['lines"']


@pytest.mark.parametrize("text", [
    "1,Good, the Bad\n2,B\n", '1,One, two "three"\n', "1,A\n2,B\n", '1,5" nails\n2,A, B\n',
    '1,"Weird Al", live\n', '1,"Weird Al" live\n', "1\n",
])
def test_a_file_that_is_not_quoted_is_split_at_the_first_comma(tmp_path, text):
    assert read(tmp_path, text) == (False, raw_lines(text))


@QUICK
@given(
    rows=st.lists(st.tuples(st.text("0123456789", min_size=1, max_size=4), TEXT), min_size=1),
    separator=st.sampled_from(",\t|"), quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    crlf=st.booleans(),
)
def test_what_a_csv_writer_writes_comes_back(
    tmp_path_factory, rows, separator, quoting, crlf
):
    """Every field, but for line breaks and for spaces before a field, which nobody misses."""
    table = io.StringIO()
    end = "\r\n" if crlf else "\n"
    csv.writer(table, delimiter=separator, lineterminator=end, quoting=quoting).writerows(rows)
    quoted, found = read(tmp_path_factory.getbasetemp(), table.getvalue(), separator)
    expected = []
    for item, title in rows:
        parts = title.split("\n")
        expected.append([item, " ".join(map(str.strip, parts)) if len(parts) > 1 else title])
    if quoted:
        assert [[item, title.strip()] for _, (item, title) in found] == [
            [item, title.strip()] for item, title in expected
        ]
    else:  # nothing needed quotes
        assert [fields for _, fields in found] == expected


def test_both_in_one_file_is_refused_with_both_lines(tmp_path):
    """Either reading would spoil titles: with commas inside quotes it is sure that they are csv's;
    without, more quoted lines than others are needed.
    """
    with pytest.raises(InputError, match=r"table.txt:1: .* quoted as csv, but line 3 .*3 fields"):
        read(tmp_path, '1,"A, B"\n2,C\n3,D, E\n')
    with pytest.raises(InputError, match=r"table.txt:1: .* line 3 .* in all of it or in none"):
        read(tmp_path, '1,"A"\n2,"B"\n3,D, E\n')
    with pytest.raises(InputError, match=r"table.txt:3: .* but line 1 "):
        read(tmp_path, '1,D, E\n2,F, G\n3,"He said ""no"""\n')
    with pytest.raises(InputError, match=r"table.txt:1: .* line 2 .*unexpected end of data"):
        read(tmp_path, '1,"A, B"\n2,"C\n')


def test_a_title_in_quotes_of_its_own_is_told(tmp_path, capsys):
    text = '1,"Heat"\n2,D, E\n3,F, G\n'
    assert read(tmp_path, text) == (False, raw_lines(text))
    assert "not quoted as csv (line 2: 3 fields" in (said := capsys.readouterr().out)
    assert "1 lines keep their double quotes, e.g. line 1" in said


def test_columns_of_a_spreadsheet_are_refused(tmp_path):
    """Opened in a spreadsheet, a title with commas is several cells, and every other line ends with
    empty ones.
    """
    with pytest.raises(InputError, match="3 of 4 lines end with ',', as where a spreadsheet"):
        read(tmp_path, "1,A,\n2,B,\n3,C, D\n4,E,\n")
    assert not read(tmp_path, "1,A,\n2,B\n3,C\n")[0]  # one title may end so


def test_a_row_count_that_is_the_first_line_s(tmp_path):
    text = 'id:token\ttitle:token_seq\n1\t"A ""b"" c"\n2\tC\n'
    assert read(tmp_path, text, "\t", None, rest=False) == (
        True, [(1, ["id:token", "title:token_seq"]), (2, ["1", 'A "b" c']), (3, ["2", "C"])]
    )
    assert read(tmp_path, "a\tb\n1\t2\t3\n", "\t", None, rest=False) == (
        False, [(1, ["a", "b"]), (2, ["1", "2", "3"])]
    )
    assert read(tmp_path, "", "\t", None, rest=False) == (False, [])
