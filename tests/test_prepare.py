"""prepare: pictures and indexes from drawn or published images, resumable, visibly complete."""

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
from preparation import overview, synthetic

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


def of_folder(source, image_size=24):
    return ["--dataset", "folder", "--source", str(source), "--image-size", str(image_size)]


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
    assert overview.count_grades(sets["worker1"]) == [4, 2, 2, 0, 0]
    assert overview.count_grades(sets["worker2"]) == [4, 0, 2, 2, 0]
    assert overview.count_grades(sets["worker3"]) == [4, 0, 0, 1, 3]
    assert overview.count_grades(sets["val_set"]) == [6, 1, 2, 2, 1]
    out = capsys.readouterr().out
    assert "proliferative     DR  total" in out and "worker3" in out and "val_set" in out
    assert Image.open("preprocessed/synthetic/contact_sheet.png").size == (
        136 + 12 * 128,
        48 + 5 * 128,
    )


def test_equal_hospitals_have_the_shares_and_the_pictures_of_any_hospital():
    prepare.main([*SMALL, "--split", "iid"])
    train = data.read_index("index/train_set.pkl")
    assert overview.count_grades(train) == [12, 1, 9, 0, 2]
    for number in (0, 5):
        rng = np.random.default_rng([0, 0, number])
        image, _ = synthetic.draw(train[number]["label"], rng, 32)
        assert (np.asarray(Image.open(train[number]["dir"])) == image).all()


def test_each_worker_is_one_of_the_drawn_hospitals_and_they_are_named(capsys):
    prepare.main(SMALL)
    prepared = json.loads(Path("index/prepared.json").read_text())
    names = [hospital.name for hospital in synthetic.HOSPITALS]
    assert prepared["worker_hospitals"] == dict(
        zip(("worker1", "worker2", "worker3"), names, strict=True)
    )
    assert f"worker2: {names[1]}" in capsys.readouterr().out
    # The picture of a patient is that of its hospital: of patients, and by a camera of its own.
    record = data.read_index("index/worker2.pkl")[0]
    rng = np.random.default_rng([0, 0, int(record["picture"][6:11])])
    image, _ = synthetic.draw(record["label"], rng, 32, hospital=synthetic.HOSPITALS[1])
    assert (np.asarray(Image.open(record["dir"])) == image).all()


@pytest.mark.parametrize(
    "positions_of_workers",
    [
        [[0, 1, 2]],
        [[0, 2], [1]],
        [[0], [1], [2], [0]],
        [[0], [1], [2], [0], [1], [2], [0]],
    ],
)
def test_more_or_fewer_clients_than_hospitals_deal_the_same_pictures(positions_of_workers, capsys):
    """More: several clients share the patients of one. Fewer: a client has those of several."""
    num_clients = len(positions_of_workers)
    prepare.main(SMALL)
    pictures = snapshot()
    prepare.main([*SMALL, "--num-clients", str(num_clients)])
    out = capsys.readouterr().out
    assert "36 pictures are there, 0 to make" in out
    workers = json.loads(Path("index/prepared.json").read_text())["worker_hospitals"]
    for names, positions in zip(workers.values(), positions_of_workers, strict=True):
        assert names == " and ".join(sorted(synthetic.HOSPITALS[i].name for i in positions))
    dealt = [
        record["dir"]
        for number in range(num_clients)
        for record in data.read_index(f"index/worker{number + 1}.pkl")
    ]
    train = [record["dir"] for record in data.read_index("index/train_set.pkl")]
    assert sorted(dealt) == sorted(train)
    assert Path("index/val_set.pkl").read_bytes() == pictures["index/val_set.pkl"]


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
    prepare.main([*SMALL, "--num-clients", "2"])
    assert "35 pictures are there, 1 to make" in capsys.readouterr().out
    assert not Path("index/worker3.pkl").exists()
    # The equal hospitals' pictures are others; how they are dealt does not change them.
    prepare.main([*SMALL, "--split", "iid"])
    assert "0 pictures are there, 36 to make" in capsys.readouterr().out
    prepare.main([*SMALL, "--split", "dirichlet", "--num-clients", "2"])
    assert "36 pictures are there, 0 to make" in capsys.readouterr().out
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
        "split": "hospitals",
        "share": 3,
        "num_train": 24,
        "num_val": 12,
        "skipped": [],
    }
    assert {name: made[name] for name in wanted} == wanted


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
    assert prepare.main(["--dataset", "idrid", "--source", ".", "--check"]) == 10
    capsys.readouterr()
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


