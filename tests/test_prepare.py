"""prepare: pictures and indexes from drawn or published images, resumable, complete or visibly not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import prepare

ROOT = Path(__file__).parents[1]
IDRID = ROOT.parent / "shared" / "fundus" / "idrid"
SMALL = ["--num-train", "24", "--num-val", "12", "--image-size", "32"]


@pytest.fixture(autouse=True)
def in_an_empty_project(tmp_path, monkeypatch):
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)


def eye(path, level=150, size=(80, 60)):
    """A photograph: a disc of noise on black."""
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.ogrid[: size[1], : size[0]]
    disc = (x - size[0] / 2) ** 2 + (y - size[1] / 2) ** 2 < (size[1] / 2) ** 2
    noise = np.random.default_rng(level).integers(level - 30, level + 30, (size[1], size[0], 3))
    Image.fromarray((noise * disc[..., None]).astype(np.uint8)).save(path)


def photo_folder(folder, count=20):
    """The layout of --dataset folder: patient 0 has images 0 and 1, and so on."""
    rows = [f"eye{i:02d}.png,{i // 2 % 5},{i // 2}" for i in range(count)]
    for i in range(count):
        eye(folder / f"eye{i:02d}.png", level=60 + 5 * i)
    (folder / "labels.csv").write_text("\n".join(["image,label,patient", *rows]) + "\n")
    return folder


def run(*argv):
    """prepare.py as a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "prepare.py"), *argv],
        capture_output=True,
        text=True,
        timeout=200,
    )


def snapshot():
    return {
        path.as_posix(): path.read_bytes()
        for folder in ("index", "preprocessed")
        for path in Path(folder).rglob("*.p*")
    }


def test_the_drawn_set_is_what_the_index_says(capsys):
    assert prepare.main(SMALL) == 0
    sets = {path.stem: data.read_index(path) for path in Path("index").glob("*.pkl")}
    assert set(sets) == {"worker1", "worker2", "worker3", "train_set", "val_set"}
    assert [len(sets[f"worker{k}"]) for k in (1, 2, 3)] == [8, 8, 8]
    assert len(sets["train_set"]) == 24 and len(sets["val_set"]) == 12
    workers = [record["dir"] for k in (1, 2, 3) for record in sets[f"worker{k}"]]
    assert sorted(workers) == [record["dir"] for record in sets["train_set"]]
    assert not set(workers) & {record["dir"] for record in sets["val_set"]}
    for record in sets["train_set"] + sets["val_set"]:
        assert Image.open(record["dir"]).size == (32, 32)
        assert record["new_label"] == str(record["label"] == 0)
    assert [
        sum(record["label"] == grade for record in sets["train_set"]) for grade in range(5)
    ] == [12, 1, 9, 0, 2]
    out = capsys.readouterr().out
    assert "proliferative  healthy     DR  total" in out and "worker3" in out and "val_set" in out
    assert Image.open("preprocessed/synthetic/contact_sheet.png").size == (12 * 128, 5 * 128)


def test_the_same_choices_give_the_same_bits_and_another_seed_others():
    prepare.main(SMALL)
    first = snapshot()
    for path in list(Path("preprocessed").rglob("*.png"))[::2]:
        path.unlink()
    prepare.main(SMALL)
    assert snapshot() == first
    prepare.main([*SMALL, "--seed", "1"])
    assert (
        snapshot()["preprocessed/synthetic/train_00000.png"]
        != first["preprocessed/synthetic/train_00000.png"]
    )


def test_finished_pictures_are_kept_while_the_choices_are_the_same(capsys):
    prepare.main(SMALL)
    Path("preprocessed/synthetic/val_00003.png").unlink()
    prepare.main([*SMALL, "--split", "dirichlet", "--num-clients", "2"])
    assert "35 pictures are there, 1 to make" in capsys.readouterr().out
    assert not Path("index/worker3.pkl").exists()
    prepare.main(["--num-train", "24", "--num-val", "12", "--image-size", "16"])
    assert "0 pictures are there, 36 to make" in capsys.readouterr().out
    assert Image.open("preprocessed/synthetic/val_00003.png").size == (16, 16)


