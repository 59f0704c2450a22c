"""Prepare a data set: pictures as the network sees them, and an index for each hospital.

    python3 prepare.py                                        # 450 + 300 synthetic images
    python3 prepare.py --arch lite0 --dataset idrid --source ~/data/IDRiD     # an unpacked archive
    python3 prepare.py --arch lite0 --dataset folder --source DIR --num-clients 1 --val-part 0
    python3 prepare.py --arch lite0 --dataset folder --source DIR --split column \\
        --hospital-column site
    python3 prepare.py --check                                # exit 0 if index/ is of these choices

The pictures go to preprocessed/, the indexes to index/. Started again with the same choices, it
goes on with the pictures that are missing. index/prepared.json says what the index was made from,
and is written last: an index without it is not complete. Nothing is removed that prepare.py did not
write: it is moved to a folder old-1, old-2 ...
"""

import datetime
import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path

from common.log import fail, warn
from common.script import (
    at_least,
    end_script,
    exit_on_signals,
    fraction,
    new_parser,
    number,
    pixels,
    start_script,
)

if __name__ == "__main__":
    start_script()  # before the packages, so that a missing one is a sentence
    exit_on_signals("prepare.py", "stopped; the finished pictures are kept for the next start")

import numpy as np
from PIL import Image

import data
import model
from common.files import alone_in, clean, move_aside, publish_text, sha256_of
from preparation import datasets, field, overview, photos, pictures, splits, synthetic, thesis
from preparation.tables import few

INDEX = Path("index")
PREPARED = INDEX / "prepared.json"
# What is written there.
WRITTEN = re.compile(
    r"(worker\d+|train_set|val_set)\.pkl|prepared\.json|(contact_sheet|check_these)\.png"
)
# --check found that index/ was made from other choices, or is not complete.
EXIT_NOT_MADE = 10
# Flags that say nothing of other data sets.
ONLY_OF = {
    "synthetic": ("num_train", "num_val"),
    "folder": ("labels", "referable", "grades_from", *datasets.COLUMN_FLAGS),
    "ddr": ("balanced",),
}


def main(argv=None):
    args = parse(argv)
    if args.check:
        return check(args)
    try:
        with alone_in(INDEX):
            prepare(args)
    except (ValueError, OSError) as error:
        return fail("prepare.py", error)
    return 0


def prepare(args):
    """Find the photographs, make the pictures, choose who gets which, write the indexes."""
    found = find_photos(args)
    print(*found.notes, sep="\n", end="\n" if found.notes else "")
    print(f"patients: {found.patients_sentence}; {len(found.photos):,} images", flush=True)
    leave_out(args, len(found.photos) + sum(map(len, found.left_out.values())), found.left_out)
    usable = settle(found, args)
    choose_indexes(usable, found.indexes, args)  # what cannot be is better said before the work
    made_with = made_with_of(args)
    problems, doubts = pictures.make_pictures(usable, made_with)
    for sentence in problems.values():
        warn("prepare.py", f"unreadable: {sentence}")
    leave_out(args, len(usable), {"cannot be used": list(problems)})
    readable = [photo for photo in usable if photo.name not in problems]
    sets = choose_indexes(readable, found.indexes, args)
    folder = pictures.folder_of(made_with)
    patients = opaque_patients(readable, args.seed) if found.patients else {}
    records = {name: records_of(chosen, folder, patients) for name, chosen in sets.items()}
    doubtful = [
        (photo.path, folder / f"{photo.name}.png", doubts[photo.name])
        for photo in readable
        if photo.name in doubts
    ]
    tell_held_out_anew(records.get("val_set", []))
    clear_index()
    hospitals = hospitals_of(sets)
    write_index(args, records, doubtful, hospitals)
    overview.print_table(records, hospitals.get("worker_hospitals", {}))
    if doubtful:
        some = few([f"{path.name} ({why})" for path, _, why in doubtful])
        print(
            f"check these: {len(doubtful):,} of {len(readable):,} photographs may be none of a "
            f"fundus: {some}; they are used as they are graded"
        )
    print(f"look at {' and '.join(map(str, sorted(INDEX.glob('*.png'))))}")
    pictures.tell_other_folders(folder, args.remove_old)


# --- the choices ---------------------------------------------------------------------------------


