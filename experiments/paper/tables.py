"""Markdown from the data files: tables, and sentences about who wins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .models import ARCHITECTURES
from .setup import ABLATION, BARE, BASELINES, BOUNDS, DEFINITIONS, LRP, LRP_METHODS, METRICS
from .summary import INSIDE, MEAN, PAPER, UNEXPLAINED, Cell, Claim, Table

NAMES = {
    "mif-accuracy-drop": "MIF accuracy (the drop)",
    "lif-accuracy": "LIF accuracy",
    "srg": "SRG",
    "aopc": "AOPC",
    "segmentation-ap": "segmentation AP",
    "pointing-game": "pointing game",
    "AP own": "AP, the object's own map",
    "AP gap": "AP, own map less the other objects' maps",
    "pointing own": "pointing game, own map",
    "pointing gap": "pointing game, own map less the others'",
}
LOSES = "**▼ Libra loses**"
LEGEND = (
    "Cells: plain → libra (mean of the paired differences [95 % bootstrap interval over images])."
    f" {LOSES}: the whole interval is below 0; ▲: above. In percent; higher is better throughout."
    " One interval in twenty leaves out 0 by chance where there is no difference."
)


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *lines])


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def interval(cell: Any, sign: str = "+") -> str:
    """Of a cell or a claim, in percent: `+1.2 [0.3, 2.0]`; more digits where these would be 0."""
    tiny = 0 < max(abs(cell.low), abs(cell.high)) < 5e-4
    form = ".1g" if tiny else ".1f"
    low, mean, high = (100 * v for v in (cell.low, cell.mean, cell.high))
    return f"{mean:{sign}{form}} [{low:{form}}, {high:{form}}]"


# --------------------------------------------------------------------------- plain and libra


def change(table: Table, model: str, method: str, metric: str) -> str:
    """One cell: plain → libra, with the difference and a mark."""
    plain, libra = (table.at(model, method, p, metric) for p in ("plain", "libra"))
    gain = table.at(model, method, "libra", metric, than="plain")
    if plain is None or libra is None or gain is None:
        return "-"
    mark = {1: " ▲", 0: "", -1: f" {LOSES}"}[gain.verdict]
    return f"{percent(plain.mean)} → {percent(libra.mean)} ({interval(gain)}){mark}"


def changed(table: Table, metric: str) -> list[str]:
    """The methods that were measured plain and under libra."""
    return [
        m
        for m in table.methods
        if m not in BASELINES
        and any(table.at(model, m, "libra", metric, "plain") for model in table.models)
    ]


def comparison(
    table: Table,
    models: Sequence[str],
    metrics: Sequence[str],
    paper: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
    """For each metric a table of methods and models, and a sentence a method.

    `paper`: metric -> method -> what stands in the next column.
    """
    parts = []
    for metric in metrics:
        theirs = (paper or {}).get(metric)
        head = ["method", *models, *(["the paper's mean"] if theirs is not None else [])]
        rows = [
            [
                method,
                *(change(table, model, method, metric) for model in models),
                *([theirs.get(method, "-")] if theirs is not None else []),
            ]
            for method in changed(table, metric)
        ]
        said = [f"- {s}" for s in sentences(table, models, metric)]
        parts.append("\n\n".join([f"## {NAMES[metric]}", grid(head, rows), "\n".join(said)]))
    return "\n\n".join(parts)


def sentences(table: Table, models: Sequence[str], metric: str) -> list[str]:
    """Whether Libra improves each method, on how many of the models, and on which it does not."""
    made = []
    single = [m for m in models if m != MEAN]
    for method in changed(table, metric):
        gains = {m: table.at(m, method, "libra", metric, "plain") for m in single}
        there = {m: g for m, g in gains.items() if g is not None}
        if not there:
            continue
        by = {v: [m for m, g in there.items() if g.verdict == v] for v in (1, 0, -1)}
        text = (
            f"Libra improves {method} in {NAMES[metric]} on {len(by[1])} of {len(there)} "
            "architectures (interval above 0)"
        )
        if by[-1]:
            text += f", **makes it worse on {len(by[-1])}** ({', '.join(by[-1])})"
        if by[0]:
            text += f", is undecided on {len(by[0])} ({', '.join(by[0])})"
        made.append(text + ".")
    return made


# --------------------------------------------------------------------------- tables


def completeness(table: Table) -> str:
    """Bounds, relative errors in both precisions, absolute ones beside the paper's."""
    models = [m for m in table.models if m != MEAN]
    parts = [
        "# Completeness\n\nThe error is |f(x) - sum of all contributions|, f(x) the predicted "
        "class's logit; relative: over |f(x)|.",
        "## The bounds\n\nThe worst image's relative error of FullGrad.",
        bounds(table),
        bound_sentence(table),
    ]
    for kind in BOUNDS:
        name = "relative-completeness-error"
        parts.append(f"## Relative, {kind}\n\nMean over images.\n\n" + _errors(
            table, kind, name, models, {}))  # fmt: skip
    entries = {tuple(PAPER["entries"][e]): v for e, v in PAPER["completeness"].items()}
    parts.append(
        "## Absolute, float32, beside the paper's\n\nMean over images; the paper's is over other "
        "models and images.\n\n"
        + _errors(table, "float32", "completeness-error", [*models, MEAN], entries)
    )
    return "\n\n".join(parts)


