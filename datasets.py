"""One function a published data set: from its folder, as its archive unpacks, to a list of Photo.

    photos = load("aptos", "~/data/aptos2019")

Each loader reads the labels only; whether a picture is there and whole shows when it is prepared. A loader raises
ValueError with one sentence where a file, a column or a grade is not what the archive has.
"""

import csv
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

RETINAMNIST_URL = "https://zenodo.org/records/10519652/files/{name}?download=1"
RETINAMNIST_MD5 = {128: "e48e916a24454daf90583d4e6efb1a18", 224: "eae7e3b6f3fcbda4ae613ebdcbe35348"}


class Photo(NamedTuple):
    path: Path
    grade: int  # 0..4
    patient: str  # images of one patient share it; where the set tells nothing, it is the image's own
    part: str = ""  # "train", "val" or "test" where the published archive says so
    name: str = ""  # unique within the set, for the prepared picture


def load(dataset, source, image_size=128):
    """Read a data set by name; `source` is its folder (for retinamnist: None, or where the downloaded file lies)."""
    if dataset == "retinamnist":
        photos = retinamnist(source, image_size)
    else:
        source = Path(source).expanduser()
        if not source.is_dir():
            raise ValueError(f"{source} is no folder: --source must be the folder of the data set {dataset!r}")
        photos = {"ddr": ddr, "aptos": aptos, "eyepacs": eyepacs, "idrid": idrid, "folder": folder}[dataset](source)
    if not photos:
        raise ValueError(f"{source} has no graded image: is it the folder of the data set {dataset!r}, fully unpacked?")
    photos = [photo._replace(name=plain_name(photo)) for photo in photos]
    names = set()
    for photo in photos:
        if photo.name in names:
            raise ValueError(f"{source} lists {photo.path} twice, or another image of that name: leave one of the two")
        names.add(photo.name)
    return photos


def plain_name(photo):
    """A file name without a folder and without an extension, from what the set calls the image."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", f"{photo.part}_{photo.name or photo.path.stem}").strip("_")


def read_table(path, *columns):
    """A tuple of the named columns for each line of a CSV file; blanks around cells and empty lines do not count."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: is --source the folder into which the archive was unpacked?")
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    try:
        header, *rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines())] or [[]]
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file: {error}") from None
    for column in columns:
        if column not in header:
            raise ValueError(f"{path} has no column {column!r}: found {', '.join(filter(None, header)) or 'nothing'}")
    places = [header.index(column) for column in columns]
    return [tuple((row + [""] * len(header))[place] for place in places) for row in rows if any(row)]


def grade_of(text, path, image, highest=4):
    """A cell to a grade. Raises ValueError naming the file and the image."""
    if text not in [str(grade) for grade in range(highest + 1)]:
        raise ValueError(f"{path} gives {image!r} the grade {text!r}, expected a whole number 0 to {highest}")
    return int(text)


def ddr(source):
    """OIA-DDR, DR grading (Li et al. 2019): train.txt, valid.txt, test.txt and a folder of each name; 5 = ungradable.

    A name like 007-0004-000.jpg is hospital, patient, image; other names tell no patient.
    """
    photos = []
    for part, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        listing = source / f"{name}.txt"
        if not listing.is_file():
            raise ValueError(f"{listing} is missing: is --source the folder that holds train.txt, valid.txt, test.txt?")
        for line in filter(str.strip, listing.read_text(encoding="utf-8-sig", errors="replace").splitlines()):
            image, cell = (line.strip().rsplit(maxsplit=1) + [""])[:2]
            grade = grade_of(cell, listing, image, highest=5)
            patient = re.sub(r"^(\d+-\d+)-\d+\.\w+$", r"\1", image)
            if grade < 5:
                photos.append(Photo(source / name / image, grade, patient, part))
    return photos


