"""page.py: the verdict, the model to use, and a page on which nothing is made up."""

import html
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import STARTS_S
from PIL import Image

from report import Model, Run
from reporting import card as cards
from reporting import metrics
from reporting import page as page_of
from reporting.page import Page

GRADES = np.repeat([0, 1, 2, 3, 4], [90, 20, 50, 20, 20])
TASK = "referable DR"
PREPARED = {
    "dataset": "synthetic",
    "preprocessing": "synthetic",
    "split": "hospitals",
    "worker_hospitals": {"worker1": "screening <centre>"},
    "val_hospitals": ["screening <centre>", "the other"] * 100,
}


def records_of(grades):
    return [
        {"picture": f"<b>&{n}.png", "label": int(grade), "dir": f"{n}.png", "patient": f"p{n}"}
        for n, grade in enumerate(grades)
    ]


def answers(strength, grades=GRADES, seed=0):
    """P(healthy) of a model that tells grades apart the better, the greater its strength is."""
    noise = np.random.default_rng(seed).standard_normal(len(grades))
    return 1 / (1 + np.exp(strength * (grades - 1.4) + noise))


def card_of(prepared, round_number, assessed):
    state = SimpleNamespace(arch="drcnn", image_size=32, run="run0", rounds=2, seed=0)
    state.weights, state.weights_sha256 = "none", "0" * 64
    state.counted = {"client001": {"round": round_number, "num_examples": 10}}
    state.counted["client002"] = {"round": 1, "num_examples": 7}  # and missed the last
    row = {"round": round_number, "clients": 3, "num_examples": 60}
    return cards.make(state, row, prepared, "1" * 64, assessed)


def model_of(kind, name, p_healthy, grades=GRADES, round_number=2):
    """A Model with its card, as a server or central.py makes it."""
    card = card_of(PREPARED, round_number, metrics.assess(p_healthy, records_of(grades)))
    card["by_round"] = [cards.round_of({**card, "round": 1}), cards.round_of(card)]
    return Model(kind, name, f"{name}.h5", card, p_healthy)


def run_of(federated=3, alone=0.7, grades=GRADES, **more):
    """A Run of a federated model and one hospital alone, of these strengths."""
    name = "client001 (screening <centre>) alone"
    return Run(
        federated=model_of("federated", "federated", answers(federated, grades), grades),
        val=records_of(grades),
        others=[model_of("alone", name, answers(alone, grades, seed=1), grades)],
        **{"prepared": PREPARED, **more},
    )


def text_of(source):
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", source)).split())


# --- the verdict and the model to use -------------------------------------------------------------


def test_the_verdict_counts_images_and_has_the_paired_difference():
    page = Page(run_of())
    found = page.found_more(page.models[1])
    more, images = round(found.value * 45), page.positive(page.reporting).sum()
    figures = f"(+{found.value:.2f}, {found.low:.2f} to {found.high:.2f})"
    assert images == 45 and more / images == pytest.approx(found.value) and found.low > 0
    assert page.verdict().startswith(f"Federation found {more} more of 45 images with {TASK} than")
    assert page.verdict().endswith(f"at the same specificity {figures}.")


@pytest.mark.parametrize(
    "federated, alone, grades, begins",
    [
        (1.5, 1.5, GRADES, "No difference is shown"),
        (0.9, 4, GRADES, r"Federation found \d+ fewer of .* \(−0\."),
        (3, 0.7, np.repeat([0, 2], 30), "There are too few patients"),
        (3, None, GRADES, "What federation brought is not measured"),
    ],
)
def test_the_verdict_claims_no_more_than_was_shown(federated, alone, grades, begins):
    run = run_of(federated, alone or 1, grades)
    run.others = run.others if alone else []
    assert re.match(begins, Page(run).verdict())


def test_the_best_hospital_alone_is_chosen_by_those_who_are_not_scored():
    """One that is good on the reporting patients only is not the one to beat."""
    run = run_of()
    lucky = np.where(Page(run).choosing, answers(0.1, seed=2), answers(6, seed=2))
    run.others.append(model_of("alone", "client002 alone", lucky))
    assert "client001" in Page(run).verdict()


@pytest.mark.parametrize("on_choosing, on_reporting, used", [(1.2, 9, 2), (9, 1.2, 1)])
def test_the_best_round_is_used_only_where_it_is_shown_to_be_better(
    on_choosing, on_reporting, used
):
    """By those who choose."""
    run = run_of(1.2)
    best = [answers(strength, seed=3) for strength in (on_choosing, on_reporting)]
    p_healthy = np.where(Page(run).choosing, *best)
    run.candidates = [model_of("federated", "federated", p_healthy, round_number=1)]
    run.candidates[0].card["by_round"] = run.federated.card["by_round"][:1]  # it ends there
    page = Page(run)
    assert page.card["round"] == used
    assert [row["round"] for row, *_ in page.rounds()] == [1, 2]


