"""Make the pictures of a data set, several at a time, and keep those that are there.

They lie in preprocessed/HASH/, of all that decides what a picture looks like but the photograph
itself, and a picture's name ends in digits of the photograph's own hash. So nothing is ever written
over: other choices or another photograph make another file. Started again after a crash, it goes on
with the pictures that are missing.
"""

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from rich.progress import track

from common.files import clean, publish_text, replacing
from preparation import photos, synthetic

PREPROCESSED = Path("preprocessed")
MADE_FROM = "pictures.json"  # says in each folder what its pictures were made with
OURS = re.compile(r".+_[0-9a-f]{12}\.png")
DOUBT = "doubt"  # the text in a PNG that says why its photograph may be none of a fundus
# Of fewer, a log need not say how far it is.
FEWEST_TO_SAY = 500


class Terminal(Console):
    """rich's, but it does not hide the cursor: a signal that ends the script would leave it so."""

    def show_cursor(self, show=True):
        return False


def folder_of(made_with):
    """The folder of pictures that are made with these choices, a dict of JSON values."""
    text = json.dumps(made_with, sort_keys=True)
    return PREPROCESSED / hashlib.sha256(text.encode()).hexdigest()[:12]


def make_pictures(found, made_with):
    """Make NAME.png of every Photo in `found` that has none yet, in the folder of `made_with`.

    made_with: of prepare.made_with_of. Returns ({name: what is wrong with the photograph},
    {name: why it may be no fundus}).
    """
    folder = folder_of(made_with)
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    publish_text(folder / MADE_FROM, json.dumps(made_with, indent=1) + "\n")
    doubts = {photo.name: doubt_in(folder / f"{photo.name}.png") for photo in found}
    # of a synthetic one, the random numbers follow from its number
    missing = [(i, photo) for i, photo in enumerate(found) if doubts[photo.name] is None]
    problems = {}
    num_there = len(found) - len(missing)
    print(f"{folder}: {num_there} pictures are there, {len(missing)} to make", flush=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow and NumPy work beside each other
        made = pool.map(lambda each: make_picture(*each, folder, made_with), missing)
        made = progress(made, "pictures made", len(missing))
        for (_, photo), (problem, doubt) in zip(missing, made, strict=True):
            doubts[photo.name] = doubt
            if problem:
                problems[photo.name] = problem
    return problems, {name: doubt for name, doubt in doubts.items() if doubt}


def doubt_in(path):
    """The doubt that a picture holds, "" for none; None where there is no such picture."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return picture.info.get(DOUBT, "")
    except OSError:
        return None


def progress(items, what, total, stderr=False):
    """Yields the items; with a bar on a terminal, and in a log, of many, a line for each tenth."""
    bar = Terminal(stderr=stderr)
    if bar.is_terminal:
        yield from track(items, what, total, console=bar)
        return
    for done, item in enumerate(items, start=1):
        yield item
        if total >= FEWEST_TO_SAY and done * 10 // total > (done - 1) * 10 // total:
            print(f"  {done:,} of {total:,} {what}", file=bar.file, flush=True)


def make_picture(number, photo, folder, made_with):
    """Make one picture: (what is wrong with it, why it may be no fundus), "" where nothing is."""
    doubt = ""
    try:
        if photo.path is None:
            rng = np.random.default_rng([made_with["seed"], 0, number])
            hospital = synthetic.hospital_of(photo.hospital)
            image = synthetic.draw(photo.grade, rng, made_with["image_size"], hospital=hospital)
        elif made_with["dataset"] == "imported":
            image = np.asarray(photos.open_image(photo.path))
            if not made_with["keep_channels"]:  # OpenCV wrote them in the other order
                image = np.ascontiguousarray(image[..., ::-1])
        else:
            image, doubt = photos.prepare_photograph(
                photo.path, made_with["image_size"], made_with["preprocessing"]
            )
    except ValueError as error:
        return str(error), ""
    text = PngInfo()
    if doubt:
        text.add_text(DOUBT, doubt)
    with replacing(folder / f"{photo.name}.png") as written:
        Image.fromarray(image).save(written, pnginfo=text)
    return "", doubt


# --- folders of other choices --------------------------------------------------------------------


def tell_other_folders(used, remove):
    """List the folders of pictures but `used`, with their size; remove: what is ours in them."""
    for listed in sorted(PREPROCESSED.glob(f"*/{MADE_FROM}")):
        folder = listed.parent
        if folder == used:
            continue
        ours = [path for path in folder.iterdir() if OURS.fullmatch(path.name)]
        megabytes = sum(path.stat().st_size for path in ours) / 1e6
        size = f"{folder}: {len(ours):,} pictures, {megabytes:,.0f} MB"
        if not remove:
            print(f"{size} that no index here points to (--remove-old removes them)")
            continue
        for path in (*ours, listed):
            path.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
        print(f"{size} removed")
