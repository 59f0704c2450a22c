"""Prepare a data set: pictures as the network sees them in preprocessed/, and an index for every hospital in index/.

    python3 prepare.py                                          # draws 900 + 300 synthetic images, three hospitals
    python3 prepare.py --dataset idrid --source ~/data/IDRiD    # photographs, from the folder of the unpacked archive
    python3 prepare.py --split noniid --share 100               # unequal hospitals with 100 images in common
    python3 prepare.py --check                                  # exit 0 if index/ was made like this, 10 if not

Started again with the same choices, it goes on with the pictures that are missing. index/prepared.json tells what the
index was made from; it is removed first and written last: an index without it is not complete.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from common.script import at_least, exit_on_signals, fail, pixels, start_script

if __name__ == "__main__":
    start_script()  # before the packages, so that a missing one is a sentence

import numpy as np
from PIL import Image

import data
from common.files import alone_in, clean, publish_text, replacing, sha256_of
from preparation import datasets, fundus, overview, photos, splits

PREPARED = Path("index/prepared.json")


def main(argv=None):
    args = parse(argv)
    try:
        made_from = choices_of(args)
        if args.check:
            return check(made_from, args.skip_broken)
        with alone_in(PREPARED.parent):
            found = find(args)
            PREPARED.unlink(missing_ok=True)
            found, made_from["skipped"] = make_pictures(found, made_from, args.skip_broken)
            write(divide(found, args, made_from), made_from)
    except (ValueError, OSError, BrokenProcessPool) as error:
        return fail("prepare.py", error)
    return 0


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
        help="iid, the thesis's noniid, by --alpha",
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
        "--skip-broken", action="store_true", help="leave unreadable images out instead of stopping"
    )
    add(
        "--index-from",
        nargs="+",
        metavar="FILE",
        help="worker1.pkl ... val_set.pkl of the thesis, their pictures in "
        "--source; pandas pickles are code: only files that you trust",
    )
    add(
        "--check",
        action="store_true",
        help="only tell whether index/ was made from these choices (exit 0 or 10)",
    )
    args = parser.parse_args(argv)
    if not args.source and not args.index_from and args.dataset not in ("synthetic", "retinamnist"):
        parser.error(
            f"--dataset {args.dataset} needs --source, the folder of the unpacked data set"
        )
    if args.index_from and any(
        Path(file).resolve().parent == PREPARED.parent.resolve() for file in args.index_from
    ):
        parser.error(
            "--index-from must lie outside index/, where the new indexes are written: move the old ones first"
        )
    if args.balanced and args.dataset != "ddr":
        parser.error(f"--balanced is the thesis's draw from ddr, not from {args.dataset}")
    if args.split == "noniid" and args.num_clients != 3:
        parser.error(
            f"--split noniid is for 3 clients, found {args.num_clients}: use --split dirichlet"
        )
    if not 0 < args.alpha < float("inf"):
        parser.error(f"--alpha must be above 0, found {args.alpha}")
    return args


def choices_of(args):
    """All that decides the result, as a dict: prepared.json keeps it, --check compares with it."""
    source = str(Path(args.source).expanduser().resolve()) if args.source else None
    if args.index_from:
        files = [str(Path(file).resolve()) for file in args.index_from]
        return {
            "dataset": "imported",
            "preprocessing": "imported",
            "source": source,
            "index_from": files,
        }
    choices = {
        name: value
        for name, value in vars(args).items()
        if name not in ("check", "skip_broken", "index_from")
    }
    code = "".join(sha256_of(module.__file__)[:6] for module in (fundus, photos, datasets))
    return {
        **choices,
        "source": source,
        "alpha": args.alpha if args.split == "dirichlet" else None,
        "code": code,
        "preprocessing": "drawn" if args.dataset == "synthetic" else "graham",
    }


def check(choices, skip_broken):
    """Exit code 0 where index/ was made from the choices and is whole; else 10, with a line that says why."""
    try:
        made = json.loads(PREPARED.read_text(encoding="utf-8"))
        problems = [
            f"it was made with {name} {made.get(name)}, not {value}"
            for name, value in choices.items()
            if made.get(name) != value
        ]
        if made["skipped"] and not skip_broken:
            problems.append(f"{len(made['skipped'])} unreadable images were left out")
        for name in [f"worker{k + 1}" for k in range(made["num_clients"])] + [
            "train_set",
            "val_set",
        ]:
            problems += [
                f"{record['dir']} is missing"
                for record in data.read_index(f"index/{name}.pkl")
                if not os.path.exists(record["dir"])
            ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problems = [f"it is not complete ({error})"]
    if problems:
        print(f"index/ has to be made anew: {problems[0]}")
    return 10 if problems else 0


def find(args):
    """A list of Photo; those to be drawn have no path, and their grades are in GRADE_SHARES' proportions."""
    if args.index_from:
        return datasets.thesis_index(args.index_from, args.source)
    if args.dataset != "synthetic":
        found = datasets.load(args.dataset, args.source, args.image_size)
        kept = [photo for photo in found if photo.part != "test" or args.balanced]
        if len(kept) < len(found):
            print(
                f"{len(found) - len(kept)} images of the published test part are left alone, to test with at the end"
            )
        return kept
    rng, found = np.random.default_rng([args.seed, 0]), []
    for part, count in (("train", args.num_train), ("val", args.num_val)):
        ends = np.round(np.cumsum(fundus.GRADE_SHARES) * count)
        grades = rng.permutation(np.searchsorted(ends, np.arange(count), side="right")).tolist()
        found += [
            datasets.Photo(None, grade, f"{part} {number}", part, f"{part}_{number:05d}")
            for number, grade in enumerate(grades)
        ]
    return found