def test_a_hospital_that_missed_the_last_round_is_one_of_the_federation(pictures):
    """The model was trained on its images, too: report.py compares all that its card names."""
    text = text_of(Page(run_of()).html())
    assert "the federation of 2 hospitals, round 2 of 2" in text
    assert "client001 (screening <centre>): 10 images, client002: 7 images" in text


def test_a_run_of_one_round_has_no_round_1_1():
    run = run_of()
    for each in (run.federated, *run.others):
        each.card["by_round"] = each.card["by_round"][:1]
    assert ">1</text>" in Page(run).auc_by_round() and ">1.1</text>" not in Page(run).auc_by_round()


def test_without_a_threshold_the_auc_alone_is_measured(pictures):
    """0.5 was chosen by nobody: the round's line, the launcher and the page say one thing."""
    run = run_of(federated=-2)
    card = run.federated.card
    assert card["tasks"][TASK]["threshold"] is None and "sensitivity" not in cards.summary(card)
    told = card["by_round"][-1][TASK]
    assert told["auc"] is not None and told["sensitivity"] is told["specificity"] is None
    text = text_of(Page(run).html())
    assert re.search(r" federated 0\.\d+ [^a-z]+to [^a-z]+not measured", text)
    assert "federated has no threshold" in text


def test_a_hospital_that_clients_share_is_called_by_its_own_name():
    run = run_of()
    run.federated.card["clients"] = {"client001": 10, "client002": 10}
    assert [row["name"] for row in Page(run).hospitals()] == [
        "client001 (screening <centre>)",
        "the other",
    ]
    hospitals = {"worker1": "screening <centre>", "worker2": "screening <centre>"}
    run.prepared = {**PREPARED, "worker_hospitals": hospitals}
    names = [row["name"] for row in Page(run).hospitals()]
    assert names == ["screening <centre>", "the other"]


def test_of_1000_people_all_are_accounted_for():
    page = Page(run_of())
    screened = page.screened()
    measured = page.card["tasks"][TASK]["measured"]
    found, alarms = 100 * measured["sensitivity"][0], 900 * (1 - measured["specificity"][0])
    assert screened["PPV"] == pytest.approx(found / (found + alarms))
    for what, expected in {"found": found, "missed": 100 - found, "false alarms": alarms}.items():
        value, low, high = screened[what]
        assert value == pytest.approx(expected) and low <= value <= high


def test_a_hospital_is_measured_on_its_own_patients():
    page = Page(run_of())
    row, _ = page.hospitals()
    own = page.reporting & (np.arange(200) % 2 == 0)
    found = page.score(page.used, own & (GRADES >= 2)) > page.threshold
    assert row["name"] == "client001 (screening <centre>)" and row["images"] == own.sum()
    assert row["sensitivity"].value == pytest.approx(found.mean())


def test_the_page_says_how_far_scores_are_probabilities():
    """Recalibrated on those who choose; by a card that was made for others; by none, of too few."""
    run = run_of()
    assert "neither too low nor too high" in Page(run).calibration()[1]
    run.federated.p_healthy = 1 - (1 - run.federated.p_healthy) / 4
    assert "too low to be read as probabilities" in Page(run).calibration()[1]
    few = run_of(grades=np.repeat([0, 2], 35))
    assert few.federated.card["tasks"][TASK]["calibration"] is None
    assert "fewer than 20 of those patients who choose" in Page(few).calibration()[2]
    few.home = "client001"  # of how many it has nobody says that
    assert "fewer than 20 of the server’s patients who choose" in Page(few).calibration()[2]


def test_two_eyes_of_a_patient_count_once_in_the_intervals_of_the_calibration(monkeypatch):
    counted = []
    monkeypatch.setattr(page_of, "with_interval", lambda axes, x, part, n, **_: counted.append(n))
    run = run_of()
    run.federated.p_healthy = run.federated.p_healthy[::2].repeat(2)
    for number, record in enumerate(run.val):
        record["patient"] = f"p{number // 2}"
    page = Page(run)
    page.calibration()
    patients = len(set(page.patients[page.reporting]))
    # where two groups meet, one patient may be in both
    assert len(counted) == 5 and patients <= sum(counted) <= patients + 4


