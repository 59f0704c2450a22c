"""The indexes and pictures of the thesis's own repository (Thesis2020, folder DR) become ours.

Its index files are pickled pandas DataFrames: worker1.pkl ..., val_set.pkl (or iid_valid.pkl),
train_set.pkl; and in assign_noniid/ share_data.pkl, the images that every worker gets, with
new_trainset.pkl, the others. A pickle is code: only files that the user trusts, named by
--index-from, are read in here; whatever else reads an index goes by data.read_index.
"""

from pathlib import Path, PureWindowsPath

from data import INDEX_COLUMNS
from preparation.datasets import DataSet, Photo
from preparation.tables import few

# Names of one and the same index in several folders of the thesis.
SAME_INDEX = {"iid_valid": "val_set"}


def load(files, source):
    """Read index files, and find their pictures: a DataSet with `indexes`, the paths of its Photos.

    source: the folder of the pictures, or the one from which `dir` leads to them.
    """
    try:
        import pandas
    except ImportError:
        raise ValueError(
            "--index-from reads pandas DataFrames and needs pandas: pip install pandas"
        ) from None
    found = DataSet()
    photos = {}  # by path: the same image is in several indexes
    for name, file in name_files(files).items():
        found.indexes[name] = []
        for picture, grade, directory, healthy in read_rows(pandas, file):
            check_row(file, picture, grade, healthy)
            path = find_picture(str(picture), str(directory), Path(source))
            photo = photos.setdefault(path, Photo(path, int(grade), str(path), name=path.stem))
            if photo.grade != int(grade):
                raise ValueError(f"{file}: {path} has two grades, {photo.grade} and {grade}")
            found.indexes[name].append(path)
    found.photos = list(photos.values())
    complete_indexes(found)
    return found


def name_files(files):
    """{name of the index: file}. Raises ValueError where the set of names makes no sense."""
    named = {SAME_INDEX.get(file.stem, file.stem): file for file in map(Path, files)}
    others = {"train_set", "val_set", "share_data", "new_trainset"}
    workers = {f"worker{number}" for number in range(1, len(named.keys() - others) + 1)}
    if not workers or named.keys() - others != workers or len(named) < len(files):
        raise ValueError(
            f"--index-from got {', '.join(files)}; expected worker1, worker2 ..., val_set, and "
            "perhaps train_set or share_data and new_trainset, each once"
        )
    return named


def read_rows(pandas, file):
    """The rows of a pickled DataFrame, each (picture, label, dir, new_label)."""
    columns = list(INDEX_COLUMNS)
    try:
        return list(pandas.read_pickle(file)[columns].itertuples(index=False))
    except Exception as error:  # reading a pickle can raise anything
        raise ValueError(
            f"{file} is no DataFrame with the columns {', '.join(columns)} ({error!r})"
        ) from None


def check_row(file, picture, grade, healthy):
    """Raise ValueError if a row is none of a graded image."""
    is_grade = str(grade) in ("0", "1", "2", "3", "4")
    if not is_grade or str(healthy) != str(str(grade) == "0"):
        raise ValueError(
            f"{file}: the grade {grade} of {picture} and healthy {healthy} do not fit together"
        )


def find_picture(picture, directory, source):
    """The path of a picture. Raises ValueError where it is missing.

    `directory` is like preprocessed/train/x.jpg, from the thesis's folder DR. A user may give that
    folder, preprocessed/, or preprocessed/train/.
    """
    # Read as a Windows path, both kinds of slashes part the folders.
    parts = [part for part in PureWindowsPath(directory).parts if part not in ("/", "\\", "..")]
    candidates = [source.joinpath(*parts[start:]) for start in range(len(parts))]
    for path in [*candidates, source / picture]:
        if path.is_file():
            return path
    raise ValueError(f"{directory} is not in {source}: --source must be the folder of the pictures")


def complete_indexes(found):
    """Deal share_data to every worker, make a train_set if there is none; say what is odd."""
    shared = found.indexes.pop("share_data", [])
    dealt = found.indexes.pop("new_trainset", [])
    for name, paths in found.indexes.items():
        if name.startswith("worker"):
            found.indexes[name] = list(dict.fromkeys(paths + shared))
            dealt = found.indexes[name] + dealt
    found.indexes.setdefault("train_set", list(dict.fromkeys(dealt)))
    if shared:
        found.notes.append(f"share_data: every worker gets its {len(shared)} images")
    if "val_set" not in found.indexes:
        found.notes.append(
            "no val_set.pkl (iid_valid.pkl) was given: there will be none, and a server needs one "
            "to score by"
        )
    trained_on = {each for name, own in found.indexes.items() if name != "val_set" for each in own}
    both = [path.name for path in found.indexes.get("val_set", []) if path in trained_on]
    if both:
        found.notes.append(
            f"{len(both)} images of val_set are trained on, too: {few(both)}; scores will be "
            "better than they are of new ones"
        )
