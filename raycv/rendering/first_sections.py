"""The first sections of a report: verdict, checks, operating points, folds, ranking, threshold, criteria."""

from collections.abc import Sequence
from typing import Any

from raycv.rendering import charts
from raycv.rendering.blocks import Block, Column, Figure, Section, Table, Terms, Text, estimate, label, shown
from raycv.rendering.svg import svg_of

LABEL_METRICS = ("f1", "precision", "recall", "specificity", "accuracy", "balanced_accuracy", "mcc")
SCORE_METRICS = ("roc_auc", "average_precision", "brier", "ece")
NAME = Column("name", "")
MOST_ROWS = 26
"""Rows of a curve's table in the page. The CSV file has every point."""


def first_sections(evaluation: dict[str, Any], warnings: Sequence[str]) -> list[Section]:
    """Returns sections 1 to 7.

    Args:
        evaluation: The statistics, as `evaluate` returns them.
        warnings: The warnings of the run.
    """
    return [
        _verdict(evaluation),
        _checks(evaluation, warnings),
        _operating_points(evaluation),
        _folds(evaluation),
        _ranking(evaluation),
        _thresholds(evaluation),
        _criteria(evaluation),
    ]


def figure(name: str, title: str, finding: str, evaluation: dict[str, Any], table: Table, rows: int = 0) -> Figure:
    """Draws the chart of `charts` that has the figure's name."""
    svg = svg_of(name.replace("_", "-"), title, finding, getattr(charts, name), evaluation, rows)
    return Figure(name, title, finding, svg, table)


def _verdict(evaluation: dict[str, Any]) -> Section:
    verdict = evaluation["verdict"]
    rows = [
        ["F1 at cross-fold thresholds", estimate(verdict["f1"])],
        [f"best floor: {label(verdict['floor'])}", estimate(_floor_f1(evaluation))],
        ["difference to the best floor", estimate(verdict["floor_difference"])],
        ["ROC-AUC, pooled", estimate(evaluation["score_metrics"]["pooled"]["roc_auc"])],
    ]
    table = Table("verdict", "The headline numbers", [NAME, Column("value", "value (95 % interval)", "metric")], rows)
    again = "The intervals of F1 count the choice of the thresholds too. Criteria and slices hold the thresholds."
    blocks: list[Block] = [*map(Text, verdict["sentences"]), table, Text(again)]
    return Section("verdict", "Verdict", "Is it better than a trivial answer?", blocks)


def _floor_f1(evaluation: dict[str, Any]) -> dict[str, Any]:
    floors = evaluation["floors"]
    return next(row["metrics"]["f1"] for row in floors["table"] if row["name"] == floors["best"])


def _checks(evaluation: dict[str, Any], warnings: Sequence[str]) -> Section:
    found = [check for check in evaluation["checks"] if check["status"] == "found"]
    found.sort(key=lambda check: check["severity"] != "serious")
    terms = [
        (
            f"{check['code']} {check['severity']}: {check['title']}",
            [check["finding"], f"Why it matters: {check['why']}", f"What to do: {check['remedy']}"],
        )
        for check in found
    ]
    blocks: list[Block] = [Terms(terms)] if terms else [Text("No check found anything.")]
    columns = [Column("code", "code"), Column("title", "looks for"), Column("status", "result")]
    rows = [[check["code"], check["title"], check["status"]] for check in evaluation["checks"]]
    blocks.append(Table("checks", "All checks", columns, rows))
    if warnings:
        blocks.append(Terms([("Warnings of the run", list(warnings))]))
    return Section("checks", "Checks", "What would a referee object to?", blocks)


def _operating_points(evaluation: dict[str, Any]) -> Section:
    points = evaluation["operating_points"]
    judged = [point for point in points if point["pooled"]]
    columns = [
        Column("point", "operating point"),
        Column("threshold", "threshold"),
        Column("f1", "F1, threshold chosen again", "metric"),
        Column("f1_fixed", "F1, threshold held", "metric"),
        Column("f1_fold_mean", "mean F1 of folds, corrected t", "metric"),
        Column("f1_sd", "sd over folds", "metric"),
        Column("f1_criterion_macro", "mean F1 of criteria", "metric"),
        Column("optimism", "optimism of pooled F1", "difference"),
    ]
    rows = [_point(point) for point in points]
    table = Table("operating_points", "Operating points", columns, rows)
    every = Table(
        "metrics",
        "Every metric of labels, pooled over the folds",
        [Column("metric", "metric"), *(Column(point["name"], label(point["name"]), "metric") for point in judged)],
        [[label(metric), *(estimate(point["pooled"][metric]) for point in judged)] for metric in LABEL_METRICS],
    )
    named = ", ".join(
        f"{shown(point['pooled']['f1']['value'], 'metric')} at {label(point['name'])}" for point in judged
    )
    blocks: list[Block] = [
        figure("operating_points", "F1 at each operating point", f"F1 is {named}.", evaluation, table, len(judged)),
        every,
        Terms([(label(point["name"]), [point["estimand"]]) for point in points]),
    ]
    if not any(point["name"] == "cross_fold_epoch" for point in points):
        blocks.insert(1, Text("The scores of every epoch are not recorded, so the optimism of the epoch is unknown."))
    blocks.append(
        Text(
            "Optimism is F1 of a point minus F1 of the more honest point below it: tuned in fold minus cross-fold, and "
            "cross-fold minus cross-fold with the epoch chosen by the other folds too."
        )
    )
    return Section("operating-points", "Operating points", "How much do our own choices flatter the model?", blocks)


