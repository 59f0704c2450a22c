"""Does this upload count? `rounds.verdict` by the table of DESIGN 4, and by an oracle.

The oracle remembers a run as people would: who delivered what in which round. `test_any_order.py`
asks it, too.
"""

import re
from dataclasses import dataclass

import pytest
from conftest import metrics
from hypothesis import HealthCheck, given, settings
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


@dataclass
class Story:
    """A run as it happened: who delivered what in which round. Uploads are {client: digest}."""

    closed: list  # the uploads of each merged round
    evaluated: int  # how many of these rounds are evaluated
    uploads: dict  # of the open round
    is_frozen: bool
    clients: list  # who takes part, sorted
    rounds: int  # of the whole run

    def expects(self, all_required, client, run, number, digest):
        """(NEW or REPEAT, the round), or (status code, None).

        Written from the promises, not from the table.
        """
        open_round = len(self.closed) + 1
        took_part = [n for n, uploads in enumerate(self.closed, 1) if client in uploads]
        last = took_part[-1] if took_part else None
        is_last = last is not None and self.closed[last - 1][client] == digest
        if number is None:
            if not is_last and not all_required:
                return FETCH, None
            number = last if is_last else open_round
        # What was counted stays answered ...
        if run != "other" and is_last and number == last:
            return REPEAT, number
        # ... who takes part no more is told so before anything else ...
        if client not in self.clients:
            return LEFT, None
        # ... and only the open round of this run takes weights, until it is frozen.
        if run == "other" or number != open_round or open_round > self.rounds:
            return FETCH, None
        if not self.is_frozen:
            return NEW, number
        return (REPEAT, number) if self.uploads.get(client) == digest else (FETCH, None)

    def state(self):
        counted = {
            name: (number, digest)
            for number, uploads in enumerate(self.closed, 1)
            for name, digest in uploads.items()
        }
        return make_state(
            len(self.closed) + 1,
            self.evaluated,
            counted,
            self.uploads,
            self.is_frozen,
            self.clients,
        )


NAMES = st.sampled_from([A, B, C])
UPLOADS = st.dictionaries(NAMES, st.sampled_from([X, Y]), min_size=1)


@st.composite
def stories(draw):
    clients = sorted(draw(st.sets(NAMES, min_size=1)))
    closed = draw(st.lists(UPLOADS, max_size=3))
    uploads = {name: each for name, each in draw(UPLOADS).items() if name in clients}
    if len(closed) == 3:
        uploads = {}  # no round is open any more
    is_frozen = bool(uploads) and draw(st.booleans())
    being_evaluated = bool(closed) and not is_frozen and draw(st.booleans())
    return Story(closed, len(closed) - being_evaluated, uploads, is_frozen, clients, rounds=3)


@settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    story=stories(),
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
