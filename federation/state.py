"""The state of a run: what a server needs in order to go on after a crash. Standard library only.

`RunState` is one JSON file, server/state.json. It never changes in place: each step makes a new
state and publishes it whole (`common.files.publish`: write, fsync, rename, fsync the folder). So a
reader, or a server that starts again, finds the state before a step or after it, never between.

What the fields say together about the current round:

| the round is | `frozen`     | `round`                  | `history` has      | `merged`           |
|--------------|--------------|--------------------------|--------------------|--------------------|
| open         | None         | its number               | all rounds before  | (of the one before)|
| frozen       | its clients  | its number               | all rounds before  | (of the one before)|
| merged       | None         | its number + 1           | all rounds before  | what its row needs |
| evaluated    | None         | its number + 1           | its row too        | (no longer needed) |

Only an evaluated round is answered with 1. The run is over once its last round is evaluated.

The crash promise: what each step publishes, in this order, and what a start does when the server
was killed after that publish and before the next one:

| step     | publishes                                    | a start then                           |
|----------|----------------------------------------------|----------------------------------------|
| begin    | server_weight.h5, with the first weights     | begins a new run: no state names this  |
|          | state.json                                   | opens round 1                          |
| accept   | state.json: `uploads` has old and new upload | counts the one whose SHA-256 the file  |
|          |                                              | has: the old one, or none              |
|          | client001/client_weights.h5                  | counts the new one, by the same rule   |
| freeze   | state.json: `frozen`                         | merges these uploads                   |
| merge    | server_weight.h5                             | merges the same uploads again, which   |
|          |                                              | gives the same bits                    |
| commit   | state.json: next `round`, `weights_sha256`,  | evaluates server_weight.h5             |
|          | `counted`, `merged`; no uploads              |                                        |
| evaluate | server_weight.json, the model card           | evaluates again, publishes all of this |
|          | if it is the best: best_weight.h5, its card  | again                                  |
|          | history.csv                                  |                                        |
|          | state.json: `history`, `best`                | adds what clients.csv lacks            |
|          | clients.csv: what the clients measured       | has nothing to repeat                  |
| answer   | nothing: each waiting call gets its 1        | finds in `counted` what a client sends |
|          |                                              | again because it got no answer         |

A start whose --clients names others (they hold from the open round on) moves the files of the
uploads of those that left aside, then publishes the state without them; killed in between, the next
start finds no such file and does the rest.
"""

from dataclasses import asdict, dataclass, field, fields, replace

from common import files
from common.script import CLIENT_NAME

HISTORY_COLUMNS = (
    "round,loss,accuracy,auc,sensitivity,specificity,clients,missing,num_examples,seconds"
).split(",")


@dataclass(frozen=True)
class RunState:
    """One state of a run. `changed` makes the next one; `save` and `load` are the JSON file."""

    # Random hexadecimal digits; a new run has another one. New clients send it with each upload, so
    # weights that were trained for an earlier run are never counted in this one.
    run: str

    # The names of all clients that take part, sorted. A restart may name others.
    clients: list

    # How many rounds the whole run has. A restart with a larger --rounds makes it longer.
    rounds: int

    # SHA-256 of server_weight.h5, of the weights that the open round starts from.
    weights_sha256: str

    # What the server was started with. A restart may leave these flags out; it may not change them.
    arch: str
    image_size: int  # pixels a side
    seed: int  # of the first weights
    weights: str = "none"  # where the first weights came from: none (random), imagenet or a file
    freeze_base: bool = False  # whether clients are to train only the layers after the base

    # What the rounds are scored on: SHA-256 of val_set.pkl, and the kind of its pictures, as
    # prepared.json names it.
    # Another one at a restart is refused: the rows of one history must be of the same patients.
    validation_sha256: str = ""
    preprocessing: str = ""

    # Number of the open (or frozen) round, from 1; rounds + 1 once the last one is merged.
    round: int = 1

    # Accepted uploads of the open round: {client: [upload, ...]}, an upload being
    # {"num_examples": 300, "sha256": of what was sent, "file_sha256": of what lies in its file,
    # "scores": what the client measured; left out where it measured nothing}.
    # The two SHA-256 differ only where another layout was converted: the first recognises what a
    # client sends again, the second finds the file after a crash.
    # A list, because both are named here while a newer upload replaces an older one: the file
    # client001/client_weights.h5 is one of them, and its SHA-256 says which.
    uploads: dict = field(default_factory=dict)

    # None while the round is open. Then the sorted names of the clients that are merged: from here
    # on no other upload is accepted for this round, so a merge after a crash has the same inputs.
    frozen: list | None = None

    # Each client's last merged upload: {client: {"round": 3, "num_examples": 300, "sha256": ...,
    # "update_length", "update_cosine": beside the others', as `weights.compare_updates` says,
    # "rounds_against": in how many rounds running the cosine was negative}}. A crash between the
    # freeze and the commit leaves the two numbers out.
    # A client that never got its answer sends the same upload again: it is found here, and answered
    # instead of being counted twice.
    counted: dict = field(default_factory=dict)

    # Of the last merged round, all that its row of the history needs beside the evaluation. The
    # uploads are forgotten at the commit: a crash before the evaluation would lose these numbers.
    merged: dict | None = None

    # One row (dict) for each evaluated round: `merged`, its metrics and seconds. history.csv is
    # written whole from it, so a crash neither doubles nor drops a row.
    history: list = field(default_factory=list)

    # The best round so far: {"round": 7, "auc": 0.98, "sha256": of best_weight.h5}.
    best: dict | None = None

    @property
    def is_last_merged(self):
        """Whether the last round is merged; its evaluation may still run."""
        return self.round > self.rounds

    @property
    def is_over(self):
        """Whether the last round is evaluated."""
        return self.evaluated >= self.rounds

    @property
    def evaluated(self):
        """The number of the last round that is merged, evaluated and in the history; 0 at first."""
        return len(self.history)

    def changed(self, **changes):
        """A new state with these changes; this one stays as it is."""
        return replace(self, **changes)

    def save(self, path):
        """Publish the state as `path`."""
        files.save_state(path, asdict(self))

    @classmethod
    def load(cls, path, remedy="move it away"):
        """The state in the file `path`, or None where there is no file.

        remedy: what the user can do about a file that is not the state of a server's run; it ends
        the sentence of the ValueError that is raised then.
        """
        kinds = {each.name: each.type for each in fields(cls)}
        content = files.load_state(path, kinds, remedy)
        if content is None:
            return None
        state = cls(**content)
        problem = _problem_of(state)
        if problem:
            raise ValueError(f"{path} is not the state of a run ({problem}): {remedy}")
        return state