def _point(point: dict[str, Any]) -> list[Any]:
    thresholds = point["thresholds"] or [point["threshold"]]
    low, high = shown(min(thresholds), "threshold"), shown(max(thresholds), "threshold")
    first = [label(point["name"]), low if low == high else f"{low} to {high}"]
    if not point["pooled"]:
        return [*first, *["not reported"] * 5, ""]
    f1, mean = point["pooled"]["f1"], point["fold_mean"]["f1"]
    chosen = estimate(f1, "reselected") if f1.get("reselected") else "not chosen again"
    macro, optimism = estimate(point["criterion_macro"]["f1"]), point["optimism"]
    tail = [mean["sd"], macro, estimate(optimism["pooled"]) if optimism else ""]
    return [*first, chosen, estimate(f1, "fixed"), estimate(mean, "corrected_t"), *tail]


def _folds(evaluation: dict[str, Any]) -> Section:
    columns = [
        Column("fold", "fold", "count"), Column("posts", "posts", "count"), Column("pairs", "pairs", "count"),
        Column("matched", "matched", "count"), Column("threshold_tuned", "threshold, in fold", "threshold"),
        Column("threshold_cross", "threshold, cross-fold", "threshold"), Column("f1_tuned", "F1, in fold", "metric"),
        Column("f1", "F1, cross-fold", "metric"), Column("precision", "precision, cross-fold", "metric"),
        Column("recall", "recall, cross-fold", "metric"), Column("roc_auc", "ROC-AUC", "metric"),
        Column("average_precision", "average precision", "metric"),
    ]  # fmt: skip
    rows = [
        [
            *(fold[key] for key in ("fold", "posts", "pairs", "matched")),
            *(fold["threshold"][rule] for rule in ("tuned_in_fold", "cross_fold")),
            fold["tuned_in_fold"]["f1"],
            *(fold["cross_fold"][metric] for metric in ("f1", "precision", "recall")),
            *(fold["scores"][metric] for metric in ("roc_auc", "average_precision")),
        ]
        for fold in evaluation["folds"]
    ]
    blocks: list[Block] = [Table("folds", "The folds", columns, rows, sortable=True)]
    epochs = evaluation["epochs"]
    if epochs is None:
        blocks.append(Text("The epochs of the folds are not recorded, so there are no learning curves."))
    else:
        blocks.append(_learning_curves(evaluation, epochs))
    return Section("folds", "Folds", "Is it one lucky fold?", blocks)


def _learning_curves(evaluation: dict[str, Any], epochs: dict[str, Any]) -> Figure:
    longest = max(map(len, epochs["f1_by_epoch"]))
    columns = [Column("fold", "fold", "count")]
    columns += [Column(f"epoch_{epoch}", f"epoch {epoch}", "metric") for epoch in range(1, longest + 1)]
    columns += [Column("kept", "kept", "count"), Column("cross", "of the others", "count")]
    rows = [
        [fold, *values, *["stopped"] * (longest - len(values)), epochs["own"][fold], epochs["cross"][fold]]
        for fold, values in enumerate(epochs["f1_by_epoch"])
    ]
    f1 = epochs["f1"]
    finding = (
        f"Mean F1 is {f1['own']:.3f} at each fold's own best epoch and {f1['cross']:.3f} at the epoch that the other "
        f"folds choose: an optimism of {f1['optimism']:+.3f}."
    )
    table = Table("learning_curves", "F1 after each epoch", columns, rows)
    return figure("learning_curves", "Learning curves", finding, evaluation, table)


