"""prepare: pictures and indexes of synthetic and photographed eyes; resumable, visibly complete.

What test_cases.py's folders show of photographs is not tested again here.
"""

import json
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, until
from PIL import Image

import data
import prepare
from preparation import overview, synthetic

SMALL = ["--num-train", "24", "--num-val", "12", "--image-size", "32"]


@pytest.fixture(autouse=True)
def in_an_empty_project(tmp_path, monkeypatch):
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)


def eye(path, level=150):
    """A photograph: a disc of noise on black, 80 x 60."""
    y, x = np.ogrid[:60, :80]
    disc = (x - 40) ** 2 + (y - 30) ** 2 < 30**2
    noise = np.random.default_rng(level).integers(level - 30, level + 30, (60, 80, 3))
    Image.fromarray((noise * disc[..., None]).astype(np.uint8)).save(path)


@pytest.fixture
def photographs(tmp_path):
    """photographs(column=pattern ...) -> the flags for a folder of 20 photographs.

    Patient 0 has images 0 and 1, and so on.
    """
    source = tmp_path / "photographs"
    source.mkdir()

    def make(**columns):
        columns = {"image": "eye{0:02d}.png", "label": "{1}", "patient": "P{2}", **columns}
        lines = [",".join(columns)]
        for i in range(20):
            eye(source / f"eye{i:02d}.png", level=60 + 5 * i)
            lines.append(",".join(columns.values()).format(i, i // 2 % 5, i // 2))
        (source / "labels.csv").write_text("\n".join(lines))
        return ["--dataset", "folder", "--source", str(source), "--image-size", "24"]

    make.source = source
    return make


def indexes():
    return {path.stem: data.read_index(path) for path in sorted(Path("index").glob("*.pkl"))}


def sizes():
    return {name: len(own) for name, own in indexes().items()}


def made():
    return json.loads(Path("index/prepared.json").read_text())


def pictures():
    return {path: path.read_bytes() for path in Path("preprocessed").rglob("*.png")}


def number_of(record):
    """Of which photograph of `photographs`, or of which synthetic one, it is."""
    return int(re.search(r"(\d+)_[0-9a-f]{12}\.png$", record["picture"])[1])


# --- synthetic -----------------------------------------------------------------------------------


def test_the_synthetic_set_is_what_the_index_says():
    assert prepare.main([*SMALL, "--share", "0"]) == 0
    sets = indexes()
    assert sizes() == {"train_set": 24, "val_set": 12, "worker1": 8, "worker2": 8, "worker3": 8}
    workers = [record["dir"] for k in (1, 2, 3) for record in sets[f"worker{k}"]]
    assert sorted(workers) == [record["dir"] for record in sets["train_set"]]
    assert not set(workers) & {record["dir"] for record in sets["val_set"]}
    grades = [overview.count_grades(sets[f"worker{k}"]) for k in (1, 2, 3)]
    assert grades == [[4, 2, 2, 0, 0], [4, 0, 2, 2, 0], [4, 0, 0, 1, 3]]
    # The picture of a patient is that of its hospital: of patients, and by a camera of its own.
    names = [hospital.name for hospital in synthetic.HOSPITALS]
    assert list(made()["worker_hospitals"].values()) == names
    assert made()["val_hospitals"] == [names[number_of(each) // 4] for each in sets["val_set"]]
    assert Path("index/contact_sheet.png").exists()
    record = sets["worker2"][0]
    rng = np.random.default_rng([0, 0, number_of(record)])
    image = synthetic.draw(record["label"], rng, 32, hospital=synthetic.HOSPITALS[1])
    assert (np.asarray(Image.open(record["dir"])) == image).all()


@pytest.mark.parametrize("hospitals_of_workers", [[[0, 2], [1]], [[0], [1], [2], [0]]])
def test_more_or_fewer_clients_than_hospitals_deal_the_same_pictures(hospitals_of_workers):
    """More: several clients share the patients of one. Fewer: a client has those of several."""
    prepare.main([*SMALL, "--num-clients", str(len(hospitals_of_workers))])
    names = [sorted(synthetic.HOSPITALS[i].name for i in own) for own in hospitals_of_workers]
    assert list(made()["worker_hospitals"].values()) == list(map(" and ".join, names))


def test_pictures_of_other_choices_lie_elsewhere_and_can_be_removed(capsys, monkeypatch):
    prepare.main(SMALL)
    first = pictures()
    next(Path("preprocessed").rglob("val_*.png")).unlink()
    prepare.main([*SMALL, "--num-clients", "2"])  # who gets which is no choice of a picture
    assert "35 pictures are there, 1 to make" in capsys.readouterr().out
    assert pictures() == first
    for other in (["--seed", "1"], ["--split", "iid"], ["--image-size", "16"]):
        prepare.main([*SMALL, *other])
        assert "0 pictures are there, 36 to make" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "__file__", prepare.__file__)  # drawn by other code
        prepare.main(SMALL)
        assert "0 pictures are there, 36 to make" in capsys.readouterr().out
    assert first.items() <= pictures().items()
    mine = [Path("preprocessed/others/eye_0123456789ab.png")]
    mine.append(next(iter(first)).with_name("mine.txt"))
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    prepare.main([*SMALL, "--image-size", "16"])
    assert capsys.readouterr().out.count("36 pictures, 0 MB that no index here points to") == 4
    prepare.main([*SMALL, "--image-size", "16", "--remove-old"])
    assert len(list(Path("preprocessed").glob("*/*_*.png"))) == 36 + 1
    assert all(path.exists() for path in mine)


def test_the_table_has_a_row_a_set(capsys):
    worker1 = [{"label": grade} for grade in (0, 0, 1, 2, 4)]
    sets = {"worker1": worker1, "val_set": [{"label": 3, "patient": "p0001"}]}
    overview.print_table(sets, {"worker1": "Lund [north], and its branches"})
    header, first, *more, second = capsys.readouterr().out.splitlines()
    assert header.split()[:5] == [*overview.GRADE_NAMES]
    assert first.split() == "worker1 2 1 1 0 1 3 5 unknown Lund [north], and its".split()
    assert second.split() == "val_set 0 0 0 1 0 1 1 1".split()
    assert max(map(len, [header, first, *more])) <= 80 and len(more) == 1


# --- what an index keeps -------------------------------------------------------------------------


def test_check_tells_whether_the_index_is_of_these_choices(capsys):
    def check(*argv):
        return prepare.main([*SMALL, *argv, "--check"]), capsys.readouterr().out

    prepare.main(SMALL)
    capsys.readouterr()
    assert check() == (0, "")
    anew = "index/ has to be made anew: it was made with seed 0, not 1\n"
    assert check("--seed", "1") == (10, anew)
    picture = Path(data.read_index("index/train_set.pkl")[2]["dir"])
    picture.rename("elsewhere.png")
    assert f"{picture} is missing" in check()[1]
    Path("index/worker2.pkl").write_bytes(b"half")
    assert "worker2.pkl" in check()[1]


def test_what_prepare_did_not_write_is_moved_aside(capsys):
    Path("index").mkdir()
    for name in ("worker1.pkl", "worker7.pkl", "prepared.json"):
        Path("index", name).write_text("the user's")
    prepare.main(SMALL)
    assert "index/old-1: 3 files that prepare.py did not write" in capsys.readouterr().out
    assert Path("index/old-1/worker7.pkl").read_text() == "the user's"
    prepare.main([*SMALL, "--num-clients", "1"])
    assert not Path("index/worker2.pkl").exists() and not Path("index/old-2").exists()
    Path("index/val_set.pkl").write_text("edited")
    prepare.main(SMALL)
    assert [path.read_text() for path in Path("index/old-2").iterdir()] == ["edited"]


def test_a_failure_leaves_the_old_index_or_one_that_is_not_complete(monkeypatch, capsys):
    prepare.main(SMALL)
    Path("empty").mkdir()
    assert prepare.main(["--dataset", "aptos", "--source", "empty"]) == 1
    assert "train.csv is no file" in capsys.readouterr().err
    assert prepare.main([*SMALL, "--check"]) == 0

    def disk_full(path, records, inner=data.write_index):
        if path.stem == "train_set":
            raise OSError(28, "No space left on device")
        inner(path, records)

    monkeypatch.setattr(data, "write_index", disk_full)
    assert prepare.main([*SMALL, "--seed", "1"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert prepare.main([*SMALL, "--seed", "1", "--check"]) == 10


STANDS_STILL_AFTER_8 = f"""
import itertools, runpy, sys, time
sys.path.insert(0, {str(ROOT)!r})
from preparation import synthetic
def draw(*arguments, inner=synthetic.draw, drawn=itertools.count(), **options):
    if next(drawn) >= 8:
        time.sleep(1000)
    return inner(*arguments, **options)
synthetic.draw = draw
runpy.run_path({str(ROOT / "prepare.py")!r}, run_name='__main__')
"""


def test_stopped_at_any_instant_it_is_not_complete_and_goes_on(start, capfd):
    script = Path("stands_still.py").absolute()
    script.write_text(STANDS_STILL_AFTER_8)
    process = start(script, *SMALL, cwd=Path.cwd())

    def finished():
        return list(Path("preprocessed").glob("*/[!.]*.png"))

    until(lambda: len(finished()) == 8, lambda: f"it makes pictures: {process.output}")
    process.signal(signal.SIGINT)
    assert process.wait() == 130 and "Traceback" not in process.output
    assert len(finished()) == 8 and not Path("index/prepared.json").exists()
    finished()[0].with_name(".half.1-0123abcd.tmp.png").touch()  # as SIGKILL leaves it
    assert prepare.main(SMALL) == 0
    assert "8 pictures are there, 28 to make" in capfd.readouterr().out
    assert len(finished()) == 36 and not list(Path("preprocessed").glob("*/.*"))


@pytest.mark.parametrize("flags, expected", [
    ("--arch vgg16", (224, "graham")),
    ("--arch lite0", (448, "colour")),
    ("--arch lite0 --image-size 64 --preprocessing graham", (64, "graham")),
])  # fmt: skip
def test_size_and_preprocessing_follow_from_the_network(flags, expected):
    args = prepare.parse(["--dataset", "aptos", "--source", ".", *flags.split()])
    assert (args.image_size, args.preprocessing) == expected
    # they decide, not the network's name: an index of another that looks the same is the same
    assert "arch" not in prepare.choices_of(args)


# --- photographs ---------------------------------------------------------------------------------


def test_a_photograph_that_was_exported_again_or_in_colour_is_another_picture(photographs, capsys):
    choices = photographs()
    prepare.main(choices)
    eye(photographs.source / "eye03.png", level=20)
    capsys.readouterr()
    prepare.main(choices)
    out = capsys.readouterr().out
    assert "19 pictures are there, 1 to make" in out
    # a doubt is kept with its picture
    assert "check these: 20 of 20 photographs may be none of a fundus: eye00.png" in out
    assert "index/check_these.png" in out and Path("index/check_these.png").exists()
    assert prepare.main([*choices, "--preprocessing", "colour"]) == 0
    assert "0 pictures are there, 20 to make" in capsys.readouterr().out
    assert made()["preprocessing"] == "colour"


def test_who_is_held_out_now_and_was_trained_on_before_is_said(photographs, capsys):
    choices = photographs()
    for _ in range(2):  # the same draw holds out the same
        prepare.main(choices)
    assert "trained on" not in capsys.readouterr().err
    trained_on = {record["dir"] for record in indexes()["train_set"]}
    prepare.main(photographs(label="4"))
    known = [record for record in indexes()["val_set"] if record["dir"] in trained_on]
    assert known
    said = f"{len(known)} of the {sizes()['val_set']} images held out now were trained on"
    assert said in capsys.readouterr().err


def test_copies_of_a_photograph_may_not_have_two_grades(photographs, capsys):
    choices = photographs(patient="{0}")
    source = photographs.source
    (source / "eye02.png").write_bytes((source / "eye00.png").read_bytes())
    assert prepare.main(choices) == 1
    err = capsys.readouterr().err
    assert "eye00.png (grade 0)" in err and "eye02.png (grade 1)" in err
    assert prepare.main([*choices, "--skip-broken"]) == 0
    assert len(indexes()["train_set"] + indexes()["val_set"]) == 18


def test_an_error_page_under_two_names_joins_no_patients(photographs, capsys):
    choices = photographs()
    for name in ("eye00.png", "eye10.png"):
        (photographs.source / name).write_text("<html>404")
    assert prepare.main([*choices, "--skip-broken"]) == 0
    assert "identical" not in capsys.readouterr().out
    records = indexes()["train_set"] + indexes()["val_set"]
    patients = {number_of(record): record["patient"] for record in records}
    assert len(patients) == 18 and patients[1] != patients[11]


def test_what_is_unreadable_is_one_line_whatever_the_file_is_called(photographs, capsys):
    choices = photographs()
    for number in range(20):
        folder = photographs.source / str(number % 5)
        folder.mkdir(exist_ok=True)
        (photographs.source / f"eye{number:02d}.png").rename(folder / f"{number}.png")
    (folder / "a\nb.png").touch()
    assert prepare.main([*choices, "--labels", "none"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and r"a\nb.png cannot be read" in lines[0]


def test_a_hospital_trains_on_all_it_has_and_a_server_validates_on_all(photographs):
    choices = photographs()
    prepare.main([*choices, "--num-clients", "1", "--val-part", "0", "--patient-column", "none"])
    assert sizes() == {"train_set": 20, "worker1": 20}
    assert not data.knows_patients(indexes()["worker1"])
    prepare.main([*choices, "--val-part", "1"])
    assert sizes() == {"val_set": 20} and data.knows_patients(indexes()["val_set"])


def test_each_worker_is_a_hospital_of_the_table(photographs, capsys):
    of_column = ["--split", "column", "--val-part", "0"]
    choices = [*photographs(site="site {1}"), *of_column]
    assert prepare.main(choices) == 0
    assert made()["worker_hospitals"] == {f"worker{k + 1}": f"site {k}" for k in range(5)}
    for k in range(5):
        assert {each["label"] for each in indexes()[f"worker{k + 1}"]} == {k}
    assert prepare.main([*choices, "--check"]) == 0
    assert prepare.main([*photographs(), *of_column]) == 1
    assert "say which by --hospital-column" in capsys.readouterr().err
    # a patient of two hospitals goes to one
    choices = [*photographs(patient="{1}", place="{2}"), *of_column]
    prepare.main([*choices, "--hospital-column", "Place"])
    assert "5 patients are of several hospitals" in capsys.readouterr().out


OF_FOLDER = "--dataset folder --source ."


@pytest.mark.parametrize("flags, named", [
    ("--dataset ddr", "--source"),
    ("--source photos", "--dataset"),
    ("--balanced", "--balanced is of --dataset ddr"),
    (f"--num-train 50 {OF_FOLDER}", "--num-train is of --dataset synthetic"),
    ("--keep-channels", "--index-from"),
    (f"--split hospitals {OF_FOLDER}", "--split hospitals is of --dataset synthetic"),
    ("--split column", "--split column is of --dataset folder"),
    (f"--hospital-column x {OF_FOLDER}", "--split column"),
    ("--split noniid --num-clients 4", "3 clients"),
    ("--alpha 0 --split dirichlet", "--alpha"),
    ("--val-part nan", "--val-part"),
])  # fmt: skip
def test_what_would_end_in_another_result_is_wrong_usage(flags, named, capsys):
    with pytest.raises(SystemExit) as caught:
        prepare.main(flags.split())
    assert caught.value.code == 2 and named in capsys.readouterr().err.splitlines()[-1]


# --- --index-from: the thesis's pickled DataFrames -----------------------------------------------


@pytest.fixture
def thesis(tmp_path):
    """The thesis's folder DR as she left it: pictures, and indexes in several folders.

    thesis(name, numbers, column=[...]) writes an index, and returns its path.
    """
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    root = tmp_path / "DR"
    rows = []
    (root / "preprocessed/train").mkdir(parents=True)
    for number in range(12):
        directory = f"preprocessed/train/{number}.jpg"
        red = Image.new("RGB", (32, 32), (200, 90 + 3 * number, 10))
        red.save(root / directory, quality=95, subsampling=0)
        rows.append((f"{number}.jpg", number % 2 * 2, directory, str(number % 2 == 0)))

    def write(name, numbers, **changes):
        frame = pandas.DataFrame([rows[number] for number in numbers], columns=data.INDEX_COLUMNS)
        (root / name).parent.mkdir(exist_ok=True)
        frame.assign(**changes).to_pickle(root / name)
        return str(root / name)

    write.root = root
    return write


def test_the_thesis_s_own_layout_is_taken_with_red_and_blue_put_right(thesis, capsys):
    choices = [
        *("--source", str(thesis.root / "preprocessed"), "--index-from"),
        thesis("assign_noniid/worker1.pkl", [3, 4, 5]),
        thesis("assign_noniid/worker2.pkl", [6, 7]),
        thesis("assign_noniid/share_data.pkl", [3, 6]),
        thesis("assign_noniid/new_trainset.pkl", [4, 5, 7, 10]),
    ]
    val = thesis("index/iid_valid.pkl", [0, 1, 2])
    assert prepare.main([*choices, val]) == 0
    assert {name: {number_of(each) for each in own} for name, own in indexes().items()} == {
        "worker1": {3, 4, 5, 6},  # with the shared images
        "worker2": {3, 6, 7},
        "train_set": {3, 4, 5, 6, 7, 10},
        "val_set": {0, 1, 2},
    }
    red, green, blue = np.asarray(Image.open(indexes()["val_set"][1]["dir"]))[16, 16].tolist()
    assert abs(red - 10) < 4 and abs(green - 93) < 4 and abs(blue - 200) < 4
    assert (made()["dataset"], made()["num_clients"], made()["image_size"]) == ("imported", 2, 32)
    assert prepare.main([*choices, val, "--check"]) == 0
    assert prepare.main([*choices, val, "--keep-channels"]) == 0
    assert np.asarray(Image.open(indexes()["val_set"][1]["dir"]))[16, 16, 0] > 190
    assert prepare.main(choices) == 0
    assert "no val_set.pkl (iid_valid.pkl) was given" in capsys.readouterr().out
    assert "val_set" not in indexes()


def test_an_import_that_is_scored_on_what_it_has_seen_is_told(thesis, capsys):
    files = [thesis("worker1.pkl", [3, 4, 5]), thesis("val_set.pkl", [0, 1, 4])]
    assert prepare.main(["--source", str(thesis.root), "--index-from", *files]) == 0
    assert "1 images of val_set are trained on, too: 4.jpg" in capsys.readouterr().out


def test_an_import_that_does_not_fit_is_one_sentence(thesis, tmp_path, capsys):
    (tmp_path / "worker1.pkl").write_bytes(b"no pickle")
    both = dict(label=[0, 1], new_label=["True", "False"])
    for words, *files in (
        ("expected worker1, worker2", thesis("worker1.pkl", [0]), thesis("worker3.pkl", [3])),
        ("each once", thesis("worker1.pkl", [0]), thesis("g/worker1.pkl", [0])),
        ("/x/0 is not in", thesis("a/worker1.pkl", [0, 1], dir=["/x/0", "/x/1"])),
        ("do not fit together", thesis("c/worker1.pkl", [0], new_label=["False"])),
        ("has two grades, 0 and 1", thesis("d/worker1.pkl", [0, 0], **both)),
        ("train_set would be without images", thesis("e/worker1.pkl", [])),
        ("is no DataFrame with the columns picture", str(tmp_path / "worker1.pkl")),
    ):
        assert prepare.main(["--index-from", *files, "--source", str(thesis.root)]) == 1
        assert words in capsys.readouterr().err


def test_without_pandas_the_sentence_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert prepare.main(["--index-from", "worker1.pkl", "--source", "."]) == 1
    assert "needs pandas: pip install pandas" in capsys.readouterr().err
