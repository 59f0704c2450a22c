"""One function for each published data set: from its folder, as its archive unpacks, to Photos.

Only the labels are read here. Whether a picture is there and whole shows when it is prepared.
All raise ValueError, one sentence, where a file, a column or a grade is not what the archive has.
"""

import csv
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.files import replacing
from data import INDEX_COLUMNS

RETINAMNIST_URL = "https://zenodo.org/records/10519652/files/{name}?download=1"
RETINAMNIST_MD5 = {
    128: "e48e916a24454daf90583d4e6efb1a18",
    224: "eae7e3b6f3fcbda4ae613ebdcbe35348",
}


class Photo(NamedTuple):
    """A graded photograph of a data set, before it is prepared."""

    path: Path | None  # None: it is to be drawn
    grade: int  # 0..4
    patient: str  # the same for all images of a patient; the image's own where nothing is known
    part: str = ""  # "train", "val" or "test" where the published archive says so
    name: str = ""  # of the prepared picture, without extension; unique within the data set
    hospital: str = ""  # the name of one of fundus.HOSPITALS, where the picture is drawn for one


def load(dataset, source, image_size=128):
    """Read a data set by its name, a key of LOADERS, into a list of Photo.

    source: its folder; for retinamnist None, or where the downloaded file lies.
    """
    source = Path(source).expanduser() if source else None
    if dataset != "retinamnist" and not source.is_dir():
        raise ValueError(
            f"{source} is no folder: --source must be the folder of the data set {dataset!r}"
        )
    photos = {}
    for photo in LOADERS[dataset](source, image_size):
        name = picture_name(photo)
        if name in photos:
            raise ValueError(
                f"{source} lists {photo.path} twice, or another image of that name: leave one of "
                "the two"
            )
        photos[name] = photo._replace(name=name)
    if not photos:
        raise ValueError(
            f"{source} has no graded image: is it the folder of the data set {dataset!r}, fully "
            "unpacked?"
        )
    return list(photos.values())


def picture_name(photo):
    """A file name for the prepared picture: all but letters, digits, "_" and "-" becomes "_"."""
    words = f"{photo.part}_{photo.name or photo.path.stem}"
    return re.sub(r"[^\w-]+", "_", words).strip("_")


def read_labels(table, image_column, grade_column, highest=4, **layout):
    """Read a CSV file: [(image, grade, line), ...]; a line is a dict, its keys in lower case.

    highest: the highest grade. layout: what csv.DictReader needs to know of an unusual table.
    """
    columns, lines = read_table(table, layout)
    for column in (image_column, grade_column):
        if column not in columns:
            found = ", ".join(filter(None, columns)) or "nothing"
            raise ValueError(f"{table} has no column {column!r}: found {found}")
    labels = []
    for line in lines:
        image = line[image_column]
        cell = line[grade_column]
        if not image and not cell:
            continue  # an empty line, as at the end of many tables
        if cell not in [str(grade) for grade in range(highest + 1)]:
            raise ValueError(
                f"{table} gives {image!r} the grade {cell!r}, expected a whole number 0 to "
                f"{highest}"
            )
        labels.append((image, int(cell), line))
    return labels


