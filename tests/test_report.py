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
from reporting import card as cards
from reporting import metrics
from reporting.page import by_epoch

SECTIONS = ["summary", "comparison", "curves", "errors", "missed", "clients", "time"]
COMPARED = "series,round,loss,accuracy,auc,sensitivity,specificity\n" + "".join(
    f"{series},{number},0.5,0.{number}5,0.75,0.5,0.5\n"
    for series in ("central", "federated <IID>")
    for number in range(1, 9)
)


def write_comparison(folder):
    """compare.csv and compare.json, as launch.py writes them."""
    (folder / "compare.csv").write_text(COMPARED)
    card = (folder / "server" / "server_weight.json").read_text()
    assessed = {name: json.loads(card)["tasks"] for name in ("central", "federated <IID>")}
    central = assessed["central"]["referable DR"]["measured"]
    central["auc"] = [0.75, 0.6, 0.9]
    central["sensitivity"] = [0.85, 0.7, 0.95]
    (folder / "compare.json").write_text(json.dumps(assessed))


def finished_run(folder):
    """A project folder in which a run of two rounds ended.

    The model tells bright pictures (odd numbers) from dark ones (even). Some with DR are dark and
    some healthy ones are bright: so it finds some DR, misses some, and has false alarms.
    """
    make_data(folder, validation=60)
    workers = [data.read_index(folder / "index" / f"worker{k}.pkl") for k in (1, 2, 3)]
    data.write_index(folder / "index" / "train_set.pkl", sum(workers, []))
    val = data.read_index(folder / "index" / "val_set.pkl")
    brightness = data.healthy(val)
    for number, record in enumerate(val):
        grade = (0, 1, 0, 2, 0, 2, 0, 3, 0, 4, 0, 0)[number % 12]
        if number in (10, 46):  # one chooses the thresholds, one is scored
            grade = 3
        record.update(label=grade, new_label=str(grade == 0), picture=f"<b>&{number}.png")
    data.write_index(folder / "index" / "val_set.pkl", val)
    prepared = {"dataset": "synthetic", "split": "iid", "preprocessing": "drawn", "image_size": 32}
    (folder / "index" / "prepared.json").write_text(json.dumps(prepared))
    for name in ("server", "client001", "client002", "client003"):
        (folder / name).mkdir(exist_ok=True)
    model.configure(0)
    network = model.build("drcnn", 32)
    images = pixels_of(val, folder)
    batches = data.TrainingBatches(images, brightness, 8, 0, "teacher", augment=False)
    for round_number in range(1, 7):
        model.train(network, batches, round_number, 1, lambda row: None)
    weights = folder / "server" / "server_weight.h5"
    model.save(network, weights)
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
    counted = {"client001": {"round": 2, "num_examples": 8, "sha256": ""}}
    state = RunState(
        run="run0",
        clients=["client001", "client002", "client003"],
        rounds=2,
        weights_sha256=files.sha256_of(weights),
        arch="drcnn",
        image_size=32,
        seed=0,
        round=3,
        counted=counted,
        history=[{"round": number, **row} for number in (1, 2)],
    )
    state.save(folder / "server" / "state.json")
    assessed = metrics.assess(model.predict(network, images), val)
    validation = files.sha256_of(folder / "index" / "val_set.pkl")
    card = cards.make(state, state.history[-1], prepared, validation, assessed)
    cards.publish(weights, card)
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


def pixels_of(records, folder):
    """uint8 (n, size, size, 3), as a network of the pictures' own size sees them."""
    return np.stack([np.asarray(Image.open(folder / record["dir"])) for record in records])


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
        write_comparison(finished)
        assert report.main(["--compare", "compare.csv"]) == 0
        (finished / "compare.csv").unlink()
        (finished / "compare.json").unlink()
    return (finished / "server" / "report.html").read_text(encoding="utf-8")


