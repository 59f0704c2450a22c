"""What lies in a folder becomes a list of photographs with grades and patients.

A published data set is described by PUBLISHED; any other folder has one table, or a folder for each
grade. Only the labels are read here, and it is looked up which photographs are there. Whether a
photograph is whole shows when it is prepared.
"""

import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from preparation.photos import SUFFIXES, dicom_patient
from preparation.tables import few, fold, is_grade, plain, read_grade, read_table

# Names of the columns of a table, as tables.plain writes them. What a column is for is its role.
COLUMN_NAMES = {
    "image": {
        "image", "imageid", "imagename", "imagefile", "imagefilename", "imagepath", "img", "imgid",
        "imgname", "imgpath", "file", "filename", "filepath", "path", "picture", "photo",
        "photograph", "idcode",
    },
    "label": {
        "label", "grade", "level", "diagnosis", "severity", "stage", "class", "dr", "drgrade",
        "drlevel", "drseverity", "drstage", "drclass", "drlabel", "retinopathy", "retinopathygrade",
        "diabeticretinopathy", "diabeticretinopathygrade", "icdr", "icdrgrade", "icdrlevel",
        "adjudicateddrgrade",
    },
    "patient": {
        "patient", "patientid", "patientno", "patientnr", "patientnumber", "patientcode",
        "patientname", "pid", "ptid", "mrn", "person", "personid", "subject", "subjectid",
        "participant", "participantid",
    },
    "part": {"part", "split", "partition", "subset"},
    "hospital": {
        "hospital", "hospitalid", "site", "siteid", "centre", "centreid", "center", "centerid",
        "clinic", "clinicid", "institution",
    },
}  # fmt: skip
# What stands in a column of patients where the patient is not known.
NOBODY = {
    "", "-", "--", "?", "na", "n/a", "nan", "none", "null", "unk", "unknown", "anonymous",
    "anonymized",
}  # fmt: skip
# What a column or a folder may call a part.
PARTS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
# A file name may have 255 bytes on most file systems; a temporary one has some more than this.
MOST_NAME_BYTES = 180
TABLE_SUFFIXES = (".csv", ".tsv")


class Photo(NamedTuple):
    """A graded photograph of a data set, before it is prepared."""

    path: Path | None  # None: it is synthetic
    grade: int  # 0..4
    patient: str  # the same for all images of a patient; the image's own where nothing is known
    part: str = ""  # "train", "val" or "test" where the data set says so
    name: str = ""  # what the data set calls it; later the prepared picture, without extension
    hospital: str = ""


@dataclass
class DataSet:
    """What was found of a data set."""

    photos: list = field(default_factory=list)  # of Photo
    patients: str | None = None  # what tells the patients apart; None: nothing does
    patients_sentence: str = ""  # the same as a sentence for the user
    left_out: dict = field(default_factory=dict)  # why -> images, as a sentence names them
    notes: list = field(default_factory=list)  # other lines for the user
    read: set = field(default_factory=set)  # paths of what was looked at


class Published(NamedTuple):
    """How a published data set lies in its folder."""

    tables: tuple  # of (table, folder of its photographs, part)
    image: str  # columns
    grade: str
    layout: dict = {}  # of tables without a line of names: what read_table needs
    folder: str = ""  # where tables and folders lie, or in the source itself
    side: str = ""  # a pattern: what a name has behind the patient; "": names tell no patient
    ungradable: str | None = None  # a grade of the published set that means ungradable


PUBLISHED = {
    # Porwal et al. 2018, disease grading. Both parts use the same names for different eyes.
    "idrid": Published(
        tuple(
            (
                f"2. Groundtruths/{letter}. IDRiD_Disease Grading_{title} Labels.csv",
                f"1. Original Images/{letter}. {title} Set",
                part,
            )
            for letter, title, part in (("a", "Training", "train"), ("b", "Testing", "val"))
        ),
        "image name",
        "retinopathy grade",
        folder="B. Disease Grading",
    ),
    # OIA-DDR, Li et al. 2019: lines like `007-0004-000.jpg 0`. Of 12,522 names none has a beginning
    # in common with another that would tell a patient.
    "ddr": Published(
        tuple(
            (f"{name}.txt", name, part)
            for name, part in (("train", "train"), ("valid", "val"), ("test", "test"))
        ),
        "image",
        "grade",
        {"columns": ["image", "grade"], "delimiter": " "},
        ungradable="5",
    ),
    # Kaggle 2019
    "aptos": Published((("train.csv", "train_images", ""),), "id_code", "diagnosis"),
    # Kaggle 2015: 10_left and 10_right are of patient 10
    "eyepacs": Published(
        (("trainLabels.csv", "train", ""),), "image", "level", side="_(left|right)$"
    ),
}  # fmt: skip
NAMES = (*PUBLISHED, "folder")


