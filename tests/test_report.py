"""report.py: what belongs together is compared, what does not is refused or left out by a sentence.

What the page says is tested in test_page.py.
"""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import make_data
from PIL import Image

import central
import data
import model
import predict
import report
from common import files
from reporting import card as cards
from reporting import metrics


def by_brightness(network, images):
    """In place of model.predict: the brighter, the less P(healthy)."""
    return 1 - images.mean((1, 2, 3)) / 255


def finished_run(folder):
    """A project folder in which a run of two rounds ended; tests of predict.py use it, too.

    By brightness, its pictures with odd numbers have DR. Some of these are healthy and some of the
    others are not: so the model finds some DR, misses some, and has false alarms.
    """
    make_data(folder, validation=60)
    val_path = folder / "index" / "val_set.pkl"
    val = data.read_index(val_path)
    for number, record in enumerate(val):
        grade = (0, 1, 0, 2, 0, 2, 0, 3, 0, 4, 0, 0)[number % 12]
        if number in (10, 46):  # one chooses the thresholds, one is scored
            grade = 3
        record.update(label=grade, new_label=str(grade == 0))
    data.write_index(val_path, val)
    prepared = {"dataset": "synthetic", "split": "iid", "preprocessing": "synthetic"}
    prepared |= {"image_size": 32, "worker_hospitals": {"worker1": "screening centre"}}
    (folder / "index" / "prepared.json").write_text(json.dumps(prepared))
    pixels = np.stack([np.asarray(Image.open(folder / record["dir"])) for record in val])
    weights = folder / "server" / "server_weight.h5"
    weights.parent.mkdir()
    model.configure(0)
    model.save(model.build("drcnn", 32), weights)
    assessed = metrics.assess(by_brightness(None, pixels), val)
    state = SimpleNamespace(run="run0", rounds=2, arch="drcnn", image_size=32, seed=0)
    state.weights, state.weights_sha256 = "none", files.sha256_of(weights)
    for number in (1, 2):
        state.counted = {"client001": {"round": number, "num_examples": 8}}
        row = {"round": number, "clients": 1, "num_examples": 8}
        card = cards.make(state, row, prepared, files.sha256_of(val_path), assessed)
        cards.publish(weights, card)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("report") / "project")


@pytest.fixture
def here(finished, tmp_path, monkeypatch):
    """A copy of the finished run with one hospital alone beside it, as the current folder."""
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setattr(model, "train", lambda *arguments, **more: None)
    monkeypatch.setattr(model, "predict", by_brightness)
    like = ["--like", "server/server_weight.h5", "--out", "alone/client001"]
    assert central.main([*like, "--index", "index/worker1.pkl"]) == 0
    return tmp_path / "copy"


def loaded(*flags):
    args = report.parse(list(flags))
    return report.load_client(args) if args.client_dir else report.load_server(args)


def refused(capsys, *flags):
    """The one sentence with which report.py ends."""
    assert report.main(list(flags)) == 1
    error = capsys.readouterr().err
    assert " report: error: " in error and error.count("\n") == 1
    return error


def train_by(commands):
    for command in commands:
        assert central.main(command.partition(" central.py ")[2].split()) == 0


def change_card(weights, **changes):
    path = cards.path_of(weights)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_it_ends_with_a_table_the_verdict_the_page_and_the_next_command(here, capsys):
    assert report.main([]) == 0
    *table, _, page, command = capsys.readouterr().out.splitlines()  # the verdict before the page
    assert any(line.startswith("client001 (screening centre) alone ") for line in table)
    assert page.endswith((here / "server" / "report.html").as_uri())
    (here / "preprocessed" / "pictures.json").write_text('{"preprocessing": "synthetic"}')
    assert predict.main(command.partition(" .venv/bin/python predict.py ")[2].split()) == 0
    assert "client001 (screening centre) alone" in (here / "server" / "report.html").read_text()


def test_a_card_keeps_what_was_measured_of_each_round(here):
    card = loaded().federated.card
    assert [row["round"] for row in card["by_round"]] == [1, 2]
    for task, entry in card["tasks"].items():
        assert card["by_round"][-1][task]["auc"] == entry["measured"]["auc"][0]
    card["by_round"] *= 50  # what is too long for the wire is left out there
    assert len(cards.to_wire(card)) <= cards.MAX_WIRE_BYTES
    assert cards.parse(cards.to_wire(card))["by_round"] == []


