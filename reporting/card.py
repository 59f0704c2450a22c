"""Reporting: the model card, what a weight file was made with, as JSON beside it.

    server/server_weight.h5      server/server_weight.json

No score is computed in here (metrics.py does) and no weight file opened but for its SHA-256; what
a card says comes from outside and is checked before anybody relies on it.

A weight file alone does not say which network it belongs to, how a photograph must be prepared for
it, or which score is a finding. The card does, and names the SHA-256 of its weight file: a pair
that does not belong together is refused. Two files copied to another machine are enough to score.
"""

import functools
import json
import math
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import data
from common.files import publish_text, sha256_of
from reporting import metrics
from reporting.metrics import MEASURED, TASK, TASKS

CARD_VERSION = 2  # 2: scores are recalibrated for each task, and num_nan
MAX_WIRE_BYTES = 4000  # of fedml-card; gRPC's metadata ends at 8 kB, and there is other metadata
MAX_FILE_BYTES = 1 << 20
# The type of each entry that must be there, and what readers rely on.
NEEDED = {
    "card_version": int,
    "arch": str,
    "image_size": int,
    "initial_weights": str,
    "seed": int,
    "preprocessing": str,
    "prepared_image_size": int,
    "dataset": str,
    "split": str,
    "run": str,
    "round": int,
    "date": str,
    "commit": str,
    "weights_sha256": str,
    "validation_sha256": str,
    "clients": dict,
    "num_images": int,
    "num_patients": int,
    "num_reporting_images": int,
    "num_reporting_patients": int,
    "num_nan": int,
    "patients_known": bool,
    "tasks": dict,
    "warning": str,
}
ROUND_METRICS = ("auc", "sensitivity", "specificity")  # what a card keeps of each round
# Pictures of these kinds do not mix. Imported ones, or such of which nothing is known, may be any.
KINDS_OF_PICTURES = {
    "synthetic": "a drawn eye",
    "graham": "the round field of a photograph, stretched to the square, less its local average",
    "colour": "the round field of a photograph, stretched to the square, in its colours",
}
# What is told of the images, where prepared.json says it.
UNKNOWN_DATA = {"dataset": "unknown", "split": "unknown", "preprocessing": "unknown"}


