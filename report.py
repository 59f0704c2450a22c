"""The result of a run as one page, server/report.html.

The page needs nothing else: no network, no script, no other file.

    python3 report.py
    python3 report.py --compare compare.csv      # with the curves of ./compare.sh

Clients' images and training times are shown where they are on this machine.
Needs the packages of requirements-report.txt.
"""

import argparse
import csv
import importlib.util
import json
import math
from pathlib import Path

from common.log import fail, say
from common.script import end_script, exit_on_signals, start_script

if __name__ == "__main__":
    start_script()  # before the packages, so that a missing one is a sentence

import numpy as np

import data
import model
from common import files
from reporting import card as cards
from reporting.metrics import METRICS, TASKS, choosing_half, measure

# At most so many images of a client are scored, taken evenly: vgg16 needs 0.3 s for one.
MAX_CLIENT_IMAGES = 500
NEEDED_STATE = ("run", "clients", "arch", "image_size", "seed", "rounds", "history")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--server-dir", type=Path, default=Path("server"), metavar="DIR", help="(server)")
    add("--index-dir", type=Path, default=Path("index"), metavar="DIR", help="(index)")
    add("--compare", type=Path, metavar="FILE", help="what ./compare.sh wrote of this data set")
    add("--out", type=Path, metavar="FILE", help="(SERVER_DIR/report.html)")
    args = parser.parse_args(argv)
    out = args.out or args.server_dir / "report.html"
    try:
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("the report needs matplotlib: pip install -r requirements-report.txt")
        from reporting.page import page

        run = load(args)
        files.publish_text(out, page(run))
    except (ValueError, OSError) as error:
        return fail("report", error)
    say("report", f"{out}: {summary_line(run)}")
    return 0


def summary_line(run):
    """'round 10/10, 300 held-out images of 300 patients: AUC 0.991 (0.984 to 0.997); ...'"""
    card = run["card"]
    any_dr = card["tasks"]["any DR"]["measured"]
    referable = card["tasks"]["referable DR"]["measured"]
    line = (
        f"round {len(run['history'])}/{run['rounds']}, {card['num_images']} held-out images of "
        f"{card['num_patients']} patients, half of them scored: "
        f"AUC {interval_text(any_dr['auc'])}; referable DR: AUC {interval_text(referable['auc'])}"
    )
    if card["warning"]:
        return f"{line}; this model must not be used: {card['warning']}"
    return (
        f"{line}, sensitivity {interval_text(referable['sensitivity'])}, "
        f"specificity {interval_text(referable['specificity'])}"
    )


def interval_text(measured):
    value, low, high = measured
    return "unknown" if value is None else f"{value:.3f} ({low:.3f} to {high:.3f})"


def load(args):
    """The server's state as a dict, with what the page needs beside it.

    card, best_card   the model cards of the last and of the best round; best_card may be None
    val               records of the validation images; grades (n,) and choosing, bool (n,), of them
    p_healthy         what the merged model says of each, (n,)
    sites             {client: its training history, records and metrics}, as far as known here
    training          what the clients of this machine trained with: {"epochs": {1}, ...}
    training_seconds  {round: seconds of the slowest client}
    client_scores     {client: the last row of server/clients.csv}
    compared          {series: rows} of --compare, and compared_tasks, {series: tasks} of the file
                      compare.json beside it: what a model card says of a model's scores
    """
    run = files.load_state(args.server_dir / "state.json", NEEDED_STATE)
    if run is None or not run["history"]:
        raise ValueError(
            f"{args.server_dir / 'state.json'} knows no finished round: "
            "start a run with ./run_local.sh"
        )
    weights = args.server_dir / "server_weight.h5"
    card = cards.read(weights)
    if (card["run"], card["round"]) != (run["run"], len(run["history"])):
        raise ValueError(
            f"{cards.path_of(weights)} is of run {card['run']}, round {card['round']}, and the "
            f"state of run {run['run']}, round {len(run['history'])}: start the server again"
        )
    val_path = args.index_dir / "val_set.pkl"
    val = data.read_index(val_path)
    if files.sha256_of(val_path) != card["validation_sha256"]:
        raise ValueError(
            f"{val_path} is not the validation set that this run was scored on (data set "
            f"{card['dataset']}): prepare that one again, or give its folder as --index-dir"
        )
    model.configure(card["seed"])
    network = model.build(card["arch"], card["image_size"])
    model.load(network, weights)
    grades = np.array([record["label"] for record in val])
    threshold = cards.used_threshold(card, "any DR")
    sites = {
        name: load_site(name, args.index_dir, run, network, threshold) for name in run["clients"]
    }
    return {
        **run,
        "card": card,
        "best_card": load_best(args.server_dir, run),
        "val": val,
        "grades": grades,
        "choosing": choosing_half(grades, data.patients(val)),
        "p_healthy": model.predict(network, data.load_images(val, card["image_size"])),
        "max_client_images": MAX_CLIENT_IMAGES,
        "sites": sites,
        "training": training_of(sites),
        "training_seconds": training_seconds(sites),
        "client_scores": read_client_scores(args.server_dir / "clients.csv"),
        "compared": read_compared(args.compare) if args.compare else {},
        "compared_tasks": read_compared_tasks(args.compare) if args.compare else {},
    }


