"""predict.py: photographs are scored as in training; what is no fundus gets no verdict."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import rows_of
from eyes import NO_FUNDUS, eye
from PIL import Image
from test_report import by_brightness, finished_run

import model
import predict
from common import files
from preparation import photos
from reporting import metrics


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A finished run on synthetic pictures; its folder of pictures says what made them."""
    made = finished_run(tmp_path_factory.mktemp("predict") / "project")
    (made / "preprocessed" / "pictures.json").write_text('{"preprocessing": "synthetic"}')
    return made


@pytest.fixture
def score(project, monkeypatch, capsys):
    """score(preprocessing, argument ..., warning=..., threshold=..., calibration=...) ->
    (exit code, {path: score}, the output), with a card that says so.
    """
    monkeypatch.chdir(project)
    monkeypatch.setattr(model, "predict", by_brightness)
    path = project / "server" / "server_weight.json"
    original = path.read_text()

    def run(preprocessing, *arguments, warning="", threshold=0.5, calibration=None):
        card = {**json.loads(original), "preprocessing": preprocessing, "warning": warning}
        card["tasks"]["referable DR"] |= {"threshold": threshold, "calibration": calibration}
        path.write_text(json.dumps(card))
        code = predict.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return code, dict(re.findall(r"^(.+?)  score (\d\.\d{3})", said.out, re.M)), said

    yield run
    path.write_text(original)


def by_hand(pixels):
    return f"{1 - by_brightness(None, pixels[None])[0]:.3f}"


@pytest.fixture
def folder(tmp_path):
    """Four photographs, one of which is of no fundus, a broken one, and two files that are none."""
    made = tmp_path / "eyes"
    (made / "more").mkdir(parents=True)
    for seed, name in enumerate(("a_left.jpg", "a_right.JPG", "more/c_left.webp")):
        eye(seed=seed).save(made / name)
    NO_FUNDUS["landscape"]().save(made / "=b_left.png")
    (made / "broken_left.png").write_text("no image")
    (made / "._a_left.jpg").write_text("what macOS writes beside a file")
    (made / "München.txt").write_text("a note")
    return made


# --- what is scored -------------------------------------------------------------------------------


def test_a_photograph_is_prepared_as_in_training(score, tmp_path):
    eye().save(tmp_path / "eye.png")
    scores = {}
    for kind in photos.PREPROCESSINGS:
        code, scores[kind], said = score(kind, tmp_path / "eye.png")
        pixels, _ = photos.prepare_photograph(tmp_path / "eye.png", 32, kind)
        assert (code, scores[kind]) == (0, {str(tmp_path / "eye.png"): by_hand(pixels)})
        assert "synthetic" not in said.out + said.err and "medical device" in said.err
    assert scores["graham"] != scores["colour"]
    code, _, said = score("imported", tmp_path / "eye.png")
    assert code == 0 and "prepared is not known (imported)" in said.err


def test_a_prepared_picture_is_not_prepared_again(score):
    path = "preprocessed/0003.png"
    code, scores, _ = score("synthetic", path)
    assert (code, scores) == (0, {path: by_hand(np.asarray(Image.open(path)))})


def test_a_score_is_recalibrated_by_the_card(score, monkeypatch):
    monkeypatch.setattr(model, "predict", lambda _, images: np.full(len(images), 0.2))
    card = {"calibration": [0.5, 1.0], "threshold": 0.82}
    _, _, said = score("synthetic", "preprocessed/0003.png", **card)
    expected = 1 / (1 + np.exp(-(0.5 * np.log(0.8 / 0.2) + 1)))
    assert f"score {expected:.3f}  referable DR" in said.out


@pytest.mark.parametrize("kind, path, words", [
    ("synthetic", "eye.png", "was trained on synthetic eyes"),
    ("graham", "preprocessed/0003.png", "were made by 'synthetic'"),
])  # fmt: skip
def test_a_model_for_another_kind_of_pictures_gives_no_verdict(score, tmp_path, kind, path, words):
    eye().save(tmp_path / "eye.png")
    path = path if "/" in path else tmp_path / path
    code, scores, said = score(kind, path, "preprocessed/0003.png")
    assert (code, scores, said.err.count("\n")) == (1, {}, 1)
    assert words in said.err and "referable" not in said.out


def test_a_score_that_is_no_number_is_not_scored(score, monkeypatch):
    monkeypatch.setattr(model, "predict", lambda _, images: np.full(len(images), np.nan))
    code, scores, said = score("synthetic", "preprocessed/0003.png", "preprocessed/0004.png")
    assert (code, scores) == (1, {}) and said.err.count("the model answers NaN") == 2
    assert "2 images: 2 not scored" in said.out


