"""report.py: right numbers with right intervals, on a page that needs nothing but itself."""

import base64
import html
import importlib.util
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import make_data
from PIL import Image

import data
import model
import report
from common import files
from federation.state import RunState
from reporting import metrics

SECTIONS = ["summary", "curves", "errors", "missed", "clients", "time"]
COMPARED = "series,round,loss,accuracy,auc,sensitivity,specificity\n" + "".join(
    f"{series},{number},0.5,0.{number}5,0.75,0.5,0.5\n"
    for series in ("central", "federated <IID>")
    for number in range(1, 9)
)


def finished_run(folder):
    """A project folder in which a run of two rounds ended; the model finds some DR, misses some, and has false alarms."""
    make_data(folder, validation=60)
    workers = [data.read_index(folder / "index" / f"worker{k}.pkl") for k in (1, 2, 3)]
    data.write_index(folder / "index" / "train_set.pkl", sum(workers, []))
    val = data.read_index(folder / "index" / "val_set.pkl")
    for number, record in enumerate(val):
        grade = (0, 1, 0, 2, 3, 4)[number % 6]
        record.update(label=grade, new_label=str(grade == 0), picture=f"<b>&{number}.png")
    data.write_index(folder / "index" / "val_set.pkl", val)
    (folder / "index" / "prepared.json").write_text(
        json.dumps(
            {"dataset": "synthetic", "split": "iid", "preprocessing": "drawn", "image_size": 32}
        )
    )
    for name in ("server", "client001", "client002", "client003"):
        (folder / name).mkdir(exist_ok=True)
    model.configure(0)
    network = model.build("drcnn", 32)
    images = np.stack([np.asarray(Image.open(folder / record["dir"])) for record in val])
    p = model.predict(network, images)
    bias = network.layers[-1].weights[-1]
    bias.assign(
        bias - np.median(np.log(p / (1 - p))).astype(np.float32)
    )  # half of the images on either side of 0.5
    model.save(network, folder / "server" / "server_weight.h5")
    row = {
        "loss": 0.7,
        "accuracy": 0.5,
        "auc": 0.5,
        "sensitivity": 0.5,
        "specificity": 0.5,
        "clients": 3,
        "missing": "",
        "num_examples": 30,
        "wait_seconds": 5.0,
        "merge_seconds": 1.0,
        "evaluate_seconds": 2.0,
        "seconds": 8.0,
    }
    state = RunState(
        run="run0",
        clients=["client001", "client002", "client003"],
        rounds=2,
        weights_sha256="",
        arch="drcnn",
        image_size=32,
        seed=0,
        round=3,
        history=[{"round": number, **row} for number in (1, 2)],
    )
    state.save(folder / "server" / "state.json")
    for name, seconds in (("client001", 3.0), ("client002", 4.25)):
        epochs = [
            {
                "round": number,
                "epoch": 1,
                "loss": 0.6,
                "accuracy": 0.6,
                "num_examples": 8,
                "seconds": seconds,
            }
            for number in (1, 2)
        ]
        files.save_state(folder / name / "state.json", {"run": "run0", "history": epochs})
    files.save_state(
        folder / "client003" / "state.json",
        {"run": "another", "history": [{**epochs[0], "seconds": 99.0}]},
    )
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("report") / "project")


