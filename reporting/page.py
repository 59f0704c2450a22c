"""The page of report.py: `page` puts the sections together, each a function of the run that returns HTML with inline SVG."""

import base64
import io
from contextlib import contextmanager
from html import escape

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix, roc_curve

import data
from preparation.overview import GRADE_NAMES, count_grades
from preparation.photos import open_image
from reporting.metrics import METRICS, wilson

WORST = 6  # images in each gallery
GRADE_COLOURS = ("#9cc3e6", "#f6d77c", "#f0a35e", "#dc6b4a", "#94303f")
COLOURS = ("#2563a8", "#d4722a", "#3b8e62", "#8d5fb0", "#8a8f98", "#b23a5a", "#2a9aa8")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
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
HEAD = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'"><style>
*{box-sizing:border-box}body{max-width:1240px;margin:auto;padding:8px 16px;font:16px/1.5 system-ui,"DejaVu Sans",sans-serif;
color:#1f2733;background:#f4f6f9}h1{font-size:1.6em;margin:.5em 0 0;line-height:1.2}h2{margin:0;font-size:1.2em}
h3{font-size:1em;margin:0 0 .5em}p{margin:.5em 0;max-width:90ch}small,figcaption,.quiet{color:#5a6472;font-size:.85em}
small{display:block}section{background:#fff;border:1px solid #dfe4ea;border-radius:10px;padding:16px;margin:16px 0}
div{overflow-x:auto}svg{width:100%;max-width:420px}
.grid{display:grid;gap:16px;margin:12px 0;grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--least)),1fr))}
table{border-collapse:collapse}td{padding:6px 14px 6px 0;border-top:1px solid #e8ebf0;vertical-align:top;white-space:nowrap}
figure{margin:0;overflow-wrap:anywhere}img{width:100%;border-radius:6px}figcaption{line-height:1.3}b{font-size:1.6em}
.note{border-left:4px solid #d4722a;background:#fdf0e6;padding:8px 12px}</style>"""


def page(run):
    made = {"dataset": "unknown", "split": "unknown", "preprocessing": "unknown", **run["prepared"]}
    title = escape(
        f"Federated DR screening: the model after round {len(run['history'])} of {run['rounds']}"
    )
    facts = (
        f"run {run['run']} · {run['arch']}, {run['image_size']} × {run['image_size']} pixels · "
        f"{len(run['clients'])} clients · data set {made['dataset']} · split {made['split']}"
    )
    drawn = "The images are drawn: the figures show that federation works, and say nothing about patients."
    sections = (
        summary,
        curves,
        errors,
        missed,
        clients,
        time,
        *[comparison] * bool(run["compared"]),
    )
    body = "".join(section(run) for section in sections).replace(">auc<", ">AUC<")
    return (
        f'{HEAD}<title>{title}</title></head><body><h1>{title}</h1><p class="quiet">{escape(facts)}</p><p class="note">'
        f"<strong>This is not a medical device:</strong> decide nothing about a patient by it or by its scores. "
        f"{drawn * (made['preprocessing'] == 'drawn')}</p>{body}</body></html>\n"
    )


def box(name, heading, *parts):
    return f'<section id="{name}"><h2>{heading}</h2>{"".join(parts)}</section>\n'


def grid(cells, least=340):
    return f'<div class="grid" style="--least:{least}px">{"".join(f"<div>{cell}</div>" for cell in cells)}</div>'


def table(*rows):
    return f"<table>{''.join('<tr>' + ''.join(f'<td>{cell}</td>' for cell in row) + '</tr>' for row in rows)}</table>"


def shown(name, value, low, high):
    """A number with its interval below it; proportions in percent."""
    if np.isnan(value):
        return "–"
    if name == "auc":
        return f"{value:.3f}<small>{low:.3f} to {high:.3f}</small>"
    return f"{100 * value:.1f} %<small>{100 * low:.1f} to {100 * high:.1f}</small>"


@contextmanager
def picture(cells, title):
    """Axes to draw on; what was drawn is then added to `cells` as an <svg> of its column's width."""
    with rc_context(STYLE):
        figure, text = Figure(figsize=(4.6, 3.1), layout="constrained"), io.StringIO()
        axes = figure.subplots()
        axes.set_title(title, fontsize=11)
        yield axes
        figure.savefig(
            text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    cells.append(
        f'<svg role="img" aria-label="{escape(title)}" viewBox{text.getvalue().partition("viewBox")[2]}'
    )


def draw_lines(axes, series):
    """series: {name: [(round, value), ...]}, the first drawn boldest."""
    for place, (name, points) in reversed(list(enumerate(series.items()))):
        axes.plot(
            *zip(*points, strict=True),
            label=name,
            color=COLOURS[place % len(COLOURS)],
            linewidth=1.2 + (place == 0),
        )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("round")
    if len(series) > 1:
        axes.legend(reverse=True)


def draw_stacked(axes, names, parts, colours):
    """A bar for each of `names`, made of parts: {what: value for each name}."""
    bottom = np.zeros(len(names))
    for colour, (part, values) in zip(colours, parts.items(), strict=False):
        axes.bar(names, values, bottom=bottom, color=colour, label=part, width=0.7)
        bottom += values
    axes.grid(visible=False, axis="x")
    axes.figure.legend(loc="outside lower center", ncols=2)


# --- the sections -------------------------------------------------------------------------------------------------


def summary(run):
    cards = [
        f"<p>{name}</p><b>{shown(name, *values).replace('<small>', '</b><small>')}"
        for name, values in run["measured"].items()
    ]
    return box(
        "summary",
        "The merged model on images that nobody trained on",
        grid(cards, least=130),
        f"<p>{len(run['val'])} held-out images, {sum(count_grades(run['val'])[1:])} with DR; a score above 0.5 says DR.</p>"
        '<p class="quiet">Below each number is its 95 % interval: Wilson (1927); for the AUC Newcombe (2006, method 5) '
        "with the variance of Hanley and McNeil (1982).</p>",
    )


def curves(run):
    cells = []
    for name in ("loss", *METRICS):
        series = {"merged, validation": [(row["round"], row[name]) for row in run["history"]]}
        for client, (history, _, _) in run["sites"].items():
            if history and name in history[0]:
                series[f"{client}, training"] = [(row["round"], row[name]) for row in history]
        with picture(cells, name) as axes:
            draw_lines(axes, series)
            axes.set_ylim(0, None if name == "loss" else 1.02)
    return box("curves", "Round by round", grid(cells))


def errors(run):
    ill, score = data.healthy(run["val"]) < 0.5, 1 - run["p_healthy"]
    (cleared, alarms), (overlooked, found) = confusion_matrix(
        ill, score > 0.5, labels=[False, True]
    )
    cells = [
        table(
            ("", "model: DR", "model: healthy"),
            ("has DR", f"<b>{found}</b> found", f"<b>{overlooked}</b> missed"),
            ("healthy", f"<b>{alarms}</b> false alarms", f"<b>{cleared}</b> cleared"),
        )
    ]
    if ill.any() and not ill.all():
        false_rate, found_rate, thresholds = roc_curve(ill, score, drop_intermediate=False)
        at = np.argmax(found_rate >= 0.95)
        cells[0] += (
            f"<p>To find 95 % of DR the threshold would be {thresholds[at]:.3f}, at a specificity of "
            f"{1 - false_rate[at]:.1%}; chosen on these same images, so expect less elsewhere.</p>"
        )
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
                alarms / (~ill).sum(),
                found / ill.sum(),
                "o",
                color=COLOURS[1],
                label="operating point (score 0.5)",
            )
            axes.set(xlabel="1 − specificity (false alarms)", ylabel="sensitivity (DR found)")
            axes.legend(loc="lower right")
    return box("errors", "Found, missed, false alarms", grid(cells))


def missed(run):
    labels, score, cells = (
        np.array([record["label"] for record in run["val"]]),
        1 - run["p_healthy"],
        [],
    )
    with picture(cells, "Sensitivity by grade") as axes:
        for grade in sorted(set(labels) - {0}):
            n, part = int(np.sum(labels == grade)), float(np.mean(score[labels == grade] > 0.5))
            low, high = wilson(part, n)
            name = f"{GRADE_NAMES[grade]}\n{part * n:.0f} of {n}"
            axes.bar(name, part, color=GRADE_COLOURS[grade], width=0.7)
            axes.errorbar(
                name,
                part,
                [[max(0, part - low)], [max(0, high - part)]],
                color="#333b47",
                capsize=4,
            )
        axes.set_ylim(0, 1.03)
        axes.tick_params(axis="x", labelsize=9)
    for heading, wrong, order in (
        ("Worst misses: DR with the lowest scores", (labels > 0) & (score <= 0.5), score),
        ("Worst false alarms: healthy, highest scores", (labels == 0) & (score > 0.5), -score),
    ):
        worst = [
            thumbnail(run["val"][i], score[i]) for i in np.argsort(order, kind="stable") if wrong[i]
        ][:WORST]
        cells.append(f"<h3>{heading}</h3>{grid(worst, least=100) if worst else 'none'}")
    return box("missed", "Who is missed", grid(cells))


def thumbnail(record, score):
    png = io.BytesIO()
    open_image(record["dir"]).resize((128, 128)).save(png, "PNG")
    text = f"score {score:.3f}<br>grade {record['label']}, {GRADE_NAMES[record['label']]}<br>{escape(record['picture'])}"
    source = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    return (
        f'<figure><img alt="fundus picture" src="{source}"><figcaption>{text}</figcaption></figure>'
    )


def clients(run):
    cells, rows = [], [("client", "images", *METRICS)]
    for client, (_, records, measured) in run["sites"].items():
        numbers = (
            [shown(name, *measured[name]) for name in METRICS]
            if measured
            else ["its images are not on this machine"]
        )
        rows.append((escape(client), len(records) or "–", *numbers))
    here = {
        client: count_grades(records) for client, (_, records, _) in run["sites"].items() if records
    }
    if here:
        with picture(cells, "Images by grade") as axes:
            graded = zip(GRADE_NAMES, zip(*here.values(), strict=True), strict=True)
            draw_stacked(axes, list(here), dict(graded), GRADE_COLOURS)
    text = (
        '<p class="quiet">The clients trained on these images: compare the clients with each other. Of more than '
        f"{run['client_images']} images of a client, every n-th was looked at.</p>"
    )
    return box(
        "clients", "The merged model at each client", grid([*cells, table(*rows) + text], least=576)
    )


def time(run):
    cells, seconds, names = (
        [],
        [],
        ("training, slowest client", "start, transport, waiting", "merging", "evaluating"),
    )
    for row in run["history"]:
        slowest = max(
            sum(epoch["seconds"] for epoch in history if epoch["round"] == row["round"])
            for history, _, _ in run["sites"].values()
        )
        slowest = min(
            slowest, row["wait_seconds"]
        )  # a server that was started again has waited since then only
        seconds.append(
            (slowest, row["wait_seconds"] - slowest, row["merge_seconds"], row["evaluate_seconds"])
        )
    parts = dict(zip(names, np.transpose(seconds), strict=True))
    with picture(cells, "Seconds a round") as axes:
        draw_stacked(axes, [row["round"] for row in run["history"]], parts, COLOURS)
        axes.xaxis.get_major_locator().set_params(integer=True)
    rows = (
        ("", "median of a round"),
        *((name, f"{np.median(part):.2f} s") for name, part in parts.items()),
    )
    return box("time", "Where the time went", grid([*cells, table(*rows)]))


def comparison(run):
    rounds = max(len(rows) for rows in run["compared"].values())
    cells, lasts, window = [], [("after the last round", *METRICS)], max(3, rounds // 10)
    raw = {
        name: [(row["round"], row["accuracy"]) for row in rows]
        for name, rows in run["compared"].items()
    }
    mean = {
        name: [
            (points[i][0], np.mean(points[max(0, i + 1 - window) : i + 1], axis=0)[1])
            for i in range(len(points))
        ]
        for name, points in raw.items()
    }
    for title, series in (
        ("Validation accuracy", raw),
        (f"Mean of the last {window} rounds", mean),
    ):
        with picture(cells, title) as axes:
            draw_lines(axes, series)
    for name, rows in run["compared"].items():
        accuracy = rows[-1]["accuracy"]
        lasts.append(
            (
                escape(name),
                shown("accuracy", accuracy, *wilson(accuracy, len(run["val"]))),
                *(f"{rows[-1][metric]:.3f}" for metric in METRICS[1:]),
            )
        )
    return box("comparison", "Is federation worth it?", grid(cells), f"<div>{table(*lasts)}</div>")
