"""Prepare a data set: pictures as the network sees them, and an index for each hospital.

    python3 prepare.py                                        # draw 450 + 300 images
    python3 prepare.py --dataset idrid --source ~/data/IDRiD  # photographs, an unpacked archive
    python3 prepare.py --dataset folder --source DIR --num-clients 1 --val-part 0   # a hospital's
    python3 prepare.py --split noniid --share 100             # unequal hospitals, 100 images common
    python3 prepare.py --check                                # exit 0 if index/ is of these choices

The pictures go to preprocessed/, the indexes to index/. Started again with the same choices, it
goes on with the pictures that are missing. index/prepared.json says what the index was made from.
It is removed first and written last: an index without it is not complete. Nothing is removed that
prepare.py did not write: it is moved to a folder old-1, old-2 ...
"""

import argparse
import datetime
import hashlib
import json
import os
import re
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from common.log import fail
from common.script import at_least, end_script, exit_on_signals, pixels, start_script

if __name__ == "__main__":
    start_script()  # before the packages, so that a missing one is a sentence

import numpy as np
from PIL import Image

import data
from common.files import alone_in, sha256_of
from preparation import datasets, field, overview, photos, pictures, splits, synthetic, thesis
from preparation.tables import few
from preparation.written import WrittenFiles

INDEX = Path("index")
PREPARED = INDEX / "prepared.json"
SPLIT_FIGURE = INDEX / "split.png"
PREPROCESSED = Path("preprocessed")
# --check found that index/ was made from other choices, or is not complete.
EXIT_NOT_MADE = 10
# What a flag is where it is not given. Which ones were given must be known: one that would have no
# effect is refused.
DEFAULTS = {
    "dataset": "synthetic",
    "source": None,
    "image_size": 128,
    "seed": 0,
    "num_train": 450,
    "num_val": 300,
    "num_clients": 3,
    "split": None,  # "hospitals" if they are drawn, else "iid"
    "alpha": 0.5,
    "share": 0,
    "balanced": False,
    "val_part": None,
    "preprocessing": "graham",
    "image_column": "image",
    "label_column": "label",
    "patient_column": "",
    "skip_broken": False,
    "index_from": None,
    "keep_channels": False,
    "check": False,
}
OF_FOLDER = ("image_column", "label_column", "patient_column")
OF_DRAWING = ("num_train", "num_val")
# The imported indexes and pictures have all of this already.
NOT_OF_IMPORT = (
    *("dataset", "image_size", "seed", "num_clients", "split", "alpha", "share", "balanced"),
    *("val_part", "preprocessing", *OF_FOLDER, *OF_DRAWING),
)


def main(argv=None):
    args = parse(argv)
    try:
        choices = choices_of(args)
        if args.check:
            return check(args, choices)
        with alone_in(INDEX):
            prepare(args, choices)
    except (ValueError, OSError, BrokenProcessPool) as error:
        return fail("prepare.py", error)
    return 0


def prepare(args, choices):
    """Find the photographs, make the pictures, choose who gets which, write the indexes."""
    found, indexes = find_photos(args)
    folder = PREPROCESSED / choices["dataset"]
    refuse_own_pictures(found.photos, folder)
    tell(found)
    usable, left_out = without_missing(found, args)
    choose_indexes(usable, indexes, args)  # if that cannot be, it is better said before the work
    index = WrittenFiles(INDEX)
    index.clear(PREPARED)
    listed = WrittenFiles(folder)
    problems, doubts = pictures.make_pictures(usable, choices, listed)
    readable = without_broken(usable, problems, args.skip_broken)
    sets = choose_indexes(readable, indexes, args)
    patients = opaque_patients(readable, args.seed) if found.patients else {}
    records = {name: records_of(chosen, folder, patients) for name, chosen in sets.items()}
    prepared = {
        **choices,
        "num_clients": len(workers_of(sets)),
        "patients": found.patients,
        "labels": digest_of(found.photos),
        "skipped": sorted([*left_out, *problems]),
        "ungradable": len(found.ungradable),
        "indexes": {name: counts_of(own) for name, own in records.items()},
        "date": datetime.date.today().isoformat(),
        "worker_hospitals": worker_hospitals(sets),
    }
    write_indexes(index, records, prepared)
    show(index, listed, records, prepared)
    show_doubtful(listed, readable, doubts)
    index.tell_moved()
    listed.tell_moved()


