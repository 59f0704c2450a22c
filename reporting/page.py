"""The page of report.py: `page` joins the sections, each a function of the run that gives HTML.

Curves are inline SVG, pictures are data URLs: the page needs no other file.
"""

import base64
import io
from contextlib import contextmanager
from html import escape

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from preparation.overview import GRADE_NAMES, count_grades
from preparation.photos import open_image
from reporting import metrics
from reporting.card import used_threshold
from reporting.metrics import METRICS, TASKS

MAX_THUMBNAILS = 6  # images in each gallery
CALIBRATION_BINS = 8
GRADE_COLOURS = ("#9cc3e6", "#f6d77c", "#f0a35e", "#dc6b4a", "#94303f")
COLOURS = ("#2563a8", "#d4722a", "#3b8e62", "#8d5fb0", "#8a8f98", "#b23a5a", "#2a9aa8")
# What a metric is called on the page, in the order of the summary's rows.
NAMES = {
    "auc": "AUC",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "accuracy": "accuracy",
    "always_same": "accuracy of always giving the more frequent answer",
    "sensitivity_at_90": "sensitivity at 90 % specificity",
    "specificity_at_90": "specificity at 90 % sensitivity",
    "loss": "loss",
}


def percent(value):
    return f"{100 * value:.1f} %"