def test_the_verdict_is_at_the_threshold_of_the_card_or_of_a_flag(score):
    paths = sorted(map(str, Path("preprocessed").glob("*.png")))[-20:]
    _, scores, said = score("synthetic", *paths, warning="it finds nobody", threshold=None)
    assert said.err.count("must not be used: it finds nobody") == 1
    assert len(scores) == 20 and "referable" not in said.out
    middle = sorted(map(float, scores.values()))[9] + 0.0005  # as it is printed, it is rounded
    expected = {
        path: "referable DR" if float(value) > middle else "no referable DR"
        for path, value in scores.items()
    }
    for given, of_card in ((["--threshold", middle], 0.5), ([], middle)):
        _, _, said = score("synthetic", *paths, *given, threshold=of_card)
        found = re.findall(r"^(.+?)  score \S+  (.+)$", said.out, re.M)
        assert dict(found) == expected and len(set(expected.values())) == 2


def test_each_is_scored_once_and_a_bad_file_gets_its_sentence(score, folder, monkeypatch):
    monkeypatch.setattr(predict, "AT_ONCE", 2)  # what is beside it changes no score
    first, hostile = folder / "a_left.jpg", folder / "a_\x1b[2J\udce5left.jpg"
    _, alone, _ = score("graham", first)
    os.rename(folder / "a_right.JPG", hostile)
    code, scores, said = score("graham", first, folder, "none.jpg")
    # what others have named does not reach the terminal raw
    names = ["a_left.jpg", r"a_\x1b[2J\udce5left.jpg", "c_left.webp"]
    assert code == 1 and [Path(path).name for path in scores] == names
    assert scores[str(first)] == alone[str(first)]
    errors = [line for line in said.err.splitlines() if "error: " in line]
    assert "broken_left.png cannot be read" in errors[0] and "none.jpg is missing" in errors[1]
    assert "=b_left.png  not gradable: no round field of view" in said.out
    for words in ("6 images: ", "1 not gradable", "2 not readable", "skipped: 1 .txt"):
        assert words in said.out
    (folder / "empty").mkdir()
    code, scores, said = score("graham", folder / "empty")
    assert (code, scores) == (1, {}) and f"{folder / 'empty'} has no image" in said.err


def test_csv_is_one_for_a_spreadsheet(score, folder, project, tmp_path, capsys):
    shutil.move(folder, project / "=München")
    code, scores, _ = score("graham", "--csv", tmp_path / "scores.csv", "=München")
    shutil.rmtree(project / "=München")
    assert code == 1 and scores == {}  # the scores are in the file
    assert (tmp_path / "scores.csv").read_bytes().startswith(b"\xef\xbb\xbf")
    rows = rows_of(tmp_path / "scores.csv")
    assert list(rows[0]) == ["path", "score", "threshold", "verdict", "model", "reason"]
    assert len(rows) == 5 and {row["path"][:9] for row in rows} == {"'=München"}  # no formula
    sha256 = files.sha256_of("server/server_weight.h5")[:12]
    assert {(row["threshold"], row["model"]) for row in rows} == {("0.5", sha256)}
    by_name = {Path(row["path"]).name: row for row in rows}
    assert 0 <= float(by_name["a_left.jpg"]["score"]) <= 1
    landscape = by_name["=b_left.png"]
    assert landscape["verdict"] == "not gradable" and landscape["score"] == ""
    assert landscape["reason"] == "no round field of view"
    with pytest.raises(SystemExit, match="2"):
        score("graham", "--csv", tmp_path / "none" / "scores.csv", "x.jpg")
    assert "none/scores.csv cannot be written" in capsys.readouterr().err


def test_a_verdict_in_the_csv_follows_from_its_numbers(score, folder, tmp_path):
    """Scores of a network that was trained on few photographs lie close to 1."""
    table = tmp_path / "scores.csv"
    close_to_1 = {"threshold": 1 - 1e-7, "calibration": [1, 20]}
    score("graham", "--csv", table, folder / "a_left.jpg", **close_to_1)
    [row] = rows_of(table)
    assert row["verdict"] == "referable DR" and float(row["score"]) > float(row["threshold"])


# --- photographs that are graded already ----------------------------------------------------------


