"""datasets: each published layout on tiny archives made here; and what is said of bad ones."""

import hashlib
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from preparation import datasets

ROOT = Path(__file__).parents[1]
IDRID = ROOT.parent / "shared" / "fundus" / "idrid"


def load_photos(*arguments):
    return datasets.load(*arguments).photos


@pytest.fixture(autouse=True)
def in_an_empty_project(tmp_path, monkeypatch):
    """An archive of arrays is unpacked into preprocessed/."""
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def idrid_archive(folder, training="IDRiD_001,3,2,,,\r\nIDRiD_002,0,0,,,\r\n"):
    labels = folder / "B. Disease Grading/2. Groundtruths"
    header = "Image name,Retinopathy grade,Risk of macular edema "
    write(labels / "a. IDRiD_Disease Grading_Training Labels.csv", f"{header},,,\r\n{training}")
    write(labels / "b. IDRiD_Disease Grading_Testing Labels.csv", f"{header}\r\nIDRiD_001,4,0\r\n")


def test_idrid_validates_on_its_testing_set_and_keeps_equal_file_names_apart(tmp_path):
    idrid_archive(tmp_path)
    photos = load_photos("idrid", tmp_path)
    images = tmp_path / "B. Disease Grading/1. Original Images"
    assert [(photo.path, photo.grade, photo.part) for photo in photos] == [
        (images / "a. Training Set/IDRiD_001.jpg", 3, "train"),
        (images / "a. Training Set/IDRiD_002.jpg", 0, "train"),
        (images / "b. Testing Set/IDRiD_001.jpg", 4, "val"),
    ]
    assert len({photo.name for photo in photos}) == len({photo.patient for photo in photos}) == 3
    assert load_photos("idrid", tmp_path / "B. Disease Grading") == photos


def test_idrid_reads_the_published_labels():
    if not IDRID.is_dir():
        pytest.skip(f"the real photographs are not here: {IDRID}")
    photos = load_photos("idrid", IDRID)
    assert all(photo.path.is_file() for photo in photos)
    assert [sum(photo.part == part for photo in photos) for part in ("train", "val")] == [405, 102]


def test_ddr_leaves_ungradable_images_out_and_says_that_its_names_tell_no_patient(tmp_path):
    write(tmp_path / "train.txt", "007-0004-000.jpg 0\n007-0004-001.jpg 2\n007-0005-000.jpg 5\n")
    write(tmp_path / "valid.txt", "20170413102628830.jpg 4\r\n\r\n")
    write(tmp_path / "test.txt", "007-0006-000.jpg 1")
    photos = load_photos("ddr", tmp_path)
    assert [
        (photo.path.relative_to(tmp_path).as_posix(), photo.grade, photo.patient, photo.part)
        for photo in photos
    ] == [
        ("train/007-0004-000.jpg", 0, "007-0004-000.jpg", "train"),
        ("train/007-0004-001.jpg", 2, "007-0004-001.jpg", "train"),
        ("valid/20170413102628830.jpg", 4, "20170413102628830.jpg", "val"),
        ("test/007-0006-000.jpg", 1, "007-0006-000.jpg", "test"),
    ]


def test_aptos(tmp_path):
    write(tmp_path / "train.csv", "id_code,diagnosis\n000c1434d8d7,2\n001639a390f0,4\n")
    photos = load_photos("aptos", tmp_path)
    assert [(photo.path, photo.grade, photo.part) for photo in photos] == [
        (tmp_path / "train_images/000c1434d8d7.png", 2, ""),
        (tmp_path / "train_images/001639a390f0.png", 4, ""),
    ]


def test_eyepacs_knows_both_eyes_of_a_patient(tmp_path):
    write(tmp_path / "trainLabels.csv", "image,level\n10_left,0\n10_right,1\n13_left,0\n")
    photos = load_photos("eyepacs", tmp_path)
    assert [photo.path.name for photo in photos] == [
        "10_left.jpeg",
        "10_right.jpeg",
        "13_left.jpeg",
    ]
    assert [photo.patient for photo in photos] == ["10", "10", "13"]


