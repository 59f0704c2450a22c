"""One function for each published data set: from its folder, as its archive unpacks, to Photos.

Only the labels are read here, and it is looked up which photographs are there. Whether a photograph
is whole shows when it is prepared. All raise ValueError, one sentence, where a table is not what
the archive has.
"""

import hashlib
import os
import re
import unicodedata
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from preparation.tables import few, read_labels
from preparation.written import WrittenFiles

RETINAMNIST_URL = "https://zenodo.org/records/10519652/files/{name}?download=1"
RETINAMNIST_MD5 = {
    128: "e48e916a24454daf90583d4e6efb1a18",
    224: "eae7e3b6f3fcbda4ae613ebdcbe35348",
}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp"}
# Names of a column of patients, in lower case and without blanks and signs between the words.
PATIENT_COLUMNS = {
    "patient", "patientid", "patientno", "patientnr", "patientnumber", "patientcode", "patientname",
    "pid", "ptid", "mrn", "person", "personid", "subject", "subjectid", "participant",
    "participantid",
}  # fmt: skip
# What stands in such a column where the patient is not known.
NOBODY = {"", "-", "--", "?", "na", "n/a", "nan", "none", "null", "unk", "unknown"}
# What a column `part` may say.
PARTS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
# A file name may have 255 bytes on most file systems; a temporary one has some more than this.
MOST_NAME_BYTES = 180


class Photo(NamedTuple):
    """A graded photograph of a data set, before it is prepared."""

    path: Path | None  # None: it is to be drawn
    grade: int  # 0..4
    patient: str  # the same for all images of a patient; the image's own where nothing is known
    part: str = ""  # "train", "val" or "test" where the published archive says so
    name: str = ""  # of the prepared picture, without extension; unique within the data set
    hospital: str = ""  # the name of one of synthetic.HOSPITALS, where the picture is drawn for one


class Columns(NamedTuple):
    """The columns of a user's own table, as --image-column ... name them."""

    image: str = "image"
    label: str = "label"
    patient: str = ""  # "": look for one; "none": there is none


@dataclass
class DataSet:
    """What was found of a data set."""

    photos: list  # of Photo
    patients: str | None = None  # what tells the patients apart; None: nothing does
    patients_sentence: str = ""  # the same as a sentence for the user
    ungradable: list = field(default_factory=list)  # (image, cell of its grade)
    missing: list = field(default_factory=list)  # names of Photos without a file
    ambiguous: list = field(default_factory=list)  # names that fit several files
    notes: list = field(default_factory=list)  # other lines for the user


def load(dataset, source, image_size=128, columns=None):
    """Find a data set by its name, a key of LOADERS.

    source: its folder; for retinamnist None, or where the downloaded file lies.
    """
    source = Path(source).expanduser() if source else None
    if dataset != "retinamnist" and not source.is_dir():
        raise ValueError(
            f"{source} is no folder: --source must be the folder of the data set {dataset!r}"
        )
    if dataset == "retinamnist":
        found = retinamnist(source, image_size)
    elif dataset == "folder":
        found = folder(source, columns or Columns())
    else:
        found = LOADERS[dataset](source)
    if not found.photos:
        ungradable = f" but {len(found.ungradable)} ungradable ones" if found.ungradable else ""
        raise ValueError(
            f"{source} has no graded image{ungradable}: is it the folder of the data set "
            f"{dataset!r}, fully unpacked?"
        )
    refuse_repeated(source, found.photos)
    found.photos = name_pictures(found.photos, source)
    num_patients = len({photo.patient for photo in found.photos})
    if found.patients and num_patients == 1 and len(found.photos) > 1:
        raise ValueError(
            f"{source}: all {len(found.photos)} images are of one patient by {found.patients}, "
            "expected several: give another --patient-column, or --patient-column none if the "
            "table does not tell patients"
        )
    return found


def refuse_repeated(source, photos):
    """Raise ValueError if a photograph is listed twice."""
    counts = Counter(photo.path for photo in photos)
    repeated = [str(path) for path, count in counts.items() if count > 1]
    if repeated:
        raise ValueError(
            f"{source} lists {few([f'{path} twice' for path in repeated])}: leave one of the two"
        )


# --- names ---------------------------------------------------------------------------------------


def name_pictures(photos, source):
    """The photos with a name for the prepared picture; no two have the same."""
    names = [picture_name(photo) for photo in photos]
    counts = Counter(name.casefold() for name in names)  # some file systems do not see the case
    named = []
    for photo, name in zip(photos, names, strict=True):
        too_long = len(name.encode()) > MOST_NAME_BYTES
        if too_long or counts[name.casefold()] > 1:
            # Two names that become one differ in what was replaced. A hash of the whole path keeps
            # them apart, and is the same at every start.
            digest = hashlib.sha256(relative(photo.path, source).encode()).hexdigest()[:10]
            short = name.encode()[:MOST_NAME_BYTES].decode(errors="ignore")
            name = f"{short}_{digest}"
        named.append(photo._replace(name=name))
    return named