def make_pictures(found, choices, skip_broken):
    """Make preprocessed/DATASET/NAME.png of every Photo that has none yet; (those that worked, names of the others)."""
    folder, drawn = Path("preprocessed") / choices["dataset"], choices["preprocessing"] == "drawn"
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    deciding = (
        "source",
        "index_from",
        "image_size",
        "code",
        *(("seed", "num_train", "num_val") if drawn else ()),
    )
    made_from, stamp = (
        json.dumps([choices.get(name) for name in deciding]),
        folder / "made_from.json",
    )
    if not stamp.exists() or stamp.read_text() != made_from:
        for old in folder.glob("*.png"):
            old.unlink()
        publish_text(stamp, made_from)
    jobs, unique = [], {photo.name: photo for photo in found}
    for number, photo in enumerate(unique.values()):
        target = folder / f"{photo.name}.png"
        made = target.exists() and (
            photo.path is None or photo.path.exists() and date_of(photo.path) == date_of(target)
        )
        if not made:
            jobs.append((photo, target, choices, number))
    print(
        f"{folder}: {len(unique) - len(jobs)} pictures are there, {len(jobs)} to make", flush=True
    )
    problems, started, terminal = {}, time.monotonic(), sys.stdout.isatty()
    steps, spawn = 100 if terminal else 10, multiprocessing.get_context("spawn")
    many = len(jobs) > 50  # for fewer, starting processes takes longer than it saves
    with (
        ProcessPoolExecutor(mp_context=spawn, initializer=end_with_parent)
        if many
        else ThreadPoolExecutor(1) as pool
    ):
        for done, problem in enumerate(pool.map(make_picture, jobs, chunksize=8), start=1):
            problems.update(problem)
            if done * steps // len(jobs) > (done - 1) * steps // len(jobs):
                rate, end = (
                    done / (time.monotonic() - started),
                    "\r" if terminal and done < len(jobs) else "\n",
                )
                print(f"  {done} of {len(jobs)} pictures, {rate:.0f} a second", end=end, flush=True)
    for name, sentence in problems.items():
        print(f"unreadable: {name}: {sentence}", file=sys.stderr)
    if problems and not skip_broken:
        raise ValueError(
            f"{len(problems)} of {len(found)} images cannot be used: mend them, or give --skip-broken"
        )
    return [photo for photo in found if photo.name not in problems], sorted(problems)