# What a client measured: the column's heading, and how a number is written.
CLIENT_SCORES = {
    "round": ("after round", "{:.0f}".format),
    "examples": ("held-out images", "{:.0f}".format),
    "auc": ("AUC", "{:.3f}".format),
    "threshold": ("threshold", "{:.3f}".format),
    "sensitivity": ("sensitivity", percent),
    "specificity": ("specificity", percent),
    "loss": ("loss", "{:.3f}".format),
    "num_examples": ("trained on", "{:.0f}".format),
    "training_loss": ("training loss", "{:.3f}".format),
    "training_seconds": ("training, seconds", "{:.1f}".format),
}
FIGURE_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "report",  # equal figures are equal bytes
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ebf0",
    "axes.edgecolor": "#9aa3af",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
}
STYLE_SHEET = """
:root { color-scheme: light dark; --text: #1f2733; --quiet: #525c6a; --page: #f4f6f9;
        --box: #fff; --line: #dfe4ea; --note: #fdf0e6; --note-line: #b4591a }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ee; --quiet: #a9b2bf; --page: #14181e; --box: #1d232b; --line: #38414d;
          --note: #33261a; --note-line: #e08a46 }
}
* { box-sizing: border-box }
body { max-width: 1240px; margin: auto; padding: 8px 16px; color: var(--text);
       background: var(--page); font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif }
h1 { font-size: 1.6em; margin: .5em 0 0; line-height: 1.2 }
h2 { font-size: 1.2em; margin: 0 }
h3 { font-size: 1em; margin: 0 0 .5em }
p { margin: .5em 0; max-width: 90ch }
small, figcaption, caption, .quiet { color: var(--quiet); font-size: .85em }
small { display: block }
section { background: var(--box); border: 1px solid var(--line); border-radius: 10px;
          padding: 16px; margin: 16px 0 }
/* drawings are dark on white, also on a dark page */
svg { width: 100%; max-width: 420px; background: #fff; border-radius: 6px }
.grid { display: grid; gap: 16px; margin: 12px 0;
        grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least)), 1fr)) }
.grid > * { min-width: 0 }
.scroll { overflow-x: auto }
.scroll > p { display: none }
table { border-collapse: collapse; margin: .5em 0 }
caption { text-align: left; padding-bottom: 4px }
th { text-align: left; font-weight: 600 }
th, td { padding: 6px 14px 6px 0; border-top: 1px solid var(--line); vertical-align: top }
td { white-space: nowrap }
td b { font-size: 1.4em }
figure { margin: 0; overflow-wrap: anywhere }
img { width: 100%; border-radius: 6px }
figcaption { line-height: 1.3 }
.note { border-left: 4px solid var(--note-line); background: var(--note); padding: 8px 12px }
@media (max-width: 700px) {
  .wide > p { display: block; margin: 0; color: var(--quiet); font-size: .85em }
}
@media print {
  :root { --text: #000; --quiet: #444; --page: #fff; --box: #fff; --line: #bbb; --note: #fff;
          --note-line: #000 }
  body { font-size: 11px; max-width: none; padding: 0 }
  section { border: 0; border-radius: 0; padding: 0; margin: 10px 0 }
  .scroll { overflow: visible }
  .wide > p { display: none }
  td, th { white-space: normal; padding: 3px 8px 3px 0 }
  h1, h2, h3, caption { break-after: avoid }
  figure, svg, tr, .note, .grid > * { break-inside: avoid }
  .grid { --narrow: calc(var(--least) * .6);
          grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--narrow)), 1fr)) }
}
"""
# The policy forbids everything that would need another file or a network.
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>{style}</style><title>{title}</title></head>
<body><header><h1>{title}</h1><p class="quiet">{facts}</p>
{notes}</header>
<main>
{sections}</main></body></html>
"""


def page(run):
    """The whole page (str) of what report.load returns."""
    sections = [summary, curves, errors, missed, clients, time]
    if run["compared"]:
        sections.insert(1, comparison)
    rounds = f"round {len(run['history'])} of {run['rounds']}"
    title = f"Federated screening for diabetic retinopathy (DR): the model after {rounds}"
    return PAGE.format(
        style=STYLE_SHEET,
        title=escape(title),
        facts=escape(" · ".join(facts(run))),
        notes="".join(f'<p class="note">{note}</p>' for note in notes(run)),
        sections="".join(section(run) for section in sections),
    )


def facts(run):
    """What one has to know to make the run again: texts."""
    card = run["card"]
    texts = [
        card["date"],
        f"run {run['run']}",
        f"{run['arch']}, {run['image_size']} × {run['image_size']} pixels",
        f"first weights: {card['initial_weights']}",
        f"{len(run['clients'])} clients",
        f"data set {card['dataset']}",
        f"split {card['split']}",
        f"seed {run['seed']}",
    ]
    for name, values in run["training"].items():
        texts.append(f"{name} {', '.join(map(str, values))}")
    if card["commit"]:
        texts.append(f"commit {card['commit']}")
    return texts


def notes(run):
    """The sentences that come first: HTML."""
    card = run["card"]
    texts = []
    if card["warning"]:
        texts.append(f"<strong>This model must not be used:</strong> {escape(card['warning'])}.")
    device = (
        "<strong>This is not a medical device:</strong> decide nothing about a patient by it "
        "or by its scores."
    )
    if card["preprocessing"] == "drawn":
        device += (
            " The images are drawn: the figures show that federation works, "
            "and say nothing about patients."
        )
    return [*texts, device]


# --- pieces of HTML -------------------------------------------------------------------------------


def box(name, heading, *parts):
    inner = "".join(parts)
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">'
        f'<h2 id="{name}-title">{heading}</h2>{inner}</section>\n'
    )


def grid(cells, least_px=340):
    """Cells side by side, as many in a row as have the least width."""
    inner = "".join(f"<div>{cell}</div>" for cell in cells)
    return f'<div class="grid" style="--least:{least_px}px">{inner}</div>'


def html_table(caption, header, rows):
    """caption: text. header: texts. rows: sequences of cells, each HTML or a number.

    The first cell of a row is its header. A table that is wider than the screen scrolls, can be
    scrolled by the keyboard, and says so.
    """
    # a corner without a text is no header of anything
    columns = (f'<th scope="col">{text}</th>' if text else "<td></td>" for text in header)
    lines = [f"<tr>{''.join(columns)}</tr>"]
    for first, *others in rows:
        cells = "".join(f"<td>{cell}</td>" for cell in others)
        lines.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    wide = " wide" if len(header) > 3 else ""
    return (
        f'<div class="scroll{wide}" role="region" aria-label="{escape(caption)}" tabindex="0">'
        "<p>The table scrolls sideways →</p>"
        f"<table><caption>{escape(caption)}</caption>{''.join(lines)}</table></div>"
    )


def metric_cell(name, measured):
    """A number with its interval below it: proportions in percent, AUC as it is.

    measured: (value, low, high), None in place of numbers that there are not.
    """
    value, low, high = measured
    if value is None or np.isnan(value):
        return "–"
    if name == "auc":
        number, interval = f"{value:.3f}", f"{low:.3f} to {high:.3f}"
    else:
        number, interval = percent(value), f"{100 * low:.1f} to {100 * high:.1f}"
    return f"{number}<small>{interval}</small>"


@contextmanager
def picture(cells, title):
    """Axes to draw on; the drawing is then added to `cells` as an <svg> as wide as its column."""
    with rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(4.6, 3.1), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title, fontsize=11)
        yield axes
        text = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=no_metadata)
    # From viewBox on: what comes before, XML's head and a fixed width, does not belong into a page.
    drawing = text.getvalue().partition("viewBox")[2]
    cells.append(f'<svg role="img" aria-label="{escape(title)}" viewBox{drawing}')


def draw_lines(axes, series):
    """series: {name: [(round, value), ...]}. The first is drawn boldest, and above the others."""
    for number, (name, points) in reversed(list(enumerate(series.items()))):
        rounds, values = zip(*points, strict=True)
        axes.plot(
            rounds,
            values,
            label=name,
            color=COLOURS[number % len(COLOURS)],
            linewidth=2.2 if number == 0 else 1.2,
        )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("round")
    if len(series) > 1:
        axes.legend(reverse=True)


def draw_stacked(axes, names, parts, colours):
    """A bar for each of `names`. parts: {what: [value for each name]}, from the bottom up."""
    bottom = np.zeros(len(names))
    for colour, (part, values) in zip(colours, parts.items(), strict=False):
        axes.bar(names, values, bottom=bottom, color=colour, label=part, width=0.7)
        bottom += values
    axes.grid(visible=False, axis="x")
    axes.figure.legend(loc="outside lower center", ncols=2)


# --- the sections ---------------------------------------------------------------------------------


def summary(run):
    card = run["card"]
    best = run["best_card"]
    tables = [scores_table(f"The model of the last round, {card['round']}", card)]
    if best and best["round"] != card["round"]:
        tables.append(scores_table(f"The model of the best round, {best['round']}", best))
    patients = card["num_patients"]
    reporting = card["num_reporting_patients"]
    text = (
        f"<p>{card['num_images']} held-out images of {patients} patients, on which nobody trained. "
        f"{patients - reporting} of these patients choose: the thresholds (a sensitivity of at "
        f"least {100 * metrics.LEAST_SENSITIVITY:.0f} %, then the greatest sensitivity + "
        f"specificity) and the best round (by AUC). The numbers are of the other {reporting}, whom "
        "the choice does not know. That is what choosing costs: half of the patients measure "
        "nothing, so the intervals are wider.</p>"
    )
    if best:
        where = "the last" if best["round"] == card["round"] else f"round {best['round']}"
        text += f"<p>The best round is {where}: best_weight.h5 is its model.</p>"
    if not card["patients_known"]:
        text += (
            '<p class="note">The index names no patients: each image counts as its own patient, '
            "and if some have two images the intervals are too narrow.</p>"
        )
    explained = (
        '<p class="quiet">Referable DR is grade 2 (moderate) or more: who is sent to an '
        "ophthalmologist. Below each number is its 95 % interval: a bootstrap over patients; "
        "where that has no width, Wilson (1927), for the AUC Newcombe (2006, method 5), with the "
        "number of patients.</p>"
    )
    return box("summary", "The merged model", text, grid(tables, least_px=460), explained)


def scores_table(caption, card):
    """Any DR and referable DR side by side."""
    header = ["", *(f"{task} (grade ≥ {least})" for task, least in TASKS.items())]
    entries = [card["tasks"][task] for task in TASKS]
    rows = [("AUC", *(metric_cell("auc", entry["measured"]["auc"]) for entry in entries))]
    # a model that must not be used is offered no threshold
    if not card["warning"]:
        rows.append(("threshold: DR where the score is above", *map(threshold_text, entries)))
        names = [name for name in NAMES if name in entries[0]["measured"] and name != "auc"]
        for name in names:
            cells = (metric_cell(name, entry["measured"][name]) for entry in entries)
            rows.append((NAMES[name], *cells))
    images = [f"{entry['num_positive']} of {card['num_reporting_images']}" for entry in entries]
    rows.append(("images with it", *images))
    return html_table(caption, header, rows)


def threshold_text(entry):
    if entry["threshold"] is None:
        return "none found; measured at 0.5"
    return f"{entry['threshold']:.3f}"


def curves(run):
    cells = []
    best = run["best_card"]
    for name in ("auc", "loss", "sensitivity", "specificity", "accuracy"):
        series = {"merged, validation": [(row["round"], row[name]) for row in run["history"]]}
        for client, site in run["sites"].items():
            if site["history"] and name in site["history"][0]:
                series[f"{client}, training"] = by_epoch(site["history"], name)
        with picture(cells, NAMES[name]) as axes:
            draw_lines(axes, series)
            axes.set_ylim(0, None if name == "loss" else 1.02)
            if best:
                axes.axvline(best["round"], color="#8a8f98", linestyle=":", linewidth=1)
    text = (
        '<p class="quiet">Of the merged model, over all validation images: AUC for any DR; '
        "sensitivity, specificity and accuracy at a score of 0.5, which nobody chose, so they may "
        "jump from round to round while the AUC does not."
    )
    text += " The dotted line marks the best round.</p>" if best else "</p>"
    return box("curves", "Round by round", grid(cells), text)


def by_epoch(history, name):
    """[(round, value), ...] of a client's training; a round's last epoch is where its result is.

    Of two epochs the first is half a round earlier.
    """
    epochs = {}  # round: how many
    for row in history:
        epochs[row["round"]] = max(row["epoch"], epochs.get(row["round"], 0))
    return [(row["round"] - 1 + row["epoch"] / epochs[row["round"]], row[name]) for row in history]


def errors(run):
    score = 1 - run["p_healthy"]
    reporting = ~run["choosing"]
    cells = []
    curves = {}
    for task, least_grade in TASKS.items():
        threshold = used_threshold(run["card"], task)
        positive = run["grades"][reporting] >= least_grade
        counts = metrics.confusion(score[reporting] > threshold, positive)
        bold = {what: f"<b>{number}</b> {what}" for what, number in counts.items()}
        rows = [
            (f"has {task}", bold["found"], bold["missed"]),
            ("has none", bold["false alarms"], bold["cleared"]),
        ]
        caption = f"{task} at {threshold:.3f}: images of the reporting patients"
        cells.append(html_table(caption, ("", "model: yes", "model: no"), rows))
        if positive.any() and not positive.all():  # there is no ROC curve of one class
            curves[task] = (positive, counts)
    if curves:
        with picture(cells, "ROC") as axes:
            axes.plot([0, 1], [0, 1], "--", color="#b9c0ca", linewidth=1)
            for colour, (task, (positive, counts)) in zip(COLOURS, curves.items(), strict=False):
                draw_roc(axes, task, score[reporting], positive, counts, colour)
            axes.set(xlabel="1 − specificity (false alarms)", ylabel="sensitivity (found)")
            axes.legend(loc="lower right")
        with picture(cells, "Calibration: any DR") as axes:
            draw_calibration(axes, score[reporting], run["grades"][reporting] > 0)
    text = (
        '<p class="quiet">Calibration: images in groups of equal size by their score; on the '
        "dashed line a score of 0.7 would mean that 7 of 10 have DR.</p>"
    )
    return box("errors", "Found, missed, false alarms", grid(cells), text)


def draw_roc(axes, task, score, positive, counts, colour):
    _, false_rate, found_rate = metrics.roc(score, positive)
    area = metrics.auc(score, positive)
    axes.plot(false_rate, found_rate, color=colour, linewidth=2, label=f"{task}: AUC {area:.3f}")
    axes.plot(
        counts["false alarms"] / (~positive).sum(),
        counts["found"] / positive.sum(),
        "o",
        color=colour,
        label="at its threshold",
    )


def draw_calibration(axes, score, has_dr):
    axes.plot([0, 1], [0, 1], "--", color="#b9c0ca", linewidth=1)
    for mean_score, part, n in metrics.calibration(score, has_dr, CALIBRATION_BINS):
        draw_with_interval(axes, mean_score, part, n, "o", COLOURS[0])
    axes.set(xlabel="mean score of a group", ylabel="part that has DR")
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.03, 1.03)


def draw_with_interval(axes, x, part, n, marker, colour):
    """A point and Wilson's interval of a proportion `part` of n."""
    low, high = metrics.wilson(part, n)
    # rounding can put an end on the wrong side of `part`, and matplotlib takes no negative length
    ends = [[max(0, part - low)], [max(0, high - part)]]
    axes.errorbar(x, part, ends, fmt=marker, color=colour, ecolor="#333b47", capsize=3)