def test_prepared_json_tells_what_made_it():
    prepare.main([*SMALL, "--share", "3"])
    made = json.loads(Path("index/prepared.json").read_text())
    wanted = {
        "dataset": "synthetic",
        "preprocessing": "drawn",
        "seed": 0,
        "image_size": 32,
        "num_clients": 3,
        "split": "iid",
        "share": 3,
        "num_train": 24,
        "num_val": 12,
        "skipped": [],
    }
    assert wanted.items() <= made.items()


def test_check_tells_whether_the_index_is_of_these_choices(capsys):
    def check(*argv):
        code = prepare.main([*SMALL, *argv, "--check"])
        return code, capsys.readouterr().out

    assert check()[0] == 10
    prepare.main(SMALL)
    capsys.readouterr()
    assert check() == (0, "")
    assert check("--seed", "1") == (
        10,
        "index/ has to be made anew: it was made with seed 0, not 1\n",
    )
    assert (
        check("--split", "noniid")[0]
        == check("--num-clients", "2")[0]
        == check("--num-val", "13")[0]
        == 10
    )
    assert check("--dataset", "idrid", "--source", ".")[0] == 10
    assert check("--alpha", "0.3")[0] == 0  # decides nothing in an IID split
    Path("preprocessed/synthetic/train_00002.png").rename("elsewhere.png")
    assert check() == (
        10,
        "index/ has to be made anew: preprocessed/synthetic/train_00002.png is missing\n",
    )
    Path("elsewhere.png").rename("preprocessed/synthetic/train_00002.png")
    Path("index/worker2.pkl").write_bytes(b"half")
    assert "worker2.pkl" in check()[1]
    Path("index/prepared.json").write_text("{}")
    assert check()[0] == 10


def test_check_answers_at_once_and_without_tensorflow():
    prepare.main(SMALL)
    script = (
        f"import sys, prepare; code = prepare.main({[*SMALL, '--check']!r}); print(code, 'tensorflow' in sys.modules, "
        "'keras' in sys.modules)"
    )
    seconds = []
    while len(seconds) < 3 and min(seconds, default=9) >= 2:
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        seconds.append(time.monotonic() - started)
        assert done.stdout == "0 False False\n", done.stderr
    assert min(seconds) < 2  # half a second on an idle machine