# --- the choices ---------------------------------------------------------------------------------


def part(text):
    """An argparse type: a part of a whole, 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def parse(argv):
    parser = argparse.ArgumentParser(
        description="Prepare a data set: pictures in preprocessed/, indexes in index/.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--dataset", choices=("synthetic", *datasets.LOADERS), help="drawn, or photographs")
    add("--source", metavar="DIR", help="folder of the unpacked data set")
    add("--image-size", type=pixels, metavar="PIXELS", help="a side of a picture (128)")
    add("--seed", type=at_least(0), metavar="N", help="of drawing and splitting (0)")
    add("--num-train", type=at_least(10), metavar="N", help="drawn images to train on (450)")
    add("--num-val", type=at_least(10), metavar="N", help="drawn images to validate on (300)")
    add(
        "--num-clients",
        type=at_least(1),
        metavar="N",
        help="number of indexes worker1.pkl, worker2.pkl ... (3)",
    )
    add(
        "--split",
        choices=("hospitals", "iid", "noniid", "dirichlet"),
        help="synthetic: three hospitals that differ in patients and cameras (default there); "
        "equal hospitals (default for photographs), the thesis's unequal ones, or by --alpha",
    )
    add(
        "--alpha",
        type=float,
        metavar="A",
        help="of --split dirichlet: the smaller, the more unequal (0.5)",
    )
    add("--share", type=at_least(0), metavar="N", help="training images that every client gets (0)")
    add(
        "--val-part",
        type=part,
        metavar="PART",
        help="part of the photographs to validate on, 0 to 1 (as the data set says, or 0.2); "
        "0: a hospital trains on all it has, 1: all are for the server to score by",
    )
    add(
        "--preprocessing",
        choices=photos.PREPROCESSINGS,
        help="of photographs: less their local average, as the thesis did (graham, the "
        "default), or in their colours, which is better for lite0 (colour)",
    )
    add(
        "--balanced",
        action="store_true",
        help="ddr: the thesis's draw of 10,000 to train on, 2,522 to validate",
    )
    for name in OF_FOLDER:
        what = name.partition("_")[0]
        default = "found by its name; none: there is none" if what == "patient" else what
        add(
            f"--{what}-column",
            metavar="NAME",
            help=f"folder: the column of labels.csv ({default})",
        )
    add(
        "--skip-broken",
        action="store_true",
        help="leave missing, ungradable and unreadable images out instead of stopping",
    )
    add(
        "--index-from",
        nargs="+",
        metavar="FILE",
        help="worker1.pkl ... val_set.pkl of the thesis, their pictures in --source; pandas "
        "pickles are code: only files that you trust",
    )
    add(
        "--keep-channels",
        action="store_true",
        help="--index-from: leave red and blue as they are; the thesis stored them exchanged",
    )
    add(
        "--check",
        action="store_true",
        help=f"only say whether index/ was made from these choices (exit 0 or {EXIT_NOT_MADE})",
    )
    given = vars(parser.parse_args(argv))
    args = argparse.Namespace(**{**DEFAULTS, **given})
    if args.split is None:
        args.split = "hospitals" if args.dataset == "synthetic" else "iid"
    refuse_without_effect(parser, args, given)
    check_usage(parser, args)
    return args


def refuse_without_effect(parser, args, given):
    """End with a usage error where a flag was given that would change nothing."""
    if args.index_from:
        beside, useless = "--index-from, whose files have it", NOT_OF_IMPORT
    elif args.dataset == "synthetic":
        beside, useless = (
            "--dataset synthetic",
            (
                *("source", "val_part", "preprocessing"),
                *OF_FOLDER,
            ),
        )
    elif args.dataset == "folder":
        beside, useless = "--dataset folder", OF_DRAWING
    else:
        beside, useless = f"--dataset {args.dataset}", (*OF_DRAWING, *OF_FOLDER)
    if not args.index_from:
        useless = (*useless, "keep_channels")
    flags = [f"--{name.replace('_', '-')}" for name in useless if name in given]
    if flags:
        parser.error(f"{' and '.join(flags)} would have no effect beside {beside}")


def check_usage(parser, args):
    """End with a usage error where flags do not fit together."""
    without_source = ("synthetic", "retinamnist")
    if not args.source and not args.index_from and args.dataset not in without_source:
        parser.error(
            f"--dataset {args.dataset} needs --source, the folder of the unpacked data set"
        )
    if args.source and not args.index_from and is_within(args.source, PREPROCESSED):
        parser.error(
            f"--source {args.source} lies in preprocessed/, where prepared pictures are written: "
            "move the photographs to a folder elsewhere"
        )
    for file in args.index_from or []:
        if Path(file).resolve().parent == INDEX.resolve():
            parser.error(
                "--index-from must lie outside index/, where the new indexes are written: move the "
                "old ones first"
            )
    if args.balanced and args.dataset != "ddr":
        parser.error(f"--balanced is the thesis's draw from ddr, not from {args.dataset}")
    if args.balanced and args.val_part is not None:
        parser.error("--balanced says itself what validates: leave --val-part out")
    if args.split == "hospitals" and args.dataset != "synthetic":
        parser.error(
            f"--split hospitals is of the drawn hospitals, not of {args.dataset}: use iid, noniid "
            "or dirichlet"
        )
    if args.split == "noniid" and args.num_clients != 3:
        parser.error(
            f"--split noniid is for 3 clients, found {args.num_clients}: use --split dirichlet"
        )
    if not 0 < args.alpha < float("inf"):
        parser.error(f"--alpha must be above 0, found {args.alpha}")


def is_within(path, folder):
    return Path(path).expanduser().resolve().is_relative_to(folder.resolve())


def choices_of(args):
    """All that decides the result, as a dict: prepared.json keeps it, --check compares with it."""
    choices = {name: value for name, value in vars(args).items() if name in DEFAULTS}
    for name in ("check", "skip_broken", "keep_channels"):
        del choices[name]
    choices["source"] = str(Path(args.source).expanduser().resolve()) if args.source else None
    if args.split != "dirichlet":
        choices["alpha"] = None
    if args.val_part == 1:
        choices["num_clients"] = 0
    drawn = args.dataset == "synthetic"
    if drawn:
        choices["preprocessing"] = "drawn"
    choices["channels"] = None
    if args.index_from:
        for name in NOT_OF_IMPORT:
            del choices[name]
        choices["dataset"] = choices["preprocessing"] = "imported"
        choices["index_from"] = [str(Path(file).resolve()) for file in args.index_from]
        choices["channels"] = "kept" if args.keep_channels else "exchanged"
        choices["image_size"] = None  # the pictures have one
    # With other code the pictures are other pictures, too.
    modules = (synthetic,) if choices["preprocessing"] == "drawn" else (photos, field)
    choices["code"] = "".join(sha256_of(module.__file__)[:8] for module in modules)
    return choices


# --- is index/ made from it? ---------------------------------------------------------------------


def check(args, choices):
    """The exit code: 0 where index/ was made from the choices and is whole; else 10, and a line."""
    try:
        problem = first_problem(args, choices)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"it is not complete ({error})"
    if not problem:
        return 0
    print(f"index/ has to be made anew: {problem}")
    return EXIT_NOT_MADE


def first_problem(args, choices):
    """Why index/ has to be made anew, or ""; raises nearly anything where prepared.json is bad."""
    prepared = json.loads(PREPARED.read_text(encoding="utf-8"))
    for name, value in choices.items():
        # The size of imported pictures is not chosen, but found.
        if prepared.get(name) != value and not (name == "image_size" and value is None):
            return f"it was made with {name} {prepared.get(name)}, not {value}"
    if not args.skip_broken:
        if prepared["skipped"]:
            return f"{len(prepared['skipped'])} unreadable images were left out"
        if prepared["ungradable"]:
            return f"{prepared['ungradable']} ungradable images were left out"
    for name in prepared["indexes"]:
        for record in data.read_index(INDEX / f"{name}.pkl"):
            if not os.path.exists(record["dir"]):
                return f"{record['dir']} is missing"
    if choices["preprocessing"] == "drawn" or not args.source and not args.index_from:
        return ""  # there is nothing outside this folder that could change
    if args.source and not os.path.exists(choices["source"]):
        return (
            ""  # the photographs are away, as on a disk that is not mounted; the pictures are here
        )
    return changed_since(args, choices, prepared)


def changed_since(args, choices, prepared):
    """What has changed in --source since index/ was made, or ""."""
    found, _ = find_photos(args)
    if prepared["labels"] != digest_of(found.photos):
        return "the labels have changed"
    listed = WrittenFiles(PREPROCESSED / choices["dataset"], read_only=True)
    skipped = set(prepared["skipped"])
    for number, photo in enumerate(photo for photo in found.photos if photo.name not in skipped):
        entry = listed.entry(listed.folder / f"{photo.name}.png")
        if not entry or entry.get("made_from") != pictures.stamp(photo, number, choices):
            return f"{photo.path} has changed"
    return ""


def digest_of(found):
    """SHA-256 of names, grades, patients and parts of a list of Photo."""
    rows = sorted((photo.name, photo.grade, photo.patient, photo.part) for photo in found)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


# --- what there is -------------------------------------------------------------------------------


def find_photos(args):
    """(DataSet, imported indexes): what is to be drawn, or what there is; of the latter {} else."""
    if args.index_from:
        found, indexes = thesis.load(args.index_from, args.source)
        if args.keep_channels:
            found.notes.append("red and blue stay as they are in the files (--keep-channels)")
        else:
            found.notes.append(
                "red and blue are put right: the thesis stored them exchanged (--keep-channels if "
                "these pictures are right)"
            )
        return found, indexes
    if args.dataset == "synthetic":
        return photos_to_draw(args), {}
    columns = datasets.Columns(args.image_column, args.label_column, args.patient_column)
    found = datasets.load(args.dataset, args.source, args.image_size, columns)
    if not args.balanced:
        # The thesis's draw is from all parts. Else the published test part is for a final test.
        kept = [photo for photo in found.photos if photo.part != "test"]
        if len(kept) < len(found.photos):
            found.notes.append(
                f"{len(found.photos) - len(kept)} images of the published test part are left "
                "alone, to test with at the end"
            )
        found.photos = kept
    if args.val_part is not None and any(photo.part for photo in found.photos):
        found.notes.append("--val-part decides: the parts that the data set itself tells do not")
    return found, {}


def photos_to_draw(args):
    """A DataSet of Photos without a path: to train and to validate on, from every hospital.

    The grades are in the proportions of their hospital.
    """
    if args.split == "hospitals":
        hospitals = [(hospital.name, hospital.grade_shares) for hospital in synthetic.HOSPITALS]
    else:
        hospitals = [("", synthetic.GRADE_SHARES)]
    rng = np.random.default_rng([args.seed, 0])
    found = []
    for part, total in (("train", args.num_train), ("val", args.num_val)):
        number = 0
        for position, (name, grade_shares) in enumerate(hospitals):
            # The rest of a total that cannot be divided goes to the first hospitals.
            count = len(range(position, total, len(hospitals)))
            ends = np.round(np.cumsum(grade_shares) * count)
            sorted_grades = np.searchsorted(ends, np.arange(count), side="right")
            for grade in rng.permutation(sorted_grades).tolist():
                patient = f"{part} {number}"
                picture = f"{part}_{number:05d}"
                found.append(datasets.Photo(None, grade, patient, part, picture, name))
                number += 1
    return datasets.DataSet(found, "drawing", "each drawn image is of a patient of its own")


def refuse_own_pictures(found, folder):
    """Raise ValueError if a photograph lies where prepare.py writes its pictures."""
    own = [photo.path for photo in found if photo.path and is_within(photo.path, folder)]
    if own:
        raise ValueError(
            f"{own[0]} lies in {folder}, where prepared pictures are written: move the photographs "
            "to a folder elsewhere"
        )


def tell(found):
    """Say what was found before the work begins."""
    num_patients = len({photo.patient for photo in found.photos})
    count = f"{len(found.photos):,} images"
    if found.patients:
        count += f" of {num_patients:,} patients"
    print(f"patients: {found.patients_sentence}; {count}", flush=True)
    for note in found.notes:
        print(note, flush=True)


def without_missing(found, args):
    """(photos with a file, names of the others).

    Raises ValueError if some are missing or ungradable and may not be left out.
    """
    total = len(found.photos) + len(found.ungradable)
    sentences = []
    if found.ungradable:
        some = few([f"{image!r} ({cell or 'blank'})" for image, cell in found.ungradable])
        sentences.append(f"{len(found.ungradable):,} of {total:,} images are ungradable: {some}")
    if found.missing:
        some = few([repr(name) for name in found.missing])
        sentences.append(
            f"{len(found.missing):,} of {total:,} images are not in {args.source}: {some}"
        )
    if found.ambiguous:
        some = few([repr(name) for name in found.ambiguous])
        sentences.append(f"{len(found.ambiguous):,} names fit several files each: {some}")
    for sentence in sentences:
        if args.skip_broken:
            print(f"left out: {sentence}", flush=True)
        else:
            fail("prepare.py", sentence)
    if sentences and not args.skip_broken:
        raise ValueError("nothing was made: mend that, or leave these out with --skip-broken")
    there = [photo for photo in found.photos if photo.path is None or photo.path.is_file()]
    if not there:
        raise ValueError(
            f"none of the {total:,} images is in {args.source}: is it the right folder?"
        )
    names = {photo.name for photo in there}
    return there, [photo.name for photo in found.photos if photo.name not in names]


def without_broken(found, problems, skip_broken):
    """The photos of `found` that have no problem; ValueError if others may not be skipped."""
    for name, sentence in problems.items():
        print(f"unreadable: {name}: {sentence}", file=sys.stderr)
    if problems and not skip_broken:
        raise ValueError(
            f"{len(problems)} of {len(found)} images cannot be used: mend them, or give "
            "--skip-broken"
        )
    return [photo for photo in found if photo.name not in problems]


# --- who gets which ------------------------------------------------------------------------------


def choose_indexes(found, indexes, args):
    """{name of an index: [Photo]}: worker1, worker2 ..., train_set, val_set.

    indexes: imported ones, as thesis.load gives them. Raises ValueError if one would be empty.
    """
    if indexes:
        named = {photo.name: photo for photo in found}
        sets = {
            name: [named[each] for each in names if each in named]
            for name, names in indexes.items()
        }
    else:
        # Random numbers of their own: the same photos validate, however the others are dealt.
        rng_val = np.random.default_rng([args.seed, 1])
        rng_split = np.random.default_rng([args.seed, 2])
        train, val = splits.choose_validation(found, args.balanced, rng_val, args.val_part)
        sets = {}
        if train:
            workers = splits.split(
                train, args.split, args.num_clients, rng_split, args.alpha, args.share
            )
            sets = {f"worker{number}": chosen for number, chosen in enumerate(workers, start=1)}
            sets["train_set"] = train
        if val:
            sets["val_set"] = val
    if not all(sets.values()):
        empty = " and ".join(name for name in sets if not sets[name])
        raise ValueError(f"{empty} would be without images")
    return sets


def workers_of(sets):
    """The names of the workers' indexes among `sets`."""
    return [name for name in sets if name.startswith("worker")]


