"""thesis_index: the thesis's pickled DataFrames become our index; what does not fit is told in a sentence."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import prepare


@pytest.fixture
def pandas():
    return pytest.importorskip("pandas", reason="pandas is not installed")


@pytest.fixture
def thesis(tmp_path, monkeypatch, pandas):
    """Their repository with pictures, and an empty project of ours as the current directory; writes an index of theirs."""
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    (tmp_path / "pictures").mkdir()
    for number in range(8):
        noise = np.random.default_rng(number).integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "pictures" / f"007-000{number}-000.jpg")

    def write(name, numbers, **changes):
        columns = {
            "picture": [f"007-000{n}-000.jpg" for n in numbers],
            "label": [n % 3 for n in numbers],
            "dir": [f"/home/them/DR/preprocessed/007-000{n}-000.jpg" for n in numbers],
            "new_label": [str(n % 3 == 0) for n in numbers],
        }
        pandas.DataFrame({**columns, **changes}).to_pickle(tmp_path / f"{name}.pkl")
        return str(tmp_path / f"{name}.pkl")

    write.pictures = str(tmp_path / "pictures")
    return write


def test_an_import_becomes_our_index_with_the_pictures_in_the_project(thesis):
    files = [thesis("worker1", [0, 1, 2]), thesis("worker2", [3, 4]), thesis("val_set", [5, 6])]
    choices = ["--index-from", *files, "--source", thesis.pictures]
    assert prepare.main(choices) == 0
    assert [record["label"] for record in data.read_index("index/worker1.pkl")] == [0, 1, 2]
    assert [record["new_label"] for record in data.read_index("index/val_set.pkl")] == ["False", "True"]
    assert len(data.read_index("index/train_set.pkl")) == 5
    assert all(Path(record["dir"]).exists() for record in data.read_index("index/train_set.pkl"))
    made = json.loads(Path("index/prepared.json").read_text())
    assert made["dataset"] == "imported" and made["num_clients"] == 2 and made["image_size"] == 20
    assert prepare.main([*choices, "--check"]) == 0
    assert prepare.main(["--check"]) == 10


def test_a_dir_within_the_project_needs_no_source(thesis, tmp_path):
    Path("preprocessed").mkdir()
    for number in range(3):
        (tmp_path / "pictures" / f"007-000{number}-000.jpg").rename(f"preprocessed/{number}.jpg")
    files = [thesis("worker1", [0, 1], dir=["preprocessed/0.jpg", "preprocessed/1.jpg"]),
             thesis("val_set", [2], dir=["preprocessed/2.jpg"])]
    assert prepare.main(["--index-from", *files]) == 0
    assert [record["dir"] for record in data.read_index("index/worker1.pkl")] == ["preprocessed/0.jpg", "preprocessed/1.jpg"]


def test_what_does_not_fit_is_one_sentence(thesis, tmp_path, capsys):
    def sentence_for(*files, source=thesis.pictures):
        assert prepare.main(["--index-from", *files, *(["--source", source] if source else [])]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "Traceback" not in err
        return err

    worker, val = thesis("worker1", [0, 1]), thesis("val_set", [2])
    assert "/home/them" in sentence_for(worker, val, source=None)
    assert "expected worker1, worker2 ..., val_set" in sentence_for(worker)
    assert "expected worker1, worker2" in sentence_for(worker, thesis("worker3", [3]), val)
    assert "007-0000-000.jpg is missing" in sentence_for(worker, val, source=str(tmp_path))
    assert "the grade 7" in sentence_for(thesis("worker1", [0], label=[7]), val)
    assert "do not fit together" in sentence_for(thesis("worker1", [0], new_label=["False"]), val)
    (tmp_path / "worker1.pkl").write_bytes(b"no pickle")
    assert "is no DataFrame with the columns picture, label, dir, new_label" in sentence_for(worker, val)


def test_without_pandas_the_sentence_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    assert prepare.main(["--index-from", "worker1.pkl"]) == 1
    assert "needs pandas: pip install pandas" in capsys.readouterr().err