def parser():
    """The argparse.ArgumentParser of this script's flags."""
    made = new_parser(__doc__)
    add = made.add_argument_group("what there is").add_argument
    add(
        "--dataset",
        choices=("synthetic", *datasets.NAMES),
        default="synthetic",
        help="synthetic eyes (the default), a published data set, or any folder of photographs",
    )
    add("--source", metavar="DIR", help="folder of the photographs, as unpacked")
    add(
        "--skip-broken",
        action="store_true",
        help="leave missing, ungradable and unreadable images out instead of stopping",
    )
    add = made.add_argument_group("synthetic eyes").add_argument
    add("--num-train", type=at_least(10), default=450, metavar="N", help="to train on (450)")
    add("--num-val", type=at_least(10), default=300, metavar="N", help="to validate on (300)")
    add = made.add_argument_group("any folder of photographs, --dataset folder").add_argument
    add(
        "--labels",
        default="",
        metavar="NAME",
        help="its table, where there are several; none: folders tell the grades",
    )
    datasets.add_flags(add)
    add = made.add_argument_group(
        "indexes and pictures of the thesis, taken as they are (no size, no split changes them)"
    ).add_argument
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
        help="leave red and blue as they are; the thesis stored them exchanged",
    )
    add = made.add_argument_group("the pictures").add_argument
    add(
        "--arch",
        choices=list(model.ARCHS),
        default="drcnn",
        help="the network; size and preprocessing of its pictures follow from it (drcnn)",
    )
    add(
        "--image-size",
        type=pixels,
        metavar="PIXELS",
        help="a side of a picture (default: each network's own, "
        f"{', '.join(f'{name} {arch.image_size}' for name, arch in model.ARCHS.items())})",
    )
    add(
        "--preprocessing",
        choices=photos.PREPROCESSINGS,
        help="of photographs: stretched to the square, less their local average, as the thesis did "
        "(graham, the default), or in their shape and colours (colour, the default for lite0)",
    )
    add("--remove-old", action="store_true", help="remove the pictures of other choices")
    add = made.add_argument_group("who gets which").add_argument
    add(
        "--val-part",
        type=fraction,
        metavar="PART",
        help="part of the photographs to validate on, 0 to 1 (as the data set says, or 0.2); "
        "0: a hospital trains on all it has, 1: all are for the server to score by",
    )
    add(
        "--num-clients",
        type=at_least(1),
        metavar="N",
        help="number of indexes worker1.pkl, worker2.pkl ... (3; --split column: the hospitals)",
    )
    add(
        "--split",
        choices=("hospitals", "column", "iid", "noniid", "dirichlet"),
        help="hospitals: three synthetic ones that differ in patients and cameras (the default "
        "of synthetic); column: the hospitals that the table names; iid: equal ones (the "
        "default of photographs); noniid: the thesis's unequal ones; dirichlet: by --alpha",
    )
    add(
        "--alpha",
        type=number("a number from 0.001 to 1000", lambda value: 0.001 <= value <= 1000),
        default=0.5,
        metavar="A",
        help="dirichlet: the smaller, the more unequal (0.5)",
    )
    add(
        "--share",
        type=at_least(0),
        default=0,
        metavar="N",
        help="training images that every client gets (0)",
    )
    add(
        "--balanced",
        action="store_true",
        help="ddr: the thesis's draw of 10,000 to train on, 2,522 to validate",
    )
    add("--seed", type=at_least(0), default=0, metavar="N", help="of all that is random (0)")
    add(
        "--check",
        action="store_true",
        help=f"only say whether index/ was made from these choices (exit 0 or {EXIT_NOT_MADE})",
    )
    return made