def picture_name(photo):
    """A file name for the prepared picture: all but letters, digits, "_" and "-" becomes "_"."""
    words = f"{photo.part}_{photo.name or photo.path.stem}"
    return re.sub(r"[^\w-]+", "_", unicodedata.normalize("NFC", words)).strip("_")


def relative(path, source):
    """The path from the folder `source`, or as it is where it does not lie there; with slashes."""
    if source and path.is_relative_to(source):
        path = path.relative_to(source)
    return path.as_posix()


class PhotoFinder:
    """Finds the files of one folder by the names that a table gives them.

    A name that is no file may be loose: without extension, in another case, with backslashes, with
    accents that are composed otherwise, or without the folders before it. It counts if only one
    file fits.
    """

    def __init__(self, source):
        self.source = source
        self.missing = []
        self.ambiguous = []
        self.files = None  # loose name -> list of paths; made when it is needed first

    def find(self, name, suffix=""):
        """The path of the photograph `name` (+ suffix); where it would be if it is missing."""
        path = self.source / f"{name}{suffix}"
        if os.path.isfile(path):
            return path
        if self.files is None:
            self.files = loose_names(self.source)
        fitting = self.files.get(loose(name), [])
        if len(fitting) == 1:
            return fitting[0]
        (self.ambiguous if fitting else self.missing).append(f"{name}{suffix}")
        return path


def loose(name):
    """A name without all that loose names may differ in, but with its extension."""
    text = unicodedata.normalize("NFC", name.replace("\\", "/")).casefold()
    return "/".join(part for part in text.split("/") if part not in ("", "."))


def loose_names(source):
    """{loose name: list of paths} of all pictures in the folder `source`.

    A picture has up to four such names: with and without extension, with and without its folders.
    """
    files = {}
    for directory, folders, names in os.walk(source):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(directory) / name
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            whole = loose(path.relative_to(source).as_posix())
            for key in {whole, loose(name)}:
                files.setdefault(key, []).append(path)
                files.setdefault(key[: -len(path.suffix)], []).append(path)
    return files


# --- patients ------------------------------------------------------------------------------------


def find_patient_column(table, columns, wanted):
    """The column of patients among `columns` (in lower case), or None.

    wanted: what --patient-column says: "" to look for one, "none" for none.
    """
    if wanted.lower() == "none":
        return None
    if wanted:
        if wanted.strip().lower() not in columns:
            found = ", ".join(filter(None, columns))[:300]
            raise ValueError(f"{table} has no column {wanted!r}: found {found}")
        return wanted.strip().lower()
    for column in columns:
        if re.sub(r"[\W_]+", "", column) in PATIENT_COLUMNS:
            return column
    return None


def read_patient(cell):
    """The patient that a cell names, the same however it is written; "" if it names nobody."""
    text = unicodedata.normalize("NFC", cell).strip().casefold()
    if text in NOBODY:
        return ""
    return re.sub(r"^(\d+)\.0$", r"\1", text)  # a spreadsheet makes 17 to 17.0


# --- the data sets -------------------------------------------------------------------------------


def ddr(source):
    """OIA-DDR (Li et al. 2019): three tables without a header, lines like `007-0004-000.jpg 0`.

    Grade 5 is ungradable. The names tell no patient: of 12,522 none has a beginning in common with
    another that would say so.
    """
    files = PhotoFinder(source)
    found = DataSet([], missing=files.missing, ambiguous=files.ambiguous)
    num_left_out = 0
    for part, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        layout = {"fieldnames": ("image", "grade"), "delimiter": " "}
        labels = read_labels(source / f"{name}.txt", "image", "grade", **layout)
        for label in labels.graded:
            path = files.find(f"{name}/{label.image}")
            found.photos.append(Photo(path, label.grade, label.image, part))
        # That is a class of the published set, and no fault of the table.
        published = [image for image, cell in labels.ungradable if cell == "5"]
        num_left_out += len(published)
        found.ungradable += [each for each in labels.ungradable if each[1] != "5"]
    if num_left_out:
        found.notes.append(f"{num_left_out:,} ungradable images (grade 5) are left out")
    found.patients_sentence = (
        "the names of ddr tell no patient: each image counts as its own patient"
    )
    return found


def aptos(source):
    """APTOS 2019 (Kaggle); the set tells no patients."""
    files = PhotoFinder(source)
    labels = read_labels(source / "train.csv", "id_code", "diagnosis")
    photos = [
        Photo(files.find(f"train_images/{label.image}", ".png"), label.grade, label.image)
        for label in labels.graded
    ]
    return DataSet(
        photos,
        None,
        "aptos tells no patients: each image counts as its own patient",
        labels.ungradable,
        files.missing,
        files.ambiguous,
    )