def end_with_parent():
    """In a process of the pool: leave Ctrl-C to the parent, and end when it is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def make_picture(job):
    """Make one picture. Returns {}, or {name: what is wrong with the photograph}."""
    photo, target, choices, number = job
    try:
        if photo.path is None:
            rng = np.random.default_rng([choices["seed"], 0, number])
            image, _ = fundus.draw(photo.grade, rng, choices["image_size"])
        elif choices["preprocessing"] == "imported":
            image = np.asarray(photos.open_image(photo.path))
        else:
            image = photos.preprocess(photos.open_image(photo.path), choices["image_size"])
    except ValueError as error:
        return {photo.name: str(error)}
    with replacing(target) as written:
        Image.fromarray(image).save(written)
        if photo.path:
            os.utime(
                written, (date_of(photo.path),) * 2
            )  # a photograph of another date, also an older one, is another
    return {}


def date_of(path):
    return int(path.stat().st_mtime)


def divide(found, args, made_from):
    """{name of an index: [Photo]}: worker1, worker2 ..., train_set, val_set."""
    if args.index_from:
        parts = [Path(file).stem for file in args.index_from]
        sets = {part: [photo for photo in found if photo.part == part] for part in parts}
        everyone = {photo.name: photo for photo in found if photo.part != "val_set"}
        sets.setdefault("train_set", list(everyone.values()))
        made_from["num_clients"] = len(sets) - 2
        return sets
    train, val = splits.choose_validation(
        found, args.balanced, np.random.default_rng([args.seed, 1])
    )
    workers = splits.split(
        train,
        args.split,
        args.num_clients,
        np.random.default_rng([args.seed, 2]),
        args.alpha,
        args.share,
    )
    sets = {f"worker{number}": photos for number, photos in enumerate(workers, start=1)}
    return {**sets, "train_set": train, "val_set": val}


def write(sets, made_from):
    """The indexes; then prepared.json, which declares them complete; then a table and two pictures that show them."""
    index, figure = PREPARED.parent, PREPARED.with_name("split.png")
    sheet = Path("preprocessed") / made_from["dataset"] / "contact_sheet.png"
    if not all(sets.values()):
        raise ValueError(
            f"{' and '.join(name for name in sets if not sets[name])} would be without images"
        )
    clean(index)
    for old in (
        figure,
        *index.glob("worker*.pkl"),
        index / "train_set.pkl",
        index / "val_set.pkl",
    ):  # never new beside old
        old.unlink(missing_ok=True)
    records = {}
    for name, found in sets.items():
        records[name] = [
            {
                "picture": f"{photo.name}.png",
                "label": photo.grade,
                "new_label": str(photo.grade == 0),
                "dir": (sheet.parent / f"{photo.name}.png").as_posix(),
            }
            for photo in sorted(found, key=lambda photo: photo.name)
        ]
        data.write_index(index / f"{name}.pkl", records[name])
    with Image.open(records["val_set"][0]["dir"]) as picture:
        made_from["image_size"] = picture.width
    publish_text(PREPARED, json.dumps(made_from, indent=1) + "\n")
    print(overview.table(records))
    overview.save_contact_sheet(sheet, records["train_set"] + records["val_set"])
    drawn = overview.save_split_figure(
        figure, [own for name, own in records.items() if name.startswith("worker")]
    )
    print(
        f"look at {sheet} and {figure}"
        if drawn
        else f"look at {sheet}; {figure} needs matplotlib and was not drawn"
    )


if __name__ == "__main__":
    exit_on_signals("prepare.py: stopped; the finished pictures are kept for the next start")
    sys.exit(main())
