"""datasets: published archives, and the folders that hospitals have, become photographs."""

from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from PIL import Image

from preparation import datasets
from preparation.datasets import COLUMN_NAMES, load


def photograph(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "grey").save(path)


def flags(**given):
    asked = {f"{role}_column": "" for role in COLUMN_NAMES} | {"hospital_column": "none"}
    return SimpleNamespace(**asked | dict(labels="", referable=False, grades_from=None) | given)


def folder_of(folder, text, *names):
    for name in names or ("a.jpg", "b.jpg", "c.jpg"):
        photograph(folder / name)
    (folder / "labels.csv").write_text(text)
    return folder


def grades_of(found):
    return {photo.name: photo.grade for photo in found.photos}


# --- published ------------------------------------------------------------------------------------

IDRID = "B. Disease Grading/"
LABELS = f"{IDRID}2. Groundtruths/%s. IDRiD_Disease Grading_%s Labels.csv"
PARTS = ("train", "valid", "test")
TREES = {  # tables with their text, photographs; parts and grades that must come of it
    "idrid": (
        {
            LABELS % part: "Image name,Retinopathy grade,Risk ,,\r\nIDRiD_001,3,1,,\r\n"
            for part in (("a", "Training"), ("b", "Testing"))
        },
        [
            f"{IDRID}1. Original Images/{part} Set/IDRiD_001.jpg"
            for part in ("a. Training", "b. Testing")
        ],
        [("train", 3), ("val", 3)],
    ),
    "ddr": (
        {f"{part}.txt": f"{part}-1.jpg 2\n{part}-2.jpg 5\n" for part in PARTS},
        [f"{part}/{part}-{number}.jpg" for part in PARTS for number in (1, 2)],
        [("train", 2), ("val", 2), ("test", 2)],
    ),
    "eyepacs": (
        {"trainLabels.csv": "image,level\n10_left,0\n10_right,4\n13_left,1\n15_left,1\n"},
        ["train/10_left.jpeg", "train/10_right.jpeg", "train/13_left.jpeg"],
        [("", 0), ("", 4), ("", 1)],
    ),
    "aptos": ({"train.csv": "id_code,diagnosis\nabc,2\n"}, ["train_images/abc.png"], [("", 2)]),
}


@pytest.mark.parametrize("name", TREES)
def test_a_published_set_is_read_as_it_is_unpacked(tmp_path, name):
    tables, names, expected = TREES[name]
    for each in names:
        photograph(tmp_path / each)
    for each, text in tables.items():
        (tmp_path / each).parent.mkdir(exist_ok=True)
        (tmp_path / each).write_text(text)
    found = load(name, tmp_path, None)
    assert [(photo.part, photo.grade) for photo in found.photos] == expected
    patients = len({photo.patient for photo in found.photos})
    if name == "eyepacs":  # both eyes are of one; 15_left is not there
        assert patients == 2 and found.patients
        assert list(found.left_out.values()) == [["'15_left'"]]
    else:  # IDRiD's parts use the same names for different eyes
        assert patients == len(expected) and not found.patients and not found.left_out
    if name == "ddr":
        assert "3 ungradable images are left out" in found.notes
    if name == "idrid":
        assert load(name, tmp_path / IDRID, None).photos == found.photos


# --- a table of any name --------------------------------------------------------------------------


def test_a_column_without_a_known_name_is_found_by_what_it_holds_and_that_is_said(tmp_path):
    text = "what,who,how bad\na.jpg,x,0\nb.jpg,y,2\nc.jpg,z,4\n"
    found = load("folder", folder_of(tmp_path, text), flags())
    assert grades_of(found) == {"a.jpg": 0, "b.jpg": 2, "c.jpg": 4}
    assert "labels.csv, label: column 'how bad', 3 of 3 cells are grades" in found.notes


