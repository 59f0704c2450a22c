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

import data
import model
from common import files
from reporting.metrics import METRICS, measure

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
    """'round 10/10, 300 held-out images: accuracy 0.990 (0.971 to 0.997), AUC ...'"""
    numbers = []
    for name, (value, low, high) in run["measured"].items():
        shown_name = "AUC" if name == "auc" else name
        numbers.append(f"{shown_name} {value:.3f} ({low:.3f} to {high:.3f})")
    return (
        f"round {len(run['history'])}/{run['rounds']}, {len(run['val'])} held-out images: "
        + ", ".join(numbers)
    )


def load(args):
    """The server's state as a dict, with what the page needs beside it.

    val          records of the validation images
    p_healthy    what the merged model says of each, (n,)
    measured     its metrics with their intervals
    sites        {client: (training history, records, metrics)}
    prepared     what prepared.json says of the images; empty where there is none
    compared     {series: rows} of --compare
    """
    run = files.load_state(args.server_dir / "state.json", NEEDED_STATE)
    if run is None or not run["history"]:
        raise ValueError(
            f"{args.server_dir / 'state.json'} knows no finished round: "
            "start a run with ./run_local.sh"
        )
    val = data.read_index(args.index_dir / "val_set.pkl")
    model.configure(run["seed"])
    network = model.build(run["arch"], run["image_size"])
    model.load(network, args.server_dir / "server_weight.h5")
    p_healthy = model.predict(network, data.load_images(val, run["image_size"]))
    prepared_path = args.index_dir / "prepared.json"
    prepared = {}
    if prepared_path.exists():
        prepared = json.loads(prepared_path.read_text(encoding="utf-8"))
    return {
        **run,
        "val": val,
        "p_healthy": p_healthy,
        "measured": measure(p_healthy, data.healthy(val)),
        "max_client_images": MAX_CLIENT_IMAGES,
        "sites": {name: load_site(name, args.index_dir, run, network) for name in run["clients"]},
        "prepared": prepared,
        "compared": read_compared(args.compare) if args.compare else {},
    }


def load_site(name, index_dir, run, network):
    """(training history of this run, records, metrics with intervals) of a client.

    Each is empty where it cannot be known here: the client trained on another machine.
    """
    state = files.load_state(Path(name) / "state.json")
    if not state or state["run"] != run["run"]:
        return [], [], {}
    path = data.worker_index(name, index_dir) or index_dir / f"{name}.pkl"
    records = data.read_index(path) if path.exists() else []
    measured = {}
    if records and all(Path(record["dir"]).exists() for record in records):
        step = math.ceil(len(records) / MAX_CLIENT_IMAGES)
        scored = records[::step]
        p_healthy = model.predict(network, data.load_images(scored, run["image_size"]))
        measured = measure(p_healthy, data.healthy(scored))
    return state["history"], records, measured


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


if __name__ == "__main__":
    exit_on_signals("report", "stopped")
    end_script(main())