@pytest.fixture
def graded(project, monkeypatch):
    """40 pictures of 20 patients with a table; the network's score follows the grade, nearly."""
    made = project / "preprocessed" / "graded"
    made.mkdir(exist_ok=True)
    (made / "pictures.json").write_text('{"preprocessing": "synthetic"}')
    lines = ["image,label,patient"]
    for i in range(40):
        grade = (0, 2, 0, 3, 1)[i // 2 % 5]
        Image.new("RGB", (32, 32), (60 * grade + i, 0, 0)).save(made / f"{i:02d}.png")
        lines.append(f"{i:02d},{grade},{i // 2}")
    (made / "labels.csv").write_text("\n".join(lines))
    monkeypatch.setattr(model, "predict", lambda _, images: 1 - images[:, 0, 0, 0] / 255)
    yield made / "labels.csv"
    shutil.rmtree(made)


def test_graded_photographs_tell_how_good_it_is_here(score, graded):
    _, scores, said = score("synthetic", "--labels", graded, threshold=0.5)
    assert len(scores) == 40 and "40 graded photographs of 20 patients, 16 with it" in said.out
    with_it = [value for path, value in scores.items() if int(Path(path).stem) // 2 % 5 in (1, 3)]
    sensitivity = np.mean(np.array(with_it, float) > 0.5)
    assert re.search(rf"sensitivity +{sensitivity:.3f} \(\S+ to \S+\)", said.out)
    for name in ("specificity", "auc"):
        assert re.search(rf"{name} +1.000 \(0\.\d+ to 1.000\)", said.out)
    relative = graded.relative_to(Path.cwd())  # named in two ways, each counts once
    _, _, twice = score("synthetic", "--labels", relative, graded.parent, threshold=0.5)
    assert "40 graded photographs of 20 patients" in twice.out and " 40 images: " in twice.out


def test_a_graded_photograph_that_is_not_there_is_named_and_is_an_error(score, graded):
    with open(graded, "a") as table:
        table.write("\n77,0,77\n78,ungradable,78\n")
    code, scores, said = score("synthetic", "--labels", graded)
    assert (
        code == 1 and len(scores) == 40 and f"1 images are not in {graded.parent}: '77'" in said.out
    )


def test_a_threshold_is_chosen_on_half_and_measured_on_the_other(score, graded, monkeypatch):
    monkeypatch.setattr(metrics, "choosing_half", lambda grades, _: np.arange(len(grades)) < 20)
    _, _, said = score("synthetic", "--labels", graded, "--sensitivity", 1, "preprocessed/0003.png")
    # midway between the brightest with grade 1 and the darkest with grade 2 of those who choose
    threshold = (60 + 19 + 120 + 2) / 2 / 255
    assert "20 graded photographs of 10 patients, 8 with it" in said.out
    assert f"at the threshold {threshold:.4g}:" in said.out and "41 images" in said.out


@pytest.mark.parametrize("argv, sentence", [
    ([], "expected images, or --labels"),
    (["x.jpg", "--sensitivity", "0.9"], "--sensitivity needs --labels"),
    (["x.jpg", "--threshold", "1.2"], "'1.2' is not a number from 0 to 1"),
])  # fmt: skip
def test_wrong_usage_ends_with_2(argv, sentence, capsys):
    with pytest.raises(SystemExit) as caught:
        predict.main(argv)
    assert caught.value.code == 2 and sentence in capsys.readouterr().err


# --- the model ------------------------------------------------------------------------------------


def test_the_result_that_lies_here_is_taken_and_two_are_asked_about(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert predict.weights_here() == Path("server/server_weight.h5")
    for name in ("client002", "server"):
        (tmp_path / name).mkdir()
        shutil.copy(project / "server" / "server_weight.h5", tmp_path / name)
    assert predict.weights_here() == Path("client002/server_weight.h5")
    Path("client002").rename("uppsala")  # a name of the hospital's own
    Path("server/server_weight.h5").unlink()
    assert predict.weights_here() == Path("uppsala/server_weight.h5")
    Path("uppsala").rename("client002")
    Path("server/server_weight.h5").write_bytes(b"another")
    with pytest.raises(ValueError, match="2 models here: .*client002.*say which by --weights"):
        predict.weights_here()


def test_two_files_are_enough_and_it_says_which(project, tmp_path, monkeypatch, capsys):
    for name in ("server_weight.h5", "server_weight.json"):
        shutil.copy(project / "server" / name, tmp_path)
    shutil.copytree(project / "preprocessed", tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    assert predict.main(["--weights", "server_weight.h5", "pictures/0003.png"]) == 0
    said = capsys.readouterr()
    assert "0003.png  score" in said.out and "model: server_weight.h5, of round 2" in said.out
    assert predict.main(["--weights", "no.h5", "pictures/0003.png"]) == 1
    assert "no.h5 is missing" in capsys.readouterr().err