def refused(capsys, *flags):
    """The one sentence with which report.py ends."""
    assert report.main(list(flags)) == 1
    error = capsys.readouterr().err
    assert " report: error: " in error and error.count("\n") == 1
    return error


# --- the page ----------------------------------------------------------------------------------


def test_the_page_needs_nothing_else(page):
    assert re.findall(r'<section id="(\w+)"', page) == SECTIONS
    links = re.findall(r'(?:src|href|action|data)\s*=\s*["\']?([^"\'\s>]+)', page)
    assert links and all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert not re.search(r"<script|<link|<iframe|@import|url\((?!#)", page)
    assert set(re.findall(r"\w+://[^\s\"'<>]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "default-src 'none'" in page
    assert "not a medical device" in page and "The images are drawn" in page
    assert "diabetic retinopathy (DR)" in page


@pytest.fixture(scope="module")
def scored(finished):
    """Of the reporting patients: records, grades, scores; and the card."""
    val = data.read_index(finished / "index" / "val_set.pkl")
    network = model.build("drcnn", 32)
    model.load(network, finished / "server" / "server_weight.h5")
    score = 1 - model.predict(network, pixels_of(val, finished))
    grades = np.array([record["label"] for record in val])
    reporting = ~metrics.choosing_half(grades, [record["dir"] for record in val])
    card = json.loads((finished / "server" / "server_weight.json").read_text())
    return grades[reporting], score[reporting], card


def test_the_page_counts_as_a_hand_count(page, scored):
    grades, score, card = scored
    for task, least_grade in {"any DR": 1, "referable DR": 2}.items():
        says = score > card["tasks"][task]["threshold"]
        has = grades >= least_grade
        counts = [says & has, ~says & has, says & ~has, ~says & ~has]
        found, missed, alarms, cleared = (int(chosen.sum()) for chosen in counts)
        assert (
            f'<th scope="row">has {task}</th><td><b>{found}</b> found</td>'
            f"<td><b>{missed}</b> missed</td>" in page
        )
        assert f"<td><b>{alarms}</b> false alarms</td><td><b>{cleared}</b> cleared</td>" in page
        assert f"{100 * found / has.sum():.1f} %<small>" in page
        assert f"{card['tasks'][task]['threshold']:.3f}" in page
    referable = score > card["tasks"]["referable DR"]["threshold"]
    assert (referable & (grades >= 2)).any() and (~referable & (grades >= 2)).any()
    names = ("none", "mild", "moderate", "severe", "proliferative")
    for grade, name in enumerate(names):
        of_grade = grades == grade
        assert (
            f">{(referable & of_grade).sum()} of {of_grade.sum()}<" in page and f">{name}<" in page
        )


def test_a_client_is_measured_at_the_threshold_for_any_dr(page, finished, scored):
    threshold = scored[2]["tasks"]["any DR"]["threshold"]
    records = data.read_index(finished / "index" / "worker1.pkl")
    network = model.build("drcnn", 32)
    model.load(network, finished / "server" / "server_weight.h5")
    score = 1 - model.predict(network, pixels_of(records, finished))
    has_dr = data.healthy(records) < 0.5
    sensitivity = np.mean(score[has_dr] > threshold)
    specificity = np.mean(score[~has_dr] <= threshold)
    table = page[page.index(f"any DR at {threshold:.3f}</caption>") :].partition("</table>")[0]
    row = re.search(r'<th scope="row">client001</th>.*', table)[0].split("</tr>")[0]
    assert f"<td>{100 * sensitivity:.1f} %" in row and f"<td>{100 * specificity:.1f} %" in row


def test_an_epoch_is_drawn_where_it_was_in_its_round():
    rows = [(1, 1, 0.9), (1, 2, 0.8), (2, 1, 0.7), (2, 2, 0.6), (3, 1, 0.5)]
    history = [dict(zip(("round", "epoch", "loss"), row, strict=True)) for row in rows]
    assert by_epoch(history, "loss") == [(0.5, 0.9), (1, 0.8), (1.5, 0.7), (2, 0.6), (3, 0.5)]


def test_the_gallery_shows_the_worst_first_and_escapes_names(page, scored):
    threshold = scored[2]["tasks"]["referable DR"]["threshold"]
    shown = [
        (float(score), int(grade))
        for score, grade in re.findall(r"<figcaption>score ([\d.]+)<br>grade (\d)", page)
    ]
    missed = [score for score, grade in shown if grade >= 2]
    alarms = [score for score, grade in shown if grade < 2]
    assert missed and missed == sorted(missed) and max(missed) <= threshold + 5e-4
    assert alarms and alarms == sorted(alarms, reverse=True) and min(alarms) >= threshold - 5e-4
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
        assert f'<th scope="row">{part}</th><td>{seconds:.2f} s</td>' in page


def test_the_comparison_gives_each_series_at_its_own_threshold(page):
    cells = "<td>0.750<small>0.600 to 0.900</small></td><td>85.0 %<small>70.0 to 95.0</small></td>"
    assert f'<th scope="row">central</th>{cells}' in page
    comparison = page[page.index('<section id="comparison"') :].partition("</section>")[0]
    assert comparison.count('<th scope="row">federated &lt;IID&gt;</th>') == 2
    assert 'aria-label="AUC for any DR, all validation images"' in comparison


def test_what_the_clients_measured_stands_below_what_the_server_measured(here, scored):
    (here / "server" / "clients.csv").write_text(
        "round,client,num_examples,examples,loss,auc,threshold,sensitivity,specificity,"
        "training_loss,training_seconds\n"
        "0,client001,8,40,0.7,0.5,0.5,0.0,1.0,0.6,3.0\n"
        "1,client001,8,40,0.6,0.7,0.5,0.25,1.0,0.5,2.0\n"
        "1,client002,10,30,0.6,,0.5,,1.0,0.4,4.0\n"
        "2,client001,,40,0.4321,0.91234,0.017,0.875,0.75,,\n"
    )
    assert report.main([]) == 0
    page = (here / "server" / "report.html").read_text(encoding="utf-8")
    table = page[page.index("as the client says") :].partition("</table>")[0]
    rows = {}
    for head, cells in re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', table):
        rows[head] = re.findall("<td>(.*?)</td>", cells)
    assert list(rows) == ["the server’s reporting patients", "client001", "client002"]
    # the result's scores, and the training of the last round that has any
    result = ["2", "40", "0.912", "0.017", "87.5 %", "75.0 %", "0.432", "8", "0.500", "2.0"]
    assert rows["client001"] == result
    assert rows["client002"][2:6] == ["–", "0.500", "–", "100.0 %"]
    measured = scored[2]["tasks"]["any DR"]["measured"]
    assert rows["the server’s reporting patients"][2] == f"{measured['auc'][0]:.3f}"
    assert rows["the server’s reporting patients"][4] == f"{100 * measured['sensitivity'][0]:.1f} %"


def test_a_client_elsewhere_is_said_to_be_elsewhere(here, capsys):
    (here / "index" / "worker2.pkl").unlink()
    (here / data.read_index("index/worker3.pkl")[0]["dir"]).unlink()
    shutil.rmtree(here / "client001")  # its index is here, but it did not train on it here
    shutil.rmtree(here / "client002")
    # of another run, perhaps: only shown where it is asked for
    write_comparison(here)
    assert report.main([]) == 0
    line = capsys.readouterr().out
    assert re.search("report: server/report.html: round 2/2, 60 held-out images of 60 pat", line)
    page = (here / "server" / "report.html").read_text()
    assert page.count("its images are not on this machine") == 3 and 'id="comparison"' not in page
    assert "How long the clients trained is not known here" in page  # and not 0 s


def test_a_model_that_must_not_be_used_is_offered_no_threshold(here, capsys):
    path = here / "server" / "server_weight.json"
    card = json.loads(path.read_text())
    path.write_text(json.dumps({**card, "warning": "it finds nobody"}))
    assert report.main([]) == 0
    assert "this model must not be used: it finds nobody" in capsys.readouterr().out
    page = (here / "server" / "report.html").read_text()
    first = re.search(r'<p class="note">(.*?)</p>', page)[1]
    assert first == "<strong>This model must not be used:</strong> it finds nobody."
    assert "threshold: DR where" not in page


def test_it_goes_by_the_card_and_not_by_what_lies_in_index_now(here, capsys):
    (here / "index" / "prepared.json").write_text(json.dumps({"dataset": "idrid"}))
    assert report.main([]) == 0
    page = (here / "server" / "report.html").read_text()
    assert "data set synthetic" in page and "The images are drawn" in page
    shutil.copy("index/worker1.pkl", "index/val_set.pkl")
    assert "is not the validation set that this run was scored on" in refused(capsys)


def test_weights_and_card_that_do_not_belong_together_are_refused(here, capsys):
    with open("server/server_weight.h5", "ab") as file:
        file.write(b"x")
    assert "describes other weights than" in refused(capsys)
    (here / "server" / "server_weight.json").unlink()
    assert "server_weight.json, the card of" in refused(capsys)


def test_the_best_round_is_marked_and_has_its_own_numbers(here):
    shutil.copy("server/server_weight.h5", "server/best_weight.h5")
    card = json.loads((here / "server" / "server_weight.json").read_text())
    card["round"] = 1
    card["tasks"]["any DR"]["measured"]["auc"] = [0.8123, 0.7, 0.9]
    (here / "server" / "best_weight.json").write_text(json.dumps(card))
    assert report.main([]) == 0
    page = (here / "server" / "report.html").read_text()
    assert "The best round is round 1" in page and "The model of the best round, 1" in page
    assert "0.812<small>0.700 to 0.900" in page


def test_what_is_missing_is_one_sentence(here, monkeypatch, capsys):
    (here / "bad.csv").write_text("series,round\ncentral,1\n")
    assert "bad.csv is not what ./compare.sh writes" in refused(capsys, "--compare", "bad.csv")
    assert "none.csv" in refused(capsys, "--compare", "none.csv")
    (here / "compare.csv").write_text(COMPARED)
    assert "compare.json" in refused(capsys, "--compare", "compare.csv")
    (here / "compare.json").write_text('{"central": {"any DR": {"threshold": 7}}}')
    error = refused(capsys, "--compare", "compare.csv")
    assert "compare.json is not what ./compare.sh writes" in error
    assert "elsewhere/state.json knows no finished round" in refused(
        capsys, "--server-dir", "elsewhere"
    )
    assert "nothing/val_set.pkl is missing" in refused(capsys, "--index-dir", "nothing")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
    )
    assert "pip install -r requirements-report.txt" in refused(capsys)


# --- in a browser ------------------------------------------------------------------------------

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
MEASURE = """<iframe id="frame" width="{width}" height="900" style="border:0"
srcdoc="{page}"></iframe>
<pre id="said"></pre><script>
document.getElementById("frame").onload = event => {{
  const inner = event.target.contentDocument, root = inner.documentElement
  document.getElementById("said").textContent = JSON.stringify({{
    width: root.clientWidth, needed: root.scrollWidth,
    sections: [...inner.querySelectorAll("section")].map(s => s.id),
    broken: [...inner.images].filter(image => !image.naturalWidth).length,
    images: inner.images.length,
    empty: [...inner.querySelectorAll("svg")].filter(
      svg => svg.getBoundingClientRect().width < 200).length}})
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
    assert said["sections"] == SECTIONS
    assert said["width"] == width and said["needed"] <= width
    assert said["images"] > 2 and said["broken"] == said["empty"] == 0
    assert "Refused to" not in ended.stderr and "Content Security Policy" not in ended.stderr
