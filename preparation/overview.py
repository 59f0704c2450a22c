"""What a prepared data set looks like: a table, a contact sheet, and the split drawn like the thesis's figure 3."""

from PIL import Image

from common.files import replacing

GRADES = ("none", "mild", "moderate", "severe", "proliferative")
COLUMNS, CELL = 12, 128  # pictures in a row of the contact sheet, and pixels a side of each


def table(sets):
    """Text: a row for each of `sets`, a dict from a name to a list of records; grades, healthy, DR, total."""
    headings = (*GRADES, "healthy", "DR", "total")
    lines = [f"{'':12}" + "".join(f"  {heading:>5}" for heading in headings)]
    for name, records in sets.items():
        none, *dr = count(records)
        cells = zip(headings, (none, *dr, none, sum(dr), none + sum(dr)), strict=True)
        lines.append(
            f"{name:12}" + "".join(f"  {cell:{max(5, len(heading))}}" for heading, cell in cells)
        )
    return "\n".join(lines)


def count(records):
    """How many records there are of each grade 0..4."""
    return [sum(record["label"] == grade for record in records) for grade in range(len(GRADES))]


def save_contact_sheet(path, records):
    """The first pictures of each grade, a row a grade, as a PNG."""
    sheet = Image.new("RGB", (COLUMNS * CELL, len(GRADES) * CELL))
    for grade in range(len(GRADES)):
        for column, record in enumerate(
            [record for record in records if record["label"] == grade][:COLUMNS]
        ):
            with Image.open(record["dir"]) as picture:
                sheet.paste(
                    picture.convert("RGB").resize((CELL, CELL)), (column * CELL, grade * CELL)
                )
    with replacing(path) as written:
        sheet.save(written)


def save_split_figure(path, workers):
    """Bars for each worker's grades, as a PNG. Returns False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(workers)
    for k, records in enumerate(workers):
        places = [grade + (k - (len(workers) - 1) / 2) * width for grade in range(len(GRADES))]
        axes.bar_label(axes.bar(places, count(records), width, label=f"worker{k + 1}"), fontsize=7)
    axes.set_xticks(range(len(GRADES)), GRADES)
    axes.set_ylabel("images")
    axes.legend()
    with replacing(path) as written:
        figure.savefig(written)
    return True
