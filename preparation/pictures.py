"""Make the pictures of a data set, several at a time, and keep those that are there.

Started again after a crash, it goes on with the pictures that are missing.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.files import temporary
from preparation import photos, synthetic
from preparation.written import publish_listed

# For fewer pictures than this, starting processes takes longer than it saves.
FEWEST_FOR_PROCESSES = 51


class Job(NamedTuple):
    """A picture to make."""

    photo: object  # datasets.Photo
    number: int  # of the photo in the data set; a drawing's random numbers follow from it
    target: object  # path
    choices: dict  # what prepare.py was told
    made_from: str  # see `stamp`


class Made(NamedTuple):
    """What became of a Job."""

    name: str
    problem: str = ""  # why the photograph could not be used
    doubt: str = ""  # why its field of view is implausible
    warnings: tuple = ()  # sentences of Pillow
    entry: dict | None = None  # of WrittenFiles


def make_pictures(found, choices, listed):
    """Make NAME.png of every Photo in `found` that has none yet, in the folder of `listed`.

    choices: a dict of all that decides the result, as prepare.py keeps it in prepared.json.
    listed: WrittenFiles. Returns ({name: what is wrong with the photograph}, {name: doubt}).
    """
    jobs = []
    doubts = {}
    targets = set()
    for number, photo in enumerate(found):
        target = listed.folder / f"{photo.name}.png"
        targets.add(target.name)
        made_from = stamp(photo, number, choices)
        entry = listed.entry(target)
        if entry and entry.get("made_from") == made_from:
            doubts[photo.name] = entry.get("doubt", "")
        else:
            jobs.append(Job(photo, number, target, choices, made_from))
    for job in jobs:
        listed.clear(job.target)
    for name in [name for name in listed.entries if name not in targets]:
        if listed.entry(listed.folder / name):
            listed.clear(listed.folder / name)  # a picture of ours, of other choices
    num_kept = len(found) - len(jobs)
    print(f"{listed.folder}: {num_kept} pictures are there, {len(jobs)} to make", flush=True)
    problems = {}
    for made in run_jobs(jobs):
        for sentence in made.warnings:
            print(f"warning: {sentence}", file=sys.stderr)
        if made.problem:
            problems[made.name] = made.problem
        else:
            doubts[made.name] = made.doubt
            listed.add(made.entry)
    return problems, {name: doubt for name, doubt in doubts.items() if doubt}


def stamp(photo, number, choices):
    """What a picture is made from, as a short text: if anything of it changes, the text changes.

    Of a photograph: path, size and time of the last change in nanoseconds. The text is a hash: a
    path may hold a patient's name.
    """
    deciding = [choices["preprocessing"], choices["code"], choices["channels"]]
    deciding.append(choices["image_size"])
    if photo.path is None:
        deciding += [choices["seed"], number, photo.grade, photo.hospital]
    else:
        state = os.stat(photo.path)
        deciding += [os.path.abspath(photo.path), state.st_size, state.st_mtime_ns]
    return hashlib.sha256(json.dumps(deciding).encode()).hexdigest()[:32]


def run_jobs(jobs):
    """Run make_picture on every job, with a line of progress. Yields what became of each."""
    if len(jobs) < FEWEST_FOR_PROCESSES:
        pool = ThreadPoolExecutor(1)
    else:
        pool = ProcessPoolExecutor(
            # "spawn": a forked process would inherit this one's locks and threads.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=end_with_parent,
        )
    started = time.monotonic()
    with pool:
        for done, made in enumerate(pool.map(make_picture, jobs, chunksize=8), start=1):
            show_progress(done, len(jobs), time.monotonic() - started)
            yield made


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
    """Make one picture. Returns a Made."""
    name = job.photo.name
    doubt = ""
    with warnings.catch_warnings(record=True) as caught:
        # Pillow warns of odd files; whoever reads it must know of which.
        warnings.simplefilter("always")
        try:
            if job.photo.path is None:
                image = draw(job)
            elif job.choices["preprocessing"] == "imported":
                image = import_picture(job.photo.path, job.choices["channels"])
            else:
                image, doubt = photos.prepare_photograph(
                    job.photo.path, job.choices["image_size"], job.choices["preprocessing"]
                )
        except ValueError as error:
            return Made(name, problem=str(error))
    sentences = tuple(dict.fromkeys(f"{job.photo.path}: {each.message}" for each in caught))
    written = temporary(job.target)
    try:
        Image.fromarray(image).save(written)
        facts = {"made_from": job.made_from}
        if doubt:
            facts["doubt"] = doubt
        entry = publish_listed(written, job.target, facts)
    finally:
        written.unlink(missing_ok=True)
    return Made(name, doubt=doubt, warnings=sentences, entry=entry)


def draw(job):
    """A drawn photograph: uint8 (image_size, image_size, 3)."""
    rng = np.random.default_rng([job.choices["seed"], 0, job.number])
    hospital = synthetic.hospital_of(job.photo.hospital)
    image, _ = synthetic.draw(job.photo.grade, rng, job.choices["image_size"], hospital=hospital)
    return image


def import_picture(path, channels):
    """A picture of the thesis as it is: uint8 (height, width, 3).

    channels: "exchanged" puts red and blue right; OpenCV wrote them in the other order.
    """
    image = np.asarray(photos.open_image(path))
    return np.ascontiguousarray(image[..., ::-1]) if channels == "exchanged" else image
