"""One function a published data set: from its folder, as its archive unpacks, to a list of Photo.

Only labels are read here; whether a picture is there and whole shows when it is prepared. ValueError, one sentence,
where a file, a column or a grade is not what the archive has.
"""

import csv
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.files import replacing
from data import COLUMNS

RETINAMNIST_URL = "https://zenodo.org/records/10519652/files/{name}?download=1"
RETINAMNIST_MD5 = {128: "e48e916a24454daf90583d4e6efb1a18", 224: "eae7e3b6f3fcbda4ae613ebdcbe35348"}


class Photo(NamedTuple):
    path: Path
    grade: int  # 0..4
    patient: (
        str  # images of one patient share it; where the set tells nothing, it is the image's own
    )
    part: str = ""  # "train", "val" or "test" where the published archive says so
    name: str = ""  # unique within the set, for the prepared picture


def load(dataset, source, image_size=128):
    """Read a data set by name; `source` is its folder (for retinamnist: None, or where the downloaded file lies)."""
    source = Path(source).expanduser() if source else None
    if dataset != "retinamnist" and not source.is_dir():
        raise ValueError(
            f"{source} is no folder: --source must be the folder of the data set {dataset!r}"
        )
    photos = {}
    for photo in LOADERS[dataset](source, image_size):
        name = re.sub(r"[^\w-]+", "_", f"{photo.part}_{photo.name or photo.path.stem}").strip("_")
        if name in photos:
            raise ValueError(
                f"{source} lists {photo.path} twice, or another image of that name: leave one of the two"
            )
        photos[name] = photo._replace(name=name)
    if not photos:
        raise ValueError(
            f"{source} has no graded image: is it the folder of the data set {dataset!r}, fully unpacked?"
        )
    return list(photos.values())


def read_labels(table, image, grade, highest=4, **layout):
    """(image, grade, the line as a dict) for each line of a CSV file with the columns `image` and `grade`, in any case."""
    if not table.is_file():
        raise ValueError(
            f"{table} is missing: is --source the folder into which the archive was unpacked?"
        )
    with open(table, encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file, restval="", skipinitialspace=True, **layout)
        columns = reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or []]
        for column in (image, grade):
            if column not in columns:
                found = ", ".join(filter(None, columns)) or "nothing"
                raise ValueError(f"{table} has no column {column!r}: found {found}")
        try:
            lines = [{name: str(cell).strip() for name, cell in line.items()} for line in reader]
        except csv.Error as error:
            raise ValueError(f"{table} is no CSV file: {error}") from None
    lines = [(line[image], line[grade], line) for line in lines if line[image] or line[grade]]
    for name, cell, _ in lines:
        if cell not in list("012345")[: highest + 1]:
            raise ValueError(
                f"{table} gives {name!r} the grade {cell!r}, expected a whole number 0 to {highest}"
            )
    return [(name, int(cell), line) for name, cell, line in lines]


def ddr(source, _):
    """OIA-DDR (Li et al. 2019): lines `007-0004-000.jpg 0`: hospital, patient, image (other names tell no patient)."""
    layout = {"fieldnames": ("image", "grade"), "delimiter": " "}
    return [
        Photo(source / folder / image, grade, re.sub(r"^(\d+-\d+)-\d+\.\w+$", r"\1", image), part)
        for part, folder in (("train", "train"), ("val", "valid"), ("test", "test"))
        for image, grade, _ in read_labels(
            source / f"{folder}.txt", "image", "grade", highest=5, **layout
        )
        if grade < 5
    ]  # 5: ungradable


def aptos(source, _):
    """APTOS 2019 (Kaggle); the set tells no patients."""
    labels = read_labels(source / "train.csv", "id_code", "diagnosis")
    return [
        Photo(source / "train_images" / f"{image}.png", grade, image) for image, grade, _ in labels
    ]


def eyepacs(source, _):
    """EyePACS (Kaggle 2015); 10_left and 10_right are of patient 10."""
    return [
        Photo(source / "train" / f"{image}.jpeg", grade, re.sub("_(left|right)$", "", image))
        for image, grade, _ in read_labels(source / "trainLabels.csv", "image", "level")
    ]