def missed(run):
    task = "referable DR"
    threshold = used_threshold(run["card"], task)
    records = [
        record for record, chose in zip(run["val"], run["choosing"], strict=True) if not chose
    ]
    grades = run["grades"][~run["choosing"]]
    score = 1 - run["p_healthy"][~run["choosing"]]
    cells = []
    with picture(cells, f"Called {task}, by grade") as axes:
        for grade in sorted(set(grades)):
            called = score[grades == grade] > threshold
            name = f"{GRADE_NAMES[grade]}\n{called.sum()} of {len(called)}"
            part = float(np.mean(called))
            axes.bar(name, part, color=GRADE_COLOURS[grade], width=0.7)
            draw_with_interval(axes, name, part, len(called), "none", "#333b47")
        axes.set_ylim(0, 1.03)
        axes.tick_params(axis="x", labelsize=8)
    order = np.argsort(score, kind="stable")
    misses = [i for i in order if grades[i] >= TASKS[task] and score[i] <= threshold]
    order = np.argsort(-score, kind="stable")
    alarms = [i for i in order if grades[i] < TASKS[task] and score[i] > threshold]
    cells.append(gallery(f"Worst misses: {task} with the lowest scores", records, score, misses))
    cells.append(gallery("Worst false alarms: the highest scores", records, score, alarms))
    text = (
        f'<p class="quiet">At {threshold:.3f}, on the images of the reporting patients. Grades 0 '
        "and 1 should not be called, grades 2 to 4 should.</p>"
    )
    return box("missed", "Who is missed", grid(cells), text)