def add_flags(add, roles=tuple(COLUMN_NAMES)):
    """Add the flags that say how a table is read, but for --labels; add: an argparse method."""
    for role in roles:
        less = "" if role in ("image", "label") else "; none: there is none"
        add(
            f"--{role}-column",
            default="",
            metavar="NAME",
            help=f"the table's column of the {role} (found by its name{less})",
        )
    add("--referable", action="store_true", help="the labels are 0 and 1; 1 is grade 2 or more")
    add(
        "--grades-from",
        type=int,
        choices=(0, 1),
        help="the number that means no DR (asked where it cannot be told)",
    )


def load(dataset, source, flags):
    """Find a data set by its name, one of NAMES, in the folder `source`: a DataSet.

    flags: of "folder": an object with what `add_flags` adds, and `labels`, the table's name or "".
    Raises ValueError, one sentence, where something cannot be read as it is meant.
    """
    source = Path(source).expanduser()
    if not source.is_dir():
        raise ValueError(f"{source} is no folder, expected that of the data set {dataset!r}")
    if dataset == "folder":
        found = load_folder(source, flags)
    else:
        found = load_published(dataset, source, PUBLISHED[dataset])
    if not found.photos:
        counts = [f"{len(images)} {why}" for why, images in found.left_out.items()]
        raise ValueError(
            f"{source} has no graded image ({', '.join(counts) or 'it names none'}): is it the "
            f"folder of the data set {dataset!r}, fully unpacked?"
        )
    counts = Counter(photo.path for photo in found.photos)
    repeated = [f"{path} twice" for path, count in counts.items() if count > 1]
    if repeated:
        raise ValueError(f"{source} lists {few(repeated)}: leave one of the two")
    if found.patients and len(found.photos) > 1 == len({photo.patient for photo in found.photos}):
        raise ValueError(
            f"{source}: all {len(found.photos)} images are of one patient by {found.patients}, "
            "expected several: give another --patient-column, or --patient-column none if nothing "
            "tells the patients"
        )
    found.notes += count_kinds("not read", walk(source, found.read))
    return found


def count_kinds(what, paths):
    """["what: 3 .txt, 1 .pdf"] of these paths; [] where there is none."""
    kinds = Counter(path.suffix.lower() or "without extension" for path in paths)
    some = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(12))
    return [f"{what}: {some}"] if some else []


def walk(source, read=()):
    """The files in `source` and below that are not hidden and not in `read`, in order."""
    for directory, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(directory) / name
            if not name.startswith(".") and path not in read:
                yield path


# --- data sets -----------------------------------------------------------------------------------


def load_published(dataset, source, published):
    """The DataSet of one of PUBLISHED."""
    root = source / published.folder
    if not root.is_dir():
        root = source  # that folder itself was given
    found = DataSet()
    for name, folder, part in published.tables:
        table = read_table(root / name, **published.layout)
        found.read.add(table.path)
        images = table.cells(table.column(published.image))
        grades = table.cells(table.column(published.grade))
        patients = [published.side and re.sub(published.side, "", image) for image in images]
        rows = [
            dict(zip(COLUMN_NAMES, (*row, part, ""), strict=True))
            for row in zip(images, grades, patients, strict=True)
            if row[1] != published.ungradable
        ]
        if len(rows) < len(images):  # a class of the published set, no fault of its table
            found.notes.append(
                f"{table.path.name}: {len(images) - len(rows):,} ungradable images are left out"
            )
        add_photos(found, rows, read_grades(table.path, rows, 0), root / folder)
    if published.side:
        found.patients = "the file name"
        found.patients_sentence = "by the file name: 10_left and 10_right are of patient 10"
    else:
        found.patients_sentence = f"{dataset} tells no patients: each image is its own patient"
    return found


