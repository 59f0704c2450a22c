"""overview: the table counts right, a row a grade on the sheet, a figure where matplotlib is."""

import sys

import pytest
from PIL import Image

from preparation import overview


def records_of(grades):
    return [{"label": grade, "dir": f"{number}.png"} for number, grade in enumerate(grades)]


def test_the_table_has_a_row_a_set_and_columns_for_grades_and_totals():
    header, first, second = overview.format_table(
        {"worker1": records_of([0, 0, 1, 2, 4]), "val_set": records_of([3])}
    ).splitlines()
    assert header.split() == [
        "none",
        "mild",
        "moderate",
        "severe",
        "proliferative",
        "DR",
        "total",
    ]
    assert first.split() == ["worker1", "2", "1", "1", "0", "1", "3", "5"]
    assert second.split() == ["val_set", "0", "0", "0", "1", "0", "1", "1"]
    assert len(header) == len(first) == len(second)


def test_the_table_with_patients_fits_a_terminal():
    records = [{"label": 4, "patient": str(number)} for number in range(20_000)]
    table = overview.format_table({"train_set": records, "worker10": records})
    assert max(map(len, table.splitlines())) <= 80


def test_the_contact_sheet_has_a_row_a_grade(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grades = [0, 0, 3] + [2] * 20
    for number, grade in enumerate(grades):
        Image.new("RGB", (32, 32), (50 * grade + 20, 0, 0)).save(f"{number}.png")
    overview.save_contact_sheet("sheet.png", records_of(grades), "what there is")
    sheet = Image.open("sheet.png")
    reds = [
        [sheet.getpixel((136 + 128 * column + 64, 48 + 128 * row + 64))[0] for column in range(12)]
        for row in range(5)
    ]
    empty = 255
    assert reds == [
        [20, 20] + [empty] * 10,
        [empty] * 12,
        [120] * 12,
        [170] + [empty] * 11,
        [empty] * 12,
    ]
    title = sheet.crop((0, 0, sheet.width, 48))
    names = [sheet.crop((0, 48 + 128 * row, 136, 176 + 128 * row)) for row in range(5)]
    assert all(dark(part) for part in (title, *names))


def dark(picture):
    """Whether something is written there."""
    return min(picture.convert("L").tobytes()) < 100


def test_the_split_figure(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert overview.save_split_figure(
        tmp_path / "split.png", {"worker1": records_of([0, 1, 2]), "worker2": records_of([4])}, "x"
    )
    assert Image.open(tmp_path / "split.png").size[0] > 300
    assert [path.name for path in tmp_path.iterdir()] == ["split.png"]


def test_without_matplotlib_there_is_no_figure(tmp_path, monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"] + [
        "matplotlib"
    ]:
        monkeypatch.setitem(sys.modules, module, None)
    assert not overview.save_split_figure(tmp_path / "split.png", {"worker1": records_of([0])}, "x")
    assert not list(tmp_path.iterdir())
