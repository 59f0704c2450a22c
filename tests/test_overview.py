"""overview: the table counts right, a row a grade on the sheet."""

from PIL import Image

from preparation import overview


def records_of(grades):
    return [{"label": grade, "dir": f"{number}.png"} for number, grade in enumerate(grades)]


def test_the_table_has_a_row_a_set(capsys):
    sets = {"worker1": records_of([0, 0, 1, 2, 4]), "val_set": records_of([3])}
    sets["val_set"][0]["patient"] = "p0001"
    overview.print_table(sets, {"worker1": "Lund [north], and its branches"})
    header, first, *more, second = capsys.readouterr().out.splitlines()
    assert header.split()[:5] == [*overview.GRADE_NAMES]
    assert first.split() == "worker1 2 1 1 0 1 3 5 unknown Lund [north], and its".split()
    assert second.split() == "val_set 0 0 0 1 0 1 1 1".split()
    assert max(map(len, [header, first, *more])) <= 80 and len(more) == 1


def test_the_contact_sheet_has_a_row_a_grade(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grades = [0, 0, 3] + [2] * 20
    for number, grade in enumerate(grades):
        Image.new("RGB", (32, 32), (50 * grade + 20, 0, 0)).save(f"{number}.png")
    overview.save_contact_sheet("sheet.png", records_of(grades))
    sheet = Image.open("sheet.png")
    left = sheet.width - 12 * 128
    for column, reds in ((0, [20, 255, 120, 170, 255]), (11, [255, 255, 120, 255, 255])):
        at = [(left + 128 * column + 64, 128 * row + 64) for row in range(5)]
        assert [sheet.getpixel(xy)[0] for xy in at] == reds  # white where there is none
