"""What a prepared data set looks like: a table, a contact sheet, and the split drawn like the thesis's figure 3."""

from pathlib import Path

from PIL import Image

GRADES = ("none", "mild", "moderate", "severe", "proliferative")
COLUMNS = 12  # of the contact sheet
CELL = 128  # pixels a side of one picture in it


def table(sets):
    """Text: a row for each of `sets`, a dict from a name to a list of records; grades, healthy, DR, total."""
    headings = (*GRADES, "healthy", "DR", "total")
    lines = [f"{'':12}" + "".join(f"  {heading:>5}" for heading in headings)]
    for name, records in sets.items():
        counts = count(records)
        cells = (*counts, counts[0], sum(counts[1:]), sum(counts))
        places = zip(headings, cells, strict=True)
        lines.append(f"{name:12}" + "".join(f"  {cell:{max(5, len(heading))}}" for heading, cell in places))
    return "\n".join(lines)


def count(records):
    """How many records there are of each grade 0..4."""
    return [sum(record["label"] == grade for record in records) for grade in range(len(GRADES))]


def save_contact_sheet(path, records):
    """The first pictures of each grade, a row a grade, as a PNG."""
    sheet = Image.new("RGB", (COLUMNS * CELL, len(GRADES) * CELL))
    for grade in range(len(GRADES)):
        chosen = [record for record in records if record["label"] == grade][:COLUMNS]
        for column, record in enumerate(chosen):
            with Image.open(record["dir"]) as picture:
                sheet.paste(picture.convert("RGB").resize((CELL, CELL)), (column * CELL, grade * CELL))
    save(sheet.save, path)


def save_split_figure(path, workers):
    """Bars for each worker's grades, as a PNG. Returns False where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.8 / len(workers)
    for k, records in enumerate(workers):
        places = [grade + (k - (len(workers) - 1) / 2) * width for grade in range(len(GRADES))]
        bars = axes.bar(places, count(records), width, label=f"worker{k + 1}")
        axes.bar_label(bars, fontsize=7)
    axes.set_xticks(range(len(GRADES)), GRADES)
    axes.set_ylabel("images")
    axes.legend()
    save(figure.savefig, path)
    return True


def save(writer, path):
    """Write to a temporary file beside `path`, then put it there, so that nobody reads half a picture."""
    written = Path(path).with_suffix(".tmp.png")
    writer(written)
    written.replace(path)