def read_prepared(index_dir):
    """What index/prepared.json says of the images, a dict; {} where there is none."""
    try:
        prepared = json.loads((Path(index_dir) / "prepared.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return prepared if isinstance(prepared, dict) else {}


def name_of(client, prepared):
    """'client001 (screening centre)': what a client is called wherever a person reads of it.

    prepared: of `read_prepared`; without a hospital's name in there, the client's own.
    """
    index = data.worker_index(client)
    hospital = (prepared.get("worker_hospitals") or {}).get(index and index.stem)
    return f"{client} ({hospital})" if hospital else client


def make(state, row, prepared, validation_sha256, assessed):
    """The card (dict) of server_weight.h5 after an evaluated round.

    state: federation.state.RunState. row: the round's row of the history.
    prepared: what index/prepared.json says, {} where there is none.
    validation_sha256: of the file val_set.pkl, so that nobody measures on another one unnoticed.
    assessed: from reporting.metrics.assess.
    """
    told = {**UNKNOWN_DATA, **prepared}
    # Of the index of a hospital or of a server alone, nothing was split.
    workers = [name for name in told.get("indexes") or {} if name.startswith("worker")]
    if "indexes" in told and len(workers) < 2:
        told["split"] = "none"
    counted = {
        name: upload["num_examples"]
        for name, upload in state.counted.items()
        if upload["round"] == row["round"]
    }
    size = state.image_size
    picture = KINDS_OF_PICTURES.get(told["preprocessing"], "a picture of an unknown kind")
    return {
        "card_version": CARD_VERSION,
        "input": f"{size} x {size} pixels, RGB, 0 to 255, uint8 or float: {picture}",
        "output": "P(healthy), 0 to 1; the DR score is 1 - P(healthy)",
        "arch": state.arch,
        "image_size": size,
        "preprocessing": str(told["preprocessing"])[:40],
        "prepared_image_size": told.get("image_size", state.image_size),
        "dataset": str(told["dataset"])[:80],
        "split": str(told["split"])[:40],
        "run": state.run,
        "round": row["round"],
        "rounds": state.rounds,
        "seed": state.seed,
        "initial_weights": Path(state.weights).name[:80],
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "weights_sha256": state.weights_sha256,
        "validation_sha256": validation_sha256,
        "num_clients": row["clients"],
        "num_examples": row["num_examples"],
        "clients": counted,
        **assessed,
    }


@functools.cache
def commit():
    """The commit of this program, "" where it is not in a git repository."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # git would answer for a repository further up
        return ""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()[:60] if done.returncode == 0 else ""


def path_of(weights_path):
    """server/server_weight.h5 -> server/server_weight.json"""
    return Path(weights_path).with_suffix(".json")


def publish(weights_path, card):
    """Publishes the card beside its weights, with what the card before it said of earlier rounds.

    by_round: [{"round": 1, "any DR": {"auc": 0.9, ...}, "referable DR": {...}}, ...], of the
    reporting patients at the threshold of that round. A round that is evaluated again, after a
    crash, replaces its entry.
    """
    if "by_round" not in card:  # the copy beside the best round's weights says the same
        card["by_round"] = [*earlier_rounds(weights_path, card), round_of(card)]
    publish_text(path_of(weights_path), json.dumps(card, indent=1, allow_nan=False) + "\n")


def round_of(card):
    """The entry of `by_round` for the round that a card is of."""
    measured = {"round": card["round"]}
    for task, entry in card["tasks"].items():
        values = {name: entry["measured"][name][0] for name in ROUND_METRICS}
        measured[task] = {"threshold": entry["threshold"], **values}
    return measured


def earlier_rounds(weights_path, card):
    """`by_round` of the card that lies there, up to this card's round; [] where it is no help."""
    try:
        before = parse(path_of(weights_path).read_bytes())
    except (OSError, ValueError):  # none yet, or damaged: these rounds are then not measured
        return []
    if before["run"] != card["run"]:
        return []
    return [row for row in before.get("by_round", []) if row["round"] < card["round"]]


def read(weights_path):
    """The card beside a weight file. Raises ValueError: missing, bad, or of other weights."""
    path = path_of(weights_path)
    if not Path(weights_path).exists():
        raise ValueError(f"{weights_path} is missing: train a model first, with ./run_local.sh")
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES)
    except FileNotFoundError:
        raise ValueError(
            f"{path}, the card of {weights_path}, is missing: a model has one after its first "
            "round; copy both files"
        ) from None
    try:
        card = parse(content)
    except ValueError as error:
        raise ValueError(f"{path} is no model card: {error}") from None
    found = sha256_of(weights_path)
    if found != card["weights_sha256"]:
        raise ValueError(
            f"{path} describes other weights than {weights_path} holds (SHA-256 "
            f"{card['weights_sha256'][:12]}..., found {found[:12]}...): copy both files anew; of a "
            "run that goes on, try again when its round is evaluated"
        )
    return card


def parse(content):
    """A card from JSON bytes or text that nobody vouches for. Raises ValueError, saying why not."""
    try:
        card = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    if not isinstance(card, dict):
        raise ValueError(f"it holds a {type(card).__name__}, expected an object")
    for name, kind in NEEDED.items():
        if type(card.get(name)) is not kind:
            raise ValueError(
                f"its {name!r} is {str(card.get(name))[:40]!r}, expected {kind.__name__}"
            )
    if card["card_version"] != CARD_VERSION:
        raise ValueError(
            f"it has version {card['card_version']}, this program knows {CARD_VERSION}"
        )
    for name in ("image_size", "prepared_image_size"):
        if not 16 <= card[name] <= 4096:
            raise ValueError(f"its {name!r} is {card[name]}, expected 16 to 4096 pixels")
    for task in TASKS:
        check_task(task, card["tasks"].get(task))
    check_rounds(card.get("by_round", []))  # older cards have none
    return card


def check_task(task, entry):
    """Raises ValueError unless it has what `metrics.assess` gives of a task."""
    if not isinstance(entry, dict) or not isinstance(entry.get("measured"), dict):
        raise ValueError(f"it does not say what was measured for {task}")
    threshold = entry.get("threshold")
    if threshold is not None and not is_part(threshold):
        raise ValueError(f"its threshold for {task} is {str(threshold)[:40]}, expected 0 to 1")
    check_calibration(task, entry.get("calibration"))
    if type(entry.get("num_positive")) is not int:
        raise ValueError(f"it does not say how many images have {task}")
    for metric in MEASURED:
        numbers = entry["measured"].get(metric)
        if not isinstance(numbers, list) or len(numbers) != 3:
            raise ValueError(f"its {metric} for {task} is not [value, low, high]")
        if not all(number is None or is_part(number) for number in numbers):
            raise ValueError(f"its {metric} for {task} has a number outside 0 to 1")


def check_calibration(task, calibration):
    """Raises ValueError unless it is None or [slope, intercept], a line that rises."""
    if calibration is None:
        return
    try:
        slope, intercept = calibration
        rises = slope > 0 and math.isfinite(slope) and math.isfinite(intercept)
    except (TypeError, ValueError, OverflowError):
        rises = False
    if not rises:
        raise ValueError(
            f"its calibration for {task} is {str(calibration)[:60]}, expected a slope above 0 and "
            "an intercept"
        )


def check_rounds(by_round):
    """Raises ValueError unless it is what `publish` writes."""
    names = ("threshold", *ROUND_METRICS)
    try:
        numbers = [row[task][name] for row in by_round for task in TASKS for name in names]
        whole = all(type(row["round"]) is int for row in by_round)
    except (TypeError, KeyError, IndexError):
        whole = False
    if not whole or not all(number is None or is_part(number) for number in numbers):
        raise ValueError("its 'by_round' is not a list of rounds with the scores of each task")


def is_part(number):
    return type(number) in (int, float) and 0 <= number <= 1


def to_wire(card):
    """The card as ASCII JSON of at most MAX_WIRE_BYTES, for the metadata fedml-card."""
    text = json.dumps(card, separators=(",", ":"))  # ASCII: all else is escaped
    # Of many rounds, then of many clients; num_clients and num_examples still say how many.
    for name, nothing in (("by_round", []), ("clients", {})):
        if len(text) > MAX_WIRE_BYTES:
            card = {**card, name: nothing}
            text = json.dumps(card, separators=(",", ":"))
    return text


def score(card, task, p_healthy):
    """The DR score, 0..1, of what the network answers, P(healthy): each (n,).

    It is the probability that an image is positive for the task, where the card has a calibration.
    The card's thresholds are of it: all who compare an answer with one get its score here.
    """
    return metrics.recalibrated(p_healthy, card["tasks"][task]["calibration"])


def threshold_of(card, task=TASK):
    """The threshold that was chosen for a task, or None."""
    return card["tasks"].get(task, {}).get("threshold")


def summary(card, task=TASK):
    """A round's line: 'AUC 0.991  sensitivity 0.946  specificity 0.930 for referable DR, ...'.

    Of the reporting patients, at the threshold that the others have chosen: what is on the page.
    Of a model that answers NaN there are no numbers: its warning says for how many images.
    """
    if card["num_nan"]:
        return f"no model: {card['warning']}"
    measured = card["tasks"][task]["measured"]
    shown = ["auc"] if threshold_of(card, task) is None else ROUND_METRICS
    numbers = [
        f"{name.replace('auc', 'AUC')} {'not measured' if value is None else f'{value:.3f}'}"
        for name, value in ((name, measured[name][0]) for name in shown)
    ]
    patients = card["num_reporting_patients"]
    return f"{'  '.join(numbers)}  for {task}, of {patients} patients"


def used_threshold(card, task):
    """The threshold that was chosen for a task; 0.5 where none was."""
    threshold = threshold_of(card, task)
    return 0.5 if threshold is None else threshold