def idrid(source, _):
    """IDRiD, disease grading (Porwal et al. 2018); both parts use the same file names for different eyes."""
    root, photos = source / "B. Disease Grading", []
    root = root if root.is_dir() else source  # the folder itself may be given
    for part, letter, title in (("train", "a", "Training"), ("val", "b", "Testing")):
        table = root / "2. Groundtruths" / f"{letter}. IDRiD_Disease Grading_{title} Labels.csv"
        images = root / "1. Original Images" / f"{letter}. {title} Set"
        photos += [
            Photo(images / f"{image}.jpg", grade, f"{part} {image}", part)
            for image, grade, _ in read_labels(table, "image name", "retinopathy grade")
        ]
    return photos


def folder(source, _):
    """Any pictures with a labels.csv: image (path from the folder), label (grade) and, if known, patient."""
    return [
        Photo(
            source / image,
            grade,
            f"patient {line['patient']}" if line.get("patient") else image,
            name=image,
        )
        for image, grade, line in read_labels(source / "labels.csv", "image", "label")
    ]


def retinamnist(source, image_size):
    """RetinaMNIST+ (Yang et al. 2023; CC BY 4.0), of 128 or 224 pixels; downloaded once where there is no source."""
    pixels, photos = 128 if image_size <= 128 else 224, []
    name = f"retinamnist_{pixels}.npz"
    url = RETINAMNIST_URL.format(name=name)
    try:
        if source is None:
            import keras  # here, because it takes seconds

            source = Path(
                keras.utils.get_file(
                    name, url, file_hash=RETINAMNIST_MD5[pixels], hash_algorithm="md5"
                )
            )
    except Exception as error:  # no network, no such page, a checksum that does not fit
        raise ValueError(
            f"{name} cannot be downloaded from {url} ({error}): try again online, or fetch it by hand "
            "and give --source the file"
        ) from None
    archive = source / name if source.is_dir() else source
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
    archive.with_suffix("").mkdir(exist_ok=True)
    for part, (images, labels) in parts.items():
        for number, (image, label) in enumerate(zip(images, labels.ravel(), strict=True)):
            path = archive.with_suffix("") / f"{part}_{number:04d}.png"
            if not (path.exists() and path.stat().st_mtime >= archive.stat().st_mtime):
                with replacing(path) as written:
                    Image.fromarray(image).save(written)
            if label not in range(5):
                raise ValueError(
                    f"{archive} gives {path.name} the grade {label}, expected a whole number 0 to 4"
                )
            photos.append(Photo(path, int(label), path.name, part, f"{number:04d}"))
    return photos


def thesis_index(files, source):
    """The thesis's index files, pickled pandas DataFrames: a Photo a row, `part` being the file's name.

    A pickle is code: only files that the user trusts. source: folder of the pictures; None where `dir` leads to them.
    """
    try:
        import pandas
    except ImportError:
        raise ValueError(
            "--index-from reads pandas DataFrames and needs pandas: pip install pandas"
        ) from None
    photos, names, seen = [], {Path(file).stem for file in files}, {}
    workers = {f"worker{number}" for number in range(1, len(names - {"train_set", "val_set"}) + 1)}
    if not workers or names - {"train_set"} != workers | {"val_set"}:
        found = ", ".join(sorted(names))
        raise ValueError(
            f"--index-from got {found}; expected worker1, worker2 ..., val_set and perhaps train_set"
        )
    for file in map(Path, files):
        try:
            rows = pandas.read_pickle(file)[list(COLUMNS)].itertuples(index=False)
        except Exception as error:  # reading a pickle can raise anything
            raise ValueError(
                f"{file} is no DataFrame with the columns {', '.join(COLUMNS)} ({error!r})"
            ) from None
        for picture, grade, where, healthy in rows:
            if str(grade) not in list("01234") or str(healthy) != str(str(grade) == "0"):
                raise ValueError(
                    f"{file}: the grade {grade} of {picture} and healthy {healthy} do not fit together"
                )
            path = Path(source).expanduser() / picture if source else Path(where)
            if not path.exists():
                raise ValueError(
                    f"{file}: {path} is missing: --source must be the folder of the pictures"
                )
            photo = Photo(path, int(grade), picture, file.stem, Path(picture).stem)
            if seen.setdefault(photo.name, photo)[:2] != photo[:2]:
                raise ValueError(
                    f"{file}: {path} and {seen[photo.name].path} have one name, or two grades: rename one of them"
                )
            photos.append(photo)
    return photos


LOADERS = {loader.__name__: loader for loader in (idrid, ddr, aptos, eyepacs, folder, retinamnist)}
