"""The state of a run: what a server needs in order to go on after a crash. Standard library only.

`RunState` is one JSON file, server/state.json. It never changes in place: each step makes a new
state and publishes it whole (`common.files.publish`: write, fsync, rename, fsync the folder). So a
reader, or a server that starts again, finds the state before a step or after it, never between.

What the fields say together about the current round:

| the round is | `frozen`     | `round`                  | `history` has      | `closing`          |
|--------------|--------------|--------------------------|--------------------|--------------------|
| open         | None         | its number               | all rounds before  | (of the one before)|
| frozen       | its clients  | its number               | all rounds before  | (of the one before)|
| merged       | None         | its number + 1           | all rounds before  | what its row needs |
| evaluated    | None         | its number + 1           | its row too        | (no longer needed) |

Only an evaluated round is answered with 1. The run is over once `round` is larger than `rounds`.

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
|          | `counted`, `closing`; no uploads             |                                        |
| evaluate | server_weight.json, the model card           | evaluates again, publishes all of this |
|          | if it is the best: best_weight.h5, its card  | again                                  |
|          | history.csv                                  |                                        |
|          | state.json: `history`, `best`                | has nothing to repeat                  |
| answer   | nothing: each waiting call gets its 1        | finds in `counted` what a client sends |
|          |                                              | again because it got no answer         |

Other clients, at a restart whose --clients names others (of an open round, before anyone is
served):

| step     | publishes                                    | a start then                           |
|----------|----------------------------------------------|----------------------------------------|
| change   | state.json: `clients`, `membership`; no      | awaits the new clients in this round   |
|          | upload of a client that left                 |                                        |
| aside    | moves such an upload's file                  | moves it, if it is still there         |
"""

from dataclasses import asdict, dataclass, field, fields, replace

from common import files

# Fields that a state file may lack: of a run without a merge, or one that an older version began.
# Whoever adds a field adds its name here and gives it a default, so that older runs still resume.
OPTIONAL_FIELDS = {"weights", "closing", "best", "client_scores", "membership"}


def new_upload(num_examples, sha256, file_sha256, metrics=None):
    """The entry of an upload in the state. metrics: what the client measured, or nothing."""
    upload = {"num_examples": num_examples, "sha256": sha256}
    if file_sha256 != sha256:
        upload["file_sha256"] = file_sha256
    if metrics:
        upload["metrics"] = metrics
    return upload


def file_sha256_of(upload):
    """SHA-256 of what lies in an upload's file; an entry without it was stored as it was sent."""
    return upload.get("file_sha256", upload["sha256"])


@dataclass(frozen=True)
class RunState:
    """One state of a run. `changed` makes the next one; `save` and `load` are the JSON file."""

    # Random hexadecimal digits; a new run has another one. New clients send it with each upload, so
    # weights that were trained for an earlier run are never counted in this one.
    run: str

    # The names of all clients that take part, sorted. A restart may name others: `membership`.
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

    # Number of the open (or frozen) round, from 1; rounds + 1 once the last one is merged.
    round: int = 1

    # Accepted uploads of the open round: {client: [upload, ...]}, an upload being
    # {"num_examples": 300, "sha256": of what was sent, "file_sha256": of what lies in its file}.
    # The two differ, and the second is there, only where another layout was converted: the first
    # recognises what a client sends again, the second finds the file after a crash.
    # A list, because both are named here while a newer upload replaces an older one: the file
    # client001/client_weights.h5 is one of them, and its SHA-256 says which.
    uploads: dict = field(default_factory=dict)

    # None while the round is open. Then the sorted names of the clients that are merged: from here
    # on no other upload is accepted for this round, so a merge after a crash has the same inputs.
    frozen: list | None = None

    # Each client's last merged upload: {client: {"round": 3, "num_examples": 300, "sha256": ...}}.
    # A client that never got its answer sends the same upload again: it is found here, and answered
    # instead of being counted twice.
    counted: dict = field(default_factory=dict)

    # Of the last merged round, all that its row of the history needs beside the evaluation: round,
    # clients, missing, num_examples, wait_seconds, merge_seconds. The uploads are forgotten at the
    # commit, so a crash before the evaluation would otherwise lose these numbers.
    closing: dict | None = None

    # One row (dict) for each evaluated round: `closing`, its metrics and seconds. history.csv is
    # written whole from it, so a crash neither doubles nor drops a row.
    history: list = field(default_factory=list)

    # What the clients measured (progress.SCORES_COLUMNS), one row (dict) a round and client, oldest
    # first; clients.csv is written whole from it. `round` is the one whose result was scored.
    client_scores: list = field(default_factory=list)

    # The best round so far: {"round": 7, "auc": 0.98, "sha256": of best_weight.h5}. None before the
    # first, and in a run that an older version began.
    best: dict | None = None

    # Who joined and who left since the run began, one entry a change, the oldest first:
    # {"round": 5, "joined": ["client004"], "left": ["client002"]}. The round is the one that was
    # open then: the first without the one and with the other.
    membership: list = field(default_factory=list)

    @property
    def is_over(self):
        """Whether the last round is merged (its evaluation may still run)."""
        return self.round > self.rounds

    @property
    def left(self):
        """{client: the round in which it left}, of those that have not joined again."""
        left = {}
        for change in self.membership:
            left.update(dict.fromkeys(change["left"], change["round"]))
            for client in change["joined"]:
                left.pop(client, None)
        return left

    @property
    def freezes_base(self):
        """Whether clients are to train only the layers after the base, which ImageNet trained.

        Not of the thesis's vgg16: there each client chooses, with --freeze-base.
        """
        return self.weights == "imagenet" and self.arch == "lite0"

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
        known = {each.name for each in fields(cls)}
        content = files.load_state(path, sorted(known - OPTIONAL_FIELDS), remedy)
        if content is None:
            return None
        unknown = sorted(set(content) - known)
        if unknown:
            raise ValueError(
                f"{path} has {', '.join(unknown)}, which this program does not know, so a newer "
                f"version wrote it: use that one, or {remedy}"
            )
        return cls(**content)
