"""DR scores (0 healthy ... 1 DR) of new photographs, prepared as the training images were.

    python3 predict.py eye1.jpg eye2.png
    python3 predict.py --csv scores.csv photographs/ 'others/*_left.jpg'
    python3 predict.py --weights somewhere/server_weight.h5 eye1.jpg

The model card beside the weight file (server_weight.json) says how: the network, the preparation of
the photographs, and the score above which referable DR (grade 2 or more) is suspected.
"""

import argparse
import csv
import glob
import io
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from common.log import fail, say, warn
from common.script import end_script, exit_on_signals, start_script

if __name__ == "__main__":
    start_script()  # before the packages, so that a missing one is a sentence

import numpy as np
from PIL import Image

import model
from common import files
from preparation import photos
from preparation.pictures import FEWEST_FOR_PROCESSES, end_with_parent
from reporting import card as cards

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp")
AT_ONCE = 64  # photographs that are prepared, then scored together
CSV_COLUMNS = ("path", "score", "verdict", "reason")
REFERABLE = "referable DR"
NOT_REFERABLE = "no referable DR"


@dataclass
class Result:
    """What became of one photograph."""

    path: str
    score: float | None = None  # 0 healthy ... 1 DR; None where it could not be read
    verdict: str = ""
    reason: str = ""  # why it could not be read


def main(argv=None):
    args = parse(argv)
    try:
        paths = find_images(args.images)
        check_writable(args.csv)
        card = cards.read(args.weights)
        model.configure(seed=0)
        network = model.build(card["arch"], card["image_size"])
        model.load(network, args.weights)
    except (ValueError, OSError) as error:
        return fail("predict", error)
    for warning in warnings_of(card, paths):
        warn("predict", f"warning: {warning}")
    results = []
    for result in score_all(network, card, paths, progress=Progress(len(paths), bool(args.csv))):
        results.append(result)
        if result.reason:
            fail("predict", result.reason)
        elif not args.csv:
            print(f"{result.path}  DR score {result.score:.3f}  {result.verdict}".rstrip())
            sys.stdout.flush()
    num_unreadable = sum(result.score is None for result in results)
    if args.csv:
        write_csv(args.csv, results)
        say("predict", f"{args.csv}: {summary_of(results)}")
    warn("predict", "no medical device: decide nothing about a patient by these scores")
    return 1 if num_unreadable else 0


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="a JPEG, PNG, TIFF or BMP; a folder (all images in it and below it); or a pattern. "
        "A picture in preprocessed/ is prepared already",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        default=Path("server/server_weight.h5"),
        metavar="FILE",
        help="the model; its card, FILE with .json in place of .h5, lies beside it (%(default)s)",
    )
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="write path, score, verdict and reason to FILE"
    )
    return parser.parse_args(argv)


def find_images(arguments):
    """The paths (texts) of all images that files, folders and patterns name; each once.

    Raises ValueError for a folder or a pattern in which there is none. A file that is missing stays
    in the list: it gets its own sentence when it is opened.
    """
    paths = []
    for argument in arguments:
        if Path(argument).is_dir():
            found = [str(path) for path in sorted(Path(argument).rglob("*")) if is_image(path)]
            if not found:
                raise ValueError(f"{argument} has no image ({', '.join(SUFFIXES)}) in it or below")
        elif not Path(argument).exists() and glob.has_magic(argument):
            matches = sorted(glob.glob(argument, recursive=True))
            found = [path for path in matches if Path(path).is_file()]
            if not found:
                raise ValueError(f"no file matches {argument}")
        else:
            found = [argument]
        paths += found
    return list(dict.fromkeys(paths))


def is_image(path):
    # A name that begins with "._" is macOS's note on the file whose name follows.
    return path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith("._")


