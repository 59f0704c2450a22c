"""DR scores (0 to 1) of new photographs, which are prepared as the training images were.

    python3 predict.py eye1.jpg eye2.png
    python3 predict.py --csv scores.csv photographs/ others/*_left.jpg
    python3 predict.py --weights somewhere/server_weight.h5 eye1.jpg
    python3 predict.py --labels graded/labels.csv --sensitivity 0.9 photographs/

The model card beside the weight file (server_weight.json) says how: the network, the preparation of
the photographs, what its answer means as a probability of referable DR (grade 2 or more) among such
patients as it was validated on, and the score above which that is suspected. A picture
that is no gradable photograph of a fundus gets no score. Exit code 1: something was not scored that
should have been.
"""

import argparse
import csv
import io
import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.log import fail, plain, say, warn
from common.script import (
    end_script,
    exit_on_signals,
    fraction,
    new_file,
    new_parser,
    start_script,
)

if __name__ == "__main__":
    start_script()  # before the packages, so that a missing one is a sentence
    exit_on_signals("predict", "stopped")

import numpy as np
from PIL import Image

import model
from common import files
from preparation import datasets, photos, pictures, synthetic
from preparation.tables import few
from reporting import card as cards
from reporting import metrics
from reporting.metrics import TASK

AT_ONCE = 64  # photographs that are prepared, then scored together
CSV_COLUMNS = ("path", "score", "threshold", "verdict", "model", "reason")
CLEARED = f"no {TASK}"
NOT_GRADABLE = "not gradable"
FAILED = ("not readable", "not scored")  # verdicts that make the exit code 1


@dataclass
class Result:
    """What became of one photograph."""

    path: str
    score: float | None = None  # of the card, 0..1; None where there is none
    verdict: str = ""
    reason: str = ""  # why there is no score
    image: np.ndarray | None = None  # uint8 (size, size, 3), until it is scored


def main(argv=None):
    args = parse(argv)
    try:
        graded, absent = read_graded(args)
        paths, skipped = find_images([*args.images, *graded])
        weights = args.weights or weights_here()
        card = cards.read(weights)
        if card["num_nan"]:
            raise ValueError(f"{weights} must not be used: {card['warning']}")
        check_kinds(card, paths)
        model.configure(seed=0)
        network = model.build(card["arch"], card["image_size"])
        model.load(network, weights)
    except (ValueError, OSError) as error:
        return fail("predict", error)
    sha256 = card["weights_sha256"][:12]
    say("predict", f"model: {weights}, of round {card['round']}, SHA-256 {sha256}...")
    if card["warning"]:
        warn("predict", f"warning: this model must not be used: {card['warning']}")
    scored = score_all(network, card, paths)
    results = list(pictures.progress(scored, "photographs scored", len(paths), stderr=True))
    threshold, table = judge(results, graded, args, card["tasks"][TASK]["threshold"])
    show(results, args.csv is None)
    if args.csv:
        write_csv(args.csv, results, threshold, sha256)
        say("predict", f"{args.csv} is written")
    for line in [*table, summary_of(results), *datasets.count_kinds("skipped", skipped)]:
        say("predict", line)
    warn("predict", "no medical device: decide nothing about a patient by these scores")
    return int(bool(absent) or any(result.verdict in FAILED for result in results))


def parser():
    """The argparse.ArgumentParser of this script's flags."""
    made = new_parser(__doc__)
    add = made.add_argument
    add(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="a JPEG, PNG, TIFF, BMP, WebP or DICOM file, or a folder (all images in it and below "
        "it). A picture in preprocessed/ is prepared already",
    )
    add(
        "--weights",
        type=Path,
        metavar="FILE",
        help="the model; its card, FILE with .json in place of .h5, lies beside it (default: the "
        "result that lies here, client001/server_weight.h5 or server/server_weight.h5)",
    )
    add("--csv", type=new_file, metavar="FILE", help=f"write a table of {', '.join(CSV_COLUMNS)}")
    add = made.add_mutually_exclusive_group().add_argument
    add("--threshold", type=fraction, help="the score above which it is referable (the model's)")
    add(
        "--sensitivity",
        type=fraction,
        help="choose the best threshold that finds at least this part of those with referable DR "
        "in half of the patients of --labels; what is measured is of the other half",
    )
    add = made.add_argument_group("photographs that are graded already").add_argument
    add(
        "--labels",
        type=Path,
        metavar="FILE",
        help="a table of photographs beside it, with grades: they are scored, too, and "
        "sensitivity, specificity and AUC are told with 95 %% intervals",
    )
    datasets.add_flags(add, ("image", "label", "patient", "part"))
    made.set_defaults(hospital_column="none")
    return made


