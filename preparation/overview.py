"""What a prepared data set looks like: a table of who got what, and sheets of pictures.

It prints and draws; nothing is dealt or decided in here.
"""

from PIL import Image, ImageDraw, ImageFont, ImageOps
from rich.console import Console
from rich.table import Table

from common.files import replacing
from preparation.photos import open_image

GRADE_NAMES = ("none", "mild", "moderate", "severe", "PDR")
LINE = 80  # characters of the table; the names of hospitals are broken to fit
SHEET_COLUMNS = 12  # pictures in a row of the contact sheet ...
SHEET_CELL = 128  # ... and pixels a side of each
CHECK_ROWS = 60  # on the sheet of those to be checked


def print_table(sets, hospitals):
    """A row for each of `sets`, a dict from a name to a list of records: who got what.

    hospitals: {name: what else is said of it}.
    """
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for heading in ("", *GRADE_NAMES, "DR", "total", "patients"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("hospital", overflow="fold")
    for name, records in sets.items():
        none, *dr = count_grades(records)
        patients = len({record.get("patient") for record in records} - {None})
        numbers = [none, *dr, sum(dr), len(records), patients or "unknown"]
        table.add_row(name, *map(str, numbers), hospitals.get(name, ""))
    Console(width=LINE, highlight=False, markup=False).print(table)


def count_grades(records):
    """How many records there are of each grade 0..4."""
    labels = [record["label"] for record in records]
    return [labels.count(grade) for grade in range(len(GRADE_NAMES))]


def save_contact_sheet(path, records):
    """Prepared pictures of each grade, a row for each grade with its name, as a PNG.

    They are spread over the records, because neighbours are often of one hospital.
    """
    rows = []
    for grade, name in enumerate(GRADE_NAMES):
        own = [record["dir"] for record in records if record["label"] == grade]
        count = min(SHEET_COLUMNS, len(own))
        chosen = [own[column * len(own) // count] for column in range(count)]
        rows.append((f"grade {grade}\n{name}\n{len(own):,} pictures", chosen))
    save_sheet(path, rows)


def save_check_sheet(path, doubtful):
    """Photographs that may be none of a fundus, each beside its prepared picture, as a PNG.

    doubtful: [(path of the photograph, path of the picture, why), ...]; the first CHECK_ROWS of
    them.
    """
    rows = [
        (f"{photograph.name[:60]}\n{why}", [photograph, picture])
        for photograph, picture, why in doubtful[:CHECK_ROWS]
    ]
    save_sheet(path, rows)


def save_sheet(path, rows):
    """A PNG with a row for each (text, [path of a picture, ...])."""
    font = ImageFont.load_default(15)
    lengths = [font.getlength(line) for text, _ in rows for line in text.splitlines()]
    margin = 24 + int(max(lengths))
    width = margin + SHEET_CELL * max(len(pictures) for _, pictures in rows)
    sheet = Image.new("RGB", (width, SHEET_CELL * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (text, pictures) in enumerate(rows):
        top = number * SHEET_CELL
        pen.text((12, top + 36), text, fill="black", font=font)
        for column, picture in enumerate(pictures):
            image = open_image(picture, shortest_side=SHEET_CELL)
            small = ImageOps.contain(image, (SHEET_CELL, SHEET_CELL))
            sheet.paste(small, (margin + column * SHEET_CELL, top))
    with replacing(path) as written:
        sheet.save(written)
