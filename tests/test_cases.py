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

# What expect.json says in words: of the output ...
SAYS = {
    "patient_one": "16 images are of one patient",
    "subset": "400 of 416 images",
    "ungradable": "3 of 16 .*img 03.jpg.*img 07.jpg.*img 11.jpg",
    "bits12": "twelve.png has 16 bits",
    "grades_1_to_5": "--grades-from 1",
}
# ... and of the result.
AS_WRITTEN = sorted([0, 2, 0, 1, 0, 2, 0, 3, 0, 4, 0, 2, 0, 2, 0, 1])
GRADES = {"semicolon_float": AS_WRITTEN, "names_loose": AS_WRITTEN}


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
    assert first.err.count("\n") <= expected.get("stderr_lines_at_most", 1000), first.err
    for pattern in [*expected.get("says", ()), SAYS.get(case.name, "")]:
        assert re.search(pattern, first.out + first.err, re.IGNORECASE), pattern
    if case.name == "subset":  # said before any work
        assert not list(Path("preprocessed").rglob("*.png"))
    if case.name == "grades_1_to_5":
        assert "--skip-broken" not in first.err
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
        different = num_images if case.name == "names_collide" else num_images - 4
        assert len({pixels_of(record).tobytes() for record in records}) >= different
    if case.name in GRADES:
        assert sorted(record["label"] for record in records) == GRADES[case.name]
    if "val" in expected:
        assert len(indexes["val_set"]) == expected["val"]
    for image, grade in expected.get("label_of", {}).items():
        assert [each["label"] for each in records if name_of(each).endswith(plain_name(image))] == [
            grade
        ]
    check_together(indexes, expected)
    check_alike(records, expected)
    if case.name == "surrounds":  # where the text is, the picture is what it is without the text
        pictures = {name_of(record): pixels_of(record) for record in records}
        assert np.abs(pictures["corner_text"] - pictures["plain"]).max() < 40


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