@pytest.mark.parametrize("text, words", [
    ("file,how bad,edema\na,0,1\nb,2,0\nc,3,2\n", "2 columns.*'how bad', 'edema'.*--label-column"),
    ("file,edema\na,0\nb,2\nc,1\n", "no column that can be the label.*'edema'.*--label-column"),
    ("file,grade,level\na,0,1\nb,2,0\nc,3,2\n", "2 columns.*'grade', 'level'.*--label-column"),
    ("file,age\na,40\nb,50\nc,60\n", "no column that can be the label.*--label-column"),
    ("a.jpg,0\nb.jpg,2\nc.jpg,3\n", "the first line looks like a photograph's"),
    ("image,label\na,0\n,2\nc,3\n", "line 3: 'image' is ''"),
    ("image,label,Site\na,0,Lund\nb,1,\nc,2,Lund\n", "line 3: 'Site' is ''"),
    ("image,label,Site\na,0,Lund\nb,1,lund\nc,2,B\n", "has 'Lund' and 'lund', .* one spelling"),
    ("image,label,Site\na,0,St. X\nb,1,St.  X\n", "has 'St. X' and 'St.  X', .* one spelling"),
    ("image,label\na,0\nb,7\nc,x\n", "line 3: 'label' is '7'"),
    ("image,label,part\na,0,train\nb,2,left\nc,3,val\n", "line 3: .*'left'.*--part-column"),
    ("image,label,Set\na,0,train\nb,2,1\n", "line 3: 'Set' is '1', expected train, val or test"),
    ("image,label\na,0\nb,1\nc,1\n", "0 and 1 only.*--referable.*--grades-from 0"),
    ("image,label\na,0\na.jpg,2\n", "a.jpg twice"),
    ("image,label\na,0\na.jpg,\nb,2\n", "a.jpg twice"),
    ("image,label,Site\na,0,#N/A\nb,1,Lund\n", "line 2: 'Site' is '#N/A'"),
    ("image,label,MRN\na,0,1.23457E+11\nb,1,2\n", "line 2: 'MRN' is .*rounded"),
    ("image,label,MRN\na,0,2\nb,1,1E+11\n", "line 3: 'MRN' is .*rounded"),
    ("image,label,MRN\na,0,2\nb,1,1.2e+16\n", "line 3: 'MRN' is .*rounded"),
])  # fmt: skip
def test_what_cannot_be_told_is_asked(tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        load("folder", folder_of(tmp_path, text), flags(hospital_column=""))


@pytest.mark.parametrize("given, grades", [
    (dict(label_column="edema"), [1, 0, 2]),
    (dict(label_column="shifted", grades_from=1), [0, 4, 2]),
    (dict(label_column="shifted", grades_from=0), [1, 3]),  # 5 is ungradable
    (dict(label_column="binary", referable=True), [0, 2, 2]),
    (dict(label_column="binary", grades_from=0), [0, 1, 1]),
])  # fmt: skip
def test_a_flag_answers(tmp_path, given, grades):
    text = "file,bad,edema,shifted,binary\na,0,1,1,0\nb,2,0,5,1\nc,3,2,3,1\n"
    found = load("folder", folder_of(tmp_path, text), flags(**given))
    assert [photo.grade for photo in found.photos] == grades
    assert len(found.left_out.get("are ungradable", [])) == 3 - len(grades)


@pytest.mark.parametrize("given", [dict(referable=True), dict(grades_from=1)])
def test_a_flag_that_does_not_fit_the_grades_is_refused(tmp_path, given):
    folder_of(tmp_path, "image,label\na,0\nb,2\nc,3\n")
    with pytest.raises(ValueError, match="has grades"):
        load("folder", tmp_path, flags(**given))


def test_of_several_tables_it_asks_which(tmp_path):
    folder_of(tmp_path, "image,label\na,0\nb,2\n")
    (tmp_path / "old.tsv").write_text("image\tlabel\na\t3\nb\t4\n")
    with pytest.raises(ValueError, match="2 tables, 'labels.csv', 'old.tsv'.*--labels"):
        load("folder", tmp_path, flags())
    found = load("folder", tmp_path, flags(labels="old.tsv"))
    assert grades_of(found) == {"a": 3, "b": 4}
    assert "not read: 1 .jpg, 1 .csv" in found.notes


def test_a_patient_is_the_same_however_it_is_written(tmp_path):
    for one, other in (("Lee,  Ann", "lee, ann"), ("17", "17.0")):
        folder_of(tmp_path, f'image,label,MRN\na,0,"{one}"\nb,2,"{other}"\nc,3,unknown\n')
        found = load("folder", tmp_path, flags())
        assert len({photo.patient for photo in found.photos}) == 2
    assert "1 images are of an unknown patient" in found.patients_sentence
    assert load("folder", tmp_path, flags(patient_column="none")).patients == ""


@pytest.mark.parametrize("nobody", ["#N/A", "Anonymous^", "--", "."])
def test_who_is_not_known_is_nobody_else(tmp_path, nobody):
    folder_of(tmp_path, f"image,label,MRN\na,0,1\nb,2,{nobody}\nc,3,{nobody}\n")
    found = load("folder", tmp_path, flags())
    assert "2 images are of an unknown patient" in found.patients_sentence
    folder_of(tmp_path, f"image,label,MRN\na,0,{nobody}\nb,2,{nobody}\n")
    assert "nothing tells them" in load("folder", tmp_path, flags()).patients_sentence


def test_names_are_found_where_only_one_file_fits(tmp_path):
    names = ("Set A/eye2.png", "Set B/eye2.png", "Set B/é.webp")
    rows = "eye2,0\ne\u0301,2\nSet B/eye2.png,3\nabsent,4\n"
    found = load("folder", folder_of(tmp_path, f"image,label\n{rows}", *names), flags())
    assert sorted(photo.grade for photo in found.photos) == [2, 3]
    assert list(found.left_out.values()) == [["'eye2'"], ["'absent'"]]


def test_photographs_of_a_kind_that_is_not_read_are_named(tmp_path):
    (tmp_path / "a.jfif").touch()
    (tmp_path / "labels.csv").write_text("image,label\na.jfif,0\n")
    with pytest.raises(ValueError, match="1 are not in .*; not read: 1 .jfif"):
        load("folder", tmp_path, flags())


def test_a_long_picture_name_is_cut_between_letters():
    name = datasets.picture_name(datasets.Photo(None, 0, "", name="ä" * 300), "0123456789abcdef")
    assert len(name.encode()) < 200 and name.endswith("ä_0123456789ab")


# --- folders of grades, DICOM ---------------------------------------------------------------------


@pytest.mark.parametrize("names", [
    ("0 - no DR", "Mild", "2", "severe", "PDR"),
    ("R0", "R1", "R2", "severe", "R3"),
])  # fmt: skip
def test_a_folder_for_each_grade(tmp_path, names):
    for grade, name in enumerate(names):
        for part in ("train", "test"):
            photograph(tmp_path / part / name / f"{grade}.jpg")
    found = load("folder", tmp_path, flags())
    assert [photo.part for photo in found.photos] == ["test"] * 5 + ["train"] * 5
    for photo in found.photos:
        assert photo.path.name == f"{photo.grade}.jpg"
    british = "R0, R1, R2 and R3 are read as the grades 0, 1, 2 and 4"
    assert (british in found.notes) == ("R0" in names)
    with pytest.raises(ValueError, match="no table, of which --label-column"):
        load("folder", tmp_path, flags(label_column="grade"))
    (tmp_path / "export.csv").write_text("something else")
    assert load("folder", tmp_path, flags(labels="none")).photos == found.photos


def test_a_link_to_a_folder_is_followed_but_not_in_a_circle(tmp_path):
    photograph(tmp_path / "source" / "0" / "x.jpg")
    photograph(tmp_path / "elsewhere" / "y.jpg")
    (tmp_path / "source" / "2").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "source" / "0" / "up").symlink_to(tmp_path / "source")
    found = load("folder", tmp_path / "source", flags())
    assert grades_of(found) == {"0/x.jpg": 0, "2/y.jpg": 2}


