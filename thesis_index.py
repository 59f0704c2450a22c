"""Import the index files of the thesis's repository: pickled pandas DataFrames with the columns of our own index.

A pandas pickle can run any code when it is read, so only files that the user trusts, and only on request:
`python3 prepare.py --index-from worker1.pkl worker2.pkl worker3.pkl val_set.pkl --source FOLDER_OF_THE_PICTURES`.
"""

import os
import shutil
from pathlib import Path

import data
from photos import open_image

COPIES = Path("preprocessed/imported")


def import_indexes(files, source):
    """Read worker1.pkl ..., val_set.pkl and perhaps train_set.pkl; returns (workers, train, val), lists of records.

    source: folder of their pictures, which are copied to COPIES; None if `dir` leads to them within the project.
    Raises ValueError where pandas is missing, or a file or a record is not as expected.
    """
    try:
        import pandas
    except ImportError:
        raise ValueError("--index-from reads pandas DataFrames and needs pandas: pip install pandas") from None
    frames = {}
    for file in map(Path, files):
        try:
            frame = pandas.read_pickle(file)
            frames[file.stem] = list(frame[list(data.COLUMNS)].itertuples(index=False, name=None))
        except Exception as error:  # reading a pickle can raise anything
            columns = ", ".join(data.COLUMNS)
            raise ValueError(f"{file} is no DataFrame with the columns {columns} ({error!r})") from None
    names = [f"worker{k}" for k in range(1, len(frames) + 1) if f"worker{k}" in frames]
    others = sorted(set(frames) - set(names) - {"train_set", "val_set"})
    if not names or names[-1] != f"worker{len(names)}" or "val_set" not in frames or others:
        found = ", ".join(sorted(frames))
        raise ValueError(f"--index-from got {found}; expected worker1, worker2 ..., val_set and perhaps train_set")
    records = {name: [one_record(name, source, *row) for row in rows] for name, rows in frames.items()}
    workers = [records[name] for name in names]
    everything = {record["dir"]: record for worker in workers for record in worker}
    return workers, records.get("train_set") or list(everything.values()), records["val_set"]


def one_record(name, source, picture, label, where, new_label):
    """A row of a DataFrame as a record of our index; its picture is checked, and copied where a source is given."""
    picture, path = str(picture), Path(str(where))
    if str(label) not in ("0", "1", "2", "3", "4") or str(new_label) != str(str(label) == "0"):
        raise ValueError(f"{name} gives {picture} the grade {label} and healthy {new_label}: these do not fit together")
    if source:
        path = COPIES / Path(picture).name
        if not path.exists():
            original = Path(source).expanduser() / picture
            open_image(original)
            COPIES.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(original, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
    elif path.is_absolute() or ".." in path.parts or not path.exists():
        raise ValueError(f"{name} has {where}, which is not in this project: give --source, the folder of the pictures")
    return {"picture": picture, "label": int(label), "dir": path.as_posix(), "new_label": str(new_label)}
