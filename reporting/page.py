"""Reporting: the page of report.py. This file says what is on it, page.html how it looks.

Each method of Page gives numbers, sentences or a drawing (SVG) to the template, which escapes all
text. No file is written in here, and no model asked: what it answered is in the Run of report.py.
"""

import base64
import io
import shlex
import textwrap
from contextlib import contextmanager
from itertools import chain, cycle
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

import data
from preparation.overview import GRADE_NAMES
from preparation.photos import open_image
from reporting import card as cards
from reporting import metrics
from reporting.metrics import DISEASE, LEARNT, TASK, TASKS

MAX_PICTURES = 6  # in each gallery
PICTURE_PX = 128  # a side
LABEL_WIDTH = 22  # characters in a line of a name beside a drawing
PYTHON = ".venv/bin/python"  # of the commands that a page names
SCREENED = (100, 900)  # of 1,000 people, with and without TASK; page.html says so in words
# After Okabe and Ito (2008), whose colours people with any colour vision tell apart; darker, for
# names are written in them. Dashes and markers say the same without colour. The first is the
# federation's.
STYLES = (
    {"color": "#0072b2", "linestyle": "-", "marker": "o", "linewidth": 2.4},
    {"color": "#d55e00", "linestyle": "--", "marker": "s"},
    {"color": "#1a1a1a", "linestyle": "-.", "marker": "^"},
    {"color": "#b04a86", "linestyle": ":", "marker": "D"},
    {"color": "#007d5c", "linestyle": (0, (6, 1, 1, 1, 1, 1)), "marker": "v"},
    {"color": "#8a6d00", "linestyle": (0, (1, 1)), "marker": "P"},
)
FIGURE_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "report",  # equal figures are equal bytes
    "text.parse_math": False,  # a $ in a name is a $
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ebf0",
    "axes.edgecolor": "#9aa3af",
    "font.size": 9,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
}


def interval(measured, digits=2):
    """'0.95 to 1.00' of (value, low, high); '' where that is not known."""
    _, low, high = measured
    if low is None or np.isnan(low):
        return ""
    return f"{low:.{digits}f} to {high:.{digits}f}".replace("-", "−")


def signed(value, digits=2):
    """'+0.14', '−0.02': of a difference."""
    return "not measured" if np.isnan(value) else f"{value:+.{digits}f}".replace("-", "−")


def difference_text(measured, digits=2):
    """'+0.14, 0.06 to 0.22'; 'not measured' where it is not."""
    return ", ".join(filter(None, [signed(measured.value, digits), interval(measured, digits)]))


def how_it_did(difference):
    if difference.low > 0:
        return "is better than"
    return "is worse than" if difference.high < 0 else "is not shown to be better than"


