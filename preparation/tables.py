"""Label tables as people have them: CSV files of any dialect, read strictly.

Separated by comma, semicolon or tab; in UTF-8, UTF-16 or cp1252. A row that cannot be read as it is
meant is refused with its line, never guessed: one row that is swallowed or shifted trains a network
on other people's grades.
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
UNGRADABLE_NUMBERS = {-1, 9}
# The grades in words, as `plain` writes them. Britain's R2 is moderate or severe: it counts as the
# lower one, which is referable already.
GRADE_WORDS = {
    "nodr": 0, "noapparentdr": 0, "noapparentretinopathy": 0, "normal": 0, "healthy": 0, "r0": 0,
    "mild": 1, "milddr": 1, "mildnpdr": 1, "r1": 1,
    "moderate": 2, "moderatedr": 2, "moderatenpdr": 2, "r2": 2,
    "severe": 3, "severedr": 3, "severenpdr": 3,
    "pdr": 4, "proliferative": 4, "proliferativedr": 4, "proliferatedr": 4, "r3": 4,
}  # fmt: skip


class Table(NamedTuple):
    """A table, read whole."""

    path: Path
    columns: list  # as they are written, without blanks around
    rows: list  # of lists of texts, as many as columns
    lines: list  # the line of the file in which each row begins

    def column(self, name):
        """The number of the column that is called `name`, in any case; ValueError if not one is."""
        fitting = [i for i, each in enumerate(self.columns) if fold(each) == fold(name)]
        if not fitting:
            found = ", ".join(filter(None, self.columns))[:300] or "nothing"
            raise ValueError(f"{self.path} has no column {name!r}: found {found}")
        if len(fitting) > 1:
            raise ValueError(
                f"{self.path} has the column {name!r} twice: rename or remove one of the two"
            )
        return fitting[0]

    def cells(self, number, is_right=lambda cell: True, expected="a text"):
        """All texts of a column. Raises ValueError where one has a line break, or is not right."""
        cells = [row[number] for row in self.rows]
        for line, cell in zip(self.lines, cells, strict=True):
            if len(cell.splitlines()) > 1 or not is_right(cell):
                raise ValueError(
                    f"{self.path}, line {line}: {self.columns[number]!r} is {cell!r}, expected "
                    f"{expected}, of one line"
                )
        return cells


def fold(text):
    return text.strip().casefold()


def plain(text):
    """A name without case, blanks and signs: "Retinopathy grade" and retinopathy_grade are one."""
    return re.sub(r"[\W_]+", "", text.casefold())


def few(words, most=3):
    """Some of many for a sentence: the first `most`, and how many more there are."""
    text = ", ".join(words[:most])
    return f"{text} and {len(words) - most:,} more" if len(words) > most else text


def read_grade(cell):
    """The grade that a cell says, in words or as a number; None for ungradable; else ValueError.

    A number comes as it is, 0 to 5: on which scale it is, only the whole table can tell.
    """
    text = fold(cell)
    word = plain(text)
    if text in UNGRADABLE_WORDS:
        return None
    if word in GRADE_WORDS:
        return GRADE_WORDS[word]
    if word[:1] == str(GRADE_WORDS.get(word[1:])):
        return int(word[0])  # "1 - mild"
    # "2,0" where the comma is the decimal point; to Python "0_1" is 1, too
    number = float(text.replace(",", ".").replace("_", " "))
    if number in UNGRADABLE_NUMBERS:
        return None
    if number not in range(6):
        raise ValueError
    return int(number)


def is_grade(cell):
    try:
        read_grade(cell)
    except ValueError:
        return False
    return True


# --- reading -------------------------------------------------------------------------------------


def read_table(path, columns=None, delimiter=None):
    """Read a CSV file strictly: a Table. Raises ValueError with the line that is at fault.

    columns, delimiter: of a table that has no line with the names of its columns.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file, expected a table of that name in its folder")
    text = decode(path.read_bytes())
    if "\0" in text:
        raise ValueError(f"{path} is no CSV file: it is not text; export it as CSV")
    named = re.match(r"sep=(.)\r?\n", text)  # a spreadsheet's first line
    first_line = 1
    if named:
        delimiter, text, first_line = named[1], text[named.end() :], 2
    delimiter = delimiter or find_delimiter(text)
    numbered = list(read_rows(path, text, delimiter, first_line))
    if columns is None:
        columns = numbered.pop(0)[1] if numbered else []
        while columns and not columns[-1]:
            columns.pop()  # a spreadsheet ends each line with a comma for each column it has seen
    for line, row in numbered:
        check_row(path, line, row, columns, delimiter)
    rows = [(row + [""] * len(columns))[: len(columns)] for _, row in numbered]
    return Table(path, columns, rows, [line for line, _ in numbered])


def read_rows(path, text, delimiter, first_line):
    """Yields (line, [cell, ...]) of each row that is not empty."""
    source = io.StringIO(text, newline="")
    reader = csv.reader(source, delimiter=delimiter, skipinitialspace=True, strict=True)
    line = first_line
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if any(cells):
                yield line, cells
            line = first_line + reader.line_num
    except csv.Error as error:
        if "unexpected end" in str(error):
            raise ValueError(
                f'{path}, line {line}: a quote (") is opened and never closed: close or remove it'
            ) from None
        raise ValueError(
            f'{path}, line {line}: text behind a closed quote ("), or a row that is no CSV '
            f"({error}): mend that row"
        ) from None


def check_row(path, line, row, columns, delimiter):
    """Raise ValueError where a row is another one than it seems."""
    filled = max(number for number, cell in enumerate(row, start=1) if cell)
    if filled > len(columns):
        raise ValueError(
            f"{path}, line {line}: {filled} cells, and {len(columns)} columns are named: is a "
            f"{delimiter!r} in a text without quotes around it? found {delimiter.join(row)[:120]}"
        )
    for cell in row:
        # A quote too many, and another one lines below: what is between them was meant as rows.
        lines = cell.splitlines()[1:]
        if any(each.count(delimiter) >= len(columns) - 1 > 0 for each in lines):
            raise ValueError(
                f'{path}, line {line}: a quoted text (") goes over {len(lines) + 1} lines, and in '
                "it are whole rows: a quote is too many or missing"
            )


def decode(content):
    """The text of a table's bytes, whatever program wrote it."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def find_delimiter(text):
    """The one of comma, semicolon and tab that cuts the first line into the most columns."""
    header = re.sub(r'"[^"]*"', "", next(iter(text.splitlines()), ""))
    return max(",;\t", key=header.count)
