"""What a prepared data set looks like: a table, a contact sheet, and a figure of the split.

The figure is drawn like figure 3 of the thesis.
"""

import warnings

from PIL import Image, ImageDraw, ImageFont

from common.files import replacing
from preparation.photos import open_image

GRADE_NAMES = ("none", "mild", "moderate", "severe", "proliferative")
WITH_IT = "DR"  # all grades but the first
SHEET_COLUMNS = 12  # pictures in a row of the contact sheet ...
SHEET_CELL = 128  # ... and pixels a side of each
SHEET_MARGIN = 136  # pixels at the left, for the names of the grades ...
SHEET_TITLE = 48  # ... and above, for the title
CHECK_CELLS = 60  # photographs on the sheet of those to be checked


def format_table(sets):
    """Text: a row for each of `sets`, a dict from a name to a list of records.

    With the number of patients where the records tell them.
    """
    headings = [*GRADE_NAMES, WITH_IT, "total"]
    with_patients = all("patient" in record for records in sets.values() for record in records)
    if with_patients:
        headings.append("patients")
    lines = [f"{'':9}" + "".join(f"  {heading:>5}" for heading in headings)]
    for name, records in sets.items():
        none, *dr = count_grades(records)
        numbers = [none, *dr, sum(dr), len(records)]
        if with_patients:
            numbers.append(len({record["patient"] for record in records}))
        cells = [
            f"  {number:{max(5, len(heading))}}"
            for heading, number in zip(headings, numbers, strict=True)
        ]
        lines.append(f"{name:9}" + "".join(cells))
    return "\n".join(lines)


def count_grades(records):
    """How many records there are of each grade 0..4."""
    labels = [record["label"] for record in records]
    return [labels.count(grade) for grade in range(len(GRADE_NAMES))]


def save_contact_sheet(path, records, title):
    """Pictures of each grade, a row for each grade with its name, as a PNG.

    They are spread over the records, because neighbours are often of one hospital.
    """
    numbers = count_grades(records)
    width = SHEET_MARGIN + SHEET_COLUMNS * SHEET_CELL
    sheet = Image.new("RGB", (width, SHEET_TITLE + len(GRADE_NAMES) * SHEET_CELL), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((12, 12), title, fill="black", font=ImageFont.load_default(20))
    text_font = ImageFont.load_default(15)
    for grade, name in enumerate(GRADE_NAMES):
        top = SHEET_TITLE + grade * SHEET_CELL
        text = f"grade {grade}\n{name}\n{numbers[grade]:,} pictures"
        pen.text((12, top + 36), text, fill="black", font=text_font)
        of_grade = [record for record in records if record["label"] == grade]
        count = min(SHEET_COLUMNS, len(of_grade))
        for column in range(count):
            record = of_grade[column * len(of_grade) // count]
            with Image.open(record["dir"]) as picture:
                small = picture.convert("RGB").resize((SHEET_CELL, SHEET_CELL))
            sheet.paste(small, (SHEET_MARGIN + column * SHEET_CELL, top))
    with replacing(path) as written:
        sheet.save(written)


def save_check_sheet(path, doubtful):
    """Photographs whose field of view is implausible, each beside its prepared picture, as a PNG.

    doubtful: [(path of the photograph, path of the picture, why), ...]; the first CHECK_CELLS of
    them.
    """
    shown = doubtful[:CHECK_CELLS]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    width, height = 2 * SHEET_CELL + 44, SHEET_CELL + 40
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (photograph, picture, why) in enumerate(shown):
        x, y = number % columns * width + 4, number // columns * height + 4
        pen.text((x, y), f"{photograph.name[:44]}\n{why[:44]}", fill="black")
        with warnings.catch_warnings(action="ignore"):  # told when it was prepared
            small = open_image(photograph, shortest_side=SHEET_CELL)
        small.thumbnail((SHEET_CELL + 32, SHEET_CELL))
        sheet.paste(small, (x, y + 32))
        with Image.open(picture) as prepared:
            sheet.paste(prepared.resize((SHEET_CELL, SHEET_CELL)), (x + SHEET_CELL + 36, y + 32))
    with replacing(path) as written:
        sheet.save(written)


def save_split_figure(path, workers, title):
    """Bars for the grades of each worker, as a PNG. workers: {name: records}.

    Returns False where matplotlib is not installed: it is needed for reports only.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(workers)  # of a bar; the bars of one grade take 0.8 together
    for number, (name, records) in enumerate(workers.items()):
        from_middle = (number - (len(workers) - 1) / 2) * width
        centres = [grade + from_middle for grade in range(len(GRADE_NAMES))]
        bars = axes.bar(centres, count_grades(records), width, label=name)
        axes.bar_label(bars, fontsize=7)
    ticks = [f"{grade}: {name}" for grade, name in enumerate(GRADE_NAMES)]
    axes.set_xticks(range(len(GRADE_NAMES)), ticks)
    axes.set(title=title, xlabel="grade", ylabel="training images")
    axes.legend()
    with replacing(path) as written:
        figure.savefig(written)
    return True
