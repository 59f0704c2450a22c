"""Does this upload count? `rounds.verdict` by the table of DESIGN 4, and by an oracle.

The oracle draws histories of whole runs and remembers them as people would: who delivered what in
which round. The state that `verdict` sees is one that a server could have on disk.
"""

import re

import pytest
from conftest import metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.rounds import NEW, REPEAT, Refused, verdict
from federation.state import RunState

A, B, C, D = "client001", "client002", "client003", "client004"
X, Y, Z = "a" * 64, "b" * 64, "c" * 64  # digests
FETCH, LEFT = "FAILED_PRECONDITION", "PERMISSION_DENIED"


def upload(sha256):
    return {"num_examples": 1, "sha256": sha256}


def row(number):
    merged = {"round": number, "clients": 1, "missing": "", "num_examples": 1}
    return {**metrics(), **merged, "seconds": 1.0}


def make_state(round_number, evaluated, counted, uploads=None, frozen=False, clients=(A, B)):
    """A state as a server has it; uploads and counted are given by their digests."""
    uploads = uploads or {}
    return RunState(
        run="run0",
        clients=list(clients),
        rounds=3,
        weights_sha256=Z,
        arch="drcnn",
        image_size=32,
        seed=0,
        round=round_number,
        uploads={name: [upload(sha256)] for name, sha256 in uploads.items()},
        frozen=sorted(uploads) if frozen else None,
        counted={name: {"round": n, **upload(sha256)} for name, (n, sha256) in counted.items()},
        merged=row(round_number - 1),
        history=[row(number) for number in range(1, evaluated + 1)],
    )


def answer(*arguments):
    """(NEW or REPEAT, the round), or (status code, the sentence)."""
    try:
        return verdict(*arguments)
    except Refused as error:
        return error.code, error.sentence


# A delivered X in round 1, and C, which takes part no more, delivered Y.
COUNTED = {A: (1, X), C: (1, Y)}
OPEN = make_state(2, 1, COUNTED, {B: Y})
FROZEN = make_state(2, 1, COUNTED, {A: Z, B: Y}, frozen=True)
WITHOUT_A = make_state(2, 1, COUNTED, {B: Y}, frozen=True)
EVALUATING = make_state(2, 0, COUNTED)
LAST_EVALUATING = make_state(4, 2, {A: (3, X), B: (2, Y)})
OVER = make_state(4, 3, {A: (3, X), B: (2, Y)})


@pytest.mark.parametrize(
    ("state", "all_required", "client", "run", "number", "sha256", "expected"),
    [
        # no round can be told
        (OPEN, False, A, None, None, Y, (FETCH, "did not fetch")),
        (FROZEN, False, A, None, None, Z, (FETCH, "did not fetch")),
        (OPEN, False, D, None, None, Y, (FETCH, "did not fetch")),
        # a round that is unknown is the counted upload's, else the open one
        (OPEN, False, A, None, None, X, (REPEAT, 1)),
        (OPEN, True, A, None, None, X, (REPEAT, 1)),
        (OPEN, True, A, None, None, Y, (NEW, 2)),
        (OPEN, False, C, None, None, Y, (REPEAT, 1)),
        (OPEN, True, C, None, None, X, (LEFT, C)),
        # counted, with this round and digest
        (OPEN, True, A, "run0", 1, X, (REPEAT, 1)),
        (OPEN, True, A, None, 1, X, (REPEAT, 1)),
        (OPEN, True, C, "run0", 1, Y, (REPEAT, 1)),
        (EVALUATING, True, A, "run0", 1, X, (REPEAT, 1)),
        (LAST_EVALUATING, True, A, "run0", 3, X, (REPEAT, 3)),
        (OVER, True, B, "run0", 2, Y, (REPEAT, 2)),
        # not, or no more, one of this run's
        (OPEN, True, C, "run0", 1, X, (LEFT, C)),
        (OPEN, True, C, "run0", 2, Y, (LEFT, C)),
        (OPEN, True, C, "other", 1, Y, (LEFT, C)),
        (OPEN, True, D, "run0", 2, X, (LEFT, D)),
        # another run
        (OPEN, True, A, "other", 1, X, (FETCH, "'other'")),
        (OPEN, True, A, "other", 2, Y, (FETCH, "run0, round 2: fetch again")),
        # not the open round, or the last round is merged
        (OPEN, True, A, "run0", 1, Y, (FETCH, "round 1")),
        (OPEN, True, A, None, 3, X, (FETCH, "round 3")),
        (EVALUATING, True, A, "run0", 1, Y, (FETCH, "round 1")),
        (LAST_EVALUATING, True, A, "run0", 4, Y, (FETCH, "round 4")),
        (LAST_EVALUATING, True, A, None, None, Y, (FETCH, "round 4")),
        (OVER, True, B, "run0", 3, Y, (FETCH, "round 3")),
        # the open round, not frozen: the same bytes as in the round before are new as well
        (OPEN, True, A, "run0", 2, X, (NEW, 2)),
        (OPEN, True, A, None, 2, X, (NEW, 2)),
        (OPEN, True, B, "run0", 2, Y, (NEW, 2)),
        (EVALUATING, True, A, "run0", 2, Y, (NEW, 2)),
        # the open round, frozen with this client and digest
        (FROZEN, True, A, "run0", 2, Z, (REPEAT, 2)),
        (FROZEN, True, A, None, None, Z, (REPEAT, 2)),
        # the open round, frozen without that
        (FROZEN, True, A, "run0", 2, X, (FETCH, "being merged")),
        (WITHOUT_A, False, A, "run0", 2, Z, (FETCH, "being merged")),
    ],
)
def test_each_row_of_the_table(state, all_required, client, run, number, sha256, expected):
    found = answer(state, all_required, client, run, number, sha256)
    assert found[0] == expected[0]
    if isinstance(expected[1], int):
        assert found[1] == expected[1]
    else:
        assert client in found[1] and expected[1] in found[1]