def worker_hospitals(sets):
    """{"worker1": "screening centre", ...} where hospitals were drawn, else {}."""
    names = {}
    for worker in workers_of(sets):
        hospitals = sorted({photo.hospital for photo in sets[worker]} - {""})
        if hospitals:
            names[worker] = " and ".join(hospitals)
    return names


def opaque_patients(found, seed):
    """{patient: "p0017"}: numbers in random order, which tell nothing of the patient."""
    patients = sorted({photo.patient for photo in found})
    numbers = np.random.default_rng([seed, 3]).permutation(len(patients)) + 1
    return {patient: f"p{number:04d}" for patient, number in zip(patients, numbers, strict=True)}


def records_of(chosen, folder, patients):
    """Photos as the records of an index, ordered by name."""
    records = []
    for photo in sorted(chosen, key=lambda photo: photo.name):
        record = {
            "picture": f"{photo.name}.png",
            "label": photo.grade,
            "new_label": str(photo.grade == 0),
            "dir": (folder / f"{photo.name}.png").as_posix(),
        }
        if patients:
            record["patient"] = patients[photo.patient]
        records.append(record)
    return records


def counts_of(records):
    """How many images and patients an index has; patients None where nobody knows."""
    known = data.knows_patients(records)
    return {
        "images": len(records),
        "patients": len(set(data.patients(records))) if known else None,
    }


