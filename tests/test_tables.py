"""tables: any dialect is read, and a row that is not what it seems is refused with its line."""

import pytest

from preparation.tables import read_grade, read_table


def table_of(folder, text, encoding="utf-8"):
    (folder / "labels.csv").write_bytes(text.encode(encoding))
    return read_table(folder / "labels.csv")


@pytest.mark.parametrize("encoding, delimiter", [
    ("utf-8", ";"), ("utf-8-sig", ","), ("utf-16", "\t"), ("cp1252", ";"),
])  # fmt: skip
def test_a_table_of_any_dialect(tmp_path, encoding, delimiter):
    text = 'Image|Grade|\r\n"Müller, left.jpg"|2|\r\n\r\nb.jpg | 0\r\n'
    table = table_of(tmp_path, text.replace("|", delimiter), encoding)
    assert table.columns == ["Image", "Grade"]
    assert table.rows == [["Müller, left.jpg", "2"], ["b.jpg", "0"]]
    assert table.lines == [2, 4]


def test_a_spreadsheet_may_name_its_delimiter(tmp_path):
    table = table_of(tmp_path, "sep=;\r\na;b,c\r\n1;2\r\n")
    assert (table.columns, table.lines) == (["a", "b,c"], [3])


@pytest.mark.parametrize("text, words", [
    ('image,label\na,0\n"b,1\nc,2\n', "line 3.*never closed"),
    ('image,label\na,0\n"b"x,1\n', "line 3.*behind a closed quote"),
    ('image,label,note\na,0,"x\nb,1,y\nc,2,z"\n', "line 2.*whole rows"),
    ("image,label\na,0\nb,left,1\n", "line 3: 3 cells, and 2 columns"),
    ("image\0label", "not text"),
])  # fmt: skip
def test_a_row_that_is_not_what_it_seems_is_refused(tmp_path, text, words):
    with pytest.raises(ValueError, match=f"labels.csv.*{words}"):
        table_of(tmp_path, text)


def test_a_quote_within_a_cell_is_a_character_and_a_note_may_have_two_lines(tmp_path):
    table = table_of(tmp_path, 'image,label,note\na,0,5" lens\nb,1,"seen\ntwice"\n')
    assert [row[2] for row in table.rows] == ['5" lens', "seen\ntwice"]
    with pytest.raises(ValueError, match="line 3: 'note' is .*, of one line"):
        table.cells(2)  # where the column is needed


def test_a_column_is_found_in_any_case_but_not_if_it_is_there_twice(tmp_path):
    table = table_of(tmp_path, "Image,label,Label\na,0,1\n")
    assert table.column("image ") == 0
    with pytest.raises(ValueError, match="'label' twice"):
        table.column("label")
    with pytest.raises(ValueError, match="no column 'grade': found Image, label, Label"):
        table.column("grade")


@pytest.mark.parametrize("cell, grade", [
    ("2.0", 2), ("2,0", 2), ("5", 5), ("9", None), ("", None), ("Ungradable", None), ("no_dr", 0),
    ("Proliferate_DR", 4), ("R3", 4), ("3_Severe", 3),
])  # fmt: skip
def test_what_a_grade_says(cell, grade):
    assert read_grade(cell) == grade


@pytest.mark.parametrize("cell", ["6", "1.5", "none", "2 - mild", "inf", "DR", "0_1"])
def test_what_is_no_grade(cell):
    with pytest.raises(ValueError):
        read_grade(cell)
