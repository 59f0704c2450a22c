"""launch.py: which flag goes to which script, and what is refused before anything is made."""

import os
import re
import subprocess
import sys

import pytest

import launch

PHOTOGRAPHS = ["--dataset", "folder", "--source", "."]


def words(*given):
    """{script: the words that it gets} for these flags of the user."""
    flags = launch.parse(list(given))
    return {script: " ".join(launch.words_for(script, flags)) for script in launch.SCRIPTS}


@pytest.mark.parametrize("script", launch.SCRIPTS)
def test_every_flag_of_a_script_is_known_or_chosen_here(script):
    shown = launch.all_flags().format_help()
    for action in launch.SCRIPTS[script].parser()._actions:
        here = len(re.findall(rf"^  {action.option_strings[0]}(?=[ ,\n])", shown, re.M))
        assert here == (action.dest not in launch.CHOSEN_HERE), action.dest


def test_a_flag_goes_to_every_script_that_knows_it():
    assert words("--seed", "4", "--arch", "vgg16", "--no-freeze-base", "--fresh") == {
        "prepare.py": "--arch vgg16 --seed 4",
        "todoServer.py": "--arch vgg16 --seed 4 --fresh",
        "todoClient.py": "--epochs 2 --seed 4 --no-freeze-base",
        "central.py": "--epochs 2 --seed 4 --arch vgg16 --no-freeze-base",
    }


def test_a_round_of_photographs_is_one_pass():
    assert "--epochs" not in words(*PHOTOGRAPHS)["todoClient.py"]
    assert "--epochs 3" in words("--epochs", "3")["todoClient.py"]


def test_paths_are_relative_to_where_the_user_is(tmp_path, monkeypatch):
    for name in ("a.pkl", "b.pkl"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    given = words("--index-from", "a.pkl", "b.pkl", "--source", ".", "--weights", "none")
    assert f"--index-from {tmp_path}/a.pkl {tmp_path}/b.pkl" in given["prepare.py"]
    assert given["todoServer.py"] == "--weights none"


@pytest.mark.parametrize(
    "given, sentence",
    [
        (["--round", "3"], "unrecognized arguments: --round 3"),
        (["rounds"], "unrecognized arguments: rounds"),
        (["--listen", "localhost:1"], "unrecognized arguments: --listen localhost:1"),
        (["--rounds", "x"], "'x' is not a whole number of at least 1"),
        (["--dataset", "idrid"], "expected --source, the folder of the photographs"),
        (["--min-clients", "2"], "--min-clients needs --round-timeout"),
        (["--weights", "/nowhere.h5"], "'/nowhere.h5' is neither none nor imagenet, and no file"),
    ],
)
def test_wrong_usage(given, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        launch.parse(given)
    assert ended.value.code == 2 and sentence in capsys.readouterr().err


def test_wrong_usage_is_one_line_before_any_image_is_made(copy_of_project):
    shown = subprocess.run(
        ["./run_local.sh", "--rounds", "2", "--colour", "red"],
        cwd=copy_of_project,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert shown.returncode == 2 and shown.stdout == ""
    assert re.fullmatch(r".*--colour red; ./run_local.sh --help names the flags\n", shown.stderr)
    for folder in ("preprocessed", "index", "server"):
        assert [path.name for path in (copy_of_project / folder).iterdir()] == [".gitkeep"]
