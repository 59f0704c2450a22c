"""report.py: what belongs together is compared, what does not is refused or left out by a sentence.

What the page says is tested in test_page.py.
"""

import json
import shutil

import numpy as np
import pytest
from conftest import make_data, new_run
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
    for number in (1, 2):
        counted = {"client001": {"round": number, "num_examples": 8}}
        state = new_run(["client001"], 2, weights).changed(counted=counted)
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


def test_a_card_keeps_what_was_measured_of_each_round_but_on_the_wire(here):
    """There it has 4 kB: of many rounds and clients it says how many."""
    card = loaded().federated.card
    assert [row["round"] for row in card["by_round"]] == [1, 2]
    for task, entry in card["tasks"].items():
        assert card["by_round"][-1][task]["auc"] == entry["measured"]["auc"][0]
    card["by_round"] *= 50
    assert cards.parse(cards.to_wire(card)) == {**card, "by_round": []}
    card["clients"] = {f"client{number:03}": 10 for number in range(500)}
    wired = cards.to_wire(card)
    assert len(wired) <= 4000 and cards.parse(wired)["num_clients"] == 1


def test_what_belongs_to_the_run_is_shown_beside_it_and_what_is_missing_by_its_command(here):
    shutil.copytree("alone/client001", "central")
    assert [other.kind for other in loaded().others] == ["alone", "central"]
    shutil.rmtree("central")
    change_card("alone/client001/central_weight.h5", run="old")
    run = loaded()
    assert run.others == [] and "of another run" in run.left_out[0]
    train_by(run.commands)
    assert len(loaded().others) == 1
    change_card("alone/client001/central_weight.h5", round=1)  # central.py was stopped
    run = loaded()
    assert run.others == [] and "ends at round 1, expected 2" in run.left_out[0] and run.commands
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


def test_held_out_images_that_memory_cannot_hold_lie_in_a_file(here, monkeypatch):
    kinds = []

    def predict(network, images):
        kinds.append(type(images))
        return by_brightness(network, images)

    monkeypatch.setattr(model, "predict", predict)
    monkeypatch.setattr(data, "available_memory", lambda: 1000)
    loaded()
    assert set(kinds) == {np.memmap} and not list((here / "index").glob(".*"))


def test_a_hospital_gets_the_answer_at_home(here):
    """Measured on its own patients, by what came with the model."""
    (here / "client001").mkdir()
    for name in ("server_weight.h5", "server_weight.json"):
        shutil.copy(here / "server" / name, here / "client001" / name)
    data.write_index("index/val_set.pkl", data.read_index("index/val_set.pkl")[:12])
    at_home = ["--client-dir", "client001"]
    train_by(loaded(*at_home).commands)
    run = loaded(*at_home)
    assert [other.kind for other in run.others] == ["alone", "fine-tuned"] and run.commands == []
    assert run.others[1].card["round"] == 3  # one more, at that round's learning rate
    result = cards.read("client001/server_weight.h5")
    for task, entry in run.federated.card["tasks"].items():
        for name in ("threshold", "calibration"):
            assert entry[name] == result["tasks"][task][name]
    assert run.federated.card["num_images"] == 12
    assert run.federated.card["warning"] == ""  # too few patients to warn of the model
    assert report.main(at_home) == 0
    assert "this hospital alone" in (here / "client001" / "report.html").read_text()
    change_card("client001/server_weight.h5", round=3)  # the server's --rounds went on
    run = loaded(*at_home)
    assert run.others == [] and len(run.commands) == 2
    assert "ends at round 3, expected 4" in run.left_out[1]


def test_a_hospital_whose_pictures_are_of_another_kind_by_now_is_told(here, capsys):
    """Scored with them, the federated model would look bad, and nobody would notice."""
    (here / "client001").mkdir()
    for name in ("server_weight.h5", "server_weight.json"):
        shutil.copy(here / "server" / name, here / "client001" / name)
    change_card("client001/server_weight.h5", preprocessing="colour")
    source = ["client001/server_weight.h5", "--index", "index/worker1.pkl", "--out", "other"]
    for code in (
        report.main(["--client-dir", "client001"]),
        central.main(["--like", *source]),
        central.main(["--fine-tune", *source]),
    ):
        assert code == 1
    said = capsys.readouterr().err
    assert said.count("of the kind 'synthetic' (index/prepared.json), and those of") == 3
    assert not (here / "client001" / "report.html").exists()


def test_the_table_of_a_client_of_2020_does_not_hold_up_the_page(tmp_path):
    (tmp_path / "history.csv").write_text(",loss,acc\n0,0.5,0.9\n")
    words = report.alone_command(tmp_path / "w.h5", tmp_path / "w.pkl", tmp_path, tmp_path)
    assert words.endswith(" --epochs 1")


def test_a_table_that_a_spreadsheet_saved_is_read_or_named(tmp_path):
    path = tmp_path / "clients.csv"
    path.write_text("\ufeffround,client\n1,client001\n", encoding="utf-8")
    assert report.read_table(path) == [{"round": 1, "client": "client001"}]
    path.write_bytes("round,client\n1,Göteborg\n".encode("cp1252"))
    with pytest.raises(ValueError, match="clients.csv is no table of a run"):
        report.read_table(path)


def test_weights_card_and_validation_set_belong_together(here, capsys):
    def refused(*flags):
        """The one sentence with which report.py ends."""
        assert report.main(list(flags)) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    capsys.readouterr()
    (here / "server" / "clients.csv").write_text("round,client\none,x\n")
    assert "clients.csv is no table of a run" in refused()
    shutil.copy("index/worker1.pkl", "index/val_set.pkl")
    assert "is not the validation set that this run was scored on" in refused()
    with open("server/server_weight.h5", "ab") as file:
        file.write(b"x")
    assert "describes other weights than" in refused()
    (here / "server" / "server_weight.json").unlink()
    assert "server_weight.json, the card of" in refused()
    assert "elsewhere/server_weight.h5 is missing" in refused("--server-dir", "elsewhere")


@pytest.mark.parametrize(
    "name, value",
    [
        ("card_version", 1),
        ("image_size", 5000),
        ("num_nan", "0"),
        ("by_round", [{"round": 1}]),
        ("tasks", {}),
        ("threshold", 2),
        ("calibration", [0, 1]),
        ("calibration", [1, 1e999]),
        ("measured", {}),
    ],
)
def test_a_card_that_this_program_did_not_write_is_refused(finished, name, value):
    """Of another version, or with other scores; the sentence names what is wrong."""
    card = json.loads((finished / "server" / "server_weight.json").read_text())
    is_of_card = name in card
    (card if is_of_card else card["tasks"]["any DR"])[name] = value
    with pytest.raises(ValueError, match=name.removeprefix("card_") if is_of_card else "tasks"):
        cards.parse(json.dumps(card))
