"""Does this upload count? `rounds.verdict` by the table of DESIGN 4, row by row."""

import pytest

from federation.rounds import NEW, REPEAT, Refused, verdict
from federation.state import RunState

A, B, C, D = "client001", "client002", "client003", "client004"
X, Y, Z = "a" * 64, "b" * 64, "c" * 64  # digests
FETCH, LEFT = "FAILED_PRECONDITION", "PERMISSION_DENIED"


def upload(sha256, **more):
    return {"num_examples": 1, "sha256": sha256, **more}


# A delivered X in round 1, and C, which takes part no more, delivered Y. B has delivered Y again.
OPEN = RunState(
    run="run0",
    clients=[A, B],
    rounds=3,
    weights_sha256=Z,
    arch="drcnn",
    image_size=32,
    seed=0,
    round=2,
    uploads={B: [upload(Y)]},
    counted={A: upload(X, round=1), C: upload(Y, round=1)},
)
FROZEN = OPEN.changed(uploads={A: [upload(Z)], B: [upload(Y)]}, frozen=[A, B])
WITHOUT_A = OPEN.changed(frozen=[B])
LAST_MERGED = OPEN.changed(round=4, uploads={}, counted={A: upload(X, round=3)})


@pytest.mark.parametrize(
    ("state", "all_required", "client", "run", "number", "sha256", "expected"),
    [
        # no round can be told
        (OPEN, False, A, None, None, Y, (FETCH, "did not fetch")),
        # a round that is unknown is the counted upload's, else the open one
        (OPEN, False, A, None, None, X, (REPEAT, 1)),
        (OPEN, True, A, None, None, Y, (NEW, 2)),
        # counted, with this round and digest; who takes part no more as well
        (OPEN, True, A, "run0", 1, X, (REPEAT, 1)),
        (OPEN, True, A, None, 1, X, (REPEAT, 1)),
        (OPEN, True, C, "run0", 1, Y, (REPEAT, 1)),
        (LAST_MERGED, True, A, "run0", 3, X, (REPEAT, 3)),
        # not, or no more, one of this run's
        (OPEN, True, C, "run0", 1, X, (LEFT, C)),
        (OPEN, True, C, "run0", 2, Y, (LEFT, C)),
        (OPEN, True, C, "other", 1, Y, (LEFT, C)),
        (OPEN, True, D, "run0", 2, X, (LEFT, D)),
        # another run, of whose name no more is said than fits
        (OPEN, True, A, "other", 1, X, (FETCH, "'other'; the server is in run run0, round 2")),
        (OPEN, True, A, "x" * 5000, 2, Y, (FETCH, f"run '{'x' * 40}'; ")),
        # not the open round, or the last round is merged
        (OPEN, True, A, "run0", 1, Y, (FETCH, "round 1, which is not open")),
        (OPEN, True, A, None, 3, X, (FETCH, "round 3, which is not open")),
        (LAST_MERGED, True, A, "run0", 4, Y, (FETCH, "round 4, which is not open")),
        # the open round, not frozen: the same bytes as in the round before are new as well
        (OPEN, True, A, "run0", 2, X, (NEW, 2)),
        (OPEN, True, B, "run0", 2, Y, (NEW, 2)),
        # the open round, frozen with this client and digest
        (FROZEN, True, A, "run0", 2, Z, (REPEAT, 2)),
        # the open round, frozen without that
        (FROZEN, True, A, "run0", 2, X, (FETCH, "being merged")),
        (WITHOUT_A, False, A, "run0", 2, Z, (FETCH, "being merged")),
    ],
)
def test_each_row_of_the_table(state, all_required, client, run, number, sha256, expected):
    try:
        found = verdict(state, all_required, client, run, number, sha256)
    except Refused as error:
        assert (error.code, client in error.sentence) == (expected[0], True)
        assert expected[1] in error.sentence
    else:
        assert found == expected
