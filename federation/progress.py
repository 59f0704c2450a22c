"""What a client says of itself: where it is in its round, and what it measured.

Small JSON in gRPC metadata: fedml-progress and fedml-metrics. All of it comes from outside and none
is trusted: it is shown, it decides nothing, and what is not as expected is left out by its name.
"""

import json

TELL_EVERY_S = 10  # a client that works says so this often
QUIET_S = 30  # a client that has said nothing for so long may be stopped, or dead

MAX_PROGRESS_BYTES = 300
MAX_METRICS_BYTES = 600
PHASES = ["loading", "training", "scoring", "waiting"]
PROGRESS_LIMITS = {  # name: (least, most)
    "epoch": (0, 1_000_000),
    "epochs": (1, 1_000_000),
    "seconds_left": (0, 10_000_000),
}
METRICS_LIMITS = {
    "examples": (1, 999_999_999),
    "loss": (0, 1_000_000),
    "auc": (0, 1),
    "threshold": (0, 1),  # of the score, for the two that follow
    "sensitivity": (0, 1),
    "specificity": (0, 1),
    "training_loss": (0, 1_000_000),
    "training_seconds": (0, 10_000_000),
}
SCORES_COLUMNS = ["round", "client", "num_examples", *METRICS_LIMITS]


def parse_progress(text):
    """(progress, problems): a dict of what is good, and a text for each thing that is left out."""
    content, problems = _parse(text, MAX_PROGRESS_BYTES)
    phase = content.pop("phase", None)
    progress, more_problems = _within(content, PROGRESS_LIMITS)
    if phase in PHASES:
        progress["phase"] = phase
    else:
        more_problems.append("phase is none of " + ", ".join(PHASES))
    return progress, problems + more_problems


def parse_metrics(text):
    """(metrics, problems), as `parse_progress`."""
    content, problems = _parse(text, MAX_METRICS_BYTES)
    metrics, more_problems = _within(content, METRICS_LIMITS)
    return metrics, problems + more_problems


def _parse(text, max_bytes):
    if len(text) > max_bytes:
        return {}, [f"{len(text)} bytes, expected at most {max_bytes}"]
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}, ["it is no JSON"]
    if not isinstance(content, dict):
        return {}, ["it is no JSON object"]
    return content, []


def _within(content, limits):
    """The numbers of `content` that are known and within their limits, and the problems."""
    good, problems = {}, []
    for name, value in content.items():
        if name not in limits:
            problems.append(f"{name[:30]!r} is not known")
            continue
        least, most = limits[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and least <= value <= most:  # NaN is not
            good[name] = value
        else:
            problems.append(f"{name} is {repr(value)[:30]}, expected {least} to {most}")
    return good, problems


def in_words(progress):
    """'training, epoch 12 of 40, 3 min to go'."""
    words = [progress.get("phase", "working")]
    if "epoch" in progress and "epochs" in progress:
        words.append(f"epoch {progress['epoch']:.0f} of {progress['epochs']:.0f}")
    if "seconds_left" in progress:
        words.append(f"{duration(progress['seconds_left'])} to go")
    return ", ".join(words)


def duration(seconds):
    """'8 s', '14 min', '3 h'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"
