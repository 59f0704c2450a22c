"""written.py and prepare.py: nothing is removed that prepare.py did not write."""

import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_prepare import eye, of_folder, photo_folder

import prepare
from preparation import overview
from preparation.written import LIST, WrittenFiles

TINY = ["--num-train", "10", "--num-val", "10", "--image-size", "16", "--num-clients", "2"]
SYNTHETIC = Path("preprocessed/synthetic")


@pytest.fixture(autouse=True)
def in_an_empty_project(tmp_path, monkeypatch):
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)


def contents(folder="."):
    return {path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def write_text(listed, name, text, **facts):
    with listed.publishing(listed.folder / name, **facts) as written:
        written.write_text(text)


def test_a_file_of_ours_is_known_also_to_a_later_process_and_then_removed():
    write_text(WrittenFiles("here"), "a.txt", "ours", made_from="x")
    later = WrittenFiles("here")
    assert later.entry("here/a.txt")["made_from"] == "x"
    later.clear("here/a.txt")
    assert sorted(os.listdir("here")) == [LIST] and not later.moved


def test_a_file_that_was_changed_or_replaced_is_the_users_and_is_moved():
    listed = WrittenFiles("here")
    write_text(listed, "a.txt", "ours")
    write_text(listed, "b.txt", "ours")
    Path("here/a.txt").write_text("the user's")
    os.utime("here/b.txt", ns=(1, 1))
    for name in ("a.txt", "b.txt", "absent.txt"):
        WrittenFiles("here").clear(f"here/{name}")
    assert Path("here/old-1/a.txt").read_text() == "the user's"
    assert Path("here/old-2/b.txt").read_text() == "ours"


def test_publishing_over_a_file_of_the_users_moves_it():
    Path("here").mkdir()
    Path("here/a.txt").write_text("the user's")
    write_text(WrittenFiles("here"), "a.txt", "ours")
    assert Path("here/a.txt").read_text() == "ours"
    assert Path("here/old-1/a.txt").read_text() == "the user's"


def test_a_list_that_a_crash_cut_off_still_tells_the_rest():
    write_text(WrittenFiles("here"), "a.txt", "ours")
    with open(f"here/{LIST}", "a") as file:
        file.write('{"name": "b.txt", "si')
    listed = WrittenFiles("here")
    assert listed.entry("here/a.txt") and not listed.entry("here/b.txt")
    write_text(listed, "c.txt", "ours")
    assert WrittenFiles("here").entry("here/c.txt")


def test_a_file_of_the_users_that_has_the_lists_name_is_kept():
    Path("here").mkdir()
    Path(f"here/{LIST}").write_text("my notes")
    WrittenFiles("here")
    assert b"my notes" in contents("here")


def test_temporary_files_of_ours_are_removed_and_no_others():
    Path("here").mkdir()
    Path("here/.a.1234-0123abcd.tmp.png").write_text("half")
    Path("here/.notes.tmp").write_text("the user's")
    Path("here/.a.tmp.png").write_text("the user's")
    WrittenFiles("here")
    assert sorted(os.listdir("here")) == [".a.tmp.png", ".notes.tmp", LIST]


INDEX_NAMES = ["worker1.pkl", "worker7.pkl", "worker_mine.pkl", "train_set.pkl", "val_set.pkl"]
INDEX_NAMES += ["split.png", "prepared.json", "notes.txt", ".secret.tmp", "sub/worker1.pkl", LIST]
PICTURE_NAMES = ["train_00000.png", "val_00003.png", "mine.png", "contact_sheet.png", LIST]
PICTURE_NAMES += ["made_from.json", "check_these.png", "sub/train_00000.png", "old-1/x.png"]
LAYOUTS = st.fixed_dictionaries(
    {},
    optional={
        f"{folder}/{name}": st.integers(0, 3)
        for folder, names in (("index", INDEX_NAMES), (SYNTHETIC, PICTURE_NAMES))
        for name in names
    },
)


@settings(max_examples=8, deadline=None)
@given(before=LAYOUTS, between=LAYOUTS)
def test_whatever_the_user_has_there_is_still_somewhere_afterwards(before, between):
    """Files of the user's before the first run, and more of them put over what it wrote."""
    with tempfile.TemporaryDirectory() as project, pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        # matplotlib takes longer than all the rest
        patch.setattr(overview, "save_split_figure", lambda path, *_: path.write_text("figure"))
        users = set()
        for seed, layout in enumerate((before, between)):
            for path, number in layout.items():
                content = f"the user's {path} {seed} {number}".encode()
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                if Path(path).exists():  # the user replaces an own file, or one of ours
                    users.discard(Path(path).read_bytes())
                    Path(path).unlink()
                Path(path).write_bytes(content)
                users.add(content)
            assert prepare.main([*TINY, "--seed", str(seed)]) == 0
            assert users <= contents()
            assert prepare.main([*TINY, "--seed", str(seed), "--check"]) == 0


def test_a_plain_prepare_moves_the_users_own_indexes_aside_and_says_so(capsys):
    Path("index").mkdir()
    for name in ("worker1.pkl", "worker9.pkl", "val_set.pkl"):
        Path("index", name).write_text(f"my {name}")
    assert prepare.main(TINY) == 0
    assert sorted(os.listdir("index/old-1")) == ["val_set.pkl", "worker1.pkl", "worker9.pkl"]
    assert (
        "index/old-1: 3 files that prepare.py did not write were moved" in capsys.readouterr().out
    )
    assert prepare.main([*TINY, "--seed", "1"]) == 0
    assert not Path("index/old-2").exists()  # those were ours


def test_photographs_in_preprocessed_are_no_source(tmp_path, capsys):
    source = photo_folder(Path("preprocessed/folder"))
    with pytest.raises(SystemExit):
        prepare.main(of_folder(source))
    assert "lies in preprocessed/" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(source.resolve())
    with pytest.raises(SystemExit):
        prepare.main(of_folder(tmp_path / "link"))
    Path("labels.csv").write_text("image,label\npreprocessed/folder/eye00.png,0\n")
    assert prepare.main(of_folder(".")) == 1
    assert "where prepared pictures are written" in capsys.readouterr().err
    assert len(list(Path("preprocessed/folder").glob("eye*.png"))) == 20


def test_pictures_that_were_copied_here_are_moved_not_removed():
    """As from another machine: made by prepare.py, but not known to this folder."""
    assert prepare.main(TINY) == 0
    (SYNTHETIC / LIST).unlink()
    before = {path.read_bytes() for path in SYNTHETIC.glob("*.png")}
    assert prepare.main([*TINY, "--seed", "1"]) == 0
    assert before <= contents("preprocessed")


def test_two_photographs_that_swapped_names_within_one_second_are_prepared_anew(tmp_path, capsys):
    source = tmp_path / "photos"
    for number in range(12):
        eye(source / f"{number}.png", level=60 + 10 * number)
        os.utime(source / f"{number}.png", ns=(0, 10**18 + number))
    rows = [f"{number}.png,{number % 2}" for number in range(12)]
    (source / "labels.csv").write_text("\n".join(["image,label", *rows]))
    assert prepare.main(of_folder(source)) == 0
    first = Path("preprocessed/folder/3_png.png").read_bytes()
    assert prepare.main([*of_folder(source), "--check"]) == 0
    for name, new in (("3.png", "x.png"), ("4.png", "3.png"), ("x.png", "4.png")):
        (source / name).rename(source / new)
    capsys.readouterr()
    assert prepare.main([*of_folder(source), "--check"]) == 10
    assert "3.png has changed" in capsys.readouterr().out
    assert prepare.main(of_folder(source)) == 0
    assert "10 pictures are there, 2 to make" in capsys.readouterr().out
    assert Path("preprocessed/folder/4_png.png").read_bytes() == first


def test_check_compares_the_labels(tmp_path, capsys):
    source = photo_folder(tmp_path / "photos")
    assert prepare.main(of_folder(source)) == 0
    assert prepare.main([*of_folder(source), "--check"]) == 0
    table = source / "labels.csv"
    table.write_text(table.read_text().replace("eye03.png,1", "eye03.png,4"))
    capsys.readouterr()
    assert prepare.main([*of_folder(source), "--check"]) == 10
    assert capsys.readouterr().out == "index/ has to be made anew: the labels have changed\n"
    source.rename(tmp_path / "away")  # a disk that is not mounted: what is prepared is still good
    assert prepare.main([*of_folder(source), "--check"]) == 0


def test_the_list_of_pictures_names_no_source(tmp_path):
    source = photo_folder(tmp_path / "Jane Doe")
    assert prepare.main(of_folder(source)) == 0
    text = Path("preprocessed/folder", LIST).read_text()
    assert "Jane" not in text and len(text.splitlines()) == 21
    assert json.loads(text.splitlines()[0])["name"] == "eye00_png.png"


def test_a_doubtful_field_of_view_is_listed_at_every_start_with_a_sheet(tmp_path, capsys):
    source = photo_folder(tmp_path / "photos")
    small = Image.new("RGB", (600, 600))
    with Image.open(source / "eye04.png") as photograph:
        small.paste(photograph, (20, 20))
    small.save(source / "eye04.png")
    Image.effect_noise((90, 60), 10).convert("RGB").save(source / "eye05.png")
    for _ in range(2):
        assert prepare.main(of_folder(source)) == 0
        out = capsys.readouterr().out
        assert "check these: in 2 of 20 photographs the field of view is implausible" in out
        assert "eye04.png (it is only 1% of the picture)" in out
        assert "eye05.png (it fills the picture, without a border)" in out
        assert Image.open("preprocessed/folder/check_these.png").size[0] > 500
    assert "20 pictures are there" in out