def _errors(
    table: Table,
    kind: str,
    metric: str,
    models: Sequence[str],
    paper: Mapping[tuple[str, ...], float],
) -> str:
    rows = []
    for method in table.methods:
        for policy in ("plain", "libra", *LRP):
            found = [table.at(m, method, f"{policy}, {kind}", metric) for m in models]
            if any(found):
                rows.append((method, policy, found))
    theirs = ["the paper's mean"] if paper else []
    lines = [
        [method, policy, *("-" if c is None else f"{c.mean:.2g}" for c in found),
         *([f"{paper[method, policy]}" if (method, policy) in paper else "-"] if paper else [])]
        for method, policy, found in rows
    ]  # fmt: skip
    return grid(["method", "policy", *models, *theirs], lines)


def broken(table: Table) -> list[str]:
    """Where a bound does not hold: `model, float32`; also where nothing was measured."""
    found = []
    for model in table.models:
        for kind, most in BOUNDS.items():
            cell = table.at(model, "fullgrad", f"libra, {kind}", "relative-completeness-error")
            if model != MEAN and (cell is None or not cell.worst <= most):
                found.append(f"{model}, {kind}")
    return found


def bounds(table: Table) -> str:
    names = [f"{policy}, {kind}" for kind in BOUNDS for policy in ("libra", "plain")]
    rows = []
    for model in table.models:
        if model == MEAN:
            continue
        row = [model]
        for name in names:
            cell = table.at(model, "fullgrad", name, "relative-completeness-error")
            row.append("-" if cell is None else f"{cell.worst:.1e}")
        rows.append([*row, "**no**" if any(b.startswith(f"{model},") for b in broken(table))
                     else "yes"])  # fmt: skip
    said = ", ".join(f"{most:.0e} in {kind}" for kind, most in BOUNDS.items())
    return grid(["model", *names, f"libra at most {said}"], rows)


def bound_sentence(table: Table) -> str:
    """One sentence: whether the bounds hold."""
    models = [m for m in table.models if m != MEAN]
    failing = broken(table)
    if failing:
        return f"**The bound does not hold on: {'; '.join(failing)}.**"
    worst = []
    for kind in BOUNDS:
        at = [table.at(m, "fullgrad", f"libra, {kind}", "relative-completeness-error")
              for m in models]  # fmt: skip
        worst.append(f"{max(c.worst for c in at if c is not None):.1e} in {kind}")
    return (
        f"Libra FullGrad is complete on all {len(models)} models: its error is at most "
        f"{' and '.join(worst)}, on any image."
    )


