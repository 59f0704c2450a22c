"""Prepare a data set: pictures as the network sees them in preprocessed/, an index for each hospital.

    python3 prepare.py                                        # draw 900 + 300 images, three hospitals
    python3 prepare.py --dataset idrid --source ~/data/IDRiD  # photographs, from the unpacked archive
    python3 prepare.py --split noniid --share 100             # unequal hospitals, 100 common images
    python3 prepare.py --check                                # exit 0 if index/ is of these choices

Started again with the same choices, it goes on with the pictures that are missing. index/prepared.json
says what the index was made from. It is removed first and written last: an index without it is not
complete.
"""

import argparse
import json
import os
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
from common.files import alone_in, clean, publish_text, sha256_of
from preparation import datasets, fundus, overview, photos, pictures, splits

INDEX = Path("index")
PREPARED = INDEX / "prepared.json"
SPLIT_FIGURE = INDEX / "split.png"
# --check found that index/ was made from other choices, or is not complete.
EXIT_NOT_MADE = 10


def main(argv=None):
    args = parse(argv)
    try:
        choices = choices_of(args)
        if args.check:
            return check(choices, args.skip_broken)
        with alone_in(INDEX):
            prepare(args, choices)
    except (ValueError, OSError, BrokenProcessPool) as error:
        return fail("prepare.py", error)
    return 0


def prepare(args, choices):
    """Find the photographs, make the pictures, choose who gets which, write the indexes."""
    photos_found = find_photos(args)
    PREPARED.unlink(missing_ok=True)
    folder = Path("preprocessed") / choices["dataset"]
    problems = pictures.make_pictures(photos_found, choices, folder)
    usable = without_broken(photos_found, problems, args.skip_broken)
    sets = choose_indexes(usable, args)
    if not all(sets.values()):
        empty = " and ".join(name for name in sets if not sets[name])
        raise ValueError(f"{empty} would be without images")
    records = {name: records_of(chosen, folder) for name, chosen in sets.items()}
    prepared = {**choices, "skipped": sorted(problems), "num_clients": len(workers_of(sets))}
    write_indexes(records, prepared)
    show(records, folder)