def parse(argv):
    known = parser()
    args = known.parse_args(argv)
    if not args.images and not args.labels:
        known.error("expected images, or --labels with a table that names some")
    if args.sensitivity is not None and not args.labels:
        known.error("--sensitivity needs --labels: photographs that are graded already")
    return args


# --- what there is --------------------------------------------------------------------------------


def find_images(arguments):
    """(paths of all images, each once; paths that were skipped) of files and folders.

    Raises ValueError for a folder in which there is no image. A file that is missing stays in the
    list: it gets its own sentence when it is opened.
    """
    images, skipped = [], []
    for argument in arguments:
        if not Path(argument).is_dir():
            images.append(argument)
            continue
        found = list(datasets.walk(argument))
        fitting = [path for path in found if path.suffix.lower() in photos.SUFFIXES]
        if not fitting:
            raise ValueError(f"{argument} has no image ({', '.join(photos.SUFFIXES)})")
        images += map(str, fitting)
        skipped += [path for path in found if path not in fitting]
    # one by its full and by a relative path is called as it was last: as --labels does
    return list({Path(image).absolute(): image for image in images}.values()), skipped


def read_graded(args):
    """({path: datasets.Photo}, names without a photograph), of what --labels names."""
    if not args.labels:
        return {}, []
    flags = argparse.Namespace(**{**vars(args), "labels": args.labels.name})
    found = datasets.load("folder", args.labels.parent, flags)
    for note in found.notes:
        say("predict", note)
    for why, images in found.left_out.items():
        say("predict", f"{args.labels}: {len(images):,} images {why}: {few(images)}")
    say("predict", f"patients: {found.patients_sentence}")
    found.left_out.pop(datasets.UNGRADABLE, None)  # nobody can score these
    absent = [name for images in found.left_out.values() for name in images]
    return {str(photo.path): photo for photo in found.photos}, absent


def weights_here():
    """The weight file of the result that lies in this project. Raises ValueError for several."""
    # a client is called as its hospital likes
    found = [*sorted(Path().glob("*/server_weight.h5")), Path("server/server_weight.h5")]
    models = {files.sha256_of(path): path for path in reversed(found) if path.exists()}
    if len(models) > 1:
        some = ", ".join(map(str, models.values()))
        raise ValueError(f"there are {len(models)} models here: {some}; say which by --weights")
    return next(iter(models.values()), found[-1])


def kind_of_pictures(path):
    """What was done to a picture that prepare.py made, by its folder; None for any other file."""
    try:
        text = (Path(path).parent / pictures.MADE_FROM).read_text(encoding="utf-8")
        return str(json.loads(text)["preprocessing"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_kinds(card, paths):
    """Raise ValueError where the model was trained on another kind of pictures: no score is meant.

    Of a model whose pictures are of a kind that nobody knows, imported ones say, that is only told.
    """
    trained_on = card["preprocessing"]
    # one that is missing is told when it is opened
    kinds = {kind_of_pictures(path) for path in paths if Path(path).exists()}
    if None in kinds and trained_on == synthetic.KIND:
        raise ValueError(
            "the model was trained on synthetic eyes, and its score of a photograph would say "
            "nothing: give it pictures in preprocessed/, or --weights of a model for photographs"
        )
    if trained_on not in cards.KINDS_OF_PICTURES:
        warn(
            "predict",
            "warning: how the model's training images were prepared is not known "
            f"({trained_on}): photographs are prepared as prepare.py does by itself (graham)",
        )
        return
    for kind in sorted(kinds & set(cards.KINDS_OF_PICTURES) - {trained_on}):
        raise ValueError(
            f"some pictures were made by {kind!r}, those that the model was trained on by "
            f"{trained_on!r}: its score of them would say nothing"
        )


# --- scoring --------------------------------------------------------------------------------------


def score_all(network, card, paths):
    """Yields a Result for each path, in order."""
    # Decoding takes longer than scoring, and Pillow decodes in several threads at once.
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), AT_ONCE):  # so that memory does not follow their number
            results = list(pool.map(partial(prepare, card), paths[start : start + AT_ONCE]))
            gradable = [result for result in results if result.image is not None]
            if gradable:
                images = np.stack([result.image for result in gradable])
                scores = cards.score(card, TASK, model.predict(network, images))
                for result, score in zip(gradable, scores, strict=True):
                    result.image = None
                    if np.isnan(score):
                        result.verdict, result.reason = "not scored", "the model answers NaN"
                    else:
                        result.score = float(score)
            yield from results