def read_table(table, layout):
    """Read a CSV file: the names of its columns, in lower case, and its lines as dicts."""
    if not table.is_file():
        raise ValueError(
            f"{table} is missing: is --source the folder into which the archive was unpacked?"
        )
    # utf-8-sig: spreadsheets put a byte order mark first. Other bytes are no reason to fail: what
    # is needed, image and grade, is in ASCII in all published tables.
    with open(table, encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file, restval="", skipinitialspace=True, **layout)
        try:
            columns = [name.strip().lower() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            lines = [{name: str(cell).strip() for name, cell in line.items()} for line in reader]
        except csv.Error as error:
            raise ValueError(f"{table} is no CSV file: {error}") from None
    return columns, lines


def ddr(source, _):
    """OIA-DDR (Li et al. 2019): three tables without a header, lines like `007-0004-000.jpg 0`.

    Such a name is hospital, patient, image; other names tell no patient. Grade 5 is ungradable.
    """
    layout = {"fieldnames": ("image", "grade"), "delimiter": " "}
    photos = []
    for part, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        table = source / f"{name}.txt"
        for image, grade, _ in read_labels(table, "image", "grade", highest=5, **layout):
            if grade == 5:
                continue
            patient = re.sub(r"^(\d+-\d+)-\d+\.\w+$", r"\1", image)
            photos.append(Photo(source / name / image, grade, patient, part))
    return photos


def aptos(source, _):
    """APTOS 2019 (Kaggle); the set tells no patients."""
    labels = read_labels(source / "train.csv", "id_code", "diagnosis")
    return [
        Photo(source / "train_images" / f"{image}.png", grade, image) for image, grade, _ in labels
    ]


def eyepacs(source, _):
    """EyePACS (Kaggle 2015); 10_left and 10_right are of patient 10."""
    labels = read_labels(source / "trainLabels.csv", "image", "level")
    return [
        Photo(source / "train" / f"{image}.jpeg", grade, re.sub("_(left|right)$", "", image))
        for image, grade, _ in labels
    ]


def idrid(source, _):
    """IDRiD, disease grading (Porwal et al. 2018).

    Both parts use the same file names for different eyes, so a patient is part and name.
    """
    root = source / "B. Disease Grading"
    if not root.is_dir():
        root = source  # that folder itself was given
    photos = []
    for part, letter, title in (("train", "a", "Training"), ("val", "b", "Testing")):
        table = root / "2. Groundtruths" / f"{letter}. IDRiD_Disease Grading_{title} Labels.csv"
        images = root / "1. Original Images" / f"{letter}. {title} Set"
        for image, grade, _ in read_labels(table, "image name", "retinopathy grade"):
            photos.append(Photo(images / f"{image}.jpg", grade, f"{part} {image}", part))
    return photos


def folder(source, _):
    """Any pictures with a labels.csv: image (path from the folder), label (grade), or patient too."""
    photos = []
    for image, grade, line in read_labels(source / "labels.csv", "image", "label"):
        # The prefix keeps a patient "7" and an image "7" apart.
        patient = f"patient {line['patient']}" if line.get("patient") else image
        photos.append(Photo(source / image, grade, patient, name=image))
    return photos


def retinamnist(source, image_size):
    """RetinaMNIST+ (Yang et al. 2023; CC BY 4.0), of 128 or 224 pixels, unpacked beside its archive.

    Downloaded once where there is no source.
    """
    pixels = 128 if image_size <= 128 else 224
    name = f"retinamnist_{pixels}.npz"
    if source is None:
        source = download_retinamnist(name, RETINAMNIST_MD5[pixels])
    archive = source / name if source.is_dir() else source
    unpacked = archive.with_suffix("")
    parts = read_retinamnist(archive, name)
    unpacked.mkdir(exist_ok=True)
    photos = []
    for part, (images, labels) in parts.items():
        for number, (image, label) in enumerate(zip(images, labels.ravel(), strict=True)):
            path = unpacked / f"{part}_{number:04d}.png"
            # A picture that is older than the archive is of an older archive.
            if not path.exists() or path.stat().st_mtime < archive.stat().st_mtime:
                with replacing(path) as written:
                    Image.fromarray(image).save(written)
            if label not in range(5):
                raise ValueError(
                    f"{archive} gives {path.name} the grade {label}, expected a whole number 0 to 4"
                )
            photos.append(Photo(path, int(label), path.name, part, f"{number:04d}"))
    return photos


def download_retinamnist(name, md5):
    """The path of the archive `name` in Keras's cache, downloaded if it is not there yet."""
    url = RETINAMNIST_URL.format(name=name)
    try:
        import keras  # here, because it takes seconds

        return Path(keras.utils.get_file(name, url, file_hash=md5, hash_algorithm="md5"))
    except Exception as error:  # no network, no such page, a checksum that does not fit
        raise ValueError(
            f"{name} cannot be downloaded from {url} ({error}): try again online, or fetch it by "
            "hand and give --source the file"
        ) from None


def read_retinamnist(archive, name):
    """{part: (images, uint8 (n, pixels, pixels, 3), labels (n, 1))} of the archive."""
    try:
        with np.load(archive) as arrays:
            parts = {
                part: (arrays[f"{part}_images"], arrays[f"{part}_labels"])
                for part in ("train", "val", "test")
            }
        if any(images.dtype != np.uint8 for images, _ in parts.values()):
            raise ValueError("its images are not of 8 bits")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{archive} is no RetinaMNIST archive ({error}): download {name} from zenodo.org"
        ) from None
    return parts


def thesis_index(files, source):
    """The thesis's index files, pickled pandas DataFrames: a Photo a row, `part` the file's name.

    A pickle is code: give only files that the user trusts. source: the folder of the pictures;
    None where `dir` leads to them.
    """
    try:
        import pandas
    except ImportError:
        raise ValueError(
            "--index-from reads pandas DataFrames and needs pandas: pip install pandas"
        ) from None
    check_index_names(files)
    seen = {}
    photos = []
    for file in map(Path, files):
        try:
            rows = list(pandas.read_pickle(file)[list(INDEX_COLUMNS)].itertuples(index=False))
        except Exception as error:  # reading a pickle can raise anything
            raise ValueError(
                f"{file} is no DataFrame with the columns {', '.join(INDEX_COLUMNS)} ({error!r})"
            ) from None
        for picture, grade, dir_, healthy in rows:
            is_grade = str(grade) in ("0", "1", "2", "3", "4")
            if not is_grade or str(healthy) != str(str(grade) == "0"):
                raise ValueError(
                    f"{file}: the grade {grade} of {picture} and healthy {healthy} do not fit "
                    "together"
                )
            path = Path(source).expanduser() / picture if source else Path(dir_)
            if not path.exists():
                raise ValueError(
                    f"{file}: {path} is missing: --source must be the folder of the pictures"
                )
            photo = Photo(path, int(grade), picture, file.stem, Path(picture).stem)
            # The same image may be in several indexes, but a name stands for one image of one grade.
            first = seen.setdefault(photo.name, photo)
            if (first.path, first.grade) != (photo.path, photo.grade):
                raise ValueError(
                    f"{file}: {path} and {first.path} have one name, or two grades: rename one of "
                    "them"
                )
            photos.append(photo)
    return photos


def check_index_names(files):
    """Raise ValueError unless the files are named worker1 ... workerN, val_set, maybe train_set."""
    names = {Path(file).stem for file in files}
    num_workers = len(names - {"train_set", "val_set"})
    workers = {f"worker{number}" for number in range(1, num_workers + 1)}
    if not workers or names - {"train_set"} != workers | {"val_set"}:
        found = ", ".join(sorted(names))
        raise ValueError(
            f"--index-from got {found}; expected worker1, worker2 ..., val_set and perhaps "
            "train_set"
        )


LOADERS = {loader.__name__: loader for loader in (idrid, ddr, aptos, eyepacs, folder, retinamnist)}