def load_folder(source, flags):
    """The DataSet of any folder: with one table, or with a folder for each grade."""
    found = DataSet()
    path = find_table(source, flags.labels)
    if path:
        table = read_table(path)
        found.read.add(path)
        rows = rows_of_table(found, table, choose_columns(found, source, table, flags))
    else:
        rows = rows_of_class_folders(source)
        names = sorted({row["label"] for row in rows})
        found.notes.append(f"grades by the names of folders: {', '.join(names)}")
    grades = read_grades(path or source, rows, flags.grades_from, flags.referable)
    if flags.referable:
        found.notes.append("1 is read as grade 2, and 0 as grade 0, though some may have mild DR")
    add_photos(found, rows, grades, source)
    if not found.patients and fold(flags.patient_column) != "none":
        add_dicom_patients(found)
    if not found.patients:
        found.patients_sentence = (
            "no column and no DICOM file tells patients: each image is its own patient "
            "(--patient-column names a column)"
        )
    british = {row["label"] for row in rows if re.fullmatch("r[0-3]", fold(row["label"]))}
    if british:
        found.notes.append("R0, R1, R2 and R3 are read as the grades 0, 1, 2 and 4")
    return found


def find_table(source, name):
    """The path of the folder's table, called `name` if that is not ""; None if there is none."""
    if name:
        return source / name
    tables = [path for path in walk(source) if path.parent == source]
    tables = [path for path in tables if path.suffix.lower() in TABLE_SUFFIXES]
    if len(tables) > 1:
        some = few([repr(path.name) for path in tables])
        raise ValueError(f"{source} has {len(tables)} tables, {some}: say which by --labels NAME")
    return tables[0] if tables else None


# --- a user's table ------------------------------------------------------------------------------


def choose_columns(found, source, table, flags):
    """{role: number of its column, None where there is none}; says in `found` what each holds."""
    files = PhotoFinder(source)
    checks = {
        "image": ("name a file", 0.5, lambda cell: len(files.find(cell)) == 1),
        "label": ("are grades", 1, is_grade),
    }
    taken = {}
    for role in ("patient", "part", "hospital", "image", "label"):
        given = getattr(flags, f"{role}_column")
        number = choose_column(table, role, given, checks.get(role), taken.values())
        taken[role] = number
        if number is None:
            continue
        cells = table.cells(number)
        holds = f"{len(set(cells) - {''}):,} different"
        if role in checks:
            words, _, fits = checks[role]
            holds = f"{sum(map(fits, cells)):,} of {len(cells):,} cells {words}"
        what = "grade" if role == "label" else role
        found.notes.append(f"{table.path.name}, {what}: column {table.columns[number]!r}, {holds}")
    return taken


def choose_column(table, role, given, check, used):
    """The number of the column for a role; None where there is none, and none is needed.

    given: what the flag says: a name, "none", or "" to look for one. It is the one with a known
    name; where there are several, or none, the one whose cells are right. check: (words, part of
    the cells that must be right, whether a cell is), or None for a role that is not needed.
    used: numbers of columns that have a role already.
    """
    if fold(given) == "none" and not check:
        return None
    if given:
        return table.column(given)
    named = [n for n, name in enumerate(table.columns) if plain(name) in COLUMN_NAMES[role]]
    if len(named) == 1 or (not named and not check):
        return named[0] if named else None
    for number in named:
        table.column(table.columns[number])  # raises where one is there twice
    fitting = named
    if check:
        _, least, fits = check
        fitting = []
        for number in set(named or range(len(table.columns))) - set(used):
            cells = [row[number] for row in table.rows]
            if len(set(cells)) > 1 and sum(map(fits, cells)) >= least * len(cells):
                fitting.append(number)
        if not named and any(fits(name) for name in (table.columns[n] for n in fitting) if name):
            raise ValueError(
                f"{table.path}: the first line looks like a photograph's, not like names of "
                f"columns: add a line such as image,label; found {', '.join(table.columns)[:200]}"
            )
    if len(fitting) == 1:
        return fitting[0]
    what = f"{len(fitting)} columns that can be" if fitting else "no column that can be"
    among = few([repr(table.columns[number]) for number in fitting or range(len(table.columns))], 9)
    raise ValueError(f"{table.path} has {what} the {role}: {among}; name it with --{role}-column")


