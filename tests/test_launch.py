"""launch.py: which flag goes to which script, and what is refused."""

import pytest

import launch


def words(*given):
    """{script: the words that it gets} for these flags of the user."""
    flags = launch.parse(list(given))
    return {script: " ".join(launch.words_for(script, flags)) for script in launch.SCRIPTS}


def test_a_flag_goes_to_every_script_that_knows_it():
    assert words("--seed", "4", "--arch", "vgg16", "--no-freeze-base", "--fresh") == {
        "prepare.py": "--arch vgg16 --seed 4",
        "todoServer.py": "--arch vgg16 --seed 4 --fresh",
        "todoClient.py": "--epochs 2 --seed 4 --no-freeze-base",
        "central.py": "--epochs 2 --seed 4 --arch vgg16 --no-freeze-base",
    }


def test_each_flag_of_a_script_is_one_here_or_chosen_here():
    parsers = [module.parser() for module in launch.SCRIPTS.values()]
    of_scripts = {action.dest for parser in parsers for action in parser._actions}
    here = {action.dest for action in launch.all_flags()._actions}
    assert here == of_scripts - launch.CHOSEN_HERE | {"no_alone", "central"}


def test_a_round_of_photographs_is_one_pass():
    assert "--epochs" not in words("--dataset", "folder", "--source", ".")["todoClient.py"]


def test_paths_are_relative_to_where_the_user_is(tmp_path, monkeypatch):
    for name in ("a.pkl", "b.pkl"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    given = words("--index-from", "a.pkl", "b.pkl", "--source", ".", "--weights", "none")
    assert f"--index-from {tmp_path}/a.pkl {tmp_path}/b.pkl" in given["prepare.py"]
    assert given["todoServer.py"] == "--weights none"
    missing = words("--dataset", "folder", "--source", "nowhere")  # not one in the project
    assert f"--source {tmp_path}/nowhere" in missing["prepare.py"]


@pytest.mark.parametrize(
    "given, sentence",
    [
        (["--round", "3"], "unrecognized arguments: --round 3"),  # no short forms
        (["--listen", "localhost:1"], "unrecognized arguments: --listen localhost:1"),
        (["--dataset", "idrid"], "expected --source, the folder of the photographs"),
        (["--min-clients", "2"], "--min-clients needs --round-timeout"),
        (["--dataset", "folder", "--source", ".", "--val-part", "1"], "--val-part 0 or 1 is of"),
        (["--weights", "/nowhere.h5"], "'/nowhere.h5' is neither none nor imagenet, and no file"),
    ],
)
def test_wrong_usage(given, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a run in this project would go on without a look at --weights
    with pytest.raises(SystemExit, match="2"):
        launch.parse(given)
    assert sentence in capsys.readouterr().err
