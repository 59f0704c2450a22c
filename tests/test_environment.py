"""Where people run it: file systems without locks, and another project's Keras settings."""

import errno
import fcntl
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
from conftest import start_server

from common import files
from federation import weights


@pytest.mark.parametrize(
    ("fsync", "code", "words"),
    [
        (errno.EINVAL, 0, "warning: this file system cannot flush folders"),
        (errno.ENOTSUP, 0, "warning: this file system cannot flush folders"),
        (errno.EIO, 1, "Input/output error"),  # that is a disk which fails
    ],
)
def test_without_locks_and_without_fsync_of_folders(
    client_main, served, monkeypatch, fsync, code, words
):
    """As on some network file systems."""

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    def not_of_folders(fd, inner=os.fsync):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(fsync, os.strerror(fsync))
        inner(fd)

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(os, "fsync", not_of_folders)
    files._warn_once.cache_clear()
    ended, said = client_main("--server", served[1])
    assert ended == code and said.count(words) == 1 and "Traceback" not in said
    assert said.count("warning: this file system has no locks") == 1


def write_half(path, *_, **__):
    with open(path, "wb") as file:
        file.write(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_names_the_file(client_main, served, monkeypatch):
    """The system names none where a write fails; whoever has to make room needs it."""
    run, address = served
    with monkeypatch.context() as patched:
        patched.setattr(weights, "_write", write_half)
        code, said = client_main("--server", address)
        assert code == 4 and "No space left on device: 'client001/client_weights.h5'" in said
        path = run.folder / "history.csv"
        patched.setattr(files, "publish", write_half)
        with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
            files.publish_rows(path, ["round"], [{"round": 1}])
    assert not list(Path("client001").glob(".*.tmp*"))
    assert client_main("--server", address)[0] == 0  # once there is room


FOREIGN_SETTINGS = [
    {"floatx": "float16", "image_data_format": "channels_first"},
    {"floatx": "float64", "epsilon": 0.1},
]


@pytest.mark.slow
def test_keras_settings_of_another_project_change_no_bit(start, site, tmp_path):
    results = []
    for number, settings in enumerate([None, *FOREIGN_SETTINGS]):
        home = tmp_path / f"home{number}"
        (home / ".keras").mkdir(parents=True)
        if settings:
            text = json.dumps({"backend": "torch", **settings})
            (home / ".keras" / "keras.json").write_text(text)
        folder = shutil.copytree(site, tmp_path / f"run{number}")
        environment = {**os.environ, "HOME": str(home)}
        environment.pop("KERAS_HOME", None)
        flags = ["--clients", "client001", "--rounds", "1", "--image-size", "32"]
        server, address = start_server(start, folder, *flags, env=environment)
        arguments = ["--name", "client001", "--server", address, "--threads", "1"]
        client = start("todoClient.py", *arguments, cwd=folder, env=environment)
        assert [client.wait(120), server.wait(120)] == [0, 0], client.output + server.output
        digest = files.sha256_of(folder / "server" / "server_weight.h5")
        results.append((digest, (folder / "server" / "history.csv").read_text().split(",")[1:9]))
    assert results[0] == results[1] == results[2]