def faithfulness(table: Table, models: Sequence[str]) -> str:
    by_entry = {v[0]: k for k, v in PAPER["entries"].items() if v[1] == "libra"}
    mif = PAPER["mif"]
    theirs = {
        method: f"{mif[entry.removeprefix('Libra ')]} → {mif[entry]}"
        for method, entry in by_entry.items()
        if entry in mif
    }
    shown = [m for m in (*models, MEAN) if m in table.models]
    others = [
        [method, policy, *(_mean(table, method, policy, m) for m in METRICS)]
        for method, policy in [
            *((m, p) for m in LRP_METHODS for p in LRP),
            *((m, "plain") for m in BASELINES),
        ]
        if method in table.methods
    ]
    return "\n\n".join(
        [
            "# Faithfulness and localisation",
            LEGEND + f" `{MEAN}`: over the paper's families that the method applies to.",
            comparison(table, shown, METRICS, {"mif-accuracy-drop": theirs}),
            "## Rules of LRP, and baselines\n\n"
            f"`{MEAN}` over the paper's families, with its interval.",
            grid(["method", "policy", *(NAMES[m] for m in METRICS)], others),
        ]
    )


def _mean(table: Table, method: str, policy: str, metric: str, model: str = MEAN) -> str:
    cell = table.at(model, method, policy, metric)
    return "-" if cell is None else interval(cell, "")


def subset(title: str, about: str, table: Table, models: Sequence[str]) -> str:
    """A comparison of some of the models: the sizes, the mixers."""
    return "\n\n".join([f"# {title}", about, LEGEND, comparison(table, models, METRICS)])


def ablation(table: Table) -> str:
    model = next(m for m in table.models if m != MEAN)
    names = {tuple(v): k for k, v in PAPER["entries"].items()}
    rows = []
    for method, policy in [*(("fullgrad+", p) for p in ABLATION), (BARE, "libra"), (BARE, "plain")]:
        theirs = PAPER["ablation"].get(names.get((method, policy), ""), ["-", "-"])
        cells = [_mean(table, method, policy, m, model) for m in METRICS]
        at = METRICS.index("segmentation-ap")
        row = [cells[0], str(theirs[0]), *cells[1:at], cells[at], str(theirs[1]), *cells[at + 1 :]]
        rows.append([method, policy, *row])
    head = ["method", "policy"]
    for m in METRICS:
        head.append(NAMES[m])
        if m in ("mif-accuracy-drop", "segmentation-ap"):
            head.append("the paper's")
    return "\n\n".join(
        [
            f"# Ablation of Libra FullGrad+ on {model}",
            "Means in percent with 95 % intervals; the paper's are of EVA2-S on ImageNet and "
            "ImageNet-S. Paired differences are in [orderings.md](orderings.md).",
            grid(head, rows),
        ]
    )


def definitions(table: Table, models: Sequence[str]) -> str:
    shown = [m for m in (*models, MEAN) if m in table.models]
    parts = [
        "# What a definition changes",
        "Mean correlations of two maps of one image, in percent, with 95 % intervals. FullGrad+ "
        "and targets are the paper's in all other tables.",
    ]
    for name, about in (
        ("raw logit", "The map of the raw logit with that of the softmax's weighting of logits."),
        ("early biases", "FullGrad+ with what it is where the biases before the first block, which "
         "are in that block's input, are counted besides."),
    ):  # fmt: skip
        rows = [
            [method, policy, *(_mean(table, method, policy, name, m) for m in shown)]
            for method in table.methods
            for policy in ("plain", "libra")
            if table.at(shown[0], method, policy, name)
        ]
        parts.append(f"## {about}\n\n" + grid(["method", "policy", *shown], rows))
    return "\n\n".join(parts)


OBJECTS = ("AP gap", "AP own", "pointing gap", "pointing own")


