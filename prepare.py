"""Prepare a data set: pictures as the network sees them in preprocessed/, and an index for every hospital in index/.

    python3 prepare.py                                          # draws 900 + 300 synthetic images, three hospitals
    python3 prepare.py --dataset idrid --source ~/data/IDRiD    # photographs, from the folder of the unpacked archive
    python3 prepare.py --split noniid --share 100               # unequal hospitals with 100 images in common
    python3 prepare.py --check                                  # exit 0 if index/ was made like this, 10 if not

Stopped and started again with the same choices, it goes on with the pictures that are missing. index/prepared.json
tells what the index was made from; it is removed first and written last: an index without it is not complete.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from PIL import Image

import data
import datasets
import fundus
import overview
import photos
import splits
import thesis_index
from files import clean, publish_text, temporary
from script import at_least, exit_on_signals, fail

MADE_FROM = Path("index/prepared.json")
NOT_AS_CHOSEN = 10  # exit code of --check
FEW = 50  # for up to so many pictures, starting processes takes longer than it saves


def main(argv=None):
    args = parse(argv)
    choices = choices_of(args)
    try:
        if args.check:
            return check(choices, args.skip_broken)
        if args.index_from:
            workers, train, val = thesis_index.import_indexes(args.index_from, args.source)
            size = photos.open_image(train[0]["dir"]).width
            details = {"skipped": [], "num_clients": len(workers), "image_size": size}
        else:
            found = draw_list(args) if args.dataset == "synthetic" else load(args)
            MADE_FROM.unlink(missing_ok=True)
            found, skipped = make_pictures(found, choices, args.skip_broken)
            train, val = splits.choose_validation(found, args.balanced, np.random.default_rng([args.seed, 1]))
            rng = np.random.default_rng([args.seed, 2])
            workers = splits.split(train, args.split, args.num_clients, rng, args.alpha, args.share)
            *workers, train, val = (as_records(part, args) for part in (*workers, train, val))
            details = {"skipped": skipped}
        write_indexes(workers, train, val, {**choices, **details})
        show(workers, train, val)
    except (ValueError, OSError, BrokenProcessPool) as error:
        return fail("prepare.py", error)
    return 0


def parse(argv):
    parser = argparse.ArgumentParser(description="Prepare a data set: pictures in preprocessed/, indexes in index/.")
    add = parser.add_argument
    add("--dataset", default="synthetic", help="synthetic is drawn (the default), the others are photographs",
        choices=("synthetic", "idrid", "ddr", "aptos", "eyepacs", "folder", "retinamnist"))
    add("--source", metavar="DIR", help="folder of the unpacked data set")
    add("--image-size", type=at_least(16), default=128, help="pixels a side (128)")
    add("--seed", type=at_least(0), default=0, help="of drawing and splitting (0)")
    add("--num-train", type=at_least(10), default=900, help="synthetic images to train on (900)")
    add("--num-val", type=at_least(10), default=300, help="synthetic images to validate on (300)")
    add("--num-clients", type=at_least(1), default=3, help="number of indexes worker1.pkl, worker2.pkl ... (3)")
    add("--split", choices=("iid", "noniid", "dirichlet"), default="iid",
        help="iid (default): the same grades everywhere; noniid: the thesis's; dirichlet: see --alpha")
    add("--alpha", type=float, default=0.5, help="of --split dirichlet: the smaller, the more unequal (0.5)")
    add("--share", type=at_least(0), default=0, metavar="N", help="training images that every client gets (0)")
    add("--balanced", action="store_true", help="ddr only: the thesis's draw of 10,000 to train on, 2,522 to validate")
    add("--skip-broken", action="store_true", help="leave unreadable images out instead of stopping")
    add("--index-from", nargs="+", metavar="FILE", help="import worker1.pkl ... val_set.pkl of the thesis: pandas "
        "pickles, which are code, so only files that you trust; --source is then the folder of their pictures")
    add("--check", action="store_true", help="only tell whether index/ was made from these choices (exit 0 or 10)")
    args = parser.parse_args(argv)
    if not args.source and not args.index_from and args.dataset not in ("synthetic", "retinamnist"):
        parser.error(f"--dataset {args.dataset} needs --source, the folder of the unpacked data set")
    if args.balanced and args.dataset != "ddr":
        parser.error(f"--balanced is the thesis's draw from ddr, not from {args.dataset}")
    if args.split == "noniid" and args.num_clients != 3:
        parser.error(f"--split noniid is for 3 clients, found {args.num_clients}: use --split dirichlet")
    if not 0 < args.alpha < float("inf"):
        parser.error(f"--alpha must be above 0, found {args.alpha}")
    return args


def choices_of(args):
    """All that decides the result, as a dict: prepared.json keeps it, --check compares with it."""
    source = str(Path(args.source).expanduser().resolve()) if args.source else None
    if args.index_from:
        files = [str(Path(file).resolve()) for file in args.index_from]
        return {"dataset": "imported", "preprocessing": "imported", "source": source, "index_from": files}
    drawn = args.dataset == "synthetic"
    plain = ("dataset", "image_size", "seed", "num_clients", "split", "share", "balanced")
    here, code = Path(__file__).parent, ("fundus.py",) if drawn else ("photos.py", "datasets.py")
    return {
        **{name: getattr(args, name) for name in plain},
        "alpha": args.alpha if args.split == "dirichlet" else None,
        "preprocessing": "drawn" if drawn else "graham",
        "source": None if drawn else source,
        "num_train": args.num_train if drawn else None,
        "num_val": args.num_val if drawn else None,
        "code": hashlib.sha256(b"".join((here / name).read_bytes() for name in code)).hexdigest()[:12],
    }


def check(choices, skip_broken):
    """Exit code 0 where index/ was made from the choices and is whole; else 10, with a line that says why."""
    try:
        made = json.loads(MADE_FROM.read_text(encoding="utf-8"))
        problems = [f"it was made with {name} {made.get(name)}, not {value}"
                    for name, value in choices.items() if made.get(name) != value]
        if made["skipped"] and not skip_broken:
            problems.append(f"{len(made['skipped'])} unreadable images were left out")
        for name in [f"worker{k + 1}" for k in range(made["num_clients"])] + ["train_set", "val_set"]:
            problems += [f"{record['dir']} is missing" for record in data.read_index(f"index/{name}.pkl")
                         if not os.path.exists(record["dir"])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problems = [f"it is not complete ({error})"]
    if problems:
        print(f"index/ has to be made anew: {problems[0]}")
    return NOT_AS_CHOSEN if problems else 0


def draw_list(args):
    """The synthetic images to draw, as a list of Photo without a path, the grades in GRADE_SHARES' proportions."""
    rng, found = np.random.default_rng([args.seed, 0]), []
    for part, count in (("train", args.num_train), ("val", args.num_val)):
        ends = np.round(np.cumsum(fundus.GRADE_SHARES) * count)
        grades = rng.permutation(np.searchsorted(ends, np.arange(count), side="right"))
        names = [f"{part}_{number:05d}" for number in range(count)]
        found += [datasets.Photo(None, int(grade), name, part, name) for name, grade in zip(names, grades, strict=True)]
    return found