@pytest.mark.parametrize("names", [["0", "2", "DR"], ["0/1", "2"], []])
def test_a_folder_that_is_no_grade_is_refused(tmp_path, names):
    for name in names:
        photograph(tmp_path / name / "x.jpg")
    with pytest.raises(ValueError, match="folders without the name of one grade"):
        load("folder", tmp_path, flags())


def save_dicom(path, patient, image=None):
    made = pydicom.Dataset()
    made.file_meta = pydicom.dataset.FileMetaDataset()
    made.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    made.SOPClassUID = made.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.5.1"
    made.SOPInstanceUID = made.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    made.PatientID = patient
    made.set_pixel_data(np.asarray(image or Image.new("RGB", (8, 8), "red")), "RGB", 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save_as(path, enforce_file_format=True)
    return path


def test_dicom_tells_the_patient(tmp_path):
    for number, grade in enumerate("023"):  # the two eyes of P0, one of P1
        save_dicom(tmp_path / grade / "x.dcm", f"P{number // 2}")
    photograph(tmp_path / "4" / "y.jpg")
    found = load("folder", tmp_path, flags())
    one, other, second, unknown = (photo.patient for photo in found.photos)
    assert one == other and len({one, second, unknown}) == 3
    assert "by PatientID of DICOM files; 1 images are of an unknown" in found.patients_sentence
    assert load("folder", tmp_path, flags(patient_column="none")).patients == ""
