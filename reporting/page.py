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

import data
from preparation.overview import GRADE_NAMES, count_grades
from preparation.photos import open_image
from reporting import metrics
from reporting.metrics import METRICS

MAX_THUMBNAILS = 6  # images in each gallery
WANTED_SENSITIVITY = 0.95
NAMES = {"auc": "AUC"}  # of a metric, where it is not its key
GRADE_COLOURS = ("#9cc3e6", "#f6d77c", "#f0a35e", "#dc6b4a", "#94303f")
COLOURS = ("#2563a8", "#d4722a", "#3b8e62", "#8d5fb0", "#8a8f98", "#b23a5a", "#2a9aa8")
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
* { box-sizing: border-box }
body { max-width: 1240px; margin: auto; padding: 8px 16px; color: #1f2733; background: #f4f6f9;
       font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif }
h1 { font-size: 1.6em; margin: .5em 0 0; line-height: 1.2 }
h2 { font-size: 1.2em; margin: 0 }
h3 { font-size: 1em; margin: 0 0 .5em }
p { margin: .5em 0; max-width: 90ch }
b { font-size: 1.6em }
small, figcaption, .quiet { color: #5a6472; font-size: .85em }
small { display: block }
section { background: #fff; border: 1px solid #dfe4ea; border-radius: 10px; padding: 16px;
          margin: 16px 0 }
div { overflow-x: auto }
svg { width: 100%; max-width: 420px }
.grid { display: grid; gap: 16px; margin: 12px 0;
        grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least)), 1fr)) }
table { border-collapse: collapse }
td { padding: 6px 14px 6px 0; border-top: 1px solid #e8ebf0; vertical-align: top;
     white-space: nowrap }