def parse(argv):
    """The flags, an argparse.Namespace; ends with a usage error where they do not fit together."""
    known = parser()
    args = known.parse_args(argv)
    if args.index_from:
        args.dataset = args.preprocessing = args.split = "imported"
        args.index_from = [os.path.abspath(file) for file in args.index_from]
    arch = model.ARCHS[args.arch]
    args.image_size = args.image_size or arch.image_size
    args.preprocessing = args.preprocessing or arch.preprocessing
    is_synthetic = args.dataset == "synthetic"
    if args.split is None:
        args.split = "hospitals" if is_synthetic else "iid"
    if args.num_clients is None and args.split != "column":
        args.num_clients = 3
    of_kind = {"hospitals": "synthetic", "column": "folder"}.get(args.split, args.dataset)
    # What would end in another result than the user means, and not be seen.
    wrong = {
        "--source is a folder of photographs: say by --dataset which": (
            is_synthetic and args.source
        ),
        "expected --source, the folder of the photographs": not is_synthetic and not args.source,
        f"--split {args.split} is of --dataset {of_kind}, not of {args.dataset}: use iid, noniid "
        "or dirichlet": args.dataset != of_kind,
        f"--split noniid is for 3 clients, found {args.num_clients}: use --split dirichlet": (
            args.split == "noniid" and args.num_clients != 3
        ),
        "--hospital-column is of --split column: each client is then a hospital": (
            args.hospital_column and args.split != "column"
        ),
        "--keep-channels is of --index-from": args.keep_channels and not args.index_from,
    }
    wrong |= {
        f"--{name.replace('_', '-')} is of --dataset {kind}, not of {args.dataset}": (
            args.dataset != kind and getattr(args, name) != known.get_default(name)
        )
        for kind, names in ONLY_OF.items()
        for name in names
    }
    for sentence, holds in wrong.items():
        if holds:
            known.error(sentence)
    if args.split != "column":
        args.hospital_column = "none"
    if is_synthetic:
        args.preprocessing = synthetic.KIND
    if args.source:
        args.source = str(Path(args.source).expanduser().resolve())
    return args


def choices_of(args):
    """All that decides the result, as a dict: prepared.json keeps it, --check compares with it."""
    no_choices = ("check", "remove_old", "arch")  # of the last, what follows from it is kept
    return {name: value for name, value in vars(args).items() if name not in no_choices}


def made_with_of(args):
    """What decides how a picture looks; not who gets it.

    Other code makes other pictures, too: with any edit of these modules, of a comment even, all
    pictures are made anew.
    """
    names = ["dataset", "preprocessing", "image_size", "keep_channels"]
    modules = [photos, field]
    if args.preprocessing == synthetic.KIND:
        names, modules = [*names, "seed"], [synthetic]
    code = "".join(sha256_of(module.__file__)[:8] for module in modules)
    by_hospital = args.split == "hospitals"
    return {name: getattr(args, name) for name in names} | {"hospitals": by_hospital, "code": code}


# --- is index/ made from it? ---------------------------------------------------------------------