class Page:
    """What the template asks for, of one report.Run.

    models     those that are compared: the federated one first
    used       the one to use, of which all figures are that are of one model
    reasons    sentences: how the candidates did beside the federated one
    tasks      {task: its least grade}, as far as the labels tell
    choosing, reporting   bool (n,): the images of the patients who choose and who are scored
    """

    def __init__(self, run):
        self.run = run
        # that of the verdict first; of labels that only say "referable" there is no other
        self.referable_only = bool(run.prepared.get("referable"))
        self.tasks = {TASK: TASKS[TASK], **({} if self.referable_only else TASKS)}
        self.grades = np.array([record["label"] for record in run.val])
        self.patients = np.array(data.patients(run.val))
        self.choosing = metrics.choosing_half(self.grades, self.patients)
        self.reporting = ~self.choosing
        self.used, self.reasons = self.choose()
        # the best round's model is a federated one, a hospital's own is none
        federated = self.used if self.used.kind == "federated" else run.federated
        self.models = [federated, *run.others]
        self.card = self.used.card
        self.threshold = cards.used_threshold(self.card, TASK)

    def html(self):
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters.update(number=cards.number, interval=interval, signed=signed)
        return environment.get_template("page.html").render(
            page=self,
            run=self.run,
            card=self.card,
            disease=DISEASE,
            learnt=TASK if self.referable_only else LEARNT,
            task=TASK,
            tasks=self.tasks,
        )

    def score(self, model, half, task=TASK):
        """The DR scores of a model for the images where half, bool (n,), is true."""
        return cards.score(model.card, task, model.p_healthy)[half]

    def positive(self, half, task=TASK):
        return self.grades[half] >= TASKS[task]

    def grade_name(self, grade):
        if self.referable_only:
            return TASK if grade >= TASKS[TASK] else f"no {TASK}"
        return f"{grade}, {GRADE_NAMES[grade]}"

    def name_of(self, client):
        return cards.name_of(client, self.run.prepared)

    # --- (a) what federation brought ---

    def found_more(self, other):
        """Measured: the federated sensitivity less another model's, at the same specificity."""
        federated = self.models[0]
        return metrics.sensitivity_difference(
            self.score(federated, self.reporting),
            cards.used_threshold(federated.card, TASK),
            self.score(other, self.reporting),
            self.positive(self.reporting),
            self.patients[self.reporting],
        )

    def verdict(self):
        """What federation brought, in one sentence with its numbers."""
        if self.card["warning"]:
            return f"This model must not be used: {self.card['warning']}."
        alone = [model for model in self.models if model.kind == "alone"]
        if not alone:
            which = "this hospital was not" if self.run.home else "no hospital was"
            return f"What federation brought is not measured: {which} trained alone beside it."
        positive = self.positive(self.reporting)
        with_it, without = metrics.patients_by_class(positive, self.patients[self.reporting])
        if min(with_it, without) < metrics.FEWEST_PATIENTS:
            return (
                f"There are too few patients to say what federation brought: {with_it} with {TASK} "
                f"and {without} without; {metrics.FEWEST_PATIENTS} of each are needed."
            )
        # By the patients who choose: the best of those who are scored would be flattered.
        best = max(alone, key=self.area_on_choosing)
        found = self.found_more(best)
        more = round(found.value * positive.sum())
        how_many = f"{abs(more)} {'more' if more > 0 else 'fewer'}" if more else "as many"
        images = f"of {positive.sum()} images with {TASK}"
        figures = f"at the same specificity ({difference_text(found)})"
        rival = "this hospital alone"
        if not self.run.home:
            rival = f"the best hospital alone, {best.name.removesuffix(' alone')}"
        if found.low <= 0 <= found.high:
            return (
                f"No difference is shown between federation and {rival}: federation found "
                f"{how_many} {images}, {figures}."
            )
        return f"Federation found {how_many} {images} than {rival}, {figures}."

    def area_on_choosing(self, model):
        area = metrics.auc(self.score(model, self.choosing), self.positive(self.choosing))
        return -1 if np.isnan(area) else area

    def auc_by_round(self):
        """A drawing: of the reporting patients; "" where no card tells its rounds.

        A model that was scored once is a point.
        """
        ends, last_round = [], 1
        with drawing("AUC by round, of each model", 4.9, 3.1) as (axes, finish):
            # of many hospitals some share a style, and the names at the ends tell them apart
            styles = chain(STYLES[:1], cycle(STYLES[1:]))
            for style, model in zip(styles, self.models, strict=False):
                rows = [(row["round"], row[TASK]["auc"]) for row in model.card["by_round"]]
                points = [(where, area) for where, area in rows if area is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), **style)
                    ends.append((points[-1][1], model.name, style["color"]))
                    last_round = max(last_round, points[-1][0])
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            axes.set(xlabel="round", ylabel=f"AUC for {TASK}", xlim=(0.7, last_round + 0.3))
            axes.set_ylim(top=1.01)
            axes.set_yticks([tick for tick in axes.get_yticks() if axes.get_ylim()[0] < tick <= 1])
            label_ends(axes, ends)
            return finish() if ends else ""

    # --- (b) the one model to use ---

    def choose(self):
        """(Model, sentences): the federated one, unless another is shown to be better.

        Better is a greater AUC among the patients who choose, beyond its paired interval. The
        reporting patients, of whom all figures are, have no part in it.
        """
        federated = self.run.federated
        best, most = federated, 0.0
        sentences = []
        for other in self.run.candidates:
            difference = metrics.auc_difference(
                self.score(other, self.choosing),
                self.score(federated, self.choosing),
                self.positive(self.choosing),
                self.patients[self.choosing],
            )
            if difference.low > 0 and difference.value > most:
                best, most = other, difference.value
            sentences.append(
                f"On the patients who choose, {other.name} {how_it_did(difference)} the federated "
                f"model of the last round: AUC {difference_text(difference, digits=3)}."
            )
        return best, sentences

    def screened(self):
        """{"found": (value, low, high), ...} of 1,000 people; PPV and NPV without an interval.

        {} where a class is missing, as at a hospital whose few held-out patients are all without.
        """
        measured = self.card["tasks"][TASK]["measured"]
        if None in (measured["sensitivity"][0], measured["specificity"][0]):
            return {}
        ends = zip(measured["sensitivity"], measured["specificity"], strict=True)
        people, low, high = (metrics.of_people(*rates, *SCREENED) for rates in ends)
        return {
            "found": (people["found"], low["found"], high["found"]),
            "missed": (people["missed"], high["missed"], low["missed"]),
            "false alarms": (people["false alarms"], high["false alarms"], low["false alarms"]),
            "PPV": people["PPV"],
            "NPV": people["NPV"],
        }

    # --- (c) whom it misses ---

    def called_by_grade(self):
        """A drawing: which part of the images of each grade the model calls TASK."""
        score, grades = self.score(self.used, self.reporting), self.grades[self.reporting]
        patients = self.patients[self.reporting]
        with drawing(f"Called {TASK}, by grade", 5, 3) as (axes, finish):
            for grade in sorted(set(grades)):
                of_grade = grades == grade
                called = score[of_grade] > self.threshold
                part = float(np.mean(called))
                name = f"{self.grade_name(grade)}\n{called.sum()} of {len(called)} images"
                should_be = grade >= TASKS[TASK]
                axes.bar(
                    name,
                    part,
                    width=0.7,
                    color="#8fb8d8" if should_be else "#f3d3b4",
                    edgecolor="#333b47",
                    hatch="" if should_be else "//",
                )
                with_interval(axes, name, part, len(set(patients[of_grade])), fmt="none")
            axes.set(ylim=(0, 1.03), xlabel="grade", ylabel=f"part called {TASK}")
            axes.tick_params(axis="x", labelsize=7)
            return finish()

    def hospitals(self):
        """[{name, images, sensitivity, specificity}]: the reporting images of each hospital.

        [] where prepared.json does not say which hospital a held-out image is of.
        """
        of_images = self.run.prepared.get("val_hospitals") or []
        if len(of_images) != len(self.grades):
            return []
        clients = [self.name_of(client) for client in self.card["clients"]]
        rows = []
        for hospital in dict.fromkeys(of_images):
            half = self.reporting & (np.array(of_images) == hospital)
            measured = metrics.measure(
                self.score(self.used, half),
                self.positive(half),
                self.patients[half],
                self.threshold,
            )
            # the hospital itself where no client is it alone, or several share it
            of_it = [name for name in clients if name.endswith(f"({hospital})")]
            name = of_it[0] if len(of_it) == 1 else hospital
            rows.append({"name": name, "images": int(half.sum()), **measured})
        return rows

    def told(self):
        """{client: its last row with scores}: what hospitals measured on their own patients."""
        rows = [row for row in self.run.client_rows if row.get("examples")]
        return {self.name_of(row["client"]): row for row in rows}

    def galleries(self):
        """{heading: [picture, ...]}: the worst misses and the worst false alarms."""
        positions = np.flatnonzero(self.reporting)
        score, positive = self.score(self.used, self.reporting), self.positive(self.reporting)
        called = score > self.threshold
        worst_first = np.argsort(score, kind="stable")
        missed = [i for i in worst_first if positive[i] and not called[i]]
        alarms = [i for i in worst_first[::-1] if called[i] and not positive[i]]
        headings = {"The worst misses": missed, "The worst false alarms": alarms}
        return {
            heading: [self.picture(positions[i], score[i]) for i in chosen[:MAX_PICTURES]]
            for heading, chosen in headings.items()
        }

    def picture(self, position, score):
        record = self.run.val[position]
        png = io.BytesIO()
        open_image(record["dir"]).resize((PICTURE_PX, PICTURE_PX)).save(png, "PNG")
        return {
            "data": base64.b64encode(png.getvalue()).decode(),
            "grade": self.grade_name(record["label"]),
            "score": float(score),
            "name": record["picture"],
        }

    # --- (d) how to use it ---

    def command(self):
        # a model of synthetic eyes takes no photographs
        pictures = "preprocessed/" if self.card["preprocessing"] == "synthetic" else "photographs/"
        return f"{PYTHON} predict.py --weights {shlex.quote(str(self.used.path))} {pictures}"

    # --- (e) all else ---

    def rounds(self):
        """[(scores of the reporting patients, the row of history.csv or {}, seconds), ...].

        The seconds are those of the slowest client's training, None where no client tells them.
        """
        history = {row["round"]: row for row in self.run.history}
        seconds = [
            # a row of clients.csv is named by the round that the client scored, not by the next
            # one, in which it trained
            (row["round"] + 1, row["training_seconds"])
            for row in self.run.client_rows
            if row.get("training_seconds") is not None
        ]
        slowest = dict(sorted(seconds))  # of one round, the last
        by_round = self.run.federated.card["by_round"]  # that of an earlier best round ends there
        return [(row, history.get(row["round"], {}), slowest.get(row["round"])) for row in by_round]

    def roc(self):
        with drawing("ROC", 4.4, 3.6) as (axes, finish):
            axes.plot([0, 1], [0, 1], ":", color="#9aa3af", linewidth=1)
            for style, task in zip(STYLES, self.tasks, strict=False):
                score = self.score(self.used, self.reporting, task)
                positive = self.positive(self.reporting, task)
                if not positive.any() or positive.all():  # there is no ROC curve of one class
                    continue
                _, false_rate, found_rate = metrics.roc(score, positive)
                threshold = self.card["tasks"][task]["threshold"]
                name = task if threshold is None else None  # else the point has it
                axes.plot(false_rate, found_rate, **{**style, "marker": "", "label": name})
                if threshold is None:
                    continue
                measured = self.card["tasks"][task]["measured"]
                axes.plot(
                    1 - measured["specificity"][0],
                    measured["sensitivity"][0],
                    **style,
                    label=f"{task}, called at {threshold:.3f}",
                )
            axes.set(xlabel="1 − specificity (false alarms)", ylabel="sensitivity (found)")
            if axes.get_legend_handles_labels()[0]:  # of nothing matplotlib warns on the terminal
                axes.legend(loc="lower right", frameon=False)
            return finish()

    def calibration(self):
        """(a drawing, the conclusion, its figures), of the task of the verdict."""
        score, positive = self.score(self.used, self.reporting), self.positive(self.reporting)
        patients = self.patients[self.reporting]
        groups = metrics.calibration(score, positive)
        with drawing("Calibration", 4.4, 3.6) as (axes, finish):
            axes.plot([0, 1], [0, 1], ":", color="#9aa3af", linewidth=1)
            for mean_score, part, group in groups:
                n = len(set(patients[group]))
                with_interval(axes, mean_score, part, n, fmt="o", color=STYLES[0]["color"])
            axes.set(xlabel="mean score of a group of images", ylabel=f"part that has {TASK}")
            axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
            drawn = finish()
        if not groups:
            return drawn, "not measured", ""
        bias = metrics.mean_difference(positive, score, patients)
        figures = (
            f"The mean score is {score.mean():.2f}, and {positive.mean():.2f} of the images have "
            f"{TASK}: a difference of {difference_text(bias)}. The expected calibration error is "
            f"{cards.number(self.card['tasks'][TASK]['calibration_error'])}."
        )
        at_server = self.run.home and self.used.kind == "federated"
        who = f"{'the server’s' if at_server else 'those'} patients who choose"
        if self.card["tasks"][TASK]["calibration"] is None:
            figures += (
                " The scores are 1 − P(healthy), as the network says it, and not recalibrated: "
                f"fewer than {metrics.FEWEST_PATIENTS} of {who} have {TASK}, or do not have it, "
                "or the scores do not rise with it."
            )
        else:
            figures += (
                f" The scores were recalibrated on {who} (Platt 1999): a score is the probability "
                f"of {TASK} among patients of whom as many have it as of them."
            )
        conclusion = "scores are on average neither too low nor too high"
        if bias.low > 0 or bias.high < 0:
            direction = "low" if bias.low > 0 else "high"
            conclusion = f"scores are too {direction} to be read as probabilities"
        return drawn, conclusion, figures

    def updates(self):
        """{client: [length, cosine, rounds against the others, rounds]}, the first two medians."""
        rows = {}
        for row in self.run.client_rows:
            if row.get("update_length") is not None:
                name = self.name_of(row["client"])
                rows.setdefault(name, []).append((row["update_length"], row.get("update_cosine")))
        found = {}
        for name, pairs in sorted(rows.items()):
            cosines = [cosine for _, cosine in pairs if cosine is not None]
            cosine = np.median(cosines) if cosines else None
            against = sum(each < 0 for each in cosines)
            found[name] = [np.median([length for length, _ in pairs]), cosine, against, len(pairs)]
        return found