def test_folder_takes_columns_in_any_order_a_byte_order_mark_quotes_and_folders(tmp_path):
    write(
        tmp_path / "labels.csv",
        '\ufefflabel, patient,image\r\n2,ada,"a, b/one.JPG"\r\n\r\n'
        "0,,a/two.png\r\n0,,a/two.jpg\r\n",
    )
    photos = load_photos("folder", tmp_path)
    assert [(photo.path, photo.grade) for photo in photos] == [
        (tmp_path / "a, b/one.JPG", 2),
        (tmp_path / "a/two.png", 0),
        (tmp_path / "a/two.jpg", 0),
    ]
    assert photos[0].patient == "patient ada" and len({photo.patient for photo in photos}) == 3
    assert len({photo.name for photo in photos}) == 3 and all(
        "/" not in photo.name for photo in photos
    )


def test_folder_without_patients(tmp_path):
    write(tmp_path / "labels.csv", "image,label\none.png,0\ntwo.png,1\n")
    assert [photo.patient for photo in load_photos("folder", tmp_path)] == ["one.png", "two.png"]


@pytest.mark.parametrize("dataset, file, text, sentence", [
    ("aptos", "train.csv", "id_code,level\na,1\n", "no column 'diagnosis': found id_code, level"),
    ("aptos", "train.csv", "", "train.csv has no column 'id_code' and 'diagnosis': found nothing"),
    ("aptos", "train.csv", "id_code,diagnosis\n", "has no graded image"),
    ("aptos", "train.csv", "id_code,diagnosis\na,7\n", "'a' the grade '7', expected a whole"),
    ("aptos", "train.csv", "id_code,diagnosis\na\n", "has no graded image but 1 ungradable ones"),
    ("aptos", "train.csv", "id_code,diagnosis\na,1\na,1\n", "train_images/a.png twice"),
    ("aptos", "other.csv", "", "train.csv is missing: is --source the folder into which"),
    ("eyepacs", "trainLabels.csv", "image,grade\n", "trainLabels.csv has no column 'level'"),
    ("eyepacs", "trainLabels.csv", "image,level\n10_left,1.5\n", "gives '10_left' the grade '1.5'"),
    ("folder", "labels.csv", "image,grade\n", "labels.csv has no column 'label'"),
    ("folder", "labels.csv", "image,label\na.png,none\n", "gives 'a.png' the grade 'none'"),
    ("folder", "other", "", "labels.csv is missing"),
    ("ddr", "train.txt", "a.jpg 7\n", "'a.jpg' the grade '7', expected a whole number 0 to 4"),
    ("ddr", "train.txt", "a.jpg x\n", "train.txt gives 'a.jpg' the grade 'x'"),
    ("ddr", "valid.txt", "a.jpg 1\n", "train.txt is missing"),
    ("idrid", "other", "", "a. IDRiD_Disease Grading_Training Labels.csv is missing"),
])  # fmt: skip
def test_a_bad_archive_gets_one_sentence(tmp_path, dataset, file, text, sentence):
    write(tmp_path / file, text)
    with pytest.raises(ValueError, match=sentence.replace(".", r"\.")) as caught:
        datasets.load(dataset, tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_idrid_with_a_grade_that_does_not_exist(tmp_path):
    idrid_archive(tmp_path, training="IDRiD_001,7,2,,,\r\n")
    with pytest.raises(ValueError, match="Training Labels.csv gives 'IDRiD_001' the grade '7'"):
        datasets.load("idrid", tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(
        ValueError, match="absent is no folder: --source must be the folder of the data set 'ddr'"
    ):
        datasets.load("ddr", tmp_path / "absent")


def test_names_in_any_script_stay_apart_and_columns_may_be_in_any_case(tmp_path):
    write(
        tmp_path / "labels.csv",
        "Image,LABEL,Patient\n000/左.jpg,0,p1\n000/右.jpg,2,p1\n000/å b.jpg,1,p2\n",
    )
    photos = load_photos("folder", tmp_path)
    assert [photo.name for photo in photos] == ["000_左_jpg", "000_右_jpg", "000_å_b_jpg"]
    assert [photo.patient for photo in photos] == ["patient p1", "patient p1", "patient p2"]


def test_a_table_that_is_binary(tmp_path):
    (tmp_path / "train.csv").write_bytes(os.urandom(300_000))
    with pytest.raises(ValueError, match="train.csv"):
        datasets.load("aptos", tmp_path)


def retinamnist_archive(path, pixels=128, counts=(6, 3, 4)):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in zip(("train", "val", "test"), counts, strict=True):
        arrays[f"{part}_images"] = rng.integers(0, 256, (count, pixels, pixels, 3), np.uint8)
        arrays[f"{part}_labels"] = rng.integers(0, 5, (count, 1), np.uint8)
    np.savez(path, **arrays)
    return arrays


def test_retinamnist_from_a_file_or_its_folder(tmp_path):
    arrays = retinamnist_archive(tmp_path / "retinamnist_128.npz")
    photos = load_photos("retinamnist", tmp_path / "retinamnist_128.npz", 128)
    assert photos == load_photos("retinamnist", tmp_path, 96)
    assert [photo.part for photo in photos] == ["train"] * 6 + ["val"] * 3 + ["test"] * 4
    assert [photo.grade for photo in photos[:6]] == arrays["train_labels"][:, 0].tolist()
    assert (np.asarray(Image.open(photos[7].path)) == arrays["val_images"][1]).all()
    with pytest.raises(ValueError, match="retinamnist_224.npz is no RetinaMNIST archive"):
        datasets.load("retinamnist", tmp_path, 224)
    (tmp_path / "half.npz").write_bytes((tmp_path / "retinamnist_128.npz").read_bytes()[:1000])
    with pytest.raises(ValueError, match="half.npz is no RetinaMNIST archive"):
        datasets.load("retinamnist", tmp_path / "half.npz")
    np.savez(
        tmp_path / "float.npz", **{name: array.astype(np.float32) for name, array in arrays.items()}
    )
    with pytest.raises(
        ValueError, match="float.npz is no RetinaMNIST archive .its images are not of 8 bits"
    ):
        datasets.load("retinamnist", tmp_path / "float.npz")


def test_pictures_of_another_retinamnist_archive_are_not_taken_for_its_own(tmp_path):
    archive = tmp_path / "retinamnist_128.npz"
    retinamnist_archive(archive)
    datasets.load("retinamnist", archive)
    arrays = {
        name: 255 - array if "images" in name else array for name, array in np.load(archive).items()
    }
    np.savez(archive, **arrays)
    later = archive.stat().st_mtime + 5
    os.utime(archive, (later, later))
    photos = load_photos("retinamnist", archive)
    assert (np.asarray(Image.open(photos[0].path)) == arrays["train_images"][0]).all()
    assert not list(Path("preprocessed/retinamnist_128").glob(".*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["project", archive.name]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def test_retinamnist_asks_keras_for_the_published_file(tmp_path, monkeypatch):
    retinamnist_archive(tmp_path / "retinamnist_128.npz")
    asked = []

    def get_file(name, url, file_hash, hash_algorithm):
        asked.append((name, url, file_hash, hash_algorithm))
        if name != "retinamnist_128.npz":
            raise OSError("no network")
        return str(tmp_path / name)

    monkeypatch.setitem(
        sys.modules, "keras", SimpleNamespace(utils=SimpleNamespace(get_file=get_file))
    )
    assert len(load_photos("retinamnist", None, 128)) == 13
    with pytest.raises(
        ValueError,
        match=r"_224.npz cannot be downloaded from .* \(no network\).* give --source the file",
    ):
        datasets.load("retinamnist", None, 224)
    place = "https://zenodo.org/records/10519652/files/retinamnist_{}.npz?download=1"
    assert asked == [
        ("retinamnist_128.npz", place.format(128), "e48e916a24454daf90583d4e6efb1a18", "md5"),
        ("retinamnist_224.npz", place.format(224), "eae7e3b6f3fcbda4ae613ebdcbe35348", "md5"),
    ]


@pytest.mark.slow
def test_retinamnist_is_downloaded_once_and_checked(tmp_path):
    """From a server on this machine: wrong checksum, right one; offline with and without a file."""
    web, home = tmp_path / "web", tmp_path / "home"
    web.mkdir()
    home.mkdir()
    retinamnist_archive(web / "retinamnist_128.npz")
    md5 = hashlib.md5((web / "retinamnist_128.npz").read_bytes()).hexdigest()
    server = ThreadingHTTPServer(("localhost", 0), partial(Quiet, directory=web))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = f"""
import os
from preparation import datasets
os.chdir({str(tmp_path)!r})
def attempt(url, md5, image_size=128):
    datasets.RETINAMNIST_URL, datasets.RETINAMNIST_MD5 = url, {{128: md5, 224: md5}}
    try:
        print("RESULT", len(datasets.load("retinamnist", None, image_size).photos))
    except ValueError as error:
        print("RESULT", str(error).replace(chr(10), "LINE BREAK"))
here = "http://localhost:{server.server_port}/{{name}}?download=1"
attempt(here, "0" * 32)
attempt(here, "{md5}")
attempt("http://localhost:1/{{name}}", "{md5}")
attempt("http://localhost:1/{{name}}", "{md5}", 224)
attempt(here, "{md5}", 224)
"""
    try:
        process = subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={**os.environ, "KERAS_HOME": str(home)},
            capture_output=True,
            text=True,
            timeout=200,
        )
    finally:
        server.shutdown()
        server.server_close()
    results = [
        line.split(" ", 1)[1] for line in process.stdout.splitlines() if line.startswith("RESULT")
    ]
    assert len(results) == 5, process.stderr
    wrong, right, kept, offline, absent = results
    assert "retinamnist_128.npz cannot be downloaded" in wrong and "--source" in wrong
    assert right == kept == "13"
    for sentence in (offline, absent):
        assert (
            "retinamnist_224.npz cannot be downloaded" in sentence and "LINE BREAK" not in sentence
        )


# --- label tables as they are --------------------------------------------------------------------


def table(tmp_path, content, files=("one.png", "two.png")):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"a picture")
    path = tmp_path / "labels.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return datasets.load("folder", tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_of_any_dialect(tmp_path, encoding, delimiter):
    lines = ["image,label,note", "one.png,0,Größe", "two.png,2.0,naïve"]
    text = "\r\n".join(lines).replace(",", delimiter)
    found = table(tmp_path, text.encode(encoding))
    assert [photo.grade for photo in found.photos] == [0, 2]
    assert not found.missing and not found.ungradable


def test_what_a_spreadsheet_makes_of_numbers(tmp_path):
    found = table(
        tmp_path, "sep=;\r\nimage;label;patient\r\n1.png;2,0;17.0\r\n2.png;1;17\r\n3.png;0;18\r\n"
    )
    assert [photo.grade for photo in found.photos] == [2, 1, 0]
    assert [photo.patient for photo in found.photos] == ["patient 17", "patient 17", "patient 18"]


def test_ungradable_images_are_counted_and_wrong_grades_refused_together(tmp_path):
    cells = ["0", "", "-1", "5", "9", "9.0", "Ungradable", "n/a", "4.0"]
    rows = "".join(f"{number}.png,{cell}\n" for number, cell in enumerate(cells))
    found = table(tmp_path, "image,label\n" + rows)
    assert [photo.grade for photo in found.photos] == [0, 4]
    assert [cell for _, cell in found.ungradable] == cells[1:-1]
    with pytest.raises(ValueError, match="labels.csv gives") as caught:
        table(tmp_path, "image,label\na,7\nb,x\nc,1.5\nd,none\n,3\ne,0\n")
    sentence = str(caught.value)
    for part in ("'a' the grade '7'", "'b' the grade 'x'", "and 1 more", "1 lines without a name"):
        assert part in sentence
    with pytest.raises(ValueError, match="no column 'image' and 'label': found file, dr") as caught:
        table(tmp_path, "file,dr\na,1\n")
    assert "name it with --image-column and --label-column" in str(caught.value)


def test_columns_can_be_named(tmp_path):
    write(tmp_path / "labels.csv", "File,DR,Eye of\na.png,1,x\nb.png,2,x\nc.png,2,y\n")
    columns = datasets.Columns("file", "dr", "eye of")
    found = datasets.load("folder", tmp_path, 128, columns)
    assert [photo.patient for photo in found.photos] == ["patient x", "patient x", "patient y"]
    with pytest.raises(ValueError, match="no column 'who': found file, dr, eye of"):
        datasets.load("folder", tmp_path, 128, columns._replace(patient="who"))


@pytest.mark.parametrize(
    "header", ["patient", "patient_id", "Patient ID", "patientid", "PatientNo.", "subject", "PID"]
)
def test_a_patient_column_is_found(tmp_path, header):
    rows = "a.png,0,P1\nb.png,1,p1 \nc.png,2,Unknown\nd.png,2,unknown\ne.png,0,-\nf.png,0,\n"
    found = table(tmp_path, f"image,label,{header}\n{rows}")
    patients = [photo.patient for photo in found.photos]
    assert patients[0] == patients[1] and len(set(patients)) == 5  # unknown is nobody
    assert found.patients == f"column {header.lower()!r}"
    assert "4 images are of an unknown patient each" in found.patients_sentence


def test_without_a_patient_column_that_is_said_and_one_patient_is_refused(tmp_path):
    found = table(tmp_path, "image,label,eye\none.png,0,left\ntwo.png,1,right\n")
    assert found.patients is None
    assert "no patient column among image, label, eye: each image counts" in found.patients_sentence
    with pytest.raises(ValueError, match="all 2 images are of one patient by column 'patient'"):
        table(tmp_path, "image,label,patient\none.png,0,7\ntwo.png,1,7\n")
    ignored = datasets.Columns(patient="none")
    assert len({p.patient for p in datasets.load("folder", tmp_path, 128, ignored).photos}) == 2


def test_names_are_found_where_only_one_file_fits(tmp_path):
    files = ["Set A/Eye00.JPG", "set b/e\u0301t\u00e9.png", "deep/er/alone.tif", "x.png", "x.jpg"]
    names = ["set a\\EYE00", "Set B/\u00e9te\u0301.PNG", "alone", "./x.png", "x", "gone.png"]
    rows = "".join(f"{name},{number % 2}\n" for number, name in enumerate(names))
    found = table(tmp_path, "image,label\n" + rows, files)
    paths = [photo.path.relative_to(tmp_path).as_posix() for photo in found.photos]
    assert paths[:4] == files[:4]
    assert found.ambiguous == ["x"] and found.missing == ["gone.png"]


def test_names_that_become_one_or_are_too_long_are_told_apart(tmp_path):
    long = "1.2.840." * 35
    names = ["a (1).png", "a [1].png", "A (1).png", f"{long}/1.png", f"{long}/2.png", "b.png"]
    rows = "".join(f"{name},0\n" for name in names)
    photos = table(tmp_path, "image,label\n" + rows, ()).photos
    assert len({photo.name.casefold() for photo in photos}) == 6
    assert photos[5].name == "b_png" and all(len(photo.name.encode()) < 200 for photo in photos)
    again = table(tmp_path, "image,label\n" + "".join(f"{name},0\n" for name in names[::-1]), ())
    assert {photo.path: photo.name for photo in again.photos} == {
        photo.path: photo.name for photo in photos
    }


def test_a_part_column_says_who_validates(tmp_path):
    found = table(tmp_path, "image,label,part\none.png,0,Train\ntwo.png,1,valid\n")
    assert [photo.part for photo in found.photos] == ["train", "val"]
    with pytest.raises(
        ValueError, match="gives 'two.png' the part '', expected train, val or test"
    ):
        table(tmp_path, "image,label,part\none.png,0,train\ntwo.png,1,\n")


def test_a_subset_of_a_published_set_knows_what_is_missing(tmp_path):
    rows = "".join(f"{number}_left,{number % 5}\n" for number in range(2000))
    write(tmp_path / "trainLabels.csv", "image,level\n" + rows)
    for number in (3, 5):
        write(tmp_path / f"train/{number}_left.jpg", "resized by somebody")
    found = datasets.load("eyepacs", tmp_path)
    assert len(found.photos) == 2000 and len(found.missing) == 1998
    assert found.photos[3].path == tmp_path / "train/3_left.jpg"