def discrimination(table: Table, models: Sequence[str]) -> str:
    shown = [m for m in (*models, MEAN) if m in table.models]
    return "\n\n".join(
        [
            "# Class discrimination",
            "Scenes with several objects of different classes; a map is made for the class of "
            "each. The same masks are held against the own map and against the others', so a map "
            "that ignores its target has a gap of 0, on the average.",
            LEGEND,
            comparison(table, shown, OBJECTS),
            "## Is there a gap at all?",
            grid(["method", "policy", *shown], _gaps(table, shown)),
        ]
    )


def _gaps(table: Table, shown: Sequence[str]) -> list[list[str]]:
    """The gaps themselves with their intervals."""
    return [
        [method, policy, *(_mean(table, method, policy, "AP gap", m) for m in shown)]
        for method in table.methods
        for policy in ("plain", "libra")
        if any(table.at(m, method, policy, "AP gap") for m in shown)
    ]


def text(table: Table, scores: Mapping[str, float]) -> str:
    """The same of a CLIP's image tower, the class being a text."""
    figures = ", ".join(f"{k} {percent(v)} %" for k, v in scores.items())
    return "\n\n".join(
        [
            "# Text-prompted highlighting",
            "The image tower of a small CLIP, the cosine of image and text being explained; the "
            'texts are "a striped circle" and so on. ' + learnt(scores),
            f"Held out: {figures}.",
            LEGEND,
            comparison(table, [m for m in table.models if m != MEAN], OBJECTS),
            "![The maps of texts](text.png)",
        ]
    )


def learnt(scores: Mapping[str, float]) -> str:
    """Whether the towers can be said to know anything; chance is one in nine."""
    found = f"names the largest object in {percent(scores['accuracy'])} % (chance: 11.1 %)"
    if scores["accuracy"] < 0.5:
        return f"**The towers have not learnt: the pair {found}; the maps mean little.**"
    return f"The pair {found}."


def orderings(made: Sequence[Claim], faithful: Table | None) -> str:
    count = {v: sum(c.verdict == v for c in made) for v in ("yes", "no", "undecided")}
    inside = sum(c.reason == INSIDE for c in made)
    unexplained = sum(c.reason.startswith(UNEXPLAINED) for c in made)
    rows = [
        [
            c.table,
            f"{c.better} > {c.worse}",
            "-" if c.paper is None else f"{c.paper:.1f}",
            _found(c),
            {"yes": "yes", "no": "**no**", "undecided": "undecided"}[c.verdict],
            c.reason,
        ]
        for c in made
    ]
    absent = [f"- Not compared: {what}: {why}." for what, why in PAPER["absent"].items()]
    return "\n\n".join(
        [
            "# The paper's orderings, one by one",
            f"Of {len(made)} orderings, {count['yes']} are the same here (interval above 0), "
            f"{count['no']} are the other way round (interval below 0), {count['undecided']} are "
            f"undecided, {inside} of these with the paper's difference inside the interval; "
            f"{unexplained} that differ are unexplained." + _agreement(faithful),
            "`A > B`: A is better (of completeness errors, A's is smaller). Differences are in "
            "percentage points, of completeness errors in logits, better less worse; here with a "
            "paired 95 % bootstrap interval over images, of means over the paper's families.",
            grid(["table", "paper says", "by", "here by", "here", "reason"], rows),
            "\n".join(absent),
        ]
    )


def _agreement(faithful: Table | None) -> str:
    """How alike the rankings of all entries by MIF accuracy are."""
    from scipy.stats import kendalltau

    pairs = [
        (theirs, cell.mean)
        for entry, theirs in PAPER["mif"].items()
        if faithful is not None
        for method, policy in [PAPER["entries"][entry]]
        for cell in [faithful.at(MEAN, method, policy, "mif-accuracy-drop")]
        if cell is not None
    ]
    if len(pairs) < 3:
        return ""
    tau = kendalltau(*zip(*pairs, strict=True)).statistic
    return (
        f" Kendall's tau of the whole ranking by MIF accuracy, here and there, {len(pairs)} "
        f"entries: {tau:.2f}."
    )