def check(args):
    """The exit code: 0 where index/ was made from the choices and is whole; else 10, and a line."""
    try:
        prepared = json.loads(PREPARED.read_text(encoding="utf-8"))
        made_from = prepared["choices"]
        problems = [
            f"it was made with {name} {made_from.get(name)!r}, not {value!r}"
            for name, value in choices_of(args).items()
            if made_from.get(name) != value
        ]
        problems += [
            f"{record['dir']} is missing"
            for name in prepared["indexes"]
            for record in data.read_index(INDEX / f"{name}.pkl")
            if not os.path.exists(record["dir"])
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problems = [f"it is not complete ({error})"]
    if problems:
        print(f"index/ has to be made anew: {few(problems)}")
    return EXIT_NOT_MADE if problems else 0


# --- what there is -------------------------------------------------------------------------------


def find_photos(args):
    """The DataSet of what is to be made, or of what there is."""
    if args.dataset == "synthetic":
        return synthetic_photos(args)
    if args.index_from:
        found = thesis.load(args.index_from, args.source)
        if not args.keep_channels:
            found.notes.append(
                "red and blue are put right: the thesis stored them exchanged (--keep-channels if "
                "these pictures are right)"
            )
        return found
    found = datasets.load(args.dataset, args.source, args)
    if args.split == "column" and not found.photos[0].hospital:
        raise ValueError(
            "--split column: no column of the table is known to name the hospital; say which by "
            "--hospital-column"
        )
    return found


def synthetic_photos(args):
    """A DataSet of Photos without a path: to train and to validate on, from every hospital.

    The grades are in the proportions of their hospital.
    """
    one = (synthetic.EQUAL_HOSPITAL,)
    hospitals = synthetic.HOSPITALS if args.split == "hospitals" else one
    rng = np.random.default_rng([args.seed, 0])
    found = datasets.DataSet(patients="the drawing, one for each eye")
    for part, total in (("train", args.num_train), ("val", args.num_val)):
        before = len(found.photos)
        for position, hospital in enumerate(hospitals):
            # The rest of a total that cannot be divided goes to the first hospitals.
            count = len(range(position, total, len(hospitals)))
            ends = np.round(np.cumsum(hospital.grade_shares) * count)
            sorted_grades = np.searchsorted(ends, np.arange(count), side="right")
            for grade in rng.permutation(sorted_grades).tolist():
                number = len(found.photos)  # the picture's random numbers follow from it
                image = f"{number - before:05d}"
                made_from = json.dumps([number, grade, hospital.name]).encode()
                photo = datasets.Photo(None, grade, f"{part} {image}", part, image, hospital.name)
                name = datasets.picture_name(photo, hashlib.sha256(made_from).hexdigest())
                found.photos.append(photo._replace(name=name))
    return found


def leave_out(args, total, left_out):
    """Say what is left out, {why: [name of an image, ...]}; ValueError where that is not allowed.

    total: number of images of which these are some.
    """
    for why, images in left_out.items():
        sentence = f"{len(images):,} of {total:,} images {why}: {few(images)}"
        if images and args.skip_broken:
            print(f"left out: {sentence}", flush=True)
        elif images:
            fail("prepare.py", sentence)
    if any(left_out.values()) and not args.skip_broken:
        raise ValueError("no index was made: mend that, or leave these out with --skip-broken")


def settle(found, args):
    """The photos of `found` that are used, named as their pictures will be.

    Copies of one photograph are of one patient, and a patient is in one part; what that changes is
    said.
    """
    if args.dataset == "synthetic":
        return found.photos
    paths = [photo.path for photo in found.photos]  # a large set takes minutes to read
    digests = list(map(sha256_of, pictures.progress(paths, "photographs read", len(paths))))
    settled, copies = splits.join_identical(found.photos, digests, can_be_read)
    settled = [
        photo._replace(name=datasets.picture_name(photo, digest))
        for photo, digest in zip(settled, digests, strict=True)
    ]
    if copies:
        some = few([" = ".join(photo.name for photo in same) for same in copies])
        kept = "the imported indexes keep them" if args.index_from else "each set on one side"
        print(
            f"{sum(map(len, copies)):,} photographs are only {len(copies):,}, identical under "
            f"several names: {some}; {kept}"
        )
    if args.index_from:
        return settled
    contradictory = [
        photo for same in copies if len({each.grade for each in same}) > 1 for photo in same
    ]
    graded = [f"{photo.name} (grade {photo.grade})" for photo in contradictory]
    leave_out(args, len(settled), {"are identical to one of another grade": graded})
    excluded = {photo.path for photo in contradictory}
    settled = [photo for photo in settled if photo.path not in excluded]
    if not args.balanced:
        settled, sentences = splits.settle_parts(settled, args.val_part)
        print("".join(f"{sentence}\n" for sentence in sentences), end="")
    pairs = {(photo.patient, photo.hospital) for photo in settled}
    num_hospitals = Counter(patient for patient, _ in pairs)  # of each patient
    num_shared = sum(count > 1 for count in num_hospitals.values())
    if num_shared:
        print(
            f"{num_shared:,} patients are of several hospitals: each goes to one, with all images; "
            "if these are different people, write the hospital before the patient's number"
        )
    return settled


def can_be_read(photo):
    try:
        photos.open_image(photo.path)
    except ValueError:
        return False
    return True


# --- who gets which ------------------------------------------------------------------------------


def choose_indexes(found, indexes, args):
    """{name of an index: [Photo]}: worker1, worker2 ..., train_set, val_set.

    indexes: imported ones, as thesis.load gives them. Raises ValueError if one would be empty.
    """
    if indexes:
        at = {photo.path: photo for photo in found}
        sets = {name: [at[path] for path in paths if path in at] for name, paths in indexes.items()}
    else:
        # Random numbers of their own: the same photos validate, however the others are dealt.
        rng_val = np.random.default_rng([args.seed, 1])
        rng_split = np.random.default_rng([args.seed, 2])
        train, val = splits.choose_validation(found, args.balanced, rng_val, args.val_part)
        sets = {}
        if train:
            num_clients = args.num_clients or len({photo.hospital for photo in train})
            workers = splits.split(
                train, args.split, num_clients, rng_split, args.alpha, args.share
            )
            sets = {f"worker{number}": chosen for number, chosen in enumerate(workers, start=1)}
            sets["train_set"] = train
        if val:
            sets["val_set"] = val
    if not all(sets.values()):
        empty = " and ".join(name for name in sets if not sets[name])
        raise ValueError(f"{empty} would be without images")
    # as an index has them
    return {name: sorted(own, key=lambda photo: photo.name) for name, own in sets.items()}


def hospitals_of(sets):
    """Entries of prepared.json, where hospitals are known, else {}.

    worker_hospitals: {"worker1": "screening centre", ...}; val_hospitals: the hospital of each
    record of val_set.pkl, in its order.
    """
    names = {name: [photo.hospital for photo in chosen] for name, chosen in sets.items()}
    if not any(map(any, names.values())):
        return {}
    val = {"val_hospitals": names["val_set"]} if "val_set" in names else {}
    return val | {
        "worker_hospitals": {
            name: " and ".join(sorted(set(own)))
            for name, own in names.items()
            if name.startswith("worker")
        }
    }


def opaque_patients(found, seed):
    """{patient: "p0017"}: numbers in random order, which tell nothing of the patient."""
    patients = sorted({photo.patient for photo in found})
    numbers = np.random.default_rng([seed, 3]).permutation(len(patients)) + 1
    return {patient: f"p{number:04d}" for patient, number in zip(patients, numbers, strict=True)}


def records_of(chosen, folder, patients):
    """Photos as the records of an index; patients: {photo.patient: its opaque name}, or {}."""
    return [
        {
            "picture": f"{photo.name}.png",
            "label": photo.grade,
            "new_label": str(photo.grade == 0),
            "dir": (folder / f"{photo.name}.png").as_posix(),
            **({"patient": patients[photo.patient]} if patients else {}),
        }
        for photo in chosen
    ]


# --- what is written -----------------------------------------------------------------------------


def tell_held_out_anew(held_out):
    """Warn of images that the index which is replaced gave to training.

    New photographs or corrected grades give another draw. The model of a run that goes on has then
    seen some of the images that it is scored on.
    """
    path = INDEX / "train_set.pkl"
    try:
        trained_on = {record["dir"] for record in data.read_index(path)} if path.exists() else set()
    except ValueError:  # not one of ours: nothing was trained on it
        return
    known = sum(record["dir"] in trained_on for record in held_out)
    if known:
        warn(
            "prepare.py",
            f"{known:,} of the {len(held_out):,} images held out now were trained on with the "
            "index before: a run that goes on knows them, and its scores on them are too good; "
            "begin a new run, or keep everybody's part in a column of the table (--part-column)",
        )


def clear_index():
    """Remove what prepare.py wrote into index/ the last time; move aside what it did not write."""
    clean(INDEX)
    in_the_way = [path for path in sorted(INDEX.iterdir()) if WRITTEN.fullmatch(path.name)]
    try:
        ours = dict(json.loads(PREPARED.read_text(encoding="utf-8"))["files"])
        PREPARED.unlink()  # first: without it, what is left is no index
    except (OSError, ValueError, KeyError, TypeError):
        ours = {}
    for path in in_the_way:
        if path.is_file() and sha256_of(path) == ours.get(path.name):
            path.unlink()
    others = [path.name for path in in_the_way if path.exists()]
    aside = move_aside(INDEX, in_the_way)
    if aside:
        print(f"{aside}: {len(others)} files that prepare.py did not write are here: {few(others)}")


def write_index(args, records, doubtful, hospitals):
    """The indexes and the sheets; then prepared.json, which declares them complete."""
    for name, own in records.items():
        data.write_index(INDEX / f"{name}.pkl", own)
    pictured = records.get("train_set", []) + records.get("val_set", [])
    overview.save_contact_sheet(INDEX / "contact_sheet.png", pictured)
    if doubtful:
        overview.save_check_sheet(INDEX / "check_these.png", doubtful)
    # Imported pictures have a size of their own.
    with Image.open(pictured[0]["dir"]) as picture:
        image_size = picture.width
    written = [path for path in INDEX.iterdir() if WRITTEN.fullmatch(path.name)]
    prepared = {
        "choices": choices_of(args),
        "dataset": args.dataset,
        "split": args.split,
        "preprocessing": args.preprocessing,
        "referable": args.referable,
        "image_size": image_size,
        "num_clients": sum(name.startswith("worker") for name in records),
        "indexes": {name: len(own) for name, own in records.items()},
        **hospitals,
        "date": datetime.date.today().isoformat(),
        "files": {path.name: sha256_of(path) for path in sorted(written)},
    }
    publish_text(PREPARED, json.dumps(prepared, indent=1) + "\n")


if __name__ == "__main__":
    end_script(main())