@pytest.mark.alone
def test_check_answers_at_once_and_without_tensorflow():
    prepare.main(SMALL)
    script = (
        f"import sys, prepare; code = prepare.main({[*SMALL, '--check']!r}); "
        "print(code, 'tensorflow' in sys.modules, 'keras' in sys.modules)"
    )

    def seconds_of(script):
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        return time.monotonic() - started, done

    ratios = []
    while len(ratios) < 5 and min(ratios, default=9) >= 3:
        packages, _ = seconds_of("import numpy, PIL.Image, PIL.ImageDraw")
        taken, done = seconds_of(script)
        assert done.stdout == "0 False False\n", done.stderr
        ratios.append(taken / packages)
    assert min(ratios) < 3  # 1.5 on an idle machine


def test_photographs_in_their_colours_are_other_pictures(tmp_path, capsys):
    choices = of_folder(photo_folder(tmp_path / "photos"))
    prepare.main(choices)
    graham = {path.name: path.read_bytes() for path in Path("preprocessed/folder").glob("*.png")}
    assert prepare.main([*choices, "--preprocessing", "colour"]) == 0
    assert json.loads(Path("index/prepared.json").read_text())["preprocessing"] == "colour"
    assert "0 pictures are there, 20 to make" in capsys.readouterr().out
    names = [record["picture"] for record in data.read_index("index/train_set.pkl")]
    for name in names:
        assert Path("preprocessed/folder", name).read_bytes() != graham[name]
    assert prepare.main([*choices, "--check"]) == prepare.EXIT_NOT_MADE
    for useless in (SMALL, ["--index-from", "worker1.pkl"]):
        with pytest.raises(SystemExit):
            prepare.main([*useless, "--preprocessing", "colour"])
        assert "--preprocessing would have no effect" in capsys.readouterr().err


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
        if "train_set" in path.name:
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
    choices = [*of_folder(source), "--num-clients", "2"]
    assert prepare.main(choices) == 1
    out, err = capsys.readouterr()
    assert "1 of 20 images are not in" in err and "'eye05.png'" in err and err.count("\n") == 2
    assert "to make" not in out and not Path("preprocessed").exists()  # before any work
    eye(source / "eye05.png")
    assert prepare.main(choices) == 1
    err = capsys.readouterr().err
    for name, reason in (("eye03", "cannot be read"), ("eye07", "brighter than grey level 7")):
        assert any(name in line and reason in line for line in err.splitlines()), err
    assert "2 of 20 images cannot be used: mend them, or give --skip-broken" in err
    assert not Path("index/prepared.json").exists()
    (source / "eye05.png").unlink()
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
    (
        ["--dataset", "folder", "--source", ".", "--split", "hospitals"],
        "--split hospitals is of the drawn hospitals, not of folder: use iid, noniid or dirichlet",
    ),
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


# --- patients, and what is held out --------------------------------------------------------------


def indexes():
    return {path.stem: data.read_index(path) for path in Path("index").glob("*.pkl")}


def test_the_index_tells_patients_and_none_is_at_two_hospitals(tmp_path, capsys):
    source = photo_folder(tmp_path / "photos", count=40)
    table = source / "labels.csv"
    table.write_text(table.read_text().replace("label,patient", "label,Patient ID"))
    assert prepare.main([*of_folder(source), "--num-clients", "2"]) == 0
    out = capsys.readouterr().out
    assert "patients: by column 'patient id'; 40 images of 20 patients" in out
    assert out.split("total  patients")[1].split()[:9][-1] == "8"  # worker1: 16 images of 8
    seen = {}
    for records in indexes().values():
        for record in records:
            number = int(record["picture"][3:5]) // 2
            assert seen.setdefault(record["patient"], number) == number
            assert record["patient"][0] == "p" and len(record["patient"]) == 5
    assert len(seen) == 20
    at = [{record["patient"] for record in indexes()[name]} for name in ("worker1", "worker2")]
    val = {record["patient"] for record in indexes()["val_set"]}
    assert not at[0] & at[1] and not (at[0] | at[1]) & val and len(val) == 4
    made = json.loads(Path("index/prepared.json").read_text())
    assert made["patients"] == "column 'patient id'"
    assert made["indexes"]["worker1"] == {"images": 16, "patients": 8}


