"""What a prepared data set looks like: a table, a contact sheet, and a figure of the split.

The figure is drawn like figure 3 of the thesis.
"""

from PIL import Image, ImageDraw

from common.files import replacing
from preparation.photos import open_image

GRADE_NAMES = ("none", "mild", "moderate", "severe", "proliferative")
SHEET_COLUMNS = 12  # pictures in a row of the contact sheet ...
SHEET_CELL = 128  # ... and pixels a side of each
CHECK_CELLS = 60  # photographs on the sheet of those to be checked


def format_table(sets):
    """Text: a row for each of `sets`, a dict from a name to a list of records.

    With the number of patients where the records tell them.
    """
    headings = [*GRADE_NAMES, "healthy", "DR", "total"]
    with_patients = all("patient" in record for records in sets.values() for record in records)
    if with_patients:
        headings.append("patients")
    lines = [f"{'':12}" + "".join(f"  {heading:>5}" for heading in headings)]
    for name, records in sets.items():
        none, *dr = count_grades(records)
        numbers = [none, *dr, none, sum(dr), len(records)]
        if with_patients:
            numbers.append(len({record["patient"] for record in records}))
        cells = [
            f"  {number:{max(5, len(heading))}}"
            for heading, number in zip(headings, numbers, strict=True)
        ]
        lines.append(f"{name:12}" + "".join(cells))
    return "\n".join(lines)


def count_grades(records):
    """How many records there are of each grade 0..4."""
    labels = [record["label"] for record in records]
    return [labels.count(grade) for grade in range(len(GRADE_NAMES))]


def save_contact_sheet(path, records):
    """Pictures of each grade, a row for each grade, as a PNG.

    They are spread over the records, because neighbours are often of one hospital.
    """
    rows = len(GRADE_NAMES)
    sheet = Image.new("RGB", (SHEET_COLUMNS * SHEET_CELL, rows * SHEET_CELL))
    for grade in range(rows):
        of_grade = [record for record in records if record["label"] == grade]
        count = min(SHEET_COLUMNS, len(of_grade))
        for column in range(count):
            record = of_grade[column * len(of_grade) // count]
            with Image.open(record["dir"]) as picture:
                small = picture.convert("RGB").resize((SHEET_CELL, SHEET_CELL))
            sheet.paste(small, (column * SHEET_CELL, grade * SHEET_CELL))
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
        small = open_image(photograph, shortest_side=SHEET_CELL)
        small.thumbnail((SHEET_CELL + 32, SHEET_CELL))
        sheet.paste(small, (x, y + 32))
        with Image.open(picture) as prepared:
            sheet.paste(prepared.resize((SHEET_CELL, SHEET_CELL)), (x + SHEET_CELL + 36, y + 32))
    with replacing(path) as written:
        sheet.save(written)


def save_split_figure(path, workers):
    """Bars for the grades of each worker, as a PNG. workers: a list of lists of records.

    Returns False where matplotlib is not installed: it is needed for reports only.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(workers)  # of a bar; the bars of one grade take 0.8 together
    for number, records in enumerate(workers):
        from_middle = (number - (len(workers) - 1) / 2) * width
        centres = [grade + from_middle for grade in range(len(GRADE_NAMES))]
        bars = axes.bar(centres, count_grades(records), width, label=f"worker{number + 1}")
        axes.bar_label(bars, fontsize=7)
    axes.set_xticks(range(len(GRADE_NAMES)), GRADE_NAMES)
    axes.set_ylabel("images")
    axes.legend()
    with replacing(path) as written:
        figure.savefig(written)
    return True
