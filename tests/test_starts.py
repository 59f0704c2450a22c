"""What a start finds in its folders: taken up, refused with a sentence, or moved aside and said.

The scripts' own main() in this process, without TensorFlow. What may stand in a server's state.json
is test_state.py.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import write_weights

import data
import todoClient
import todoServer
from common import files
from federation.state import RunState


def files_in(folder):
    """{path: content} of what lies there."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- a server's folder ---------------------------------------------------------------------------


def nothing(*_):
    pass


def other_network():
    path = Path("server/state.json")
    RunState.load(path).changed(arch="resnet").save(path)


def own_index():
    """An index/ that may be changed."""
    shutil.copytree("index", "own")
    Path("index").unlink()
    Path("own").rename("index")


def other_patients():
    own_index()
    path = Path("index/val_set.pkl")
    data.write_index(path, data.read_index(path)[:-1])


def other_pictures():
    own_index()
    Path("index/prepared.json").write_text('{"preprocessing": "graham"}')


@pytest.mark.parametrize(
    ("spoil", "flags", "words"),
    [
        (nothing, "--arch vgg16", "--arch is vgg16, but the run in server has drcnn.*--fresh"),
        (nothing, "--image-size 64", "--image-size is 64, but .*--fresh"),
        (nothing, "--seed 7", "--seed is 7, but .*--fresh"),
        (nothing, "--weights imagenet", "--weights is imagenet, but .*--fresh"),
        (nothing, "--round-timeout 5 --min-clients 3", "3 is more than the run's 2 clients"),
        (nothing, "--fresh --index-dir nowhere", "nowhere/val_set.pkl is missing"),
        (Path("server/server_weight.h5").unlink, "", "server_weight.h5 is missing.*--fresh"),
        (
            lambda: write_weights("server/server_weight.h5", 7),
            "",
            "server_weight.h5 is not the model of round 1.*--fresh",
        ),
        (other_network, "", "--arch resnet, and this program knows.*--fresh"),
        (other_patients, "", "other images .*validation_sha256.*--fresh"),
        (other_pictures, "", "preprocessing was '', is 'graham'.*--fresh"),
        (
            lambda: files.save_state(Path("server/state.json"), todoClient.NEW_STATE),
            "",
            "server/state.json is not a state.*--fresh",
        ),
    ],
)
def test_a_server_that_cannot_go_on_is_exit_1_and_changes_nothing(server_main, spoil, flags, words):
    spoil()
    before = files_in(Path("server"))
    code, said = server_main(*flags.split())
    assert code == 1 and re.search(words, said.splitlines()[-1])
    assert files_in(Path("server")) == before


@pytest.mark.parametrize("script", ["server", "client"])
def test_a_folder_in_which_it_cannot_write_is_told_at_start(request, monkeypatch, script):
    """And not when all have trained: another user owns the server's folder, or a client's in it."""
    main = request.getfixturevalue(f"{script}_main")
    folder = {"server": "server/client002", "client": "client001"}[script]

    def touch(path, inner=Path.touch):
        if str(path.parent) == folder:
            raise PermissionError(13, "Permission denied", str(path))
        inner(path)

    monkeypatch.setattr(Path, "touch", touch)
    code, said = main()
    assert code == 1 and f"Permission denied: '{folder}" in said


@pytest.mark.parametrize(
    ("script", "taken", "flags"),
    [
        ("server", "server", ["--fresh"]),
        ("client", "client001", []),
        ("server", "client001", ["--server-dir", "."]),  # where a client works
    ],
)
def test_a_folder_in_which_another_works_is_left_alone(request, script, taken, flags):
    main = request.getfixturevalue(f"{script}_main")
    with files.alone_in(taken):
        upload = files.temporary(Path(taken) / "upload.h5")  # as one that is on its way
        upload.touch()
        before = files_in(Path(taken))
        code, said = main(*flags)
        assert code == 1 and f"another process works in {taken}" in said
        assert files_in(Path(taken)) == before


