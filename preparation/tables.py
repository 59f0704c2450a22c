"""Label tables as people have them: which image has which grade, in a CSV file of any dialect.

Separated by comma, semicolon or tab; in UTF-8, UTF-16 or cp1252; 2, 2.0 or 2,0. All faults of a
table are told together, in one sentence.
"""

import codecs
import csv
import io
import re
from pathlib import Path
from typing import NamedTuple

# What tables say of a photograph on which nobody can see the grade. "none" is not among them: it
# may be meant as a grade, no DR.
UNGRADABLE_WORDS = {"", "-", "?", "na", "n/a", "nan", "null", "ungradable", "ungradeable"}
UNGRADABLE_NUMBERS = {-1, 5, 9}
HIGHEST_GRADE = 4


class Label(NamedTuple):
    """One line of a label table."""

    image: str
    grade: int  # 0..4
    line: dict  # all cells, by the name of the column in lower case


class Labels(NamedTuple):
    """A label table."""

    table: Path
    columns: list  # in lower case
    graded: list  # of Label
    ungradable: list  # of (image, cell)


def read_labels(table, image_column, grade_column, flags=("", ""), **layout):
    """Read a label table.

    flags: what a user may give to name the two columns, for the sentence. layout: what
    csv.DictReader must know of an unusual table. Raises ValueError with all that is wrong.
    """
    columns, lines = read_table(table, layout)
    check_columns(table, columns, (image_column, grade_column), flags)
    graded, ungradable, wrong, nameless = [], [], [], 0
    for line in lines:
        image, cell = line[image_column], line[grade_column]
        if not any(line.values()):
            continue  # an empty line, as at the end of many tables
        if not image:
            nameless += 1
            continue
        try:
            grade = read_grade(cell)
        except ValueError:
            wrong.append((image, cell))
            continue
        if grade is None:
            ungradable.append((image, cell))
        else:
            graded.append(Label(image, grade, line))
    faults = []
    if wrong:
        expected = f"expected a whole number 0 to {HIGHEST_GRADE}"
        some = few([f"{image!r} the grade {cell!r}" for image, cell in wrong])
        faults.append(f"gives {some}, {expected}")
    if nameless:
        faults.append(f"has {nameless} lines without a name in {image_column!r}")
    if faults:
        raise ValueError(f"{table} {' and '.join(faults)}")
    return Labels(table, columns, graded, ungradable)


def check_columns(table, columns, needed, flags):
    """Raise ValueError if a column is missing."""
    missing = [
        (column, flag) for column, flag in zip(needed, flags, strict=True) if column not in columns
    ]
    if not missing:
        return
    names = " and ".join(repr(column) for column, _ in missing)
    found = ", ".join(filter(None, columns))[:300] or "nothing"
    advice = " and ".join(flag for _, flag in missing if flag)
    advice = f"; name it with {advice}" if advice else ""
    raise ValueError(f"{table} has no column {names}: found {found}{advice}")


def read_grade(cell):
    """The grade 0..4 that a cell says; None if it says ungradable; else ValueError."""
    text = cell.strip().lower()
    if text in UNGRADABLE_WORDS:
        return None
    number = float(text.replace(",", "."))  # "2,0" where the comma is the decimal point
    if not number.is_integer():
        raise ValueError
    if number in UNGRADABLE_NUMBERS:
        return None
    if not 0 <= number <= HIGHEST_GRADE:
        raise ValueError
    return int(number)


def read_table(table, layout=()):
    """Read a CSV file: the names of its columns, in lower case, and its lines as dicts."""
    if not table.is_file():
        raise ValueError(
            f"{table} is missing: is --source the folder into which the archive was unpacked?"
        )
    text = decode(table.read_bytes())
    if "\0" in text:
        raise ValueError(f"{table} is no CSV file: it is not text")
    layout = dict(layout)
    if "delimiter" not in layout:
        layout["delimiter"], text = find_delimiter(text)
    reader = csv.DictReader(
        io.StringIO(text, newline=""), restval="", skipinitialspace=True, **layout
    )
    try:
        columns = [name.strip().lower() for name in reader.fieldnames or []]
        reader.fieldnames = columns
        lines = [
            {name: cell.strip() for name, cell in line.items() if name is not None}
            for line in reader
        ]
    except csv.Error as error:
        raise ValueError(f"{table} is no CSV file: {error}") from None
    return columns, lines


def decode(content):
    """The text of a table's bytes, whatever program wrote it."""
    if content.startswith(codecs.BOM_UTF8):
        return content.decode("utf-8-sig", errors="replace")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", errors="replace")
    # Without a mark: in UTF-16 every second byte of plain English is 0.
    if content[1:2] == b"\0":
        return content.decode("utf-16-le", errors="replace")
    if content[:1] == b"\0":
        return content.decode("utf-16-be", errors="replace")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def find_delimiter(text):
    """(delimiter, text): the one that cuts the header into the most columns.

    A spreadsheet may name it in a first line `sep=;`, which is taken off.
    """
    named = re.match(r"sep=(.)\r?\n", text)
    if named:
        return named[1], text[named.end() :]
    header = text.splitlines()[:1]
    return max(",;\t", key=lambda delimiter: num_cells(header, delimiter)), text


def num_cells(lines, delimiter):
    try:
        return max((len(cells) for cells in csv.reader(lines, delimiter=delimiter)), default=0)
    except csv.Error:
        return 0


def few(words, most=3):
    """Some of many for a sentence: the first three, and how many more there are."""
    text = ", ".join(words[:most])
    return f"{text} and {len(words) - most:,} more" if len(words) > most else text
