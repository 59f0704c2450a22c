"""What lies in a folder becomes a list of photographs with grades and patients.

A published data set is described by PUBLISHED; any other folder has one table, or a folder for each
grade. Only the labels are read in here (and the patient of a DICOM file), and it is looked up which
photographs are there. No picture is decoded: whether it is whole shows when it is prepared. What is
not clear is asked, by a ValueError that names the flag, and never guessed.
"""

import os
import re
import unicodedata
from collections import Counter, defaultdict
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
    "part": {"part", "split", "partition", "subset", "set"},
    "hospital": {
        "hospital", "hospitalid", "site", "siteid", "centre", "centreid", "center", "centerid",
        "clinic", "clinicid", "institution",
    },
}  # fmt: skip
# What stands in a column of patients where the patient is not known, without NO_WORDS around it:
# a spreadsheet writes "#N/A", DICOM "ANONYMOUS^".
NOBODY = {
    "", "?", "na", "n/a", "n.a", "nv", "n/d", "ref!", "value!", "nan", "none", "null", "unk",
    "unknown", "missing", "anon", "anonymous", "anonymized", "anonymised",
}  # fmt: skip
NO_WORDS = "#^.-"
# What a column or a folder may call a part.
PARTS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
# What a cell must be, whatever else is in its row.
RIGHT = {
    "image": (bool, "a name"),
    "label": (is_grade, "a grade, 0 to 4"),
    "part": (
        lambda cell: fold(cell) in PARTS,
        "train, val or test (or --part-column none where the column says something else)",
    ),
    "patient": (
        # different patients would become one
        lambda cell: not re.fullmatch(r"\d([.,]\d+)?[eE]\+\d+", cell),
        "all digits of the patient (a spreadsheet has rounded them)",
    ),
    "hospital": (lambda cell: bool(read_patient(cell)), "a name"),
}
# A file name may have 255 bytes on most file systems; a temporary one has some more than this.
MOST_NAME_BYTES = 180
TABLES = (".csv", ".tsv")
UNGRADABLE = "are ungradable"
IMAGE = "image "  # begins the patient of an image of which nobody knows the patient


class Photo(NamedTuple):
    """A graded photograph of a data set, before it is prepared."""

    path: Path | None  # None: it is synthetic
    grade: int  # 0..4
    patient: str  # the same for all images of a patient; the image's own where nothing is known
    part: str = ""  # "train", "val" or "test" where the data set says so
    name: str = ""  # what the data set calls it; later the prepared picture, without extension
    hospital: str = ""


class Row(NamedTuple):
    """What a table, or a folder with the name of a grade, says of a photograph, in its words."""

    image: str
    label: str
    patient: str = ""  # "" where nobody knows
    part: str = ""  # one of PARTS
    hospital: str = ""


@dataclass
class DataSet:
    """What was found of a data set."""

    photos: list = field(default_factory=list)  # of Photo
    patients: str = ""  # what tells the patients apart; "": nothing does
    left_out: dict = field(default_factory=lambda: defaultdict(list))  # why -> names of images
    notes: list = field(default_factory=list)  # other lines for the user
    read: set = field(default_factory=set)  # paths of what was looked at
    indexes: dict = field(default_factory=dict)  # name -> paths, where they are imported

    @property
    def patients_sentence(self):
        """How many patients there are and what tells them, or that nothing does."""
        if not self.patients:
            return "nothing tells them (of a table --patient-column may), each image is its own"
        patients = {photo.patient for photo in self.photos}
        unknown = sum(patient.startswith(IMAGE) for patient in patients)
        of_nobody = f"; {unknown:,} images are of an unknown patient each" if unknown else ""
        return f"{len(patients):,}, by {self.patients}{of_nobody}"


# How a published data set lies in its folder: the arguments of `load_published`.
PUBLISHED = {
    # Porwal et al. 2018, disease grading. Both parts use the same names for different eyes.
    "idrid": dict(
        tables=[
            (
                f"2. Groundtruths/{letter}. IDRiD_Disease Grading_{title} Labels.csv",
                f"1. Original Images/{letter}. {title} Set",
                part,
            )
            for letter, title, part in (("a", "Training", "train"), ("b", "Testing", "val"))
        ],
        image="image name",
        label="retinopathy grade",
        folder="B. Disease Grading",
    ),
    # OIA-DDR, Li et al. 2019: lines like `007-0004-000.jpg 0`. Of 12,522 names none has a beginning
    # in common with another that would tell a patient. Its grade 5 is ungradable.
    "ddr": dict(
        tables=[("train.txt", "train", "train"), ("valid.txt", "valid", "val")]
        + [("test.txt", "test", "test")],
        image="image",
        label="grade",
        layout={"columns": ["image", "grade"], "delimiter": " "},
    ),
    # Kaggle 2019
    "aptos": dict(tables=[("train.csv", "train_images", "")], image="id_code", label="diagnosis"),
    # Kaggle 2015: 10_left and 10_right are of patient 10
    "eyepacs": dict(
        tables=[("trainLabels.csv", "train", "")],
        image="image",
        label="level",
        side="_(left|right)$",
    ),
}
NAMES = (*PUBLISHED, "folder")