def test_a_run_goes_on_without_the_file_that_it_began_with(server_main):
    """`--fresh --weights server/best_weight.h5` moves it aside."""
    path = Path("server/state.json")
    RunState.load(path).changed(weights="gone.h5").save(path)
    code, said = server_main("--weights", "gone.h5")
    assert code == 0 and "resuming run" in said


@pytest.mark.parametrize(("given", "rounds"), [("1", 2), ("2", 2), ("3", 3)])
def test_a_run_has_no_fewer_rounds_than_are_merged(server_main, monkeypatch, given, rounds):
    """Else its end, its clients and clients.csv would name the model of round 2 that of round 1."""
    path, found = Path("server/state.json"), []
    scores = dict.fromkeys(("loss", "accuracy", "auc", "sensitivity", "specificity"), 0.5)
    row = {"clients": 1, "missing": "", "num_examples": 3, "seconds": 1.0, **scores}
    history = [{"round": number, **row} for number in (1, 2)]
    RunState.load(path).changed(rounds=4, round=3, history=history).save(path)
    monkeypatch.setattr(todoServer, "serve", lambda _, opened, __: found.append(opened.state) or 0)
    code, said = server_main("--rounds", given)
    assert code == 0 and found[0].rounds == rounds and ("is over" in said) == (rounds == 2)


@pytest.mark.parametrize("side", [16, 32])
def test_a_server_whose_own_pictures_are_too_small_says_so(server_main, side):
    """It scores each round with them, and chooses the thresholds of all hospitals."""
    own_index()
    Path("index/prepared.json").write_text(json.dumps({"image_size": side}))
    code, said = server_main("--fresh", "--image-size", "32")
    assert code == 0 and ("warning: the pictures here have 16" in said) == (side == 16)


def test_fresh_moves_the_old_run_aside_and_nothing_else(server_main):
    """To a new folder each time, which is said; also what a --fresh left that was killed."""
    server = Path("server")
    (server / "client001").mkdir()
    (server / "client001" / "client_weights.h5").write_text("an upload")
    (server / "mine.txt").write_text("a note")
    (server / "works-here").mkdir()  # a client's own folder
    for name in ("state.json", "client_weights.h5"):
        (server / "works-here" / name).touch()
    old = files_in(server)
    code, said = server_main("--fresh", "--rounds", "3")
    assert code == 0 and "the old run's files are in server/old-1" in said
    moved = ("state.json", "server_weight.h5", "client001/client_weights.h5")
    assert files_in(server / "old-1") == {
        server / "old-1" / name: old[server / name] for name in moved
    }
    assert (server / "mine.txt").exists() and (server / "works-here" / "state.json").exists()
    state = RunState.load(server / "state.json")
    assert (state.run != "run0", state.rounds, state.round) == (True, 3, 1)
    assert state.validation_sha256 == files.sha256_of("index/val_set.pkl")
    # killed after it had moved the state: nothing is written over
    (server / "state.json").unlink()
    model = (server / "server_weight.h5").read_bytes()
    code, said = server_main()
    assert code == 0 and "server/old-2" in said
    assert (server / "old-2" / "server_weight.h5").read_bytes() == model


# --- a client's folder ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 99},
        {"round": -1},
        {"history": [{"round": "1"}]},
        {"trained": {"scores": {"auc": "high"}}},
        {"run": "r\x1b[2J"},
    ],
)
def test_a_client_with_a_spoiled_state_is_exit_1_and_it_stays(client_main, changes):
    Path("client001").mkdir()
    text = json.dumps({"version": files.STATE_VERSION} | todoClient.NEW_STATE | changes)
    Path("client001/state.json").write_text(text)
    code, said = client_main()
    assert code == 1 and "client001/state.json" in said and "move it away" in said
    assert "--fresh" not in said  # a client has no such flag
    assert Path("client001/state.json").read_text() == text