# What the records of a state hold: name -> types. All of them are flat, but for an upload's scores.
NUMBER = (int, float)
OPTIONAL_NUMBER = (*NUMBER, type(None))
UPLOAD_KINDS = {
    "num_examples": (int,),
    "sha256": (str,),
    "file_sha256": (str,),
    "update_length": OPTIONAL_NUMBER,
    "update_cosine": OPTIONAL_NUMBER,
    "rounds_against": (int,),
}
# ... and what an upload may leave out
OPTIONAL = {"update_length": None, "update_cosine": None, "rounds_against": 0, "scores": {}}
MERGED_KINDS = {"round": (int,), "clients": (int,), "missing": (str,), "num_examples": (int,)}
# a metric is None where it cannot be measured
ROW_KINDS = {**dict.fromkeys(HISTORY_COLUMNS, OPTIONAL_NUMBER), **MERGED_KINDS}
BEST_KINDS = {"round": (int,), "auc": OPTIONAL_NUMBER, "sha256": (str,)}
MOST_EXAMPLES = 2**31 - 1  # that the wire can name


def _problem_of(state):
    """What no state of a run can say, as text; None where all of it can be."""
    merged_and_not_evaluated = state.round - 1 - state.evaluated
    checks = {
        "run": _is_name(state.run),
        "clients": state.clients
        and all(map(_is_name, state.clients))
        and state.clients == sorted(set(state.clients)),
        "rounds": state.rounds >= 1,
        "image_size": 16 <= state.image_size <= 4096,
        "seed": state.seed >= 0,
        "history": all(
            _holds(row, ROW_KINDS) and row["round"] == number
            for number, row in enumerate(state.history, 1)
        ),
        # A round is frozen only once the one before it is evaluated.
        "round": merged_and_not_evaluated in ((0, 1) if state.frozen is None else (0,)),
        "merged": not merged_and_not_evaluated
        or (_holds(state.merged, MERGED_KINDS) and state.merged["round"] == state.round - 1),
        "uploads": all(
            name in state.clients
            and isinstance(listed, list)
            and listed
            and all(map(_is_upload, listed))
            for name, listed in state.uploads.items()
        ),
        "counted": all(map(_is_name, state.counted))
        and all(
            _is_upload(each) and each.get("round") in range(1, state.round)
            for each in state.counted.values()
        ),
        "frozen": state.frozen is None or (state.uploads and state.frozen == sorted(state.uploads)),
        "best": state.best is None or _holds(state.best, BEST_KINDS),
    }
    wrong = [name for name, is_right in checks.items() if not is_right]
    return f"its {', '.join(wrong)} cannot be" if wrong else None


def _is_upload(entry):
    entry = {**OPTIONAL, **(entry if isinstance(entry, dict) else {})}
    scores = entry.pop("scores")
    return (
        _holds(entry, UPLOAD_KINDS)
        and 1 <= entry["num_examples"] <= MOST_EXAMPLES
        and isinstance(scores, dict)
        and all(type(value) in NUMBER for value in scores.values())
    )


def _holds(record, kinds):
    """Whether it is a dict of plain values, with all of these."""
    return (
        isinstance(record, dict)
        and all(type(value) in (*NUMBER, str, type(None)) for value in record.values())
        and all(name in record and type(record[name]) in types for name, types in kinds.items())
    )


def _is_name(name):
    return type(name) is str and CLIENT_NAME.fullmatch(name) is not None