def aptos(source):
    """APTOS 2019 (Kaggle): train.csv (id_code, diagnosis) and train_images/ID.png; the set tells no patients."""
    table = source / "train.csv"
    return [
        Photo(source / "train_images" / f"{image}.png", grade_of(grade, table, image), image)
        for image, grade in read_table(table, "id_code", "diagnosis")
    ]


def eyepacs(source):
    """EyePACS (Kaggle 2015): trainLabels.csv (image, level) and train/ID.jpeg; 10_left, 10_right are patient 10."""
    table = source / "trainLabels.csv"
    return [
        Photo(source / "train" / f"{image}.jpeg", grade_of(grade, table, image), re.sub("_(left|right)$", "", image))
        for image, grade in read_table(table, "image", "level")
    ]


def idrid(source):
    """IDRiD, disease grading (Porwal et al. 2018); validation is its testing set. The set tells no patients.

    Both parts use the same file names for different eyes, and one table's lines end in empty cells.
    """
    root, photos = source / "B. Disease Grading", []
    root = root if root.is_dir() else source  # the folder itself may be given
    for part, letter, long_name in (("train", "a", "Training"), ("val", "b", "Testing")):
        table = root / "2. Groundtruths" / f"{letter}. IDRiD_Disease Grading_{long_name} Labels.csv"
        images = root / "1. Original Images" / f"{letter}. {long_name} Set"
        for image, grade in read_table(table, "Image name", "Retinopathy grade"):
            photos.append(Photo(images / f"{image}.jpg", grade_of(grade, table, image), f"{part} {image}", part))
    return photos


def folder(source):
    """Any pictures with a labels.csv: image (path from the folder), label (grade) and, if known, patient."""
    table = source / "labels.csv"
    rows = read_table(table, "image", "label")
    try:
        patients = [patient for (patient,) in read_table(table, "patient")]
    except ValueError:  # no such column
        patients = [""] * len(rows)
    return [
        Photo(source / image, grade_of(label, table, image), f"patient {patient}" if patient else image, name=image)
        for (image, label), patient in zip(rows, patients, strict=True)
    ]


def retinamnist(source, image_size):
    """RetinaMNIST+ (Yang et al. 2023; CC BY 4.0), 1,600 images of 128 or 224 pixels; the set tells no patients.

    Without a source the archive is downloaded once and kept where Keras keeps data sets, the pictures beside it.
    """
    pixels = 128 if image_size <= 128 else 224
    name = f"retinamnist_{pixels}.npz"
    if source is None:
        archive = download(name, RETINAMNIST_MD5[pixels])
    else:
        archive = Path(source).expanduser()
        archive = archive / name if archive.is_dir() else archive
    pictures, photos = archive.with_suffix(""), []
    try:
        with np.load(archive, allow_pickle=False) as arrays:
            parts = {part: (arrays[f"{part}_images"], arrays[f"{part}_labels"]) for part in ("train", "val", "test")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{archive} is no RetinaMNIST archive ({error}): download {name} from zenodo.org") from None
    pictures.mkdir(exist_ok=True)
    for part, (images, labels) in parts.items():
        for number, (image, label) in enumerate(zip(images, labels.ravel(), strict=True)):
            path = pictures / f"{part}_{number:04d}.png"
            if not path.exists():
                Image.fromarray(image).save(path)
            grade = grade_of(str(label), archive, path.name)
            photos.append(Photo(path, grade, path.name, part, name=f"{number:04d}"))
    return photos


def download(name, md5):
    """The archive's path. Raises ValueError where it cannot be had whole."""
    import keras  # here, because it takes seconds

    url = RETINAMNIST_URL.format(name=name)
    try:
        return Path(keras.utils.get_file(name, url, file_hash=md5, hash_algorithm="md5"))
    except Exception as error:  # no network, no such page, a checksum that does not fit
        raise ValueError(
            f"{name} cannot be downloaded from {url} ({error}): try again online, or fetch it by hand and give "
            "--source the file"
        ) from None