def parse(argv):
    parser = argparse.ArgumentParser(
        description="Prepare a data set: pictures in preprocessed/, indexes in index/."
    )
    add = parser.add_argument
    add(
        "--dataset",
        default="synthetic",
        choices=("synthetic", *datasets.LOADERS),
        help="drawn, or photographs",
    )
    add("--source", metavar="DIR", help="folder of the unpacked data set")
    add("--image-size", type=pixels, default=128, help="pixels a side (128)")
    add("--seed", type=at_least(0), default=0, help="of drawing and splitting (0)")
    add("--num-train", type=at_least(10), default=900, help="synthetic images to train on (900)")
    add("--num-val", type=at_least(10), default=300, help="synthetic images to validate on (300)")
    add(
        "--num-clients",
        type=at_least(1),
        default=3,
        help="number of indexes worker1.pkl, worker2.pkl ... (3)",
    )
    add(
        "--split",
        choices=("iid", "noniid", "dirichlet"),
        default="iid",
        help="equal hospitals, the thesis's unequal ones, or by --alpha (iid)",
    )
    add(
        "--alpha",
        type=float,
        default=0.5,
        help="of --split dirichlet: the smaller, the more unequal (0.5)",
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
    add(
        "--skip-broken",
        action="store_true",
        help="leave unreadable images out instead of stopping",
    )
    add(
        "--index-from",
        nargs="+",
        metavar="FILE",
        help="worker1.pkl ... val_set.pkl of the thesis, their pictures in --source; pandas pickles "
        "are code: only files that you trust",
    )
    add(
        "--check",
        action="store_true",
        help=f"only say whether index/ was made from these choices (exit 0 or {EXIT_NOT_MADE})",
    )
    args = parser.parse_args(argv)
    check_usage(parser, args)
    return args


def check_usage(parser, args):
    """End with a usage error where flags do not fit together."""
    without_source = ("synthetic", "retinamnist")
    if not args.source and not args.index_from and args.dataset not in without_source:
        parser.error(
            f"--dataset {args.dataset} needs --source, the folder of the unpacked data set"
        )
    for file in args.index_from or []:
        if Path(file).resolve().parent == INDEX.resolve():
            parser.error(
                "--index-from must lie outside index/, where the new indexes are written: move the "
                "old ones first"
            )
    if args.balanced and args.dataset != "ddr":
        parser.error(f"--balanced is the thesis's draw from ddr, not from {args.dataset}")
    if args.split == "noniid" and args.num_clients != 3:
        parser.error(
            f"--split noniid is for 3 clients, found {args.num_clients}: use --split dirichlet"
        )
    if not 0 < args.alpha < float("inf"):
        parser.error(f"--alpha must be above 0, found {args.alpha}")


def choices_of(args):
    """All that decides the result, as a dict: prepared.json keeps it, --check compares with it."""
    source = str(Path(args.source).expanduser().resolve()) if args.source else None
    if args.index_from:
        return {
            "dataset": "imported",
            "preprocessing": "imported",
            "source": source,
            "index_from": [str(Path(file).resolve()) for file in args.index_from],
        }
    choices = vars(args).copy()
    for name in ("check", "skip_broken", "index_from"):
        del choices[name]
    choices["source"] = source
    if args.split != "dirichlet":
        choices["alpha"] = None
    # With other code the pictures are other pictures, too.
    modules = (fundus, photos, datasets)
    choices["code"] = "".join(sha256_of(module.__file__)[:6] for module in modules)
    choices["preprocessing"] = "drawn" if args.dataset == "synthetic" else "graham"
    return choices


def check(choices, skip_broken):
    """The exit code: 0 where index/ was made from the choices and is whole; else 10, and a line."""
    try:
        problem = first_problem(choices, skip_broken)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"it is not complete ({error})"
    if not problem:
        return 0
    print(f"index/ has to be made anew: {problem}")
    return EXIT_NOT_MADE


def first_problem(choices, skip_broken):
    """Why index/ has to be made anew, or ""; raises nearly anything where prepared.json is bad."""
    prepared = json.loads(PREPARED.read_text(encoding="utf-8"))
    for name, value in choices.items():
        if prepared.get(name) != value:
            return f"it was made with {name} {prepared.get(name)}, not {value}"
    if prepared["skipped"] and not skip_broken:
        return f"{len(prepared['skipped'])} unreadable images were left out"
    workers = [f"worker{number + 1}" for number in range(prepared["num_clients"])]
    for name in (*workers, "train_set", "val_set"):
        for record in data.read_index(INDEX / f"{name}.pkl"):
            if not os.path.exists(record["dir"]):
                return f"{record['dir']} is missing"
    return ""


def find_photos(args):
    """A list of Photo: those to be drawn, or those of the data set that may be used."""
    if args.index_from:
        return datasets.thesis_index(args.index_from, args.source)
    if args.dataset == "synthetic":
        return photos_to_draw(args)
    found = datasets.load(args.dataset, args.source, args.image_size)
    # The thesis's draw is from all parts. Else the published test part is for a final test.
    kept = [photo for photo in found if photo.part != "test" or args.balanced]
    if len(kept) < len(found):
        print(
            f"{len(found) - len(kept)} images of the published test part are left alone, to test "
            "with at the end"
        )
    return kept


def photos_to_draw(args):
    """A list of Photo without a path, their grades in the proportions of GRADE_SHARES."""
    rng = np.random.default_rng([args.seed, 0])
    found = []
    for part, count in (("train", args.num_train), ("val", args.num_val)):
        ends = np.round(np.cumsum(fundus.GRADE_SHARES) * count)
        sorted_grades = np.searchsorted(ends, np.arange(count), side="right")
        for number, grade in enumerate(rng.permutation(sorted_grades).tolist()):
            patient = f"{part} {number}"
            found.append(datasets.Photo(None, grade, patient, part, f"{part}_{number:05d}"))
    return found


def without_broken(found, problems, skip_broken):
    """The photos of `found` that have no problem; ValueError if some have and may not be skipped."""
    for name, sentence in problems.items():
        print(f"unreadable: {name}: {sentence}", file=sys.stderr)
    if problems and not skip_broken:
        raise ValueError(
            f"{len(problems)} of {len(found)} images cannot be used: mend them, or give "
            "--skip-broken"
        )
    return [photo for photo in found if photo.name not in problems]


def choose_indexes(found, args):
    """{name of an index: [Photo]}: worker1, worker2 ..., train_set, val_set."""
    if args.index_from:
        return imported_indexes(found, args.index_from)
    # Random numbers of their own: the same photos validate, however the others are dealt.
    rng_val = np.random.default_rng([args.seed, 1])
    rng_split = np.random.default_rng([args.seed, 2])
    train, val = splits.choose_validation(found, args.balanced, rng_val)
    workers = splits.split(train, args.split, args.num_clients, rng_split, args.alpha, args.share)
    sets = {f"worker{number}": chosen for number, chosen in enumerate(workers, start=1)}
    return {**sets, "train_set": train, "val_set": val}


def imported_indexes(found, files):
    """The indexes as the thesis's files have them; train_set is made of the workers if it is none."""
    names = [Path(file).stem for file in files]
    sets = {name: [photo for photo in found if photo.part == name] for name in names}
    trained_on = {photo.name: photo for photo in found if photo.part != "val_set"}
    sets.setdefault("train_set", list(trained_on.values()))
    return sets


def workers_of(sets):
    """The names of the workers' indexes among `sets`."""
    return [name for name in sets if name not in ("train_set", "val_set")]


def records_of(chosen, folder):
    """Photos as the records of an index, ordered by name."""
    return [
        {
            "picture": f"{photo.name}.png",
            "label": photo.grade,
            "new_label": str(photo.grade == 0),
            "dir": (folder / f"{photo.name}.png").as_posix(),
        }
        for photo in sorted(chosen, key=lambda photo: photo.name)
    ]


def write_indexes(records, prepared):
    """The indexes; then prepared.json, which declares them complete."""
    clean(INDEX)
    # First all old ones go: a crash must not leave an old index beside new ones.
    for old in (SPLIT_FIGURE, *INDEX.glob("worker*.pkl")):
        old.unlink(missing_ok=True)
    for name in ("train_set", "val_set"):
        (INDEX / f"{name}.pkl").unlink(missing_ok=True)
    for name, own in records.items():
        data.write_index(INDEX / f"{name}.pkl", own)
    # Imported pictures have a size of their own.
    with Image.open(records["val_set"][0]["dir"]) as picture:
        prepared["image_size"] = picture.width
    publish_text(PREPARED, json.dumps(prepared, indent=1) + "\n")


def show(records, folder):
    """A table, and two pictures that show what was prepared."""
    print(overview.format_table(records))
    sheet = folder / "contact_sheet.png"
    overview.save_contact_sheet(sheet, records["train_set"] + records["val_set"])
    workers = [records[name] for name in workers_of(records)]
    if overview.save_split_figure(SPLIT_FIGURE, workers):
        print(f"look at {sheet} and {SPLIT_FIGURE}")
    else:
        print(f"look at {sheet}; {SPLIT_FIGURE} needs matplotlib and was not drawn")


if __name__ == "__main__":
    exit_on_signals("prepare.py", "stopped; the finished pictures are kept for the next start")
    end_script(main())