def test_photographs_are_prepared_split_by_patient_and_checked(tmp_path, capsys):
    source = photo_folder(tmp_path / "photos")
    choices = [
        "--dataset",
        "folder",
        "--source",
        str(source),
        "--image-size",
        "24",
        "--num-clients",
        "2",
    ]
    assert prepare.main(choices) == 0
    train, val = data.read_index("index/train_set.pkl"), data.read_index("index/val_set.pkl")
    assert len(train) + len(val) == 20 and len(val) == 4
    patients = [
        {int(record["picture"][3:5]) // 2 for record in records} for records in (train, val)
    ]
    assert not patients[0] & patients[1]
    picture = np.asarray(Image.open(val[0]["dir"]))
    assert picture.shape == (24, 24, 3) and 110 < picture.mean() < 150
    assert prepare.main([*choices, "--check"]) == 0
    made = json.loads(Path("index/prepared.json").read_text())
    assert made["preprocessing"] == "graham" and made["source"] == str(source)


def test_a_changed_photograph_is_prepared_again(tmp_path, capsys):
    source = photo_folder(tmp_path / "photos")
    choices = [
        "--dataset",
        "folder",
        "--source",
        str(source),
        "--image-size",
        "24",
        "--num-clients",
        "2",
    ]
    prepare.main(choices)
    for away in (5, -5, -(10**9)):
        date = time.time() + away
        os.utime(source / "eye03.png", (date, date))
        prepare.main(choices)
        assert "19 pictures are there, 1 to make" in capsys.readouterr().out
    prepare.main(choices)
    assert "20 pictures are there, 0 to make" in capsys.readouterr().out


def test_stopped_between_two_indexes_no_old_one_is_left_beside_new_ones(tmp_path, monkeypatch):
    choices = [
        "--dataset",
        "folder",
        "--source",
        str(photo_folder(tmp_path / "photos")),
        "--image-size",
        "24",
    ]
    prepare.main(choices)

    def write_index(path, records, inner=data.write_index):
        if path.name == "train_set.pkl":
            raise KeyboardInterrupt
        inner(path, records)

    monkeypatch.setattr(data, "write_index", write_index)
    with pytest.raises(KeyboardInterrupt):
        prepare.main([*choices, "--seed", "3"])
    assert sorted(path.name for path in Path("index").glob("*.pkl")) == [
        "worker1.pkl",
        "worker2.pkl",
        "worker3.pkl",
    ]
    with pytest.raises(ValueError, match="val_set.pkl is missing: make it with"):
        data.read_index("index/val_set.pkl")


def test_broken_photographs_are_named_and_stop_it_unless_they_may_be_skipped(tmp_path, capsys):
    source = photo_folder(tmp_path / "photos")
    whole = tmp_path / "whole.jpg"
    eye(whole, size=(300, 200))
    (source / "eye03.png").write_bytes(whole.read_bytes()[:4000])  # truncated
    (source / "eye05.png").unlink()
    Image.new("RGB", (40, 30)).save(source / "eye07.png")
    choices = [
        "--dataset",
        "folder",
        "--source",
        str(source),
        "--image-size",
        "24",
        "--num-clients",
        "2",
    ]
    assert prepare.main(choices) == 1
    err = capsys.readouterr().err
    for name, reason in (
        ("eye03", "cannot be read"),
        ("eye05", "is missing"),
        ("eye07", "brighter than grey level 7"),
    ):
        assert any(name in line and reason in line for line in err.splitlines()), err
    assert "3 of 20 images cannot be used: mend them, or give --skip-broken" in err
    assert not Path("index/prepared.json").exists()
    assert prepare.main([*choices, "--skip-broken"]) == 0
    assert len(data.read_index("index/train_set.pkl") + data.read_index("index/val_set.pkl")) == 17
    assert json.loads(Path("index/prepared.json").read_text())["skipped"] == [
        "eye03_png",
        "eye05_png",
        "eye07_png",
    ]
    capsys.readouterr()
    assert prepare.main([*choices, "--check"]) == 10
    assert "3 unreadable images were left out" in capsys.readouterr().out
    assert prepare.main([*choices, "--skip-broken", "--check"]) == 0


def test_a_bad_source_is_one_sentence_and_leaves_the_index_alone(tmp_path, capsys):
    prepare.main(SMALL)
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    assert prepare.main(["--dataset", "aptos", "--source", str(tmp_path / "empty")]) == 1
    err = capsys.readouterr().err
    assert " prepare.py: error: " in err and err.count("\n") == 1 and "train.csv is missing" in err
    assert prepare.main([*SMALL, "--check"]) == 0


def test_the_published_test_part_is_left_alone(tmp_path, capsys):
    for part, names in (("train", "abcdef"), ("valid", "gh"), ("test", "ij")):
        (tmp_path / f"{part}.txt").write_text(
            "".join(f"{name}.png {k % 2 * 2}\n" for k, name in enumerate(names))
        )
        for name in names:
            eye(tmp_path / part / f"{name}.png")
    choices = [
        "--dataset",
        "ddr",
        "--source",
        str(tmp_path),
        "--image-size",
        "16",
        "--num-clients",
        "2",
    ]
    assert prepare.main(choices) == 0
    assert "2 images of the published test part are left alone" in capsys.readouterr().out
    assert len(data.read_index("index/train_set.pkl")) == 6
    assert {record["picture"] for record in data.read_index("index/val_set.pkl")} == {
        "val_g.png",
        "val_h.png",
    }
    assert prepare.main([*choices, "--balanced"]) == 0
    assert len(data.read_index("index/train_set.pkl") + data.read_index("index/val_set.pkl")) == 10


@pytest.mark.parametrize("argv, sentence", [
    (["--dataset", "ddr"], "--dataset ddr needs --source"),
    (["--balanced"], "--balanced is the thesis's draw from ddr, not from synthetic"),
    (["--split", "noniid", "--num-clients", "4"], "--split noniid is for 3 clients, found 4"),
    (["--split", "dirichlet", "--alpha", "0"], "--alpha must be above 0"),
    (["--num-clients", "0"], "is not a whole number of at least 1"),
    (["--dataset", "messidor"], "invalid choice: 'messidor'"),
])  # fmt: skip
def test_wrong_usage_ends_with_2(argv, sentence, capsys):
    with pytest.raises(SystemExit) as caught:
        prepare.main(argv)
    assert caught.value.code == 2 and sentence in capsys.readouterr().err


def test_too_many_clients_for_the_images_is_one_sentence(capsys):
    assert prepare.main([*SMALL, "--num-clients", "30"]) == 1
    assert (
        "24 training images are too few for 0 shared ones and 30 clients" in capsys.readouterr().err
    )


def test_many_pictures_are_made_by_several_processes_in_the_same_bits():
    argv = ["--num-train", "50", "--num-val", "10", "--image-size", "16"]
    done = run(*argv)
    assert done.returncode == 0, done.stderr
    assert "60 of 60 pictures" in done.stdout and done.stdout.count("\n") < 25
    together = snapshot()
    for path in Path("preprocessed/synthetic").glob("*_0*.png"):
        if int(path.stem[-2:]) % 2:
            path.unlink()
    assert prepare.main(argv) == 0  # few enough to be made in this process
    assert snapshot() == together


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        signal.SIGKILL,
    ],
)
def test_stopped_at_any_instant_it_is_not_complete_leaves_no_process_and_goes_on(how, capfd):
    argv = ["--num-train", "110", "--num-val", "10", "--image-size", "16"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "prepare.py"), *argv],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    pictures = Path("preprocessed/synthetic")
    try:
        deadline = time.monotonic() + 60
        while len(list(pictures.glob("[!.]*.png"))) < 8:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, how)
        out = process.communicate(timeout=30)[0]
        assert process.returncode == (-9 if how == signal.SIGKILL else 128 + how)
        assert "Traceback" not in out
        while True:  # the processes of the pool end by themselves
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                break
            assert time.monotonic() < deadline, "a process of the pool is left"
            time.sleep(0.02)
    finally:
        if process.poll() is None:
            process.kill()
    kept = len(list(pictures.glob("[!.]*.png")))
    assert 8 <= kept < 120 and not Path("index/prepared.json").exists()
    for path in pictures.glob("[!.]*.png"):
        Image.open(path).load()
    assert prepare.main(argv) == 0
    assert f"{kept} pictures are there, {120 - kept} to make" in capfd.readouterr().out
    assert len(list(pictures.glob("[!.]*.png"))) == 121 and not list(
        pictures.glob(".*")
    )  # and the contact sheet