@pytest.fixture
def trained(client_main):
    """client001/ with weights that are trained for round 1 of run0, and not delivered."""

    def save(run="run0"):
        site = todoClient.Site(todoClient.parse(["--name", "client001"]))
        write_weights(site.weights_path, 1)
        kept = {**site.settings, "sha256": files.sha256_of(site.weights_path), "scores": {}}
        site.save(run=run, round=1, rounds=1, trained=kept)

    Path("client001").mkdir()
    return save


@pytest.mark.parametrize(
    ("flags", "spoil", "trains_again"),
    [
        ("", nothing, ""),
        ("--seed 3", nothing, "seed was 0, is 3"),
        ("--epochs 2", nothing, "epochs was None, is 2"),
        ("--learning-rate 1e-3", nothing, "learning_rate was None, is 0.001"),
        ("--index index/worker2.pkl", nothing, "num_examples was 4, is 6"),
        ("", lambda: write_weights("client001/client_weights.h5", 2), "training now"),
    ],
)
def test_what_was_trained_is_delivered_unless_by_other_settings(
    trained, client_main, served, flags, spoil, trains_again
):
    trained()
    spoil()
    code, said = client_main("--server", served[1], *flags.split())
    assert code == 0 and trains_again in said
    assert ("training now" in said) == bool(trains_again)


def test_what_lies_in_a_clients_folder_of_another_run_is_moved_aside_and_said(
    trained, client_main, served
):
    """What was trained for it is dropped with a line; nothing is moved at a first start."""
    folder, names = Path("client001"), {"history.csv", "server_weight.h5", "server_weight.json"}
    trained(run="another")
    for name in (*names, "my notes.txt"):
        (folder / name).write_text("of another run")
    before = files_in(folder)
    code, said = client_main("--server", served[1])
    assert code == 0 and "upload rejected: client001 delivers for run 'another'" in said
    assert "another run begins: what lay in client001 is in client001/old-1" in said
    moved = {path.name: path.read_bytes() for path in (folder / "old-1").iterdir()}
    assert set(moved) == names | {"state.json", "client_weights.h5"}
    assert all(moved[name] == before[folder / name] for name in names | {"client_weights.h5"})
    assert (folder / "my notes.txt").exists() and not (folder / "old-2").exists()


# --- what a client is told at its first fetch ----------------------------------------------------


@pytest.mark.parametrize(
    ("says", "flags", "words"),
    [
        ({"image_size": 10**9}, "", "not its network and round as expected .*at most 4096"),
        ({"arch": "resnet"}, "", "not its network and round as expected .*'resnet'"),
        ({}, "--name client009 --index index/worker1.pkl", "'client009' is not one of"),
    ],
)
def test_a_client_that_cannot_take_part_is_one_sentence_and_exit_1(
    client_main, served, says, flags, words
):
    run, address = served
    run.rounds.state = run.rounds.state.changed(**says)
    code, said = client_main("--server", address, *flags.split())
    assert code == 1 and re.search(words, said) and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "prepared", "code", "words"),
    [
        (
            "--index own/worker1.pkl",
            {"preprocessing": "graham"},
            1,
            "of the kind 'graham' .own/prepared.json.* of the kind 'colour': .*--preprocessing",
        ),
        (
            "--val-index own/val_set.pkl",
            {"preprocessing": "graham"},
            1,
            "the pictures of own/val_set.pkl are of the kind 'graham'",
        ),
        (
            "--index own/worker1.pkl",
            {"preprocessing": "colour", "image_size": 16},
            0,
            "warning: the pictures here have 16",
        ),
        ("--index own/worker1.pkl", {"preprocessing": "colour", "image_size": 32}, 0, ""),
    ],
)
def test_pictures_of_another_kind_or_size_than_the_servers_are_told(
    client_main, served, flags, prepared, code, words
):
    """Nobody else would notice. Held-out ones may lie in another folder than those to train on."""
    run, address = served
    run.rounds.state = run.rounds.state.changed(preprocessing="colour")
    shutil.copytree("index", "own")
    Path("own/prepared.json").write_text(json.dumps(prepared))
    ended, said = client_main("--server", address, *flags.split())
    assert ended == code and re.search(words, said)
    assert ("warning" in said) == words.startswith("warning")