def eyepacs(source):
    """EyePACS (Kaggle 2015); 10_left and 10_right are of patient 10."""
    files = PhotoFinder(source)
    labels = read_labels(source / "trainLabels.csv", "image", "level")
    photos = []
    for label in labels.graded:
        path = files.find(f"train/{label.image}", ".jpeg")
        photos.append(Photo(path, label.grade, re.sub("_(left|right)$", "", label.image)))
    return DataSet(
        photos,
        "the file name",
        "by the file name: 10_left and 10_right are of patient 10",
        labels.ungradable,
        files.missing,
        files.ambiguous,
    )


def idrid(source):
    """IDRiD, disease grading (Porwal et al. 2018).

    Both parts use the same file names for different eyes, so an image's own patient is part and
    name.
    """
    root = source / "B. Disease Grading"
    if not root.is_dir():
        root = source  # that folder itself was given
    found = DataSet([])
    for part, letter, title in (("train", "a", "Training"), ("val", "b", "Testing")):
        table = root / "2. Groundtruths" / f"{letter}. IDRiD_Disease Grading_{title} Labels.csv"
        files = PhotoFinder(root / "1. Original Images" / f"{letter}. {title} Set")
        labels = read_labels(table, "image name", "retinopathy grade")
        for label in labels.graded:
            path = files.find(label.image, ".jpg")
            found.photos.append(Photo(path, label.grade, f"{part} {label.image}", part))
        found.ungradable += labels.ungradable
        found.missing += files.missing
        found.ambiguous += files.ambiguous
    found.patients_sentence = "idrid tells no patients: each image counts as its own patient"
    return found


def folder(source, columns):
    """Any pictures with a labels.csv: image (path from the folder), label (grade), or patient too.

    A column `part` (train, val) says who validates.
    """
    table = source / "labels.csv"
    image_column, label_column = (name.strip().lower() for name in columns[:2])
    labels = read_labels(
        table, image_column, label_column, flags=("--image-column", "--label-column")
    )
    patient_column = find_patient_column(table, labels.columns, columns.patient)
    has_parts = "part" in labels.columns
    files = PhotoFinder(source)
    found = DataSet([], None, "", labels.ungradable, files.missing, files.ambiguous)
    wrong_parts = []
    num_unknown = 0
    for label in labels.graded:
        patient = read_patient(label.line[patient_column]) if patient_column else ""
        num_unknown += not patient
        # The prefix keeps a patient "7" and an image "7" apart.
        patient = f"patient {patient}" if patient else label.image
        part = label.line["part"].lower() if has_parts else ""
        if has_parts and part not in PARTS:
            wrong_parts.append(f"{label.image!r} the part {part!r}")
        path = files.find(label.image)
        found.photos.append(
            Photo(path, label.grade, patient, PARTS.get(part, ""), name=label.image)
        )
    if wrong_parts:
        raise ValueError(f"{table} gives {few(wrong_parts)}, expected train, val or test")
    if patient_column:
        found.patients = f"column {patient_column!r}"
        unknown = f"; {num_unknown} images are of an unknown patient each" if num_unknown else ""
        found.patients_sentence = f"by {found.patients}{unknown}"
    else:
        names = ", ".join(filter(None, labels.columns))[:300]
        found.patients_sentence = (
            f"no patient column among {names}: each image counts as its own patient "
            "(--patient-column names one)"
        )
    return found


def retinamnist(source, image_size):
    """RetinaMNIST+ (Yang et al. 2023; CC BY 4.0), of 128 or 224 pixels.

    Downloaded once where there is no source, and unpacked into preprocessed/, which is ours.
    """
    pixels = 128 if image_size <= 128 else 224
    name = f"retinamnist_{pixels}.npz"
    if source is None:
        source = download_retinamnist(name, RETINAMNIST_MD5[pixels])
    archive = source / name if source.is_dir() else source
    parts = read_retinamnist(archive, name)
    unpacked = WrittenFiles(Path("preprocessed") / archive.stem)
    state = archive.stat()
    made_from = [str(archive.resolve()), state.st_size, state.st_mtime_ns]
    photos = []
    for part, (images, labels) in parts.items():
        for number, (image, label) in enumerate(zip(images, labels.ravel(), strict=True)):
            path = unpacked.folder / f"{part}_{number:04d}.png"
            if label not in range(5):
                raise ValueError(
                    f"{archive} gives {path.name} the grade {label}, expected a whole number 0 to 4"
                )
            entry = unpacked.entry(path)
            if not entry or entry.get("made_from") != made_from:
                with unpacked.publishing(path, made_from=made_from) as written:
                    Image.fromarray(image).save(written)
            photos.append(Photo(path, int(label), path.name, part, f"{number:04d}"))
    sentence = "retinamnist tells no patients: each image counts as its own patient"
    return DataSet(photos, None, sentence)


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


LOADERS = {loader.__name__: loader for loader in (idrid, ddr, aptos, eyepacs, folder, retinamnist)}