def prepare(card, path):
    """A Result without a score; with the image where it is to be scored."""
    try:
        if kind_of_pictures(path):  # it was judged when it was made
            pixels, doubt = np.asarray(photos.open_image(path)), pictures.doubt_in(path)
        else:
            # The function that made the training images, so that the score is of the same picture.
            trained_on = card["preprocessing"]
            known = trained_on if trained_on in photos.PREPROCESSINGS else "graham"
            pixels, doubt = photos.prepare_photograph(path, card["prepared_image_size"], known)
    except ValueError as error:
        return Result(path, verdict="not readable", reason=str(error))
    if doubt:
        return Result(path, verdict=NOT_GRADABLE, reason=doubt)
    size = (card["image_size"], card["image_size"])
    return Result(path, image=np.asarray(Image.fromarray(pixels).resize(size)))


def judge(results, graded, args, threshold):
    """Give each scored Result its verdict: (the threshold or None, lines about what was measured).

    graded: {path: Photo}. threshold: the model's own, or None.
    """
    known = [result for result in results if result.path in graded and result.score is not None]
    score = np.array([result.score for result in known])
    grades = np.array([graded[result.path].grade for result in known], int)
    patients = np.array([graded[result.path].patient for result in known], str)
    positive = grades >= metrics.TASKS[TASK]
    reported = np.ones(len(known), bool)
    if args.threshold is not None:
        threshold = args.threshold
    elif args.sensitivity is not None:
        chooses = metrics.choosing_half(grades, patients)
        threshold = metrics.choose_threshold(score[chooses], positive[chooses], args.sensitivity)
        reported = ~chooses
    for result in results:
        if result.score is not None and threshold is not None:
            result.verdict = TASK if result.score > threshold else CLEARED
    if not graded:
        return threshold, []
    at = 0.5 if threshold is None else threshold
    here = metrics.measure(score[reported], positive[reported], patients[reported], at)
    lines = [
        f"{TASK} in {reported.sum():,} graded photographs of "
        f"{len(set(patients[reported])):,} patients, {positive[reported].sum():,} with it, at the "
        f"threshold {at:.4g}{' (there is none)' if threshold is None else ''}:"
    ]
    for name in ("sensitivity", "specificity", "auc"):
        value, low, high = map(cards.number, here[name])
        lines.append(f"  {name:11}  {value} ({low} to {high})")
    return threshold, lines


# --- what the user sees ---------------------------------------------------------------------------


def show(results, with_scores):
    """A line for each photograph; those that were scored only if `with_scores`."""
    for result in results:
        path, reason = plain(result.path), plain(result.reason)  # others may have named the file
        if result.verdict in FAILED:
            fail("predict", reason if path in reason else f"{path}: {reason}")
        elif with_scores and result.score is None:
            print(f"{path}  {result.verdict}: {reason}")
        elif with_scores:
            print(f"{path}  score {result.score:.3f}  {result.verdict}".rstrip())
    sys.stdout.flush()


def summary_of(results):
    """'500 images: 120 referable DR, 378 no referable DR, 2 not readable'"""
    counts = Counter(result.verdict or "scored" for result in results)
    return f"{len(results)} images: " + ", ".join(f"{n} {what}" for what, n in counts.items())


def write_csv(path, results, threshold, sha256):
    """Publish the table, with a byte order mark: without one a spreadsheet misreads `München`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for result in results:
        # all digits: a verdict of these two cells is that of the third
        numbers = ["" if each is None else str(each) for each in (result.score, threshold)]
        cells = (result.path, *numbers, result.verdict, sha256, result.reason)
        writer.writerow(map(plain_cell, cells))
    files.publish_text(path, "\ufeff" + text.getvalue())


def plain_cell(cell):
    """A cell that no spreadsheet takes for a formula, in UTF-8.

    A file name on Linux is bytes: what is no UTF-8 in it is written as \\udc..
    """
    text = cell.encode("utf-8", "backslashreplace").decode()
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


if __name__ == "__main__":
    end_script(main())