@pytest.fixture
def here(finished, tmp_path, monkeypatch):
    """A copy of the finished run, as the current folder."""
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def page(finished):
    """The text of a report with everything in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished)
        (finished / "compare.csv").write_text(COMPARED)
        assert report.main(["--compare", "compare.csv"]) == 0
        (finished / "compare.csv").unlink()
    return (finished / "server" / "report.html").read_text(encoding="utf-8")


def refused(capsys, *flags):
    """The one sentence with which report.py ends."""
    assert report.main(list(flags)) == 1
    error = capsys.readouterr().err
    assert " report: error: " in error and error.count("\n") == 1
    return error


# --- the page -----------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else(page):
    assert re.findall(r'<section id="(\w+)"', page) == [*SECTIONS, "comparison"]
    links = re.findall(r'(?:src|href|action|data)\s*=\s*["\']?([^"\'\s>]+)', page)
    assert links and all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert not re.search(r"<script|<link|<iframe|@import|url\((?!#)", page)
    assert set(re.findall(r"\w+://[^\s\"'<>]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "default-src 'none'" in page
    assert "not a medical device" in page and "The images are drawn" in page


def test_the_page_counts_as_a_hand_count(page, finished):
    val = data.read_index(finished / "index" / "val_set.pkl")
    network = model.build("drcnn", 32)
    model.load(network, finished / "server" / "server_weight.h5")
    images = np.stack([np.asarray(Image.open(finished / record["dir"])) for record in val])
    says_dr, grade = (
        model.predict(network, images) < 0.5,
        np.array([record["label"] for record in val]),
    )
    for what, chosen in {
        "found": says_dr & (grade > 0),
        "missed": ~says_dr & (grade > 0),
        "false alarms": says_dr & (grade == 0),
        "cleared": ~says_dr & (grade == 0),
    }.items():
        assert chosen.any() and f"<b>{chosen.sum()}</b> {what}" in page
    assert f"{100 * np.mean(says_dr == (grade > 0)):.1f} %" in page
    for number, name in enumerate(("mild", "moderate", "severe", "proliferative"), start=1):
        assert (
            f">{np.sum(says_dr & (grade == number))} of {np.sum(grade == number)}<" in page
            and f">{name}<" in page
        )


def test_the_gallery_shows_the_worst_first_and_escapes_names(page):
    shown = [
        (float(score), int(grade))
        for score, grade in re.findall(r"<figcaption>score ([\d.]+)<br>grade (\d)", page)
    ]
    missed, alarms = [s for s, grade in shown if grade > 0], [s for s, grade in shown if grade == 0]
    assert missed and missed == sorted(missed) and max(missed) <= 0.5
    assert alarms and alarms == sorted(alarms, reverse=True) and min(alarms) >= 0.5
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == len(shown)
    assert all(
        Image.open(io.BytesIO(base64.b64decode(picture))).size == (128, 128) for picture in pictures
    )
    assert "<b>&amp;" not in page and "&lt;b&gt;&amp;" in page and "federated &lt;IID&gt;" in page


def test_the_time_of_a_round_is_divided_by_the_slowest_client_of_this_run(page):
    parts = {
        "training, slowest client": 4.25,
        "start, transport, waiting": 0.75,
        "merging": 1,
        "evaluating": 2,
    }
    for part, seconds in parts.items():
        assert f"<td>{part}</td><td>{seconds:.2f} s</td>" in page


def test_the_threshold_that_finds_95_percent_is_the_highest_that_does(page, finished):
    val = data.read_index(finished / "index" / "val_set.pkl")
    network = model.build("drcnn", 32)
    model.load(network, finished / "server" / "server_weight.h5")
    p = model.predict(
        network, np.stack([np.asarray(Image.open(finished / record["dir"])) for record in val])
    )
    ill = np.sort([1 - score for score, record in zip(p, val, strict=True) if record["label"]])[
        ::-1
    ]
    assert (
        f"the threshold would be {ill[int(np.ceil(0.95 * len(ill))) - 1]:.3f}, at a specificity of "
        in page
    )


def test_the_comparison_gives_the_last_round_with_its_interval(page):
    low, high = metrics.wilson(0.85, 60)
    assert (
        f"<td>central</td><td>85.0 %<small>{100 * low:.1f} to {100 * high:.1f}</small></td><td>0.750</td>"
        in page
    )
    assert "Mean of the last 3 rounds" in page


def test_a_client_elsewhere_is_said_to_be_elsewhere(here, capsys):
    (here / "index" / "worker2.pkl").unlink()
    (here / data.read_index("index/worker3.pkl")[0]["dir"]).unlink()
    shutil.rmtree(here / "client001")  # its index is here, but it did not train on it here
    (here / "compare.csv").write_text(
        COMPARED
    )  # of another run, perhaps: only shown where it is asked for
    assert report.main([]) == 0
    assert capsys.readouterr().out.startswith(
        "report: server/report.html: round 2/2, 60 held-out images: accuracy 0."
    )
    page = (here / "server" / "report.html").read_text()
    assert page.count("its images are not on this machine") == 3 and 'id="comparison"' not in page


def test_what_is_missing_is_one_sentence(here, monkeypatch, capsys):
    (here / "bad.csv").write_text("series,round\ncentral,1\n")
    assert "bad.csv is not what ./compare.sh writes" in refused(capsys, "--compare", "bad.csv")
    assert "none.csv" in refused(capsys, "--compare", "none.csv")
    assert "elsewhere/state.json knows no finished round" in refused(
        capsys, "--server-dir", "elsewhere"
    )
    assert "nothing/val_set.pkl is missing" in refused(capsys, "--index-dir", "nothing")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
    )
    assert "pip install -r requirements-report.txt" in refused(capsys)


# --- in a browser -------------------------------------------------------------------------------------------------

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
MEASURE = """<iframe id="frame" width="{width}" height="900" style="border:0" srcdoc="{page}"></iframe>
<pre id="said"></pre><script>
document.getElementById("frame").onload = event => {{
  const inner = event.target.contentDocument, root = inner.documentElement
  document.getElementById("said").textContent = JSON.stringify({{
    width: root.clientWidth, needed: root.scrollWidth, sections: [...inner.querySelectorAll("section")].map(s => s.id),
    broken: [...inner.images].filter(image => !image.naturalWidth).length, images: inner.images.length,
    empty: [...inner.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().width < 200).length}})
}}</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_in_a_browser(page, tmp_path, width):
    (tmp_path / "frame.html").write_text(
        MEASURE.format(width=width, page=html.escape(page)), encoding="utf-8"
    )
    ended = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--hide-scrollbars",
            "--window-size=1500,1000",
            "--virtual-time-budget=10000",
            "--dump-dom",
            (tmp_path / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=90,
    )
    said = json.loads(html.unescape(re.search(r'<pre id="said">(.*?)</pre>', ended.stdout)[1]))
    assert said["sections"] == [*SECTIONS, "comparison"]
    assert said["width"] == width and said["needed"] <= width
    assert said["images"] > 2 and said["broken"] == said["empty"] == 0
    assert "Refused to" not in ended.stderr and "Content Security Policy" not in ended.stderr