def test_where_nobody_knows_the_patients_the_index_tells_none(tmp_path, capsys):
    source = photo_folder(tmp_path / "photos")
    choices = [*of_folder(source), "--patient-column", "none", "--num-clients", "2"]
    assert prepare.main(choices) == 0
    assert "patients: no patient column among image, label" in capsys.readouterr().out
    records = data.read_index("index/train_set.pkl")
    assert not data.knows_patients(records) and len(set(data.patients(records))) == len(records)
    assert json.loads(Path("index/prepared.json").read_text())["patients"] is None


def test_a_hospital_trains_on_all_it_has_and_a_server_validates_on_all(tmp_path, capsys):
    source = photo_folder(tmp_path / "photos")
    assert prepare.main([*of_folder(source), "--num-clients", "1", "--val-part", "0"]) == 0
    assert {name: len(own) for name, own in indexes().items()} == {"worker1": 20, "train_set": 20}
    assert prepare.main([*of_folder(source), "--val-part", "1"]) == 0
    assert {name: len(own) for name, own in indexes().items()} == {"val_set": 20}
    assert "20 pictures are there, 0 to make" in capsys.readouterr().out
    assert prepare.main([*of_folder(source), "--val-part", "1", "--check"]) == 0
    assert prepare.main([*of_folder(source), "--check"]) == 10


def test_a_part_column_decides_what_validates_unless_a_flag_does(tmp_path, capsys):
    source = photo_folder(tmp_path / "photos")
    rows = (source / "labels.csv").read_text().splitlines()
    parts = ["part", *("val" if number < 6 else "train" for number in range(20))]
    lines = [f"{row},{part}" for row, part in zip(rows, parts, strict=True)]
    (source / "labels.csv").write_text("\n".join(lines))
    assert prepare.main(of_folder(source)) == 0
    names = sorted(record["picture"] for record in indexes()["val_set"])
    assert names == [f"val_eye0{number}_png.png" for number in range(6)]
    assert prepare.main([*of_folder(source), "--val-part", "0.5"]) == 0
    assert len(indexes()["val_set"]) == 10
    assert "--val-part decides" in capsys.readouterr().out


@pytest.mark.parametrize("argv, sentence", [
    (["--val-part", "1.5"], "is not a number from 0 to 1"),
    (["--source", "photos"], "--source would have no effect beside --dataset synthetic"),
    (["--val-part", "0"], "--val-part would have no effect beside --dataset synthetic"),
    (["--dataset", "aptos", "--source", ".", "--num-train", "10"], "--num-train would have no"),
    (["--dataset", "aptos", "--source", ".", "--patient-column", "x"], "--patient-column would"),
    (["--keep-channels"], "--keep-channels would have no effect beside"),
    (["--index-from", "x", "--share", "3", "--num-clients", "3"], "--num-clients and --share w"),
    (["--index-from", "x.pkl", "--image-size", "64"], "--image-size would have no effect"),
    (["--index-from", "x.pkl", "--split", "iid"], "--split would have no effect beside --in"),
])  # fmt: skip
def test_a_flag_that_would_change_nothing_is_a_sentence(argv, sentence, capsys):
    with pytest.raises(SystemExit) as caught:
        prepare.main(argv)
    assert caught.value.code == 2 and sentence in capsys.readouterr().err


