"""Inputs that stand for what people report publicly about graded photographs: ../shared/cases*.

Each folder is a source for `prepare.py --dataset folder`, with what must come of it in expect.json.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED
from PIL import Image

import data
import prepare

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


def test_there_are_cases():
    if not CASES:
        pytest.skip(f"the cases are not here: {SHARED}/cases, cases_photographs")
    assert len(CASES) >= 21


def pixels_of(record):
    with Image.open(record["dir"]) as picture:
        return np.asarray(picture).astype(int)


def plain_name(image):
    return re.sub(r"\W+", "_", Path(image).stem)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    expected = json.loads((case / "expect.json").read_text())
    assert set(expected) <= KNOWN_KEYS  # a new key is a new promise, to be checked here
    code = prepare.main(["--dataset", "folder", "--source", str(case), *expected["prepare"]])
    out, err = capsys.readouterr()
    assert code == expected["exit"], out + err
    assert err.count("\n") <= expected.get("stderr_lines_at_most", 1000), err
    for pattern in [*expected.get("says", ()), SAYS.get(case.name, "")]:
        assert re.search(pattern, out + err, re.IGNORECASE), pattern
    assert case.name != "grades_1_to_5" or "--skip-broken" not in err
    if case.name == "subset":  # said before any work
        assert not list(Path("preprocessed").rglob("*.png"))
    num_images = expected.get("images")
    assert Path("index/prepared.json").exists() == (code == 0)
    if "then" in expected:
        then = prepare.main(["--dataset", "folder", "--source", str(case), *expected["then"]])
        assert then == expected["then_exit"], capsys.readouterr()
        num_images = expected["then_images"]
    paths = [path for path in Path("index").glob("*.pkl") if path.stem != "train_set"]
    indexes = {path.stem: data.read_index(path) for path in paths}
    check_indexes(case, indexes, expected, num_images)
    # without the SHA-256: as the case calls an image, without extension and signs
    records = {
        record["picture"].rpartition("_")[0]: (name, record)
        for name, own in indexes.items()
        for record in own
    }
    check_images(records, expected)
    if case.name == "surrounds":  # where the text is, the picture is what it is without the text
        with_text, without = (pixels_of(records[name][1]) for name in ("corner_text", "plain"))
        assert np.abs(with_text - without).max() < 40


def check_indexes(case, indexes, expected, num_images):
    records = [record for own in indexes.values() for record in own]
    if num_images is not None:
        assert len(records) == num_images
        different = num_images if case.name == "names_collide" else num_images - 4
        assert len({pixels_of(record).tobytes() for record in records}) >= different
    if case.name in ("semicolon_float", "names_loose"):
        assert sorted(record["label"] for record in records) == AS_WRITTEN
    if "val" in expected:
        assert len(indexes["val_set"]) == expected["val"]


def check_images(records, expected):
    """records: {what the case calls an image: (its index, its record)}"""

    def find(image):
        return next(records[name] for name in records if name.endswith(plain_name(image)))

    for image, grade in expected.get("label_of", {}).items():
        assert find(image)[1]["label"] == grade
    # copies of a photograph, and all images of a patient, lie in one index; all are there
    groups = [[find(image)[0] for image in images] for images in expected.get("together", ())]
    if expected["exit"] == 0:
        opaque = {}
        for image, patient in expected.get("patient_of", {}).items():
            name, record = find(image)
            assert re.fullmatch(r"p\d{4}", record["patient"])
            opaque.setdefault(patient, set()).add((name, record["patient"]))
        groups += opaque.values()
        assert len(set().union(*opaque.values())) == len(opaque)
    for group in groups:
        assert len(set(group)) == 1
    alike = [pixels_of(records[name][1]) for name in expected.get("alike", ())]
    for picture in alike:
        assert np.abs(picture - alike[0]).mean() <= expected["mean_difference_at_most"]