def _found(c: Claim) -> str:
    if c.table == "completeness error":
        return f"{c.mean:+.3g} [{c.low:.3g}, {c.high:.3g}]"
    return interval(c)


def models(rows: Sequence[Mapping[str, Any]]) -> str:
    names = [*dict.fromkeys(k for row in rows for k in row["scores"])]
    lines = [
        [row["name"], f"{row['parameters']:,}", f"{row['seconds']:.0f}",
         *(percent(row["scores"][k]) if k in row["scores"] else "-" for k in names)]
        for row in rows
    ]  # fmt: skip
    about = "Trained from nothing on scenes; held-out figures in percent, seconds of training."
    return "\n\n".join(["# Models", about, grid(["model", "parameters", "seconds", *names], lines)])


def losses(table: Table) -> list[Cell]:
    """Where Libra loses: differences whose interval is below 0."""
    return [c for c in table.cells if c.than and c.metric in NAMES and c.verdict < 0]


ABOUT = {
    "orderings": "the paper's orderings, one by one",
    "models": "what was trained",
    "completeness": "completeness errors, every model, policy and precision",
    "faithfulness": "every method plain and under libra, every model and metric",
    "sizes": "the same of four sizes of ViT",
    "mixers": "the same of the mixers",
    "ablation": "libra without its parts",
    "discrimination": "objects of different classes in one image",
    "definitions": "maps of the raw logit, and of biases counted twice, beside the paper's",
    "text": "highlighting what a text names",
}


def index(
    run: Mapping[str, Any],
    trained: Sequence[Mapping[str, Any]],
    sheets: Mapping[str, Table],
    made: Mapping[str, str],
    out: Path,
) -> str:
    """The first page: how it was made, the sentences that matter, and where the rest is."""
    seconds, training = sum(run["seconds"].values()), sum(m["seconds"] for m in trained)
    lines = [
        "# The paper's evaluation on scenes",
        f"Written by `python -m experiments.paper.run`: {run['images']} images "
        f"({run['images with several objects']} with several objects), {len(run['models'])} "
        f"classifiers ({', '.join(run['models'])}). Training took {training / 60:.0f} minutes, "
        f"measuring {seconds / 60:.0f}, with {run['threads']} thread(s) and torch {run['torch']}; "
        "each model's training is in [models.md](models.md).",
    ]
    if run.get("definitions") != DEFINITIONS:
        lines.append(
            "**Measured before the paper's definitions were used: every target is the raw logit, "
            "and FullGrad+ counts the biases before the first block twice. The command above "
            "measures again.**"
        )
    if run["missing"]:
        lines.append(f"**Not measured: {', '.join(run['missing'])}.**")
    if "completeness" in sheets:
        lines.append(f"- {bound_sentence(sheets['completeness'])}")
    if found := sheets.get("faithfulness"):
        wins = [c for c in found.cells if c.than and c.metric in METRICS and c.model != MEAN]
        lost = [c for c in losses(found) if c.metric in METRICS and c.model != MEAN]
        lines.append(
            f"- Of {len(wins)} cells (method x model x metric), Libra is better in "
            f"{sum(c.verdict > 0 for c in wins)}, **worse in {len(lost)}**, undecided in "
            f"{sum(c.verdict == 0 for c in wins)}."
        )
        families = [m for m in ARCHITECTURES if m in found.models]
        for metric in ("mif-accuracy-drop", "segmentation-ap"):
            lines += [f"- {s}" for s in sentences(found, families, metric) if " fullgrad+ " in s]
    if "orderings" in made:
        lines.append("- " + made["orderings"].split("\n\n")[1])
    lines.append(
        "\n".join(f"- [{name}]({name}.md): {ABOUT[name]}" for name in ABOUT if name in made)
    )
    for name in ("faithfulness", "heatmaps-methods", "heatmaps-models", "text"):
        if (out / f"{name}.png").exists():
            lines.append(f"![{name}]({name}.png)")
    return "\n\n".join(lines)