def rows_of_table(found, table, taken):
    """A dict {role: text} for each row of a user's table. taken: {role: number of its column}."""
    cells = {}
    for role in COLUMN_NAMES:
        number = taken[role]
        cells[role] = [""] * len(table.rows) if number is None else table.cells(number)
        if number is not None and role in ("image", "part", "hospital") and "" in cells[role]:
            line = table.lines[cells[role].index("")]
            raise ValueError(f"{table.path}, line {line}: the {role} is blank in this row")
    if taken["patient"] is not None:
        cells["patient"] = [read_patient(cell) for cell in cells["patient"]]
        unknown = of_unknown(cells["patient"].count(""))
        found.patients = f"column {table.columns[taken['patient']]!r}"
        found.patients_sentence = f"by {found.patients}{unknown}"
    return [dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)]


def read_patient(cell):
    """The patient that a cell names, the same however it is written; "" if it names nobody."""
    text = fold(unicodedata.normalize("NFC", cell))
    if text in NOBODY:
        return ""
    return re.sub(r"^(\d+)\.0$", r"\1", text)  # a spreadsheet makes 17 to 17.0


# --- folders of grades ---------------------------------------------------------------------------


def rows_of_class_folders(source):
    """A dict {role: text} for each photograph that lies in a folder with the name of a grade.

    A folder above or below may be called train, val or test.
    """
    rows = []
    nameless = Counter()
    for path in walk(source):
        if path.suffix.lower() in SUFFIXES:
            folders = path.relative_to(source).parts[:-1]
            grades = [folder for folder in folders if is_grade(folder)]
            parts = [folder for folder in folders if fold(folder) in PARTS]
            if len(grades) == 1 and len(parts) <= 1:
                image = path.relative_to(source).as_posix()
                row = (image, grades[0], "", "".join(parts), "")
                rows.append(dict(zip(COLUMN_NAMES, row, strict=True)))
            else:
                nameless["/".join(folders) or "."] += 1
    if nameless or not rows:
        some = few([f"{folder!r} ({count} images)" for folder, count in nameless.items()])
        raise ValueError(
            f"{source} has no table (.csv, .tsv), and folders without the name of one grade: "
            f"{some or 'none'}; expected a table (save a spreadsheet as CSV), or folders such as 0 "
            "to 4, or no DR, mild, moderate, severe, PDR"
        )
    return rows


def add_dicom_patients(found):
    """Patients by the PatientID of DICOM files, where there are such files."""
    ids = {
        photo.path: read_patient(dicom_patient(photo.path))
        for photo in found.photos
        if photo.path.suffix.lower() == ".dcm" and photo.path.is_file()
    }
    if any(ids.values()):
        found.photos = [
            photo._replace(patient=f"patient {ids[photo.path]}") if ids.get(photo.path) else photo
            for photo in found.photos
        ]
        found.patients = "PatientID"
        unknown = len(found.photos) - sum(map(bool, ids.values()))
        found.patients_sentence = f"by PatientID of DICOM files{of_unknown(unknown)}"


def of_unknown(count):
    return f"; {count} images are of an unknown patient each" if count else ""


# --- rows become photographs ---------------------------------------------------------------------