def load(args):
    found = datasets.load(args.dataset, args.source, args.image_size)
    aside = sum(photo.part == "test" for photo in found)
    if aside and not args.balanced:
        print(f"{aside} images of the published test part are left alone, so that you can test with them at the end")
        found = [photo for photo in found if photo.part != "test"]
    return found


def make_pictures(found, choices, skip_broken):
    """Make preprocessed/DATASET/NAME.png of every Photo that has none yet; (those that worked, names of the others).

    Raises ValueError where photographs cannot be read, having named them, unless they may be skipped.
    """
    folder = Path("preprocessed") / choices["dataset"]
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    deciding = ("source", "image_size", "code") + (("seed", "num_train", "num_val") if found[0].path is None else ())
    made_from = json.dumps({name: choices[name] for name in deciding}, indent=1) + "\n"
    if not (folder / "made_from.json").exists() or (folder / "made_from.json").read_text() != made_from:
        for old in folder.glob("*.png"):
            old.unlink()
        publish_text(folder / "made_from.json", made_from)
    jobs = [(photo, folder / f"{photo.name}.png", choices["image_size"], [choices["seed"], 0, number])
            for number, photo in enumerate(found) if not up_to_date(folder / f"{photo.name}.png", photo.path)]
    print(f"{folder}: {len(found) - len(jobs)} pictures are there, {len(jobs)} to make", flush=True)
    problems = dict(filter(None, progress(run(jobs), len(jobs))))
    for name, sentence in problems.items():
        print(f"unreadable: {name}: {sentence}", file=sys.stderr)
    if problems and not skip_broken:
        raise ValueError(f"{len(problems)} of {len(found)} images cannot be used: mend them, or give --skip-broken")
    return [photo for photo in found if photo.name not in problems], sorted(problems)