def check_writable(path):
    """Raises ValueError where --csv FILE could not be written after an hour of scoring."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ValueError(f"--csv {path} cannot be written: expected a file in a folder that exists")


# --- kinds of images ------------------------------------------------------------------------------


def is_prepared(path):
    """Whether it lies in preprocessed/: prepare.py made it, and it is not prepared once more."""
    return Path("preprocessed").resolve() in Path(path).resolve().parents


def preprocessing_here():
    """What index/prepared.json says was done to the pictures in preprocessed/, or "unknown"."""
    try:
        prepared = json.loads(Path("index/prepared.json").read_text(encoding="utf-8"))
        return str(prepared["preprocessing"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def warnings_of(card, paths):
    """What must be said once, before any score: sentences."""
    sentences = []
    if card["warning"]:
        sentences.append(f"this model must not be used: {card['warning']}")
    trained_on = card["preprocessing"]
    prepared = [path for path in paths if is_prepared(path)]
    if len(prepared) < len(paths):
        if trained_on == "drawn":
            sentences.append(
                "the model was trained on drawn images: its score of a photograph says nothing"
            )
        elif trained_on not in photos.PREPROCESSINGS:
            sentences.append(
                f"how the model's training images were prepared is not known ({trained_on}): "
                "these are prepared as prepare.py prepares photographs by itself (graham)"
            )
    if prepared and preprocessing_here() != trained_on:
        sentences.append(
            f"the pictures in preprocessed/ were made by {preprocessing_here()!r}, those that the "
            f"model was trained on by {trained_on!r}: a score of them says nothing"
        )
    return sentences


# --- scoring --------------------------------------------------------------------------------------


def score_all(network, card, paths, progress):
    """Yields a Result for each path, in order."""
    jobs = [
        (path, card["preprocessing"], card["prepared_image_size"], card["image_size"])
        for path in paths
    ]
    # Decoding a photograph takes longer than scoring it, so several processes share that.
    if len(jobs) < FEWEST_FOR_PROCESSES:
        yield from score_jobs(network, card, jobs, map, progress)
        return
    # "spawn": a fork of this process would inherit the locks of TensorFlow's threads
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(mp_context=context, initializer=end_with_parent) as pool:
        yield from score_jobs(network, card, jobs, pool.map, progress)


def score_jobs(network, card, jobs, run, progress):
    threshold = cards.threshold_of(card)
    for start in range(0, len(jobs), AT_ONCE):  # so that memory does not follow their number
        prepared = list(run(prepare, jobs[start : start + AT_ONCE]))
        readable = [pixels for _, pixels, reason in prepared if not reason]
        scores = iter(())
        if readable:
            scores = iter(1 - model.predict(network, np.stack(readable)))
        for path, _, reason in prepared:
            if reason:
                yield Result(path, reason=reason)
            else:
                score = float(next(scores))
                yield Result(path, score, verdict_of(score, threshold))
        progress.show(start + len(prepared))


def prepare(job):
    """(path, uint8 (size, size, 3) or None, why it could not be read or "")."""
    path, preprocessing, prepared_image_size, image_size = job
    try:
        if preprocessing == "drawn" or is_prepared(path):
            image = photos.open_image(path)
        else:
            # The function that made the training images, so that the score is of the same picture.
            known = preprocessing if preprocessing in photos.PREPROCESSINGS else "graham"
            pixels, _ = photos.prepare_photograph(path, prepared_image_size, known)
            image = Image.fromarray(pixels)
    except ValueError as error:
        sentence = str(error)
        return path, None, sentence if sentence.startswith(path) else f"{path}: {sentence}"
    return path, np.asarray(image.resize((image_size, image_size))), ""


def verdict_of(score, threshold):
    """What the score means at the card's threshold; "" where the model has none."""
    if threshold is None:
        return ""
    return REFERABLE if score > threshold else NOT_REFERABLE


# --- what the user sees ---------------------------------------------------------------------------


class Progress:
    """A line on a terminal that rewrites itself, where the scores themselves do not show it."""

    def __init__(self, total, writes_file):
        self.total = total
        self.started = time.monotonic()
        scores_are_seen = sys.stdout.isatty() and not writes_file
        self.shown = sys.stderr.isatty() and not scores_are_seen

    def show(self, done):
        if not self.shown:
            return
        rate = done / (time.monotonic() - self.started)
        filled = 30 * done // self.total
        bar = "#" * filled + "." * (30 - filled)
        end = "\n" if done == self.total else "\r"
        line = f"[{bar}] {done} of {self.total}, {rate:.0f} a second"
        print(line, end=end, file=sys.stderr, flush=True)


def summary_of(results):
    """'500 images: 120 referable DR, 378 no referable DR, 2 not readable'"""
    counts = {}
    for result in results:
        what = "not readable" if result.score is None else result.verdict or "scored"
        counts[what] = counts.get(what, 0) + 1
    return f"{len(results)} images: " + ", ".join(f"{n} {what}" for what, n in counts.items())


def write_csv(path, results):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for result in results:
        score = "" if result.score is None else f"{result.score:.6f}"
        # a file name on Linux is bytes: what is no UTF-8 in it is written as \\x..
        cells = (result.path, score, result.verdict, result.reason)
        writer.writerow(cell.encode("utf-8", "backslashreplace").decode() for cell in cells)
    files.publish_text(path, text.getvalue())


if __name__ == "__main__":
    exit_on_signals("predict", "stopped")
    end_script(main())
