"""overview: the table of who got what."""

from preparation import overview


def test_the_table_has_a_row_a_set(capsys):
    worker1 = [{"label": grade} for grade in (0, 0, 1, 2, 4)]
    sets = {"worker1": worker1, "val_set": [{"label": 3, "patient": "p0001"}]}
    overview.print_table(sets, {"worker1": "Lund [north], and its branches"})
    header, first, *more, second = capsys.readouterr().out.splitlines()
    assert header.split()[:5] == [*overview.GRADE_NAMES]
    assert first.split() == "worker1 2 1 1 0 1 3 5 unknown Lund [north], and its".split()
    assert second.split() == "val_set 0 0 0 1 0 1 1 1".split()
    assert max(map(len, [header, first, *more])) <= 80 and len(more) == 1