# --- drawings -------------------------------------------------------------------------------------


@contextmanager
def drawing(title, width, height):
    """Axes to draw on, of inches, and a function that gives what was drawn as an <svg>."""
    figure = Figure(figsize=(width, height), layout="constrained")

    def finish():
        text = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=no_metadata)
        # From viewBox on: XML's head and a fixed width do not belong into a page.
        drawn = text.getvalue().partition("viewBox")[2]
        return Markup('<svg role="img" aria-label="{}" viewBox').format(title) + Markup(drawn)

    with rc_context(FIGURE_STYLE):
        yield figure.subplots(), finish


def label_ends(axes, ends):
    """Names at the right of the lines that end there; a lower one moves down where they are close.

    ends: [(height, name, colour), ...].
    """
    bottom, top = axes.get_ylim()
    line = 0.06 * (top - bottom)  # the height of a line of text
    free = top
    for height, name, colour in sorted(ends, reverse=True):
        text = textwrap.fill(name, LABEL_WIDTH)
        num_lines = text.count("\n") + 1
        middle = min(height, free - num_lines * line / 2)
        free = middle - num_lines * line / 2
        axes.text(
            *(1.02, middle, text),
            color=colour,
            va="center",
            transform=axes.get_yaxis_transform(),
        )


def with_interval(axes, x, part, n, **style):
    """A point and Wilson's interval of a proportion `part` of n."""
    low, high = metrics.wilson(part, n)
    # rounding can put an end on the wrong side of `part`, and matplotlib takes no negative length
    ends = [[max(0, part - low)], [max(0, high - part)]]
    axes.errorbar(x, part, ends, ecolor="#333b47", capsize=3, **style)
