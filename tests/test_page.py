"""page.py: the verdict, the model to use, and a page on which nothing is made up."""

import html
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from report import Model, Run
from reporting import card as cards
from reporting import metrics
from reporting.page import Page

GRADES = np.repeat([0, 1, 2, 3, 4], [90, 20, 50, 20, 20])
STATE = {"arch": "drcnn", "image_size": 32, "run": "run0", "rounds": 2, "seed": 0}
STATE |= {"weights": "none", "weights_sha256": "0" * 64}
PREPARED = {
    "dataset": "synthetic",
    "split": "hospitals",
    "preprocessing": "drawn",
    "worker_hospitals": {"worker1": "screening <centre>"},
}


def records_of(grades):
    return [
        {
            "picture": f"<b>&{n}.png",
            "label": int(grade),
            "dir": f"{n}.png",
            "new_label": str(grade == 0),
            "patient": f"p{n}",
        }
        for n, grade in enumerate(grades)
    ]


def answers(strength, grades=GRADES, seed=0):
    """P(healthy) of a model that tells grades apart the better, the greater its strength is."""
    noise = np.random.default_rng(seed).standard_normal(len(grades))
    return 1 / (1 + np.exp(strength * (grades - 1.4) + noise))


def model_of(kind, name, p_healthy, grades=GRADES, round_number=2):
    """A Model with its card, as a server or central.py makes it."""
    counted = {f"client00{k}": {"round": round_number, "num_examples": 10 * k} for k in (1, 2, 3)}
    state = SimpleNamespace(**STATE, counted=counted)
    row = {"round": round_number, "clients": 3, "num_examples": 60}
    row |= {"loss": 0.5, "accuracy": 0.5, "auc": 0.5}
    assessed = metrics.assess(p_healthy, records_of(grades))
    card = cards.make(state, row, PREPARED, "1" * 64, assessed)
    card["by_round"] = [cards.round_of({**card, "round": 1}), cards.round_of(card)]
    return Model(kind, name, f"{name}.h5", card, p_healthy)


def run_of(federated=3, alone=0.7, grades=GRADES, **more):
    """A Run of a federated model and one hospital alone, of these strengths."""
    return Run(
        federated=model_of("federated", "federated", answers(federated, grades), grades),
        val=records_of(grades),
        prepared=PREPARED,
        others=[
            model_of(
                "alone", "client001 (screening <centre>) alone", answers(alone, grades, 1), grades
            )
        ],
        **more,
    )


# --- the verdict and the model to use -------------------------------------------------------------


def test_the_verdict_counts_at_the_same_specificity():
    run = run_of()
    reporting = ~metrics.choosing_half(GRADES, [record["patient"] for record in run.val])
    has_it = GRADES[reporting] >= 2
    score = 1 - run.federated.p_healthy[reporting]
    says = score > run.federated.card["tasks"]["referable DR"]["threshold"]
    alone = 1 - run.others[0].p_healthy[reporting]
    most = max(
        (alone[has_it] > cut).sum()
        for cut in [*alone, -1]
        if (alone[~has_it] > cut).sum() <= says[~has_it].sum()
    )
    more = says[has_it].sum() - most
    sentence = Page(run).verdict()
    assert sentence.startswith(f"Federation found {more} more of {has_it.sum()} images")
    assert f"(+{more / has_it.sum():.2f}, 0." in sentence


@pytest.mark.parametrize(
    "federated, alone, grades, begins",
    [
        (1.5, 1.5, GRADES, "No difference is shown"),
        (0.9, 4, GRADES, r"Federation found \d+ fewer of .* \(−0\."),
        (3, 0.7, np.repeat([0, 2], 30), "There are too few patients"),
    ],
)
def test_the_verdict_claims_no_more_than_was_shown(federated, alone, grades, begins):
    assert re.match(begins, Page(run_of(federated, alone, grades)).verdict())


def test_without_a_hospital_alone_nothing_is_claimed():
    run = run_of()
    run.others = []
    assert "is not measured" in Page(run).verdict()


def test_the_best_hospital_alone_is_chosen_by_those_who_are_not_scored():
    """One that is good on the reporting patients only is not the one to beat."""
    run = run_of()
    lucky = np.where(
        metrics.choosing_half(GRADES, [record["patient"] for record in run.val]),
        answers(0.1, seed=2),
        answers(6, seed=2),
    )
    run.others.append(model_of("alone", "client002 alone", lucky))
    assert "client001" in Page(run).verdict()


@pytest.mark.parametrize("strength, used", [(1.2, 2), (9, 1)])
def test_the_best_round_is_used_only_where_it_is_shown_to_be_better(strength, used):
    run = run_of(federated=1.2)
    best = model_of("federated", "federated", answers(strength, seed=3), round_number=1)
    run.candidates = [best]
    assert Page(run).card["round"] == used


def test_scores_that_are_too_low_are_said_to_be_too_low():
    run = run_of()
    run.federated.p_healthy = 1 - (1 - run.federated.p_healthy) / 4
    assert Page(run).calibration_in_words()[0].startswith("scores are too low")


def test_of_1000_people_all_are_accounted_for():
    page = Page(run_of())
    screened = page.screened()
    sensitivity = page.card["tasks"]["referable DR"]["measured"]["sensitivity"]
    assert screened["found"] == pytest.approx([100 * part for part in sensitivity])
    assert screened["found"][0] + screened["missed"][0] == pytest.approx(100)
    called = screened["found"][0] + screened["false alarms"][0]
    assert screened["PPV"] == pytest.approx(screened["found"][0] / called)
    for what in ("found", "missed", "false alarms"):
        value, low, high = screened[what]
        assert low <= value <= high


