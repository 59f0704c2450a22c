"""Make the pictures of a data set in preprocessed/, several at a time, and keep those that are there.

Started again after a crash, it goes on with the pictures that are missing.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
from PIL import Image

from common.files import clean, publish_text, replacing
from preparation import fundus, photos

# What decides how a picture looks. A drawn picture follows from its seed and its number, too.
DECIDING = ("source", "index_from", "image_size", "code")
DECIDING_DRAWN = (*DECIDING, "seed", "num_train", "num_val", "hospitals")
# For fewer pictures than this, starting processes takes longer than it saves.
FEWEST_FOR_PROCESSES = 51


def make_pictures(found, choices, folder):
    """Make folder/NAME.png of every Photo in `found` that has none yet.

    choices: a dict of all that decides the result, as prepare.py keeps it in prepared.json.
    Returns {name: what is wrong with the photograph} for those that could not be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    remove_outdated(folder, choices)
    # An imported data set lists an image once for each index that it is in.
    unique = {photo.name: photo for photo in found}
    jobs = []
    for number, photo in enumerate(unique.values()):
        target = folder / f"{photo.name}.png"
        if not is_made(photo, target):
            jobs.append((photo, target, choices, number))
    num_kept = len(unique) - len(jobs)
    print(f"{folder}: {num_kept} pictures are there, {len(jobs)} to make", flush=True)
    return run_jobs(jobs)


def remove_outdated(folder, choices):
    """Remove the pictures in `folder` if they were made from other choices."""
    drawn = choices["preprocessing"] == "drawn"
    deciding = DECIDING_DRAWN if drawn else DECIDING
    made_from = json.dumps([choices.get(name) for name in deciding])
    stamp = folder / "made_from.json"
    if stamp.exists() and stamp.read_text() == made_from:
        return
    for old in folder.glob("*.png"):
        old.unlink()
    publish_text(stamp, made_from)


def is_made(photo, target):
    """Whether the picture `target` is there, and was made from the photograph as it is now."""
    if not target.exists():
        return False
    if photo.path is None:
        return True
    return photo.path.exists() and modified_s(photo.path) == modified_s(target)


def modified_s(path):
    """The time of the last change of a file, in whole seconds since 1970."""
    return int(path.stat().st_mtime)


def run_jobs(jobs):
    """Run make_picture on every job, with a line of progress. Returns all its problems as a dict."""
    if len(jobs) < FEWEST_FOR_PROCESSES:
        pool = ThreadPoolExecutor(1)
    else:
        pool = ProcessPoolExecutor(
            # "spawn": a forked process would inherit this one's locks and threads.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=end_with_parent,
        )
    problems = {}
    started = time.monotonic()
    with pool:
        for done, problem in enumerate(pool.map(make_picture, jobs, chunksize=8), start=1):
            problems.update(problem)
            show_progress(done, len(jobs), time.monotonic() - started)
    return problems


def show_progress(done, total, seconds):
    """One line that rewrites itself on a terminal; in a log file, a line for every tenth."""
    terminal = sys.stdout.isatty()
    num_steps = 100 if terminal else 10
    if done * num_steps // total == (done - 1) * num_steps // total:
        return
    end = "\r" if terminal and done < total else "\n"
    print(f"  {done} of {total} pictures, {done / seconds:.0f} a second", end=end, flush=True)


def end_with_parent():
    """In a process of the pool: leave Ctrl-C to the parent, and end when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def wait_and_exit():
        parent.join()  # also returns if the parent was killed
        os._exit(1)

    threading.Thread(target=wait_and_exit, daemon=True).start()


def make_picture(job):
    """Make one picture. Returns {}, or {name: what is wrong with the photograph}."""
    photo, target, choices, number = job
    try:
        if photo.path is None:
            rng = np.random.default_rng([choices["seed"], 0, number])
            hospital = fundus.hospital_of(photo.hospital)
            image, _ = fundus.draw(photo.grade, rng, choices["image_size"], hospital=hospital)
        elif choices["preprocessing"] == "imported":
            image = np.asarray(photos.open_image(photo.path))
        else:
            image = photos.preprocess(photos.open_image(photo.path), choices["image_size"])
    except ValueError as error:
        return {photo.name: str(error)}
    with replacing(target) as written:
        Image.fromarray(image).save(written)
        if photo.path is not None:
            # The picture has the date of its photograph. A photograph with another date, be it
            # older or newer, is another photograph.
            date = modified_s(photo.path)
            os.utime(written, (date, date))
    return {}