def gallery(heading, records, score, positions):
    """The pictures at the first of `positions`, with score and grade."""
    shown = [thumbnail(records[i], score[i]) for i in positions[:MAX_THUMBNAILS]]
    return f"<h3>{heading}</h3>{grid(shown, least_px=100) if shown else '<p>none</p>'}"


def thumbnail(record, score):
    png = io.BytesIO()
    open_image(record["dir"]).resize((128, 128)).save(png, "PNG")
    encoded = base64.b64encode(png.getvalue()).decode()
    name = f"{record['label']}, {GRADE_NAMES[record['label']]}"
    caption = f"score {score:.3f}<br>grade {name}<br>{escape(record['picture'])}"
    return (
        f'<figure><img alt="fundus picture of grade {name}" src="data:image/png;base64,{encoded}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def clients(run):
    cells = []
    rows = []
    for client, site in run["sites"].items():
        num_images = len(site["records"]) or run["card"]["clients"].get(client, "–")
        if site["measured"]:
            numbers = [metric_cell(name, site["measured"][name]) for name in METRICS]
        else:
            numbers = ["its images are not on this machine", "", "", ""]
        rows.append((escape(client), num_images, *numbers))
    here = {
        client: count_grades(site["records"])
        for client, site in run["sites"].items()
        if site["records"]
    }
    if here:
        of_each_grade = zip(*here.values(), strict=True)  # a tuple of the clients' numbers
        with picture(cells, "Images by grade") as axes:
            parts = dict(zip(GRADE_NAMES, of_each_grade, strict=True))
            draw_stacked(axes, list(here), parts, GRADE_COLOURS)
    header = ("client", "images", *(NAMES[name] for name in METRICS))
    threshold = used_threshold(run["card"], "any DR")
    caption = f"The merged model on what each client trained on, any DR at {threshold:.3f}"
    table = html_table(caption, header, rows)
    text = (
        '<p class="quiet">The clients trained on these images: compare the clients with each '
        f"other. Of more than {run['max_client_images']} images of a client, every n-th was "
        "looked at.</p>"
    )
    cells.append(table + text)
    if run["client_scores"]:
        cells.append(client_scores_table(run["client_scores"], run["card"]))
    return box("clients", "The merged model at each client", grid(cells, least_px=620))


def client_scores_table(latest, card):
    """What each client measured itself, below what the server measured of the same model.

    latest: {client: row (dict of texts) of server/clients.csv}.
    """
    measured = card["tasks"]["any DR"]["measured"]
    of_server = {name: measured[name][0] for name in ("auc", "sensitivity", "specificity")}
    of_server["round"] = card["round"]
    of_server["examples"] = card["num_reporting_images"]
    of_server["threshold"] = used_threshold(card, "any DR")
    rows = [("the server’s reporting patients", *client_score_cells(of_server))]
    for client, row in latest.items():
        rows.append((escape(client), *client_score_cells(row)))
    caption = "The merged model on each client's own held-out images, as the client says; any DR"
    return html_table(caption, ("", *(heading for heading, _ in CLIENT_SCORES.values())), rows)


def client_score_cells(row):
    """The cells of one row; a dash for what was not measured."""
    return [
        "–" if row.get(name) in ("", None) else written(float(row[name]))
        for name, (_, written) in CLIENT_SCORES.items()
    ]


def time(run):
    cells = []
    parts = {
        "training, slowest client": [],
        "start, transport, waiting": [],
        "merging": [row["merge_seconds"] for row in run["history"]],
        "evaluating": [row["evaluate_seconds"] for row in run["history"]],
    }
    for row in run["history"]:
        # A server that was started again has measured its waiting only since then.
        training = min(run["training_seconds"].get(row["round"], 0), row["wait_seconds"])
        parts["training, slowest client"].append(training)
        parts["start, transport, waiting"].append(row["wait_seconds"] - training)
    with picture(cells, "Seconds a round") as axes:
        draw_stacked(axes, [row["round"] for row in run["history"]], parts, COLOURS)
        axes.xaxis.get_major_locator().set_params(integer=True)
    rows = [(part, f"{np.median(seconds):.2f} s") for part, seconds in parts.items()]
    cells.append(html_table("Seconds, median of a round", ("", "seconds"), rows))
    text = ""
    if not run["training_seconds"]:
        text = (
            '<p class="quiet">How long the clients trained is not known here: they are on other '
            "machines. Their training is part of “start, transport, waiting”.</p>"
        )
    return box("time", "Where the time went", grid(cells), text)


def comparison(run):
    cells = []
    series = {
        name: [(row["round"], row["auc"]) for row in rows] for name, rows in run["compared"].items()
    }
    with picture(cells, "AUC for any DR, all validation images") as axes:
        draw_lines(axes, series)
    tables = [compared_table(task, run["compared_tasks"]) for task in TASKS]
    text = (
        "<p>Each series is a model that began with the same weights and made as many passes over "
        "its images; all are measured on the same patients. Half of the patients choose a "
        "threshold for each; the tables are of the other half.</p>"
    )
    return box("comparison", "What did federation bring?", text, grid(cells + tables, 460))


def compared_table(task, compared_tasks):
    """A row for each series: AUC, and sensitivity and specificity at its own threshold."""
    shown = ("auc", "sensitivity", "specificity")
    rows = []
    for name, tasks in compared_tasks.items():
        measured = tasks[task]["measured"]
        rows.append((escape(name), *(metric_cell(metric, measured[metric]) for metric in shown)))
    header = ("series", *(NAMES[metric] for metric in shown))
    return html_table(f"{task}: after the last round, the reporting patients", header, rows)