def load_best(server_dir, run):
    """The card of the best round of this run, or None where there is none."""
    path = server_dir / "best_weight.h5"
    if not path.exists():
        return None
    card = cards.read(path)
    return card if card["run"] == run["run"] else None


def load_site(name, index_dir, run, network, threshold):
    """A client's history of this run, settings, records and metrics for any DR: a dict.

    Each is empty where it cannot be known here: the client trained on another machine.
    """
    site = {"history": [], "settings": {}, "records": [], "measured": {}}
    state = files.load_state(Path(name) / "state.json")
    if not state or state["run"] != run["run"]:
        return site
    site["history"] = state["history"]
    site["settings"] = state.get("settings") or {}
    path = data.worker_index(name, index_dir) or index_dir / f"{name}.pkl"
    records = data.read_index(path) if path.exists() else []
    site["records"] = records
    if records and all(Path(record["dir"]).exists() for record in records):
        step = math.ceil(len(records) / MAX_CLIENT_IMAGES)
        scored = records[::step]
        p_healthy = model.predict(network, data.load_images(scored, run["image_size"]))
        has_dr = data.healthy(scored) < 0.5
        site["measured"] = measure(1 - p_healthy, has_dr, data.patients(scored), threshold)
    return site


def training_of(sites):
    """{"epochs": [1], "batch size": [16]}: what clients of this machine trained with, sorted."""
    found = {"epochs": set(), "batch size": set()}
    for site in sites.values():
        found["epochs"].update(row["epoch"] for row in site["history"][-1:])
        if "batch_size" in site["settings"]:
            found["batch size"].add(site["settings"]["batch_size"])
    return {name: sorted(values) for name, values in found.items() if values}


def training_seconds(sites):
    """{round: seconds that the slowest client trained}, of the clients of this machine."""
    slowest = {}
    for site in sites.values():
        of_client = {}
        for row in site["history"]:
            of_client[row["round"]] = of_client.get(row["round"], 0) + row["seconds"]
        for round_number, seconds in of_client.items():
            slowest[round_number] = max(seconds, slowest.get(round_number, 0))
    return slowest


def read_client_scores(path):
    """{client: its last row (dict of texts)} of server/clients.csv; {} where there is none.

    The row of the result has no training: that is taken from the last row which has.
    """
    if not path.exists():
        return {}
    latest = {}
    for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
        earlier = latest.get(row["client"], row)
        for name in ("num_examples", "training_loss", "training_seconds"):
            row[name] = row[name] or earlier[name]
        latest[row["client"]] = row
    return latest


def read_compared(path):
    """{series: [row (dict of numbers), ...]}, as compare.sh wrote them."""
    columns = ("round", *METRICS)
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    if not rows or not {"series", *columns} <= set(rows[0]):
        raise ValueError(
            f"{path} is not what ./compare.sh writes: expected rows of series, {', '.join(columns)}"
        )
    compared = {}
    for row in rows:
        numbers = {name: float(row[name]) for name in columns}
        compared.setdefault(row["series"], []).append(numbers)
    return compared


def read_compared_tasks(path):
    """{series: its "tasks", as on a model card}, from the .json beside what compare.sh wrote."""
    path = path.with_suffix(".json")
    try:
        compared_tasks = json.loads(path.read_text(encoding="utf-8"))
        for tasks in compared_tasks.values():
            for task in TASKS:
                cards.check_task(task, tasks.get(task))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not what ./compare.sh writes: {error}") from None
    return compared_tasks


if __name__ == "__main__":
    exit_on_signals("report", "stopped")
    end_script(main())