# --- the page -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for record in records_of(GRADES):
        Image.new("RGB", (32, 32), (40 * record["label"], 90, 60)).save(folder / record["dir"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


@pytest.fixture(scope="module")
def full(pictures):
    """(Page, its source) of a Run in which everything is measured."""
    run = run_of(1.5, history=[{"round": 1, "seconds": 8.5, "clients": 3, "missing": "client<9>"}])
    run.client_rows = [
        {"round": 0, "client": "client001", "examples": 24, "auc": 0.91234, "training_seconds": 3},
        {"round": 0, "client": "<i>client002</i>", "examples": 30, "training_seconds": 7.5},
    ]
    page = Page(run)
    return page, page.html()


def test_the_page_needs_nothing_else_and_escapes_what_others_wrote(full):
    source = full[1]
    links = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)""", source)
    assert links and all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert "default-src 'none'" in source and "<script" not in source
    for text in ("<b>&", "<centre>", "client<9>", "<i>client002"):
        assert text not in source and html.escape(text) in source


def test_figures_are_those_of_the_card_and_what_one_needs_first_is_first(full):
    page, text = full[0], text_of(full[1])
    half = metrics.choosing_half(GRADES, [record["patient"] for record in page.run.val])
    assert np.array_equal(page.reporting, ~half)
    order = re.findall(r'<(?:section|details) id="(\w+)"', full[1])
    assert order[:5] == ["brought", "use", "missed", "how", "rounds"]
    for entry in page.card["tasks"].values():
        for metric in ("auc", "sensitivity", "specificity"):
            value, low, high = entry["measured"][metric]
            assert f"{value:.3f} {low:.2f} to {high:.2f}" in text
        assert f"{entry['threshold']:.3f}" in text
    assert "client001 (screening <centre>) 24 images 0.912 not measured" in text
    assert "3 client<9> 8.5 7.5" in text  # of that round, its seconds and the slowest training
    assert "split hospitals" in text


def test_what_is_unknown_is_not_measured(pictures):
    """And what was not made is not named: a split of one hospital's images."""
    indexes = {"worker1": {}, "val_set": {}}
    prepared = {**PREPARED, "val_hospitals": None, "referable": True, "indexes": indexes}
    run = run_of(prepared=prepared)
    run.federated.card["split"] = card_of(prepared, 2, {})["split"]
    for model in (run.federated, *run.others):
        model.card["by_round"] = []
    text = text_of(Page(run).html()).lower()
    for what in ("auc by round is", "by hospital", "round by round", "milder disease is found is"):
        assert f"{what} not measured" in text
    assert "any dr" not in text  # labels that only say "referable" do not tell
    assert "split" not in text


def test_what_hospitals_say_of_labels_that_only_say_referable_is_called_so(pictures):
    run = run_of(prepared={**PREPARED, "referable": True})
    run.client_rows = [{"round": 1, "client": "client001", "examples": 24, "auc": 0.9}]
    text = text_of(Page(run).html())
    assert f"{TASK}, as each hospital says" in text and "any DR" not in text


def test_where_all_patients_choose_nothing_is_measured_and_nothing_warned_of(recwarn):
    page = Page(run_of(grades=np.array([0, 2, 3])))
    assert not page.reporting.any() and page.calibration()[1] == "not measured"
    assert "called at" not in page.roc() and not recwarn.list


def test_a_model_that_must_not_be_used_is_offered_no_threshold(pictures):
    run = run_of()
    run.federated.card["warning"] = "it finds <nobody>"
    text = text_of(Page(run).html())
    assert "This model must not be used: it finds <nobody>." in text
    assert "called where the score" not in text and "predict.py" not in text


@pytest.mark.parametrize("grades", [np.repeat([0, 1], 20), np.repeat([2, 3], 20)])
def test_a_hospital_of_one_class_has_a_page(pictures, grades):
    """The thresholds came with the model, and of so few nothing is warned of."""
    federated = run_of().federated
    federated.p_healthy = answers(3, grades)
    federated.card |= metrics.assess(
        federated.p_healthy, records_of(grades), federated.card["tasks"]
    )
    federated.card["warning"] = ""
    run = Run(federated, records_of(grades), PREPARED, home="client001", candidates=[federated])
    text = text_of(Page(run).html())
    assert "of 1,000 people is not measured" in text and "last round: AUC not measured." in text


def test_the_gallery_shows_the_worst_first(full):
    missed, alarms = full[0].galleries().values()
    threshold = full[0].threshold
    scores = [picture["score"] for picture in missed]
    assert scores and scores == sorted(scores) and max(scores) <= threshold
    scores = [picture["score"] for picture in alarms]
    assert scores and scores == sorted(scores, reverse=True) and min(scores) > threshold


# --- in a browser ---------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
MEASURE = """<iframe id="frame" width="{width}" height="900" style="border:0"
srcdoc="{page}"></iframe>
<pre id="said"></pre><script>
document.getElementById("frame").onload = event => {{
  const inner = event.target.contentDocument, root = inner.documentElement
  const end = id => inner.getElementById(id).getBoundingClientRect().bottom
  document.getElementById("said").textContent = JSON.stringify({{
    needed: root.scrollWidth, brought: end("brought"), use: end("use"),
    broken: [...inner.images].filter(image => !image.naturalWidth).length}})
}}</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width, section", [(400, "brought"), (1280, "use")])
def test_the_first_screen(full, tmp_path, width, section):
    """What federation brought is on it, and where there is room the one model to use."""
    frame = tmp_path / "frame.html"
    frame.write_text(MEASURE.format(width=width, page=html.escape(full[1])))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
    flags += ["--window-size=1500,1000", "--virtual-time-budget=10000", "--dump-dom"]
    command = [CHROMIUM, *flags, frame.as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=STARTS_S)
    said = json.loads(html.unescape(re.search(r'<pre id="said">(.*?)</pre>', ended.stdout)[1]))
    assert said["needed"] <= width and said[section] <= 900 and said["broken"] == 0
    assert "Refused to" not in ended.stderr and "Content Security Policy" not in ended.stderr