def test_a_failure_on_the_way_leaves_an_index_that_is_not_complete(monkeypatch, capsys):
    prepare.main(SMALL)

    def disk_full(path, records):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data, "write_index", disk_full)
    assert prepare.main([*SMALL, "--seed", "1"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not Path("index/prepared.json").exists()


def test_retinamnist_from_its_file(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 12), ("val", 6), ("test", 4)):
        arrays[f"{part}_images"] = rng.integers(50, 200, (count, 128, 128, 3), np.uint8)
        arrays[f"{part}_labels"] = (np.arange(count) % 5).reshape(-1, 1)
    np.savez(tmp_path / "retinamnist_128.npz", **arrays)
    assert (
        prepare.main(["--dataset", "retinamnist", "--source", str(tmp_path), "--image-size", "32"])
        == 0
    )
    assert (
        len(data.read_index("index/train_set.pkl")) == 12
        and len(data.read_index("index/val_set.pkl")) == 6
    )


@pytest.mark.slow
def test_the_real_idrid_photographs():
    if not IDRID.is_dir():
        pytest.skip(f"the real photographs are not here: {IDRID}")
    done = run("--dataset", "idrid", "--source", str(IDRID), "--image-size", "32")
    assert done.returncode == 0, done.stderr
    assert (
        len(data.read_index("index/train_set.pkl")) == 405
        and len(data.read_index("index/val_set.pkl")) == 102
    )


# --- --index-from: the thesis's pickled DataFrames ------------------------------------------------------------


@pytest.fixture
def pandas():
    return pytest.importorskip("pandas", reason="pandas is not installed")


@pytest.fixture
def thesis(tmp_path, pandas):
    """Their repository with pictures, beside the empty project; writes an index of theirs."""
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
    assert [record["new_label"] for record in data.read_index("index/val_set.pkl")] == [
        "False",
        "True",
    ]
    assert len(data.read_index("index/train_set.pkl")) == 5
    assert all(Path(record["dir"]).exists() for record in data.read_index("index/train_set.pkl"))
    made = json.loads(Path("index/prepared.json").read_text())
    assert made["dataset"] == "imported" and made["num_clients"] == 2 and made["image_size"] == 20
    assert prepare.main([*choices, "--check"]) == 0
    assert prepare.main(["--check"]) == 10


def test_another_import_has_pictures_of_its_own(thesis, tmp_path):
    for folder, level in (("theirs", 60), ("others", 160)):
        eye(tmp_path / folder / "0.png", level)
        eye(tmp_path / folder / "1.png", level)
        where = [str(tmp_path / folder / name) for name in ("0.png", "1.png")]
        files = [
            thesis(name, [0], picture=[f"{name}.png"], dir=[path])
            for name, path in zip(("worker1", "val_set"), where, strict=True)
        ]
        for file in files:
            (tmp_path / folder / Path(file).name).write_bytes(Path(file).read_bytes())
        assert (
            prepare.main(
                ["--index-from", *(str(tmp_path / folder / Path(file).name) for file in files)]
            )
            == 0
        )
        picture = Image.open(data.read_index("index/worker1.pkl")[0]["dir"])
        assert (np.asarray(picture) == np.asarray(Image.open(where[0]))).all()


def test_a_dir_within_the_project_needs_no_source(thesis, tmp_path):
    Path("preprocessed").mkdir()
    for number in range(3):
        (tmp_path / "pictures" / f"007-000{number}-000.jpg").rename(f"preprocessed/{number}.jpg")
    files = [
        thesis("worker1", [0, 1], dir=["preprocessed/0.jpg", "preprocessed/1.jpg"]),
        thesis("val_set", [2], dir=["preprocessed/2.jpg"]),
    ]
    assert prepare.main(["--index-from", *files]) == 0
    for record, number in zip(data.read_index("index/worker1.pkl"), (0, 1), strict=True):
        assert (
            np.asarray(Image.open(record["dir"]))
            == np.asarray(Image.open(f"preprocessed/{number}.jpg"))
        ).all()


def test_what_does_not_fit_is_one_sentence(thesis, tmp_path, capsys):
    def sentence_for(*files, source=thesis.pictures):
        assert (
            prepare.main(["--index-from", *files, *(["--source", source] if source else [])]) == 1
        )
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
    twice = thesis("worker1", [0, 0], label=[0, 1], new_label=["True", "False"])
    assert "have one name, or two grades" in sentence_for(twice, val)
    assert "worker1 and train_set would be without images" in sentence_for(
        thesis("worker1", []), val
    )
    (tmp_path / "worker1.pkl").write_bytes(b"no pickle")
    assert "is no DataFrame with the columns picture, label, dir, new_label" in sentence_for(
        worker, val
    )


def test_an_index_to_import_that_would_be_overwritten_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        prepare.parse(["--index-from", "index/worker1.pkl", "elsewhere/val_set.pkl"])
    assert (
        ended.value.code == 2 and "--index-from must lie outside index/" in capsys.readouterr().err
    )


def test_without_pandas_the_sentence_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert prepare.main(["--index-from", "worker1.pkl"]) == 1
    assert "needs pandas: pip install pandas" in capsys.readouterr().err
