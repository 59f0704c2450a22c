"""Inputs that stand for what people report publicly about graded photographs: ../shared/cases.

Each folder is a source for `prepare.py --dataset folder`, with what must come of it in expect.json.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import data
import prepare

ROOT = Path(__file__).parents[1]
CASES = ROOT.parent / "shared" / "cases"
NAMES = sorted(path.parent.name for path in CASES.glob("*/expect.json"))
KNOWN_KEYS = {
    *("prepare", "exit", "images", "val", "then", "then_exit", "then_images", "alike"),
    *("mean_difference_at_most", "patient_of", "stderr_lines_at_most", "must"),
}


def test_there_are_cases():
    if not NAMES:
        pytest.skip(f"the cases are not here: {CASES}")
    assert len(NAMES) >= 11


@pytest.fixture
def prepared(tmp_path, monkeypatch, capsys):
    """prepare.py on a case, in an empty folder: its exit code and its output."""
    monkeypatch.chdir(tmp_path)

    def run(case, flags):
        code = prepare.main(["--dataset", "folder", "--source", str(CASES / case), *flags])
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return run


def read_indexes(folder):
    paths = sorted((folder / "index").glob("*.pkl"))
    return {path.stem: data.read_index(path) for path in paths if path.stem != "train_set"}


def pixels_of(folder, record):
    with Image.open(folder / record["dir"]) as picture:
        return np.asarray(picture).astype(int)


@pytest.mark.parametrize("case", NAMES)
def test_a_case(case, prepared, tmp_path):
    expected = json.loads((CASES / case / "expect.json").read_text())
    assert set(expected) <= KNOWN_KEYS  # a new key is a new promise, to be checked here
    first = prepared(case, expected["prepare"])
    assert first.returncode == expected["exit"], first.stdout + first.stderr
    assert "Traceback" not in first.stderr
    if "stderr_lines_at_most" in expected:
        assert first.stderr.count("\n") <= expected["stderr_lines_at_most"], first.stderr
    if "images" in expected:
        check_images(tmp_path, expected["images"], expected)
    if "then" in expected:
        if expected["exit"] != 0:
            assert not (tmp_path / "index/prepared.json").exists()
        then = prepared(case, expected["then"])
        assert then.returncode == expected["then_exit"], then.stdout + then.stderr
        check_images(tmp_path, expected["then_images"], expected)
    if "patient_of" in expected and expected["exit"] == 0:
        check_patients(read_indexes(tmp_path), expected["patient_of"])
    WORDS.get(case, lambda *_: None)(first, tmp_path)


def check_images(folder, num_images, expected):
    indexes = read_indexes(folder)
    records = [record for own in indexes.values() for record in own]
    assert len(records) == num_images
    pictures = [pixels_of(folder, record) for record in records]
    assert (
        len({picture.tobytes() for picture in pictures}) >= num_images - 4
    )  # of eyes that are alike
    if "val" in expected:
        assert len(indexes["val_set"]) == expected["val"]
    if "alike" in expected:
        alike = [
            picture
            for record, picture in zip(records, pictures, strict=True)
            if record["picture"].rpartition("_")[0] in expected["alike"]
        ]
        assert len(alike) == len(expected["alike"])
        for picture in alike:
            difference = np.abs(picture - alike[0]).mean()
            assert difference <= expected["mean_difference_at_most"]


def check_patients(indexes, patient_of):
    by_picture = {
        image.replace(".", "_") + ".png": patient for image, patient in patient_of.items()
    }
    seen = {}  # patient -> index, and what the index calls the patient
    for name, records in indexes.items():
        for record in records:
            patient = by_picture[record["picture"]]
            assert record["patient"] != patient
            assert seen.setdefault(patient, (name, record["patient"])) == (name, record["patient"])
    assert len(set(seen.values())) == len(set(patient_of.values()))
    assert sum(map(len, indexes.values())) == len(patient_of)  # all images are used


# --- what expect.json says in words --------------------------------------------------------------


def one_patient(first, _):
    assert first.stderr.count("\n") == 1
    assert "all 16 images are of one patient" in first.stderr


def subset(first, _):
    assert "400 of 416 images are not in" in first.stderr
    assert "pictures are there" not in first.stdout  # before any picture is made


def ungradable(first, _):
    line = first.stderr.splitlines()[0]
    assert "3 of 16 images are ungradable" in line
    for name in ("img 03.jpg", "img 07.jpg", "img 11.jpg"):
        assert name in line


def twelve_bits(first, _):
    assert "twelve.png has 16 bits a channel and values up to 3," in first.stderr
    assert "of 65,535" in first.stderr


def no_text(_, folder):
    """Where the text is in the photograph, the prepared picture is what it is without the text."""
    records = {
        record["picture"]: pixels_of(folder, record)
        for own in read_indexes(folder).values()
        for record in own
    }
    difference = np.abs(records["corner_text_png.png"] - records["plain_png.png"])
    assert difference.max() < 40


def all_different(_, folder):
    records = [record for own in read_indexes(folder).values() for record in own]
    assert len({pixels_of(folder, record).tobytes() for record in records}) == 16


def grades_as_written(_, folder):
    grades = [record["label"] for own in read_indexes(folder).values() for record in own]
    assert sorted(grades) == sorted([0, 2, 0, 1, 0, 2, 0, 3, 0, 4, 0, 2, 0, 2, 0, 1])


WORDS = {
    "patient_one": one_patient,
    "subset": subset,
    "ungradable": ungradable,
    "bits12": twelve_bits,
    "surrounds": no_text,
    "names_collide": all_different,
    "semicolon_float": grades_as_written,
    "names_loose": grades_as_written,
}