figure { margin: 0; overflow-wrap: anywhere }
img { width: 100%; border-radius: 6px }
figcaption { line-height: 1.3 }
.note { border-left: 4px solid #d4722a; background: #fdf0e6; padding: 8px 12px }
"""
# The policy forbids everything that would need another file or a network.
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>{style}</style><title>{title}</title></head>
<body><h1>{title}</h1><p class="quiet">{facts}</p><p class="note">{warning}</p>
{sections}</body></html>
"""


def page(run):
    """The whole page (str) of what report.load returns."""
    prepared = {"dataset": "unknown", "split": "unknown", "preprocessing": "unknown"}
    prepared.update(run["prepared"])
    warning = (
        "<strong>This is not a medical device:</strong> decide nothing about a patient by it "
        "or by its scores."
    )
    if prepared["preprocessing"] == "drawn":
        warning += (
            " The images are drawn: the figures show that federation works, "
            "and say nothing about patients."
        )
    sections = [summary, curves, errors, missed, clients, time]
    if run["compared"]:
        sections.append(comparison)
    rounds = f"round {len(run['history'])} of {run['rounds']}"
    facts = (
        f"run {run['run']} · {run['arch']}, {run['image_size']} × {run['image_size']} pixels · "
        f"{len(run['clients'])} clients · "
        f"data set {prepared['dataset']} · split {prepared['split']}"
    )
    return PAGE.format(
        style=STYLE_SHEET,
        title=escape(f"Federated DR screening: the model after {rounds}"),
        facts=escape(facts),
        warning=warning,
        sections="".join(section(run) for section in sections),
    )


# --- pieces of HTML -------------------------------------------------------------------------------


def box(name, heading, *parts):
    return f'<section id="{name}"><h2>{heading}</h2>{"".join(parts)}</section>\n'


def grid(cells, least_px=340):
    """Cells side by side, as many in a row as have the least width."""
    inner = "".join(f"<div>{cell}</div>" for cell in cells)
    return f'<div class="grid" style="--least:{least_px}px">{inner}</div>'


def html_table(*rows):
    """rows: sequences of cells, each HTML or a number."""
    lines = []
    for row in rows:
        cells = "".join(f"<td>{cell}</td>" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def metric_name(name):
    return NAMES.get(name, name)


def metric_text(name, value, low, high):
    """(the number, its interval) as text: proportions in percent, AUC as it is."""
    if np.isnan(value):
        return "–", ""
    if name == "auc":
        return f"{value:.3f}", f"{low:.3f} to {high:.3f}"
    return f"{100 * value:.1f} %", f"{100 * low:.1f} to {100 * high:.1f}"


def metric_cell(name, value, low, high):
    """A number with its interval below it."""
    number, interval = metric_text(name, value, low, high)
    return f"{number}<small>{interval}</small>" if interval else number


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
    cards = []
    for name, values in run["measured"].items():
        number, interval = metric_text(name, *values)
        small = f"<small>{interval}</small>" if interval else ""
        cards.append(f"<p>{metric_name(name)}</p><b>{number}</b>{small}")
    num_dr = sum(record["label"] > 0 for record in run["val"])
    return box(
        "summary",
        "The merged model on images that nobody trained on",
        grid(cards, least_px=130),
        f"<p>{len(run['val'])} held-out images, {num_dr} with DR; a score above 0.5 says DR.</p>",
        '<p class="quiet">Below each number is its 95 % interval: Wilson (1927); for the AUC '
        "Newcombe (2006, method 5) with the variance of Hanley and McNeil (1982).</p>",
    )


def curves(run):
    cells = []
    for name in ("loss", *METRICS):
        series = {"merged, validation": [(row["round"], row[name]) for row in run["history"]]}
        for client, (history, _, _) in run["sites"].items():
            if history and name in history[0]:
                series[f"{client}, training"] = [(row["round"], row[name]) for row in history]
        with picture(cells, metric_name(name)) as axes:
            draw_lines(axes, series)
            axes.set_ylim(0, None if name == "loss" else 1.02)
    return box("curves", "Round by round", grid(cells))


def errors(run):
    has_dr = data.healthy(run["val"]) < 0.5
    score = 1 - run["p_healthy"]
    counts = metrics.confusion(score > 0.5, has_dr)
    counted = {what: f"<b>{number}</b> {what}" for what, number in counts.items()}
    table = html_table(
        ("", "model: DR", "model: healthy"),
        ("has DR", counted["found"], counted["missed"]),
        ("healthy", counted["false alarms"], counted["cleared"]),
    )
    if not has_dr.any() or has_dr.all():  # there is no ROC curve of one class
        return box("errors", "Found, missed, false alarms", grid([table]))
    thresholds, false_rate, found_rate = metrics.roc(score, has_dr)
    first = np.argmax(found_rate >= WANTED_SENSITIVITY)  # of all that do, the highest threshold
    advice = (
        f"<p>To find {100 * WANTED_SENSITIVITY:.0f} % of DR the threshold would be "
        f"{thresholds[first]:.3f}, at a specificity of {1 - false_rate[first]:.1%}; "
        "chosen on these same images, so expect less elsewhere.</p>"
    )
    cells = [table + advice]
    with picture(cells, "ROC") as axes:
        axes.plot([0, 1], [0, 1], "--", color="#b9c0ca", linewidth=1)
        axes.plot(
            false_rate,
            found_rate,
            color=COLOURS[0],
            linewidth=2.2,
            label=f"AUC {run['measured']['auc'][0]:.3f}",
        )
        axes.plot(
            counts["false alarms"] / (~has_dr).sum(),
            counts["found"] / has_dr.sum(),
            "o",
            color=COLOURS[1],
            label="operating point (score 0.5)",
        )
        axes.set(xlabel="1 − specificity (false alarms)", ylabel="sensitivity (DR found)")
        axes.legend(loc="lower right")
    return box("errors", "Found, missed, false alarms", grid(cells))


def missed(run):
    labels = np.array([record["label"] for record in run["val"]])
    score = 1 - run["p_healthy"]
    cells = []
    with picture(cells, "Sensitivity by grade") as axes:
        for grade in sorted(set(labels) - {0}):
            draw_sensitivity(axes, grade, score[labels == grade] > 0.5)
        axes.set_ylim(0, 1.03)
        axes.tick_params(axis="x", labelsize=9)
    order = np.argsort(score, kind="stable")
    misses = [i for i in order if labels[i] > 0 and score[i] <= 0.5]
    order = np.argsort(-score, kind="stable")
    alarms = [i for i in order if labels[i] == 0 and score[i] > 0.5]
    cells.append(gallery("Worst misses: DR with the lowest scores", run["val"], score, misses))
    cells.append(gallery("Worst false alarms: healthy, highest scores", run["val"], score, alarms))
    return box("missed", "Who is missed", grid(cells))


def draw_sensitivity(axes, grade, found):
    """A bar with its interval. found: bool, one for each image of this grade."""
    n = len(found)
    part = float(np.mean(found))
    low, high = metrics.wilson(part, n)
    name = f"{GRADE_NAMES[grade]}\n{found.sum()} of {n}"
    axes.bar(name, part, color=GRADE_COLOURS[grade], width=0.7)
    # rounding can put an end on the wrong side of `part`, and matplotlib takes no negative length
    below = max(0, part - low)
    above = max(0, high - part)
    axes.errorbar(name, part, [[below], [above]], color="#333b47", capsize=4)


def gallery(heading, records, score, positions):
    """The pictures at the first of `positions`, with score and grade."""
    shown = [thumbnail(records[i], score[i]) for i in positions[:MAX_THUMBNAILS]]
    return f"<h3>{heading}</h3>{grid(shown, least_px=100) if shown else 'none'}"


def thumbnail(record, score):
    png = io.BytesIO()
    open_image(record["dir"]).resize((128, 128)).save(png, "PNG")
    encoded = base64.b64encode(png.getvalue()).decode()
    caption = (
        f"score {score:.3f}<br>grade {record['label']}, {GRADE_NAMES[record['label']]}"
        f"<br>{escape(record['picture'])}"
    )
    return (
        f'<figure><img alt="fundus picture" src="data:image/png;base64,{encoded}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def clients(run):
    cells = []
    rows = [("client", "images", *map(metric_name, METRICS))]
    for client, (_, records, measured) in run["sites"].items():
        if measured:
            numbers = [metric_cell(name, *measured[name]) for name in METRICS]
        else:
            numbers = ["its images are not on this machine"]
        rows.append((escape(client), len(records) or "–", *numbers))
    here = {
        client: count_grades(records) for client, (_, records, _) in run["sites"].items() if records
    }
    if here:
        of_each_grade = zip(*here.values(), strict=True)  # a tuple of the clients' numbers
        with picture(cells, "Images by grade") as axes:
            parts = dict(zip(GRADE_NAMES, of_each_grade, strict=True))
            draw_stacked(axes, list(here), parts, GRADE_COLOURS)
    text = (
        '<p class="quiet">The clients trained on these images: compare the clients with each '
        f"other. Of more than {run['max_client_images']} images of a client, every n-th was "
        "looked at.</p>"
    )
    cells.append(html_table(*rows) + text)
    return box("clients", "The merged model at each client", grid(cells, least_px=576))


def time(run):
    cells = []
    parts = {
        "training, slowest client": [],
        "start, transport, waiting": [],
        "merging": [row["merge_seconds"] for row in run["history"]],
        "evaluating": [row["evaluate_seconds"] for row in run["history"]],
    }
    for row in run["history"]:
        training = max(
            sum(epoch["seconds"] for epoch in history if epoch["round"] == row["round"])
            for history, _, _ in run["sites"].values()
        )
        # A server that was started again has measured its waiting only since then.
        training = min(training, row["wait_seconds"])
        parts["training, slowest client"].append(training)
        parts["start, transport, waiting"].append(row["wait_seconds"] - training)
    with picture(cells, "Seconds a round") as axes:
        draw_stacked(axes, [row["round"] for row in run["history"]], parts, COLOURS)
        axes.xaxis.get_major_locator().set_params(integer=True)
    rows = [("", "median of a round")]
    for part, seconds in parts.items():
        rows.append((part, f"{np.median(seconds):.2f} s"))
    cells.append(html_table(*rows))
    return box("time", "Where the time went", grid(cells))


def comparison(run):
    rounds = max(len(rows) for rows in run["compared"].values())
    window = max(3, rounds // 10)
    raw = {}
    smooth = {}
    rows = [("after the last round", *map(metric_name, METRICS))]
    for name, series in run["compared"].items():
        numbers = [row["round"] for row in series]
        accuracy = [row["accuracy"] for row in series]
        raw[name] = list(zip(numbers, accuracy, strict=True))
        smooth[name] = list(zip(numbers, mean_of_last(accuracy, window), strict=True))
        interval = metrics.wilson(accuracy[-1], len(run["val"]))
        rows.append(
            (
                escape(name),
                metric_cell("accuracy", accuracy[-1], *interval),
                *(f"{series[-1][metric]:.3f}" for metric in METRICS[1:]),
            )
        )
    cells = []
    with picture(cells, "Validation accuracy") as axes:
        draw_lines(axes, raw)
    with picture(cells, f"Mean of the last {window} rounds") as axes:
        draw_lines(axes, smooth)
    table = f"<div>{html_table(*rows)}</div>"
    return box("comparison", "Is federation worth it?", grid(cells), table)


def mean_of_last(values, window):
    """Of each value and those before it, at most `window` together, the mean."""
    return [float(np.mean(values[max(0, end - window) : end])) for end in range(1, len(values) + 1)]
