"""Inputs that stand for what people report publicly about graded photographs: ../shared/cases*.

Each folder is a source for `prepare.py --dataset folder`, with what must come of it in expect.json.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import data
import prepare

SHARED = Path(__file__).parents[2] / "shared"
CASES = sorted(path.parent for path in SHARED.glob("cases*/*/expect.json"))
KNOWN_KEYS = {
    *("prepare", "exit", "images", "val", "then", "then_exit", "then_images", "alike", "must"),
    *("mean_difference_at_most", "patient_of", "stderr_lines_at_most"),
    *("says", "label_of", "together"),
}


def test_there_are_cases():
    if not CASES:
        pytest.skip(f"the cases are not here: {SHARED}/cases, cases_photographs")
    assert len(CASES) >= 21


@pytest.fixture
def prepared(tmp_path, monkeypatch, capsys):
    """prepare.py on a case, in an empty folder: its exit code and its output."""
    monkeypatch.chdir(tmp_path)

    def run(case, flags):
        code = prepare.main(["--dataset", "folder", "--source", str(case), *flags])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


def read_indexes():
    paths = [path for path in Path("index").glob("*.pkl") if path.stem != "train_set"]
    return {path.stem: data.read_index(path) for path in paths}


def pixels_of(record):
    with Image.open(record["dir"]) as picture:
        return np.asarray(picture).astype(int)


def name_of(record):
    """What the case calls an image, without extension and signs."""
    return record["picture"].rpartition("_")[0]


def plain_name(image):
    return re.sub(r"\W+", "_", Path(image).stem)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case(case, prepared):
    expected = json.loads((case / "expect.json").read_text())
    assert set(expected) <= KNOWN_KEYS  # a new key is a new promise, to be checked here
    first = prepared(case, expected["prepare"])
    assert first.code == expected["exit"], first.out + first.err
    lines = expected.get("stderr_lines_at_most", 1000)
    assert first.err.count("\n") <= lines, first.err
    for pattern in expected.get("says", ()):
        assert re.search(pattern, first.out + first.err, re.IGNORECASE), pattern
    assert Path("index/prepared.json").exists() == (expected["exit"] == 0)
    num_images = expected.get("images")
    if "then" in expected:
        then = prepared(case, expected["then"])
        assert then.code == expected["then_exit"], then.out + then.err
        num_images = expected["then_images"]
    indexes = read_indexes()
    records = [record for own in indexes.values() for record in own]
    if num_images is not None:
        assert len(records) == num_images
        assert len({pixels_of(record).tobytes() for record in records}) >= num_images - 4
    if "val" in expected:
        assert len(indexes["val_set"]) == expected["val"]
    for image, grade in expected.get("label_of", {}).items():
        assert [each["label"] for each in records if name_of(each).endswith(plain_name(image))] == [
            grade
        ]
    check_together(indexes, expected)
    check_alike(records, expected)
    WORDS.get(case.name, lambda *_: None)(first, records)


def check_together(indexes, expected):
    """Copies of a photograph, and all images of a patient, lie in one index; all are there."""
    at = {name_of(record): name for name, own in indexes.items() for record in own}
    opaque = {name_of(each): each.get("patient") for own in indexes.values() for each in own}
    groups = [[plain_name(image) for image in images] for images in expected.get("together", ())]
    if expected["exit"] == 0:
        by_patient = {}
        for image, patient in expected.get("patient_of", {}).items():
            key = next(name for name in at if name.endswith(plain_name(image)))
            by_patient.setdefault(patient, []).append(key)
            assert opaque[key] != patient
        assert len({opaque[names[0]] for names in by_patient.values()}) == len(by_patient)
        groups += by_patient.values()
    for group in groups:
        assert len({at[name] for name in group}) == 1


def check_alike(records, expected):
    alike = [pixels_of(each) for each in records if name_of(each) in expected.get("alike", ())]
    assert len(alike) == len(expected.get("alike", ()))
    for picture in alike:
        assert np.abs(picture - alike[0]).mean() <= expected["mean_difference_at_most"]


# --- what expect.json says in words --------------------------------------------------------------


def one_patient(first, _):
    assert "all 16 images are of one patient" in first.err


def twelve_bits(first, _):
    assert "twelve.png has 16 bits a channel" in first.err


def subset(first, _):
    assert "400 of 416 images are not in" in first.err
    assert "pictures are there" not in first.out  # before any picture is made


def ungradable(first, _):
    line = first.err.splitlines()[0]
    assert "3 of 16 images are ungradable" in line
    for name in ("img 03.jpg", "img 07.jpg", "img 11.jpg"):
        assert name in line


def no_text(_, records):
    """Where the text is in the photograph, the prepared picture is what it is without the text."""
    pictures = {name_of(record): pixels_of(record) for record in records}
    assert np.abs(pictures["corner_text"] - pictures["plain"]).max() < 40


def all_different(_, records):
    assert len({pixels_of(record).tobytes() for record in records}) == 16


def grades_as_written(_, records):
    grades = sorted(record["label"] for record in records)
    assert grades == sorted([0, 2, 0, 1, 0, 2, 0, 3, 0, 4, 0, 2, 0, 2, 0, 1])


def offers_no_skipping(first, _):
    assert "--skip-broken" not in first.err and "--grades-from 1" in first.err


WORDS = {
    "patient_one": one_patient,
    "subset": subset,
    "ungradable": ungradable,
    "bits12": twelve_bits,
    "surrounds": no_text,
    "names_collide": all_different,
    "semicolon_float": grades_as_written,
    "names_loose": grades_as_written,
    "grades_1_to_5": offers_no_skipping,
}