def test_what_belongs_to_the_run_is_shown_beside_it_and_what_is_missing_by_its_command(here):
    shutil.copytree("alone/client001", "central")
    assert [other.kind for other in loaded().others] == ["alone", "central"]
    change_card("alone/client001/central_weight.h5", run="old")
    shutil.rmtree("central")
    run = loaded()
    assert run.others == [] and "of another run" in run.left_out[0]
    train_by(run.commands)
    assert len(loaded().others) == 1
    shutil.rmtree("alone")
    (here / "index" / "worker1.pkl").unlink()  # the hospitals are elsewhere
    [command] = loaded().commands
    assert " report.py --client-dir " in command


def test_the_best_round_is_a_candidate(here):
    best = here / "server" / "best_weight.h5"
    for suffix in (".h5", ".json"):
        shutil.copy(here / "server" / f"server_weight{suffix}", best.with_suffix(suffix))
    assert loaded().candidates == []  # the last round is the best
    with open(best, "ab") as file:
        file.write(b"x")
    assert "the best round is left out" in loaded().left_out[0]
    change_card(best, round=1, weights_sha256=files.sha256_of(best))
    assert len(loaded().candidates) == 1


def test_a_hospital_gets_the_answer_at_home(here, capsys):
    """Measured on its own patients, by what came with the model."""
    (here / "client001").mkdir()
    for name in ("server_weight.h5", "server_weight.json"):
        shutil.copy(here / "server" / name, here / "client001" / name)
    own = data.read_index("index/val_set.pkl")[:12]
    data.write_index("index/val_set.pkl", own)
    train_by(loaded("--client-dir", "client001").commands)
    run = loaded("--client-dir", "client001")
    assert [other.kind for other in run.others] == ["alone", "fine-tuned"] and run.commands == []
    assert run.others[1].card["round"] == 3  # one more, at that round's learning rate
    result = cards.read("client001/server_weight.h5")
    for task, entry in run.federated.card["tasks"].items():
        for name in ("threshold", "calibration"):
            assert entry[name] == result["tasks"][task][name]
    assert run.federated.card["num_images"] == len(own)
    assert run.federated.card["warning"] == ""  # too few patients to warn of the model
    assert report.main(["--client-dir", "client001"]) == 0
    assert "this hospital alone" in (here / "client001" / "report.html").read_text()


def test_weights_card_and_validation_set_belong_together(here, capsys):
    shutil.copy("index/worker1.pkl", "index/val_set.pkl")
    assert "is not the validation set that this run was scored on" in refused(capsys)
    with open("server/server_weight.h5", "ab") as file:
        file.write(b"x")
    assert "describes other weights than" in refused(capsys)
    (here / "server" / "server_weight.json").unlink()
    assert "server_weight.json, the card of" in refused(capsys)
    assert "elsewhere/server_weight.h5 is missing" in refused(capsys, "--server-dir", "elsewhere")


def test_a_card_that_this_program_did_not_write_is_refused(here):
    """Of another version, or with other scores; the sentence names what is wrong."""
    card = json.loads((here / "server" / "server_weight.json").read_text())

    def with_task(**changes):
        return {"tasks": {**card["tasks"], "any DR": {**card["tasks"]["any DR"], **changes}}}

    for changes, name in [
        ({"card_version": 1, "num_nan": None}, "version 1"),
        ({"image_size": 5000}, "image_size"),
        ({"num_nan": "0"}, "num_nan"),
        *[({"by_round": each}, "by_round") for each in ("x", [1], [{"round": 1}])],
        *[(with_task(threshold=each), "tasks") for each in (2, "0.5", True)],
        *[(with_task(calibration=each), "tasks") for each in ([0, 1], [1], "", [1, 1e999])],
        (with_task(measured={}), "tasks"),
        ({"tasks": {}}, "tasks"),
    ]:
        with pytest.raises(ValueError, match=name):
            cards.parse(json.dumps({**card, **changes}))


def test_a_table_of_a_run(here, capsys):
    """Empty cells are None; one that is damaged is refused, and not read in part."""
    table = here / "server" / "clients.csv"
    table.write_text("round,client,auc,loss\n1,007,,\n2,x,,0.5\n3\n")
    rows = report.read_table(table, "round", "client")
    assert [(row["client"], row["auc"], row["loss"]) for row in rows] == [
        ("007", None, None),
        ("x", None, 0.5),
        ("", None, None),
    ]
    for text in ("series,round\ncentral,1\n", "round,client\n1,x,3\n", "round,client\none,x\n"):
        table.write_text(text)
        assert "clients.csv is no table of a run" in refused(capsys)
    assert "nothing/val_set.pkl is missing" in refused(capsys, "--index-dir", "nothing")