COLUMN_FLAGS = [f"{role}_column" for role in COLUMN_NAMES]


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
    found = DataSet()
    if dataset == "folder":
        load_folder(found, source, flags)
    else:
        load_published(found, source, **PUBLISHED[dataset])
    if not found.photos:
        whys = [f"{len(them)} {why}, {few(them)}" for why, them in found.left_out.items()]
        whys += count_kinds("not read", walk(source, found.read))
        raise ValueError(
            f"{source} has no graded image ({'; '.join(whys) or 'it names none'}): is it the "
            f"folder of the data set {dataset!r}, unpacked, and the column that of the images?"
        )
    num_patients = len({photo.patient for photo in found.photos})
    if found.patients and num_patients == 1 < len(found.photos):
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
    """The files in `source` and below that are not hidden and not in `read`, in order.

    Links to folders are followed, but no folder twice: they may lead in a circle.
    """
    seen = set()
    for directory, folders, names in os.walk(source, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(directory) / name
            if not name.startswith(".") and path not in read:
                yield path


# --- data sets -----------------------------------------------------------------------------------


def load_published(found, source, tables, image, label, layout=None, folder="", side=""):
    """Add to `found` what a published data set has.

    tables: [(table, folder of its photographs, part), ...]
    image, label: names of columns
    layout: of tables without a line of names, what `read_table` needs
    folder: where tables and folders lie, or in the source itself
    side: a pattern: what an image's name has behind the patient; "": names tell no patient
    """
    root = source / folder
    if not root.is_dir():
        root = source  # that folder itself was given
    for name, photographs, part in tables:
        table = read_table(root / name, **layout or {})
        found.read.add(table.path)
        images = table.cells(table.column(image), *RIGHT["image"])
        labels = table.cells(table.column(label), *RIGHT["label"])
        patients = [side and re.sub(side, "", name) for name in images]
        rows = list(map(Row, images, labels, patients, [part] * len(images)))
        add_photos(found, rows, read_grades(found, table.path, rows, 0), Files(root / photographs))
    # a class of the published set, no fault of its tables
    ungradable = found.left_out.pop(UNGRADABLE, [])
    if ungradable:
        found.notes.append(f"{len(ungradable):,} ungradable images are left out")
    if side:
        found.patients = "the file name: 10_left and 10_right are of patient 10"


def load_folder(found, source, flags):
    """Add to `found` what any folder has: one table, or a folder for each grade."""
    files = Files(source)
    where = find_table(source, flags.labels)
    if where:
        table = read_table(where)
        found.read.add(where)
        rows = rows_of_table(found, table, files, flags)
    else:
        where = source
        given = [name for name in COLUMN_FLAGS if fold(getattr(flags, name)) not in ("", "none")]
        if given:
            raise ValueError(
                f"{source} has no table, of which --{given[0].replace('_', '-')} would be a column"
            )
        rows = rows_of_class_folders(source, files)
        names = sorted({row.label for row in rows})
        found.notes.append(f"grades by the names of folders: {', '.join(names)}")
    grades = read_grades(found, where, rows, flags.grades_from, flags.referable)
    add_photos(found, rows, grades, files)
    if not found.patients and fold(flags.patient_column) != "none":
        add_dicom_patients(found)


def find_table(source, name):
    """The path of the folder's table, called `name` if that is not ""; None if there is none."""
    if fold(name) == "none":
        return None
    files = [] if name else sorted(path for path in source.iterdir() if path.name[0] != ".")
    tables = [name] if name else [path.name for path in files if path.suffix.lower() in TABLES]
    if len(tables) > 1:
        some = few([repr(table) for table in tables])
        raise ValueError(f"{source} has {len(tables)} tables, {some}: say which by --labels NAME")
    return source / tables[0] if tables else None


# --- a user's table ------------------------------------------------------------------------------


def rows_of_table(found, table, files, flags):
    """A list of Row, one for each row of a user's table; says in `found` what each column holds."""
    checks = {
        "image": ("name a file", 0.5, lambda cell: len(files.find(cell)) == 1),
        "label": ("are grades", 1, is_grade),
    }
    columns = {}  # role -> its cells
    used = set()
    for role in ("patient", "part", "hospital", "image", "label"):
        given = getattr(flags, f"{role}_column")
        number = choose_column(table, role, given, checks.get(role), used)
        if number is None:
            columns[role] = [""] * len(table.rows)
            continue
        used.add(number)
        cells = columns[role] = table.cells(number, *RIGHT.get(role, ()))
        what = f"{len(set(cells) - {''}):,} different"
        if role in checks:
            words, _, fits = checks[role]
            what = f"{sum(map(fits, cells)):,} of {len(cells):,} cells {words}"
        found.notes.append(f"{table.path.name}, {role}: column {table.columns[number]!r}, {what}")
        if role == "patient" and any(map(read_patient, cells)):
            found.patients = f"column {table.columns[number]!r}"
        if role == "hospital":
            refuse_spellings(table, number, cells)
    return [Row(*cells) for cells in zip(*(columns[role] for role in Row._fields), strict=True)]


def refuse_spellings(table, number, cells):
    """Raise ValueError where one name is written in two ways: it would make two hospitals."""
    written = {}
    for cell in cells:
        first = written.setdefault(read_patient(cell), cell)
        if first != cell:
            raise ValueError(
                f"{table.path}: column {table.columns[number]!r} has {first!r} and {cell!r}, "
                "expected each hospital in one spelling: write them the same, or as two names"
            )


def choose_column(table, role, given, check, used):
    """The number of the column for a role; None where there is none, and none is needed.

    given: what the flag says: a name, "none", or "" to look for one. It is the one with a known
    name; where there are several, or none, the one whose cells are right.
    check: (words, part of the cells that must be right, whether a cell is), or None for a role that
    is not needed.
    used: numbers of columns that have a role already.
    """
    if fold(given) == "none" and not check:
        return None
    if given:
        return table.column(given)
    fitting = [n for n, name in enumerate(table.columns) if plain(name) in COLUMN_NAMES[role]]
    for number in fitting:
        table.column(table.columns[number])  # raises where one is there twice
    if check and len(fitting) != 1:
        unused = [number for number in range(len(table.columns)) if number not in used]
        has_known_name = bool(fitting)
        fitting = [number for number in fitting or unused if holds(table, number, check)]
        _, _, fits = check
        names = [table.columns[number] for number in fitting]
        if any(name and fits(name) for name in names):
            raise ValueError(
                f"{table.path}: the first line looks like a photograph's, not like names of "
                f"columns: add a line such as image,label; found {', '.join(table.columns)[:200]}"
            )
        if role == "label" and not has_known_name and len(fitting) == 1:
            # 0 to 2 may be grades of macular oedema, or of the photograph's quality
            fitting = [number for number in fitting if has_severe(table, number)]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting and not check:
        return None
    what = f"{len(fitting)} columns that can be" if fitting else "no column that can be"
    among = few([repr(table.columns[number]) for number in fitting or range(len(table.columns))], 9)
    raise ValueError(f"{table.path} has {what} the {role}: {among}; name it with --{role}-column")


def holds(table, number, check):
    """Whether a column's cells differ, and so many of them are right as `check` wants."""
    _, least, fits = check
    cells = [row[number] for row in table.rows]
    return len(set(cells)) > 1 and sum(map(fits, cells)) >= least * len(cells)


def has_severe(table, number):
    """Whether a column of grades has one above 2, which only those of DR have."""
    return any((read_grade(row[number]) or 0) > 2 for row in table.rows)


def read_patient(cell):
    """The patient (or hospital) of a cell, the same however it is written; "" if it is nobody."""
    text = " ".join(fold(unicodedata.normalize("NFC", cell)).split())
    if text.strip(NO_WORDS) in NOBODY:
        return ""
    return re.sub(r"^(\d+)\.0$", r"\1", text)  # a spreadsheet makes 17 to 17.0


# --- folders of grades ---------------------------------------------------------------------------


def rows_of_class_folders(source, files):
    """A list of Row, one for each photograph that lies in a folder with the name of a grade.

    A folder above or below may be called train, val or test.
    """
    rows = []
    nameless = Counter()
    for path in files.photographs:
        image = path.relative_to(source)
        folders = image.parts[:-1]
        grades = [folder for folder in folders if is_grade(folder)]
        parts = [folder for folder in folders if fold(folder) in PARTS]
        if len(grades) == 1 and len(parts) <= 1:
            rows.append(Row(image.as_posix(), grades[0], part="".join(parts)))
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
    for number, photo in enumerate(found.photos):
        is_dicom = photo.path.suffix.lower() == ".dcm"
        patient = read_patient(dicom_patient(photo.path)) if is_dicom else ""
        if patient:
            found.photos[number] = photo._replace(patient=f"patient {patient}")
            found.patients = "PatientID of DICOM files"


# --- rows become photographs ---------------------------------------------------------------------


def read_grades(found, where, rows, first=None, referable=False):
    """The grade 0..4 of each row, None where it is ungradable; says in `found` what is not plain.

    first: the number that means no DR, None to be asked where it is not clear. referable: 1 means
    grade 2 or more. Raises ValueError where the scale is not clear.
    """
    grades = {row.label: read_grade(row.label) for row in rows}
    if any(re.fullmatch("r[0-3]", fold(label)) for label in grades):
        found.notes.append("R0, R1, R2 and R3 are read as the grades 0, 1, 2 and 4")
    # words have no scale that could be shifted
    numbers = {
        label: grade
        for label, grade in grades.items()
        if grade is not None and not re.search("[a-z]", fold(label))
    }
    used = set(numbers.values())
    if referable:
        if not used <= {0, 1}:
            raise ValueError(f"{where} has grades up to {max(used)}: --referable is for 0, 1")
        found.notes.append("1 is read as grade 2, and 0 as grade 0, though some may have mild DR")
        grades |= {label: 2 * grade for label, grade in numbers.items()}
    elif first is None and used == {0, 1}:
        raise ValueError(
            f"{where} has the grades 0 and 1 only: is 1 referable DR (grade 2 or more), then give "
            "--referable; or is it mild DR of the grades 0 to 4, then give --grades-from 0"
        )
    elif first is None and used and min(used) == 1:
        raise ValueError(
            f"{where} has the grades 1 to {max(used)} and none is 0: is 1 no DR, on a scale "
            "shifted by one, then give --grades-from 1; or is 1 mild DR, nobody healthy, and 5 "
            "ungradable, then give --grades-from 0"
        )
    elif first == 1:
        if 0 in used:
            raise ValueError(f"{where} has grades 0: --grades-from 1 is for a scale from 1 to 5")
        grades |= {label: grade - 1 for label, grade in numbers.items()}
    return [None if grades[row.label] == 5 else grades[row.label] for row in rows]


def add_photos(found, rows, grades, files):
    """Add a Photo for each row whose photograph is among the `files`; count the others.

    Raises ValueError where two rows are of one photograph.
    """
    all_fitting = [files.find(row.image) for row in rows]
    # also where one of the rows says that it is ungradable
    counts = Counter(fitting[0] for fitting in all_fitting if len(fitting) == 1)
    repeated = [f"{path} twice" for path, count in counts.items() if count > 1]
    if repeated:
        raise ValueError(f"{files.source} lists {few(repeated)}: leave one of the two")
    for row, grade, fitting in zip(rows, grades, all_fitting, strict=True):
        image = repr(row.image)
        if len(fitting) == 1:
            found.read.add(fitting[0])
        if grade is None:
            found.left_out[UNGRADABLE].append(f"{image} ({row.label or 'blank'})")
        elif len(fitting) > 1:
            found.left_out["have names that fit several files"].append(image)
        elif not fitting:
            found.left_out[f"are not in {files.source}"].append(image)
        else:
            part, who = PARTS.get(fold(row.part), ""), read_patient(row.patient)
            # The prefixes keep a patient "7" and an image "7" apart.
            patient = f"patient {who}" if who else f"{IMAGE}{part} {row.image}"
            photo = Photo(fitting[0], grade, patient, part, row.image, row.hospital)
            found.photos.append(photo)


def picture_name(photo, sha256):
    """A file name for the prepared picture, which ends in 12 digits of its photograph's SHA-256.

    All but letters, digits, "_" and "-" becomes "_".
    """
    stem, suffix = os.path.splitext(photo.name)
    words = f"{photo.part}_{stem if suffix.lower() in SUFFIXES else photo.name}"
    words = unicodedata.normalize("NFC", words)
    name = re.sub(r"[^\w-]+", "_", words).strip("_").encode()[:MOST_NAME_BYTES]
    return f"{name.decode(errors='ignore')}_{sha256[:12]}"


class Files:
    """The photographs in one folder and below, found by the names that a table gives them.

    A name that is no file may be loose: without extension, in another case, with backslashes, with
    accents that are composed otherwise, or without the folders before it.
    """

    def __init__(self, source):
        self.source = source
        self.photographs = [path for path in walk(source) if path.suffix.lower() in SUFFIXES]
        self.by_loose_name = defaultdict(list)
        for path in self.photographs:
            for name in {loose(path.relative_to(source).as_posix()), loose(path.name)}:
                self.by_loose_name[name].append(path)
                self.by_loose_name[name[: -len(path.suffix)]].append(path)

    def find(self, name):
        """The paths that `name` can mean: none, one, or several where it is loose."""
        path = self.source / name
        if name and "\0" not in name and path.is_file() and path.suffix.lower() in SUFFIXES:
            return [path]
        return self.by_loose_name.get(loose(name), [])


def loose(name):
    """A name without all that loose names may differ in, but with its extension."""
    text = unicodedata.normalize("NFC", name.replace("\\", "/")).casefold()
    return "/".join(part for part in text.split("/") if part not in ("", "."))