def _ranking(evaluation: dict[str, Any]) -> Section:
    ranking, scores = evaluation["ranking"], evaluation["score_metrics"]
    curve = ranking["pooled"]
    keys = [
        ("cut", "score at least"), ("recall", "recall"), ("precision", "precision"),
        ("false_positive_rate", "false positive rate"),
    ]  # fmt: skip
    rows = list(zip(*(curve[key] for key, _ in keys), strict=True))
    columns = [Column(key, words, "metric") for key, words in keys]
    every = max(1, -(-len(rows) // MOST_ROWS))
    ap, auc = scores["pooled"]["average_precision"], scores["pooled"]["roc_auc"]
    numbers = [
        [
            label(metric),
            estimate(scores["pooled"][metric]),
            estimate(scores["fold_mean"][metric], "corrected_t"),
            scores["fold_mean"][metric]["sd"],
            estimate(scores["criterion_macro"][metric]),
        ]
        for metric in SCORE_METRICS
    ]
    summary = [
        Column("metric", "metric"), Column("pooled", "pooled", "metric"),
        Column("fold_mean", "mean of folds, corrected t", "metric"), Column("sd", "sd over folds", "metric"),
        Column("criterion_macro", "mean of criteria", "metric"),
    ]  # fmt: skip
    blocks: list[Block] = [
        Table("score_metrics", "Metrics that need no threshold", summary, numbers),
        figure(
            "precision_recall", "Precision and recall",
            f"Average precision is {shown(estimate(ap), 'metric')}, and a random ranking has the prevalence, "
            f"{ranking['prevalence']:.3f}.",
            evaluation, Table("curve", "Points of the pooled precision-recall curve", columns, rows, every=every),
        ),
        figure(
            "roc", "ROC curve", f"ROC-AUC is {shown(estimate(auc), 'metric')}, and a random ranking has 0.5.",
            evaluation, Table("roc", "Points of the pooled ROC curve", columns, rows, every=every),
        ),
    ]  # fmt: skip
    return Section("ranking", "Ranking", "Does a higher score mean a match, at any threshold?", blocks)


def _thresholds(evaluation: dict[str, Any]) -> Section:
    sweep = evaluation["threshold_sweep"]
    names = [f"f1_fold_{fold}" for fold in range(len(sweep["folds"]))]
    columns = [Column("threshold", "threshold", "threshold")]
    columns += [Column(metric, label(metric), "metric") for metric in ("f1", "precision", "recall")]
    columns += [Column(name, f"F1, fold {fold}", "metric") for fold, name in enumerate(names)]
    pooled = [sweep["pooled"][metric] for metric in ("f1", "precision", "recall")]
    rows = list(zip(sweep["thresholds"], *pooled, *(fold["f1"] for fold in sweep["folds"]), strict=True))
    known = [(at, f1) for at, f1 in zip(sweep["thresholds"], sweep["pooled"]["f1"], strict=True) if f1 is not None]
    finding = "Pooled F1 is undefined."
    if known:
        best = max(f1 for _, f1 in known)
        near = [at for at, f1 in known if f1 > best - 0.02]
        finding = f"Pooled F1 is within 0.02 of its highest value, {best:.3f}, from {min(near):.2f} to {max(near):.2f}."
    table = Table("threshold_sweep", "F1, precision and recall by threshold", columns, rows, every=5)
    blocks: list[Block] = [figure("threshold_sweep", "F1 by threshold", finding, evaluation, table)]
    return Section("threshold", "Threshold", "Is the best threshold a plateau or a spike?", blocks)


def _criteria(evaluation: dict[str, Any]) -> Section:
    criteria = charts.by_matched(evaluation["criteria"])
    columns = [
        Column("criterion", "criterion"), Column("pairs", "pairs", "count"), Column("matched", "matched", "count"),
        Column("prevalence", "prevalence", "share"), Column("f1", "F1", "metric"),
        Column("floor_f1", "F1, all matched", "metric"), Column("precision", "precision", "metric"),
        Column("recall", "recall", "metric"), Column("average_precision", "average precision", "metric"),
        Column("roc_auc", "ROC-AUC", "metric"),
    ]  # fmt: skip
    rows = [
        [
            *(row[key] for key in ("criterion", "pairs", "matched", "prevalence")),
            estimate(row["metrics"]["f1"]),
            row["floor_f1"],
            *(estimate(row["metrics"][metric]) for metric in ("precision", "recall", "average_precision", "roc_auc")),
        ]
        for row in criteria
    ]
    few = [row["criterion"] for row in criteria if row["few"]]
    faint = frozenset(at for at, row in enumerate(criteria) if row["few"])
    table = Table("criteria", "The criteria at cross-fold thresholds", columns, rows, faint, sortable=True)
    weakest = ", ".join(evaluation["verdict"]["weakest"])
    unknown = (
        f"{len(few)} of {len(criteria)} have fewer than 20 matched pairs, so their numbers say little" if few else ""
    )
    known = f"The weakest criteria are {weakest}" if weakest else "No criterion has an F1"
    finding = f"{known}{'; ' if unknown else ''}{unknown}."
    blocks: list[Block] = [figure("criteria_forest", "F1 by criterion", finding, evaluation, table, len(criteria))]
    return Section("criteria", "Criteria", "Where is it weak, and where is it only unknown?", blocks)
