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
    "rounds": int,
    "date": str,
    "commit": str,
    "weights_sha256": str,
    "validation_sha256": str,
    "num_clients": int,
    "clients": dict,
    "num_images": int,
    "num_patients": int,
    "num_reporting_images": int,
    "num_reporting_patients": int,
    "num_nan": int,
    "patients_known": bool,
    "tasks": dict,
    "by_round": list,
    "warning": str,
}
ROUND_METRICS = ("auc", "sensitivity", "specificity")  # what a card keeps of each round
# Pictures of these kinds do not mix. Imported ones, or such of which nothing is known, may be any.
KINDS_OF_PICTURES = {
    "synthetic": "a drawn eye",
    "graham": "the round field of a photograph, stretched to the square, less its local average",
    "colour": "the round field of a photograph, in its shape and colours, on black",
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


def check_kind(index, expected, whose):
    """Raise ValueError where the pictures of an index are of another kind than expected.

    Nobody would notice: a network answers of either, and is good for one.
    expected: one of KINDS_OF_PICTURES; of any other nothing is known. whose: pictures are of it.
    """
    folder = Path(index).parent
    own, kinds = read_prepared(folder).get("preprocessing"), KINDS_OF_PICTURES
    if own != expected and own in kinds and expected in kinds:
        raise ValueError(
            f"the pictures of {index} are of the kind {own!r} ({folder}/prepared.json), and "
            f"{whose} of the kind {expected!r}: all sites have to prepare theirs in the same way "
            "(prepare.py --preprocessing)"
        )


def too_small(prepared, image_size):
    """'warning: the pictures here have 128 pixels a side, ...'; '' where a network gets its size.

    prepared: of `read_prepared`. image_size: a side, in pixels, of what the network takes.
    """
    own_size = prepared.get("image_size")
    if not isinstance(own_size, int) or own_size >= image_size:
        return ""
    return (
        f"warning: the pictures here have {own_size} pixels a side, and the server's network takes "
        f"{image_size}: enlarging adds no detail (prepare.py --image-size {image_size})"
    )


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
    # of each client's last round: who misses this one trained the model all the same
    counted = {name: upload["num_examples"] for name, upload in state.counted.items()}
    size = state.image_size
    picture = KINDS_OF_PICTURES.get(told["preprocessing"], "a picture of an unknown kind")
    return {
        "card_version": CARD_VERSION,
        "input": f"{size} x {size} pixels, RGB, 0 to 255, uint8 or float: {picture}",
        "output": "P(healthy), 0 to 1; the DR score is 1 - P(healthy), and a task's calibration, a "
        "slope and an intercept on its logit, makes it the probability of that task",
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
    # of this folder itself: git alone would also answer for a repository further up
    command = ["git", "--git-dir=.git", "--work-tree=.", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()[:60]
    except OSError:
        return ""


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
    return [row for row in before["by_round"] if row["round"] < card["round"]]


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
    version = card.get("card_version")
    if version != CARD_VERSION:
        raise ValueError(
            f"it has version {str(version)[:20]}, this program knows {CARD_VERSION}: use the "
            "commit that made it"
        )
    for name, kind in NEEDED.items():
        if type(card.get(name)) is not kind:
            raise ValueError(
                f"its {name!r} is {str(card.get(name))[:40]!r}, expected {kind.__name__}"
            )
    for name in ("image_size", "prepared_image_size"):
        if not 16 <= card[name] <= 4096:
            raise ValueError(f"its {name!r} is {card[name]}, expected 16 to 4096 pixels")
    for name, is_right in (("tasks", has_results), ("by_round", has_rounds)):
        try:
            if is_right(card):
                continue
        except (LookupError, TypeError, ValueError, OverflowError):
            pass  # something is missing there, or of another kind
        raise ValueError(f"its {name!r} holds other scores than a card of this program")
    return card


def has_results(card):
    """Whether the card says of each task what `metrics.assess` gives of one."""
    for entry in (card["tasks"][task] for task in TASKS):
        line = entry["calibration"]
        slope, intercept = (1, 0) if line is None else line
        lengths = {len(entry["measured"][name]) for name in MEASURED}
        of_task = [entry["threshold"], entry["calibration_error"]]
        numbers = sum((entry["measured"][name] for name in MEASURED), of_task)
        if not (
            slope > 0
            and math.isfinite(slope + intercept)
            and type(entry["num_positive"]) is int
            and lengths == {3}
            and all(map(is_part_or_none, numbers))
        ):
            return False
    return True


def has_rounds(card):
    """Whether `by_round` is what `publish` writes."""
    rows = card["by_round"]
    names = ("threshold", *ROUND_METRICS)
    numbers = [row[task][name] for row in rows for task in TASKS for name in names]
    return all(type(row["round"]) is int for row in rows) and all(map(is_part_or_none, numbers))


def is_part_or_none(number):
    return number is None or (type(number) in (int, float) and 0 <= number <= 1)


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


def summary(card):
    """A round's line: 'AUC 0.991  sensitivity 0.946  specificity 0.930 for referable DR, ...'.

    Of the reporting patients, at the threshold that the others have chosen: what is on the page.
    Of a model that answers NaN there are no numbers: its warning says for how many images.
    """
    if card["num_nan"]:
        return f"no model: {card['warning']}"
    measured = card["tasks"][TASK]["measured"]
    shown = ["auc"] if card["tasks"][TASK]["threshold"] is None else ROUND_METRICS
    numbers = [f"{name.replace('auc', 'AUC')} {number(measured[name][0])}" for name in shown]
    patients = card["num_reporting_patients"]
    return f"{'  '.join(numbers)}  for {TASK}, of {patients} patients"


def used_threshold(card, task):
    """The threshold that was chosen for a task; 0.5 where none was."""
    threshold = card["tasks"][task]["threshold"]
    return 0.5 if threshold is None else threshold


def number(value, digits=3):
    """A measured number wherever a person reads one: what is unknown is never 0.000."""
    return "not measured" if value is None or math.isnan(value) else f"{value:.{digits}f}"
