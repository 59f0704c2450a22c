"""state.json: it comes back as it was, and a spoiled one is one sentence, never a traceback."""

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import MEMORY, Run, metrics, new_run, write_weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import todoServer
from common import files
from federation import rounds, status
from federation.rounds import Rounds
from federation.state import RunState

SCORES = {"auc": 0.75, "loss": 0.5}


def test_a_state_comes_back_as_it_was_and_never_changes_in_place(tmp_path):
    path = tmp_path / "state.json"
    assert RunState.load(path) is None
    state = new_run(["client001"], 2, write_weights(tmp_path / "server_weight.h5", 1))
    later = state.changed(rounds=5, best={"round": 1, "auc": None, "sha256": "x"})
    assert (state.rounds, state.best) == (2, None)
    later.save(path)
    assert RunState.load(path) == later
    with pytest.raises(AttributeError):
        state.round = 2


# --- spoiled ones --------------------------------------------------------------------------------


def copies_of_a_run(folder):
    """The folders of a run of two rounds, each a copy as one publish of its state left it."""
    copies = []
    inner = files.publish

    def publish(written, path):
        inner(written, path)
        if path.name == "state.json":
            copies.append(folder / f"copy-{len(copies)}")
            shutil.copytree(run.folder, copies[-1])

    def publish_result(state, row):
        return {"round": row["round"], "auc": 0.5, "sha256": state.weights_sha256}, "AUC 0.5"

    run = Run(folder / "run", ["client001", "client002"], 2, publish_result=publish_result)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "publish", publish)
        patch.setattr(rounds, "publish", publish)
        for number in (1, 2):
            run.rounds.hear("client001", "run0", number, {"phase": "training"}, SCORES)
            older = run.delivered("client001", number)
            newer = run.delivered("client001", number + 5)
            for call in (run.deliver("client002", 7), newer, older):
                call.thread.join()
        run.stop()
    return copies


@pytest.fixture(scope="module")
def copies():
    folder = Path(tempfile.mkdtemp(dir=MEMORY))
    yield copies_of_a_run(folder)
    shutil.rmtree(folder)


def resume(folder):
    """What a server does that is started there, and what it shows."""
    state = RunState.load(folder / "state.json")

    def merge(paths, num_examples):
        sum(num_examples)
        return files.sha256_of(paths[0]), [{} for _ in paths]

    found = Rounds(folder, state, merge, metrics, say=lambda line: None)
    found.open()
    found.describe()
    shown = status.status_of(found)
    status.draw(json.loads(json.dumps(shown)), 0)
    if not found.state.is_last_merged:
        found.change_clients(["client001"])


def test_every_state_of_a_run_is_read(copies):
    found = [RunState.load(copy / "state.json") for copy in copies]
    assert any(len(state.uploads.get("client001", ())) == 2 for state in found)
    assert any(state.frozen for state in found) and found[-1].is_over
    assert any(state.evaluated < state.round - 1 for state in found)
    for each in copies:
        resume(shutil.copytree(each, each.with_name("again")))
        shutil.rmtree(each.with_name("again"))


def spots(value, path=()):
    """The path of each value in a JSON value, and of itself."""
    yield path
    if isinstance(value, dict | list):
        for name, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from spots(each, (*path, name))


GONE = object()
ANY_VALUE = st.one_of(
    st.sampled_from([GONE, None, True, 0, 1, -1, 3, 10**30, 1.5, float("nan")]),
    st.sampled_from(["", "../x", "client001", "\ud800"]),
    st.sampled_from([[], {}, [[]], [None], ["client001"], ["client002", "client001"]]),
    st.sampled_from([{"client001": []}, {"client001": {}}, {"client009": [{}]}]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=4,
    ),
)


@settings(
    max_examples=600,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(data=st.data(), value=ANY_VALUE)
def test_with_any_value_in_any_place_it_is_refused_or_it_works(copies, data, value):
    original = data.draw(st.sampled_from(copies))
    state = json.loads((original / "state.json").read_text())
    *way, name = data.draw(st.sampled_from([spot for spot in spots(state) if spot]))
    spoiled = place = copy.deepcopy(state)
    for each in way:
        place = place[each]
    if value is GONE:
        del place[name]
    else:
        place[name] = value
    folder = shutil.copytree(original, original.with_name("spoiled"))
    try:
        (folder / "state.json").write_text(json.dumps(spoiled))
        resume(folder)
    except (ValueError, OSError) as error:
        assert 0 < len(str(error)) < 1000
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"version": 1}, "version 1"),
        ({"votes": []}, "votes"),
        ({"rounds": True}, "rounds"),
        ({"rounds": 0}, "rounds"),
        ({"image_size": 10**9}, "image_size"),
        ({"run": "a\nb"}, "run"),  # it travels in metadata
        ({"clients": []}, "clients"),
        ({"clients": ["client001", "client001"]}, "clients"),
        ({"clients": ["../client001"]}, "clients"),
        ({"round": 9}, "round"),
        ({"round": 2}, "merged"),  # merged and not evaluated, without what its row needs
        ({"frozen": []}, "frozen"),  # everyone would be told that the round is being merged
        ({"uploads": {"client009": [{"num_examples": 1, "sha256": "x"}]}}, "uploads"),
        ({"uploads": {"client001": [{"num_examples": 0, "sha256": "x"}]}}, "uploads"),
        ({"counted": {"client001": {"round": 7, "num_examples": 1, "sha256": "x"}}}, "counted"),
    ],
)
def test_what_would_be_a_wrong_result_or_a_silent_wait_is_refused_by_name(tmp_path, changes, named):
    path = tmp_path / "state.json"
    new_run(["client001"], 2, write_weights(tmp_path / "one.h5")).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=rf"state\.json .*{named}.*begin anew$"):
        RunState.load(path, remedy="begin anew")


@pytest.mark.parametrize(
    ("flags", "changes", "named"),
    [
        ([], {"arch": "resnet"}, "--arch resnet"),
        ([], {"validation_sha256": "x"}, "other images"),
        ([], {"preprocessing": "x"}, "other images"),
        (["--seed", "5"], {}, "--seed is 5"),
    ],
)
def test_a_run_that_cannot_go_on_here_is_told_at_start(tmp_path, flags, changes, named):
    state = new_run(["client001"], 2, write_weights(tmp_path / "one.h5"))
    evaluator = SimpleNamespace(validation_sha256="", preprocessing="")
    arguments = todoServer.parse(["--server-dir", str(tmp_path), *flags])
    state.changed(**changes).save(tmp_path / "state.json")
    with pytest.raises(ValueError, match=f"{named}.*--fresh"):
        todoServer.resume(arguments, evaluator)
    state.save(tmp_path / "state.json")
    arguments = todoServer.parse(["--server-dir", str(tmp_path)])
    assert todoServer.resume(arguments, evaluator) == state


@pytest.mark.parametrize("missing", RunState.__dataclass_fields__)
def test_a_state_that_lacks_anything_is_refused(tmp_path, missing):
    """A default in its place would be a wrong result in silence: round 1 again, or no uploads."""
    path = tmp_path / "state.json"
    new_run(["client001"], 2, write_weights(tmp_path / "one.h5")).save(path)
    content = json.loads(path.read_text())
    del content[missing]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=missing):
        RunState.load(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"9" * 10_000, b'{"version": []}'],
)
def test_what_is_no_state_file_is_refused(tmp_path, content):
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="state.json .*: .*move it away$"):
        RunState.load(path)


def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "state.json")
    with pytest.raises(ValueError, match="not a file: move it away"):
        RunState.load(tmp_path / "state.json")