# --- what is written -----------------------------------------------------------------------------


def write_indexes(index, records, prepared):
    """The indexes; then prepared.json, which declares them complete. index: WrittenFiles."""
    # First all old ones go: a crash must not leave an old index beside new ones.
    old = [path for path in INDEX.glob("worker*.pkl") if re.fullmatch(r"worker\d+", path.stem)]
    for path in (*sorted(old), INDEX / "train_set.pkl", INDEX / "val_set.pkl", SPLIT_FIGURE):
        index.clear(path)
    for name, own in records.items():
        with index.publishing(INDEX / f"{name}.pkl") as written:
            data.write_index(written, own)
    # Imported pictures have a size of their own.
    with Image.open(next(iter(records.values()))[0]["dir"]) as picture:
        prepared["image_size"] = picture.width
    with index.publishing(PREPARED) as written:
        written.write_text(json.dumps(prepared, indent=1) + "\n", encoding="utf-8")


def show(index, listed, records, prepared):
    """A table, and two pictures that show what was prepared."""
    print(overview.format_table(records))
    hospitals = prepared["worker_hospitals"]
    for worker, names in hospitals.items():
        print(f"{worker}: {names}")
    dataset = f"data set {prepared['dataset']}"
    pictured = records.get("train_set", []) + records.get("val_set", [])
    sheet = listed.folder / "contact_sheet.png"
    with listed.publishing(sheet) as written:
        title = f"Prepared pictures: {dataset}, preprocessing {prepared['preprocessing']}"
        overview.save_contact_sheet(written, pictured, title)
    workers = {
        f"{name} ({hospitals[name]})" if name in hospitals else name: records[name]
        for name in workers_of(records)
    }
    drawn = False
    if workers:
        with index.publishing(SPLIT_FIGURE) as written:
            title = f"Who trains on what: {dataset}"
            if "split" in prepared:  # an import is split already
                title += f", split {prepared['split']}"
            drawn = overview.save_split_figure(written, workers, title)
    if drawn:
        print(f"look at {sheet} and {SPLIT_FIGURE}")
    elif workers:
        print(f"look at {sheet}; {SPLIT_FIGURE} needs matplotlib and was not drawn")
    else:
        print(f"look at {sheet}")


def show_doubtful(listed, readable, doubts):
    """List the photographs whose field of view is implausible, with a sheet of them."""
    if not doubts:
        return
    doubtful = [
        (photo.path, listed.folder / f"{photo.name}.png", doubts[photo.name])
        for photo in readable
        if photo.name in doubts
    ]
    sheet = listed.folder / "check_these.png"
    with listed.publishing(sheet) as written:
        overview.save_check_sheet(written, doubtful)
    some = few([f"{path.name} ({why})" for path, _, why in doubtful])
    print(
        f"check these: in {len(doubtful):,} of {len(readable):,} photographs the field of view is "
        f"implausible: {some}; {sheet} shows them"
    )


if __name__ == "__main__":
    exit_on_signals("prepare.py", "stopped; the finished pictures are kept for the next start")
    end_script(main())