def up_to_date(target, original):
    """Whether a picture is there and no older than the photograph that it was made from."""
    if original is None or not original.exists():
        return original is None and target.exists()
    return target.exists() and target.stat().st_mtime >= original.stat().st_mtime


def make_picture(job):
    """Make one picture. Returns None, or (name, what is wrong with the photograph)."""
    photo, target, image_size, seed = job
    try:
        if photo.path is None:
            image, _ = fundus.draw(photo.grade, np.random.default_rng(seed), image_size)
        else:
            image = photos.preprocess(photos.open_image(photo.path), image_size)
    except ValueError as error:
        return photo.name, str(error)
    written = temporary(target)
    Image.fromarray(image).save(written)
    os.replace(written, target)
    return None


def run(jobs):
    """The results of make_picture, in order, from a process a processor."""
    if len(jobs) <= FEW:
        yield from map(make_picture, jobs)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), spawn, initializer=end_with_parent) as pool:
        yield from pool.map(make_picture, jobs, chunksize=8)


def end_with_parent():
    """In a process of the pool: leave Ctrl-C to the parent, and end when it is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def progress(results, total):
    """Pass results on and tell how far it is: in a terminal on one line, elsewhere a line each tenth."""
    started, terminal = time.monotonic(), sys.stdout.isatty()
    for done, result in enumerate(results, start=1):
        if terminal or done * 10 // total > (done - 1) * 10 // total:
            rate = done / (time.monotonic() - started)
            end = "\r" if terminal and done < total else "\n"
            print(f"  {done} of {total} pictures, {rate:.0f} a second", end=end, flush=True)
        yield result


def as_records(found, args):
    """What the index says of each Photo, in the order of their names."""
    return [{"picture": f"{photo.name}.png", "label": photo.grade, "new_label": str(photo.grade == 0),
             "dir": f"preprocessed/{args.dataset}/{photo.name}.png"}
            for photo in sorted(found, key=lambda photo: photo.name)]


def write_indexes(workers, train, val, made_from):
    """index/worker1.pkl ..., train_set.pkl and val_set.pkl; then prepared.json, which declares them complete."""
    MADE_FROM.parent.mkdir(exist_ok=True)
    MADE_FROM.unlink(missing_ok=True)
    for old in (*MADE_FROM.parent.glob("worker*.pkl"), MADE_FROM.with_name("split.png")):
        old.unlink(missing_ok=True)
    for number, records in enumerate(workers, start=1):
        data.write_index(MADE_FROM.with_name(f"worker{number}.pkl"), records)
    data.write_index(MADE_FROM.with_name("train_set.pkl"), train)
    data.write_index(MADE_FROM.with_name("val_set.pkl"), val)
    publish_text(MADE_FROM, json.dumps(made_from, indent=1) + "\n")


def show(workers, train, val):
    """The table of grades, the contact sheet and the figure of the split."""
    named = {f"worker{number}": records for number, records in enumerate(workers, start=1)}
    print(overview.table({**named, "training": train, "validation": val}))
    sheet, figure = Path(train[0]["dir"]).with_name("contact_sheet.png"), MADE_FROM.with_name("split.png")
    overview.save_contact_sheet(sheet, train + val)
    drawn = overview.save_split_figure(figure, workers)
    print(f"look at {sheet} and {figure}" if drawn else f"look at {sheet}; {figure} needs matplotlib and was not drawn")


if __name__ == "__main__":
    exit_on_signals("prepare.py: stopped; the finished pictures are kept for the next start")
    sys.exit(main())