def read_grades(where, rows, first=None, referable=False):
    """The grade 0..4 of each row, None where it is ungradable.

    first: the number that means no DR, None to be asked where it is not clear. referable: 1 means
    grade 2 or more. Raises ValueError where a cell is no grade, and where the scale is not clear.
    """
    wrong = [
        f"{row['image']!r} the grade {row['label']!r}" for row in rows if not is_grade(row["label"])
    ]
    if wrong:
        raise ValueError(f"{where} gives {few(wrong)}, expected a whole number 0 to 4")
    grades = [read_grade(row["label"]) for row in rows]
    in_numbers = {
        grade
        for grade, row in zip(grades, rows, strict=True)
        if grade is not None and not re.search("[a-z]", fold(row["label"]))
    }
    if referable:
        if not in_numbers <= {0, 1}:
            raise ValueError(f"{where} has grades up to {max(in_numbers)}: --referable is for 0, 1")
        return [2 * grade if grade else grade for grade in grades]
    if first is None and in_numbers == {0, 1}:
        raise ValueError(
            f"{where} has the grades 0 and 1 only: is 1 referable DR (grade 2 or more), then give "
            "--referable; or is it mild DR of the grades 0 to 4, then give --grades-from 0"
        )
    if first is None and in_numbers and min(in_numbers) == 1:
        raise ValueError(
            f"{where} has the grades 1 to {max(in_numbers)} and none is 0: is 1 no DR, on a scale "
            "shifted by one, then give --grades-from 1; or is 1 mild DR, nobody healthy, and 5 "
            "ungradable, then give --grades-from 0"
        )
    if first == 1 and 0 in in_numbers:
        raise ValueError(f"{where} has grades 0: --grades-from 1 is for a scale from 1 to 5")
    shifted = [grade - (first or 0) if grade in in_numbers else grade for grade in grades]
    return [None if grade is None or grade > 4 else grade for grade in shifted]


def add_photos(found, rows, grades, folder):
    """Add a Photo for each row whose photograph is in `folder`; count the others in `found`."""
    files = PhotoFinder(folder)
    wrong_parts = []
    for row, grade in zip(rows, grades, strict=True):
        fitting = files.find(row["image"])
        part = PARTS.get(fold(row["part"]), "")
        if row["part"] and not part:
            wrong_parts.append(f"{row['image']!r} the part {row['part']!r}")
        if len(fitting) == 1:
            found.read.add(fitting[0])
        if grade is None:
            why, image = "are ungradable", f"{row['image']!r} ({row['label'] or 'blank'})"
            found.left_out.setdefault(why, []).append(image)
        elif len(fitting) == 1:
            # The prefixes keep a patient "7" and an image "7" apart.
            patient = (
                f"patient {row['patient']}" if row["patient"] else f"image {part} {row['image']}"
            )
            photo = Photo(fitting[0], grade, patient, part, row["image"], row["hospital"])
            found.photos.append(photo)
        else:
            why = "have names that fit several files" if fitting else f"are not in {folder}"
            found.left_out.setdefault(why, []).append(repr(row["image"]))
    if wrong_parts:
        raise ValueError(
            f"the table gives {few(wrong_parts)}, expected train, val or test; --part-column none "
            "if that column says something else"
        )


def picture_name(photo, sha256):
    """A file name for the prepared picture, which ends in 12 digits of its photograph's SHA-256.

    All but letters, digits, "_" and "-" becomes "_".
    """
    stem, suffix = os.path.splitext(photo.name)
    words = f"{photo.part}_{stem if suffix.lower() in SUFFIXES else photo.name}"
    words = unicodedata.normalize("NFC", words)
    name = re.sub(r"[^\w-]+", "_", words).strip("_").encode()[:MOST_NAME_BYTES]
    return f"{name.decode(errors='ignore')}_{sha256[:12]}"


class PhotoFinder:
    """Finds the files of one folder by the names that a table gives them.

    A name that is no file may be loose: without extension, in another case, with backslashes, with
    accents that are composed otherwise, or without the folders before it.
    """

    def __init__(self, source):
        self.source = source
        self.files = None  # loose name -> paths; made when it is needed first

    def find(self, name):
        """The paths that `name` can mean: none, one, or several where it is loose."""
        if not name or "\0" in name:
            return []
        path = self.source / name
        if os.path.isfile(path) and path.suffix.lower() in SUFFIXES:
            return [path]
        if self.files is None:
            self.files = self.loose_names()
        return self.files.get(loose(name), [])

    def loose_names(self):
        """A photograph has up to four: with and without extension, with and without its folders."""
        files = {}
        for path in walk(self.source):
            if path.suffix.lower() in SUFFIXES:
                whole = loose(path.relative_to(self.source).as_posix())
                for key in {whole, loose(path.name)}:
                    files.setdefault(key, []).append(path)
                    files.setdefault(key[: -len(path.suffix)], []).append(path)
        return files


def loose(name):
    """A name without all that loose names may differ in, but with its extension."""
    text = unicodedata.normalize("NFC", name.replace("\\", "/")).casefold()
    return "/".join(part for part in text.split("/") if part not in ("", "."))