# --- the page -------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    for record in records_of(GRADES):
        Image.new("RGB", (32, 32), (40 * record["label"], 90, 60)).save(tmp_path / record["dir"])
    monkeypatch.chdir(tmp_path)


def text_of(page):
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def full_run():
    """A Run in which everything is measured."""
    hospitals = ["screening <centre>" if n % 2 else "the other" for n in range(len(GRADES))]
    run = run_of(1.5, history=[{"round": 1, "seconds": 8.0, "clients": 3, "missing": "client<9>"}])
    run.prepared = {**PREPARED, "val_hospitals": hospitals}
    run.client_rows = [
        {"round": 1, "client": "client001", "examples": 24, "auc": 0.91234, "training_seconds": 3},
        {"round": 1, "client": "<i>client002</i>", "examples": 30, "auc": None},
    ]
    return run


def test_the_page_needs_nothing_else(pictures):
    page = Page(full_run()).html()
    links = re.findall(r"""(?:src|href|action|data)\s*=\s*["']?([^"'\s>]+)""", page)
    assert links and all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert not re.search(r"<script|<link|<iframe|@import|url\((?!#)", page)
    assert "default-src 'none'" in page


def test_text_from_outside_is_escaped(pictures):
    page = Page(full_run()).html()
    for text in ("<b>&", "<centre>", "client<9>", "<i>client002"):
        assert text not in page and html.escape(text) in page


def test_figures_are_those_of_the_card(pictures):
    run = full_run()
    text = text_of(Page(run).html())
    for entry in run.federated.card["tasks"].values():
        for metric in ("auc", "sensitivity", "specificity"):
            value, low, high = entry["measured"][metric]
            assert f"{value:.3f} {low:.2f} to {high:.2f}" in text
        assert f"{entry['threshold']:.3f}" in text


def test_a_hospital_is_measured_with_its_number_of_images(pictures):
    run = full_run()
    page = Page(run)
    rows = {row["name"]: row for row in page.hospitals()}
    own = np.array(run.prepared["val_hospitals"]) == "screening <centre>"
    score, positive = 1 - run.federated.p_healthy, GRADES >= 2
    row = rows["client001 (screening <centre>)"]
    found = score[own & page.reporting & positive] > page.threshold
    assert row["images"] == (own & page.reporting).sum()
    assert row["sensitivity"].value == pytest.approx(found.mean())
    text = text_of(page.html())
    assert "client001 (screening <centre>) 24 images 0.912 not measured" in text


def test_what_is_unknown_is_not_measured(pictures):
    run = run_of()
    for model in (run.federated, *run.others):
        model.card.pop("by_round")  # a card of before, or from the wire
    text = text_of(Page(run).html())
    assert "0.00 s" not in text and "nan" not in text.lower().split()
    assert "a round not measured" in text and "slowest client not measured" in text
    assert "The AUC by round is not measured" in text
    assert "By hospital Not measured" in text


def test_a_split_is_named_only_where_one_was_made():
    state = SimpleNamespace(**STATE, counted={})
    row = dict.fromkeys(("round", "clients", "num_examples", "loss", "accuracy", "auc"), 1)
    one = {**PREPARED, "indexes": {"worker1": {}, "val_set": {}}}
    two = {**PREPARED, "indexes": {"worker1": {}, "worker2": {}}}
    splits = [cards.make(state, row, prepared, "", {})["split"] for prepared in (one, two)]
    assert splits == ["none", "hospitals"]


def test_a_model_that_must_not_be_used_is_offered_no_threshold(pictures):
    run = run_of()
    run.federated.card["warning"] = "it finds <nobody>"
    text = text_of(Page(run).html())
    assert text.count("This model must not be used: it finds <nobody>.") == 1
    assert "called where the score" not in text and "predict.py" not in text


def test_the_gallery_shows_the_worst_first(pictures):
    page = Page(full_run())
    missed, alarms = page.galleries().values()
    scores = [picture["score"] for picture in missed]
    assert scores and scores == sorted(scores) and max(scores) <= page.threshold
    scores = [picture["score"] for picture in alarms]
    assert scores and scores == sorted(scores, reverse=True) and min(scores) > page.threshold


# --- in a browser ---------------------------------------------------------------------------------

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
MEASURE = """<iframe id="frame" width="{width}" height="900" style="border:0"
srcdoc="{page}"></iframe>
<pre id="said"></pre><script>
document.getElementById("frame").onload = event => {{
  const inner = event.target.contentDocument, root = inner.documentElement
  const end = id => inner.getElementById(id).getBoundingClientRect().bottom
  document.getElementById("said").textContent = JSON.stringify({{
    width: root.clientWidth, needed: root.scrollWidth, brought: end("brought"), use: end("use"),
    broken: [...inner.images].filter(image => !image.naturalWidth).length}})
}}</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width, section", [(400, "brought"), (1280, "use")])
def test_the_first_screen(pictures, tmp_path, width, section):
    """What federation brought is on it, and where there is room the one model to use."""
    page = html.escape(Page(full_run()).html())
    (tmp_path / "frame.html").write_text(MEASURE.format(width=width, page=page))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
    flags += ["--window-size=1500,1000", "--virtual-time-budget=10000", "--dump-dom"]
    ended = subprocess.run(
        [CHROMIUM, *flags, (tmp_path / "frame.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=90,
    )
    said = json.loads(html.unescape(re.search(r'<pre id="said">(.*?)</pre>', ended.stdout)[1]))
    assert said["width"] == width and said["needed"] <= width
    assert said[section] <= 900 and said["broken"] == 0
    assert "Refused to" not in ended.stderr and "Content Security Policy" not in ended.stderr