def test_a_refusal_names_the_run_that_was_sent_and_no_more_of_it_than_fits():
    _, sentence = answer(OPEN, True, A, "x" * 5000, 2, X)
    assert re.search("run 'x{40}';", sentence) and "fetch again" in sentence


# --- random histories ----------------------------------------------------------------------------


class Story:
    """A run as it happened: for each round, who delivered what; the oracle's memory."""

    def __init__(self, closed, open_uploads, clients, phase):
        self.closed = closed  # [{client: digest}, ...] of the merged rounds
        self.open = {name: sha256 for name, sha256 in open_uploads.items() if name in clients}
        self.clients = sorted(clients)
        self.phase = phase  # "open", "frozen", "evaluating"

    def state(self):
        counted = {
            name: (number, sha256)
            for number, uploads in enumerate(self.closed, 1)
            for name, sha256 in uploads.items()
        }
        merged = len(self.closed)
        evaluated = max(0, merged - (self.phase == "evaluating"))
        uploads = {} if merged == 3 else self.open
        is_frozen = self.phase == "frozen" and bool(uploads)
        return make_state(merged + 1, evaluated, counted, uploads, is_frozen, self.clients)

    def expects(self, all_required, client, run, number, sha256):
        """Written from the promises, not from the table: what was counted stays answered ..."""
        open_round = len(self.closed) + 1
        took_part = [n for n, uploads in enumerate(self.closed, 1) if client in uploads]
        last = took_part[-1] if took_part else None
        is_last = last is not None and self.closed[last - 1][client] == sha256
        if number is None:
            if not is_last and not all_required:
                return FETCH, None
            number = last if is_last else open_round
        if run != "other" and is_last and number == last:
            return REPEAT, number
        # ... who takes part no more is told so before anything else ...
        if client not in self.clients:
            return LEFT, None
        # ... and only the open round of this run takes weights, until it is frozen.
        if run == "other" or number != open_round or open_round > 3:
            return FETCH, None
        if self.phase != "frozen" or not self.open:
            return NEW, number
        return (REPEAT, number) if self.open.get(client) == sha256 else (FETCH, None)


NAMES = st.sampled_from([A, B, C])
UPLOADS = st.dictionaries(NAMES, st.sampled_from([X, Y]), min_size=1)
STORIES = st.builds(
    Story,
    closed=st.lists(UPLOADS, max_size=3),
    open_uploads=UPLOADS,
    clients=st.sets(NAMES, min_size=1),
    phase=st.sampled_from(["open", "frozen", "evaluating"]),
)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(
    story=STORIES,
    all_required=st.booleans(),
    client=st.sampled_from([A, B, C, D]),
    run=st.sampled_from(["run0", "other", None]),
    number=st.one_of(st.none(), st.integers(0, 5)),
    sha256=st.sampled_from([X, Y]),
)
def test_any_history(story, all_required, client, run, number, sha256):
    if number is None:
        run = None  # who names a run names its round
    expected = story.expects(all_required, client, run, number, sha256)
    code, round_number = answer(story.state(), all_required, client, run, number, sha256)
    assert code == expected[0]
    if code in (NEW, REPEAT):
        assert round_number == expected[1]