def test_a_warning_of_pillow_carries_the_name_of_its_file(tmp_path, capsys):
    source = photo_folder(tmp_path / "photos")
    with Image.open(source / "eye04.png") as photograph:
        odd = photograph.convert("P")
        odd.info["transparency"] = bytes([0] * 20)
        odd.save(source / "eye04.png")
    (source / "eye06.png").rename(source / "eye06.png.orig")
    with Image.open(source / "eye06.png.orig") as photograph:
        photograph.save(source / "eye06.png", "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    assert prepare.main(of_folder(source)) == 0
    err = capsys.readouterr().err
    assert err.startswith("warning: ") and "eye06.png: " in err


# --- --index-from: the thesis's pickled DataFrames -----------------------------------------------


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
                [
                    "--index-from",
                    *(str(tmp_path / folder / Path(file).name) for file in files),
                    "--keep-channels",
                ]
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
    assert prepare.main(["--index-from", *files, "--keep-channels"]) == 0
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
    assert "expected worker1, worker2 ..., val_set" in sentence_for(val)
    assert "expected worker1, worker2" in sentence_for(worker, thesis("worker3", [3]), val)
    missing = sentence_for(worker, val, source=str(tmp_path / "elsewhere"))
    assert "3 pictures are missing" in missing and "007-0000-000.jpg of" in missing
    assert "the grade 7" in sentence_for(thesis("worker1", [0], label=[7]), val)
    assert "do not fit together" in sentence_for(thesis("worker1", [0], new_label=["False"]), val)
    twice = thesis("worker1", [0, 0], label=[0, 1], new_label=["True", "False"])
    assert "has two grades, 0 and 1" in sentence_for(twice, val)
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


@pytest.fixture
def thesis_folder(tmp_path, pandas):
    """The thesis's folder DR as she left it: indexes in three folders, pictures by part."""
    root = tmp_path / "DR"
    rows = []
    for number in range(12):
        part = ("train", "valid", "test")[number % 3]
        picture = root / "preprocessed" / part / f"{number}.jpg"
        picture.parent.mkdir(parents=True, exist_ok=True)
        red = Image.new("RGB", (32, 32), (200, 100 + number, 10))
        red.save(picture, quality=95, subsampling=0)
        healthy = str(number % 2 == 0)
        directory = f"preprocessed/{part}/{number}.jpg"
        rows.append((f"{number}.jpg", 0 if healthy == "True" else 2, directory, healthy))

    def write(name, numbers):
        frame = pandas.DataFrame(
            [rows[number] for number in numbers], columns=["picture", "label", "dir", "new_label"]
        )
        (root / name).parent.mkdir(exist_ok=True)
        frame.to_pickle(root / name)

    write("assign_iid/val_set.pkl", [0, 1, 2])
    for worker, numbers in ((1, [3, 4, 5]), (2, [6, 7]), (3, [8, 9])):
        write(f"assign_noniid/worker{worker}.pkl", numbers)
    write("assign_noniid/share_data.pkl", [3, 6])
    write("assign_noniid/new_trainset.pkl", [4, 5, 7, 8, 9, 10])
    write("index/iid_valid.pkl", [0, 1, 2])
    return root


@pytest.mark.parametrize("given", ["", ".", "preprocessed", "..", "assign_noniid/../preprocessed"])
def test_the_thesis_s_own_layout_is_taken(thesis_folder, given, capsys):
    files = sorted(map(str, thesis_folder.glob("assign_noniid/*.pkl")))
    files.append(str(thesis_folder / "index/iid_valid.pkl"))
    source = ["--source", str(thesis_folder / given)] if given and given != ".." else []
    assert prepare.main(["--index-from", *files, *source]) == 0
    numbers = {
        name: {int(record["picture"].split(".")[0]) for record in own}
        for name, own in indexes().items()
    }
    assert numbers == {
        "worker1": {3, 4, 5, 6},  # with the shared images
        "worker2": {3, 6, 7},
        "worker3": {3, 6, 8, 9},
        "train_set": {3, 4, 5, 6, 7, 8, 9, 10},
        "val_set": {0, 1, 2},
    }
    out = capsys.readouterr().out
    assert (
        "share_data: every worker gets its 2 images" in out and "red and blue are put right" in out
    )
    record = indexes()["val_set"][1]
    red, green, blue = np.asarray(Image.open(record["dir"]))[16, 16].tolist()
    assert abs(red - 10) < 4 and abs(green - 101) < 4 and abs(blue - 200) < 4
    assert prepare.main(["--index-from", *files, *source, "--check"]) == 0
    assert prepare.main(["--index-from", *files, *source, "--keep-channels", "--check"]) == 10
    assert prepare.main(["--index-from", *files, *source, "--keep-channels"]) == 0
    assert np.asarray(Image.open(record["dir"]))[16, 16, 0] > 190


def test_the_thesis_s_unequal_hospitals_alone_have_no_validation_set(thesis_folder, capsys):
    files = sorted(map(str, thesis_folder.glob("assign_noniid/*.pkl")))
    assert prepare.main(["--index-from", *files]) == 0
    assert "no val_set.pkl (iid_valid.pkl) was given" in capsys.readouterr().out
    assert "val_set" not in indexes()
