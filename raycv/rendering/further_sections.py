"""The further sections of a report: slices, calibration, errors, floors, data, set-up, methods, reporting."""

from collections.abc import Mapping
from typing import Any

from raycv.rendering import charts
from raycv.rendering.blocks import NOT_RECORDED, Block, Code, Column, Section, Table, Terms, Text, estimate, label
from raycv.rendering.first_sections import NAME, figure
from raycv.rendering.model_card import items

NAMES = {
    "fixed": "threshold held", "reselected": "threshold chosen again", "pooled": "pooled", "fold_mean": "mean of folds",
    "criterion_macro": "mean of criteria",
}  # fmt: skip
"""Names for people of intervals and averages, some of which an operating point has too."""
SLICE_METRICS = ("f1", "precision", "recall", "specificity", "roc_auc", "average_precision")
HELD = (
    "Thresholds are held in these intervals. The verdict's interval counts the choice of the thresholds too, so the "
    "same F1 can have another interval there."
)
OPTIONAL = {
    "length": ("shortened", "Whether a post was shortened is not recorded."),
    "negatives": ("hard_negative", "Which pairs an annotator looked at and rejected is not recorded."),
}


def further_sections(evaluation: dict[str, Any], facts: Mapping[str, Any]) -> list[Section]:
    """Returns sections 8 to 15.

    Args:
        evaluation: The statistics, as `evaluate` returns them.
        facts: The facts about the run, as `facts_of` returns them.
    """
    return [
        _slices(evaluation),
        _calibration(evaluation),
        _errors(evaluation),
        _floors(evaluation),
        _data(evaluation, facts),
        _setup(facts),
        _methods(evaluation),
        _reporting(evaluation, facts),
    ]


def _slices(evaluation: dict[str, Any]) -> Section:
    columns = [
        Column("slice", "slice"), Column("posts", "posts", "count"), Column("pairs", "pairs", "count"),
        Column("matched", "matched", "count"), *(Column(metric, label(metric), "metric") for metric in SLICE_METRICS),
    ]  # fmt: skip
    rows: list[list[Any]] = []
    differences = []
    for row in evaluation["slices"]:
        for part in row["slices"]:
            metrics = part["metrics"]
            numbers = [estimate(metrics[metric]) if metrics else None for metric in SLICE_METRICS]
            rows.append([label(part["name"]), *(part[key] for key in ("posts", "pairs", "matched")), *numbers])
        names = " minus ".join(label(part["name"]) for part in row["slices"])
        change = row["difference"]
        differences.append([names, *(estimate(change[metric]) if change else None for metric in SLICE_METRICS)])
    parts = charts.parts_of(evaluation)
    known = [(name, part["metrics"]["specificity"]["value"]) for name, part in parts if part["metrics"]]
    known = [(name, value) for name, value in known if value is not None]
    worst = min(known, key=lambda one: one[1], default=None)
    finding = f"Specificity is lowest for {worst[0]}: {worst[1]:.3f}." if worst else "No slice has a specificity."
    table = Table("slices", "The slices at cross-fold thresholds", columns, rows)
    blocks: list[Block] = [
        figure("slice_forest", "Specificity by slice", finding, evaluation, table, len(parts)),
        Table(
            "slice_differences",
            "Differences between slices",
            [NAME, *(Column(metric, label(metric), "difference") for metric in SLICE_METRICS)],
            differences,
        ),
    ]
    there = {row["name"] for row in evaluation["slices"]}
    blocks.append(Text(HELD))
    blocks += [Text(words) for name, (_, words) in OPTIONAL.items() if name not in there]
    blocks.append(Terms([(row["name"], [f"{row['meaning']}."]) for row in evaluation["slices"]]))
    return Section("slices", "Slices", "Does it fail on one kind of post?", blocks)


def _calibration(evaluation: dict[str, Any]) -> Section:
    calibration = evaluation["calibration"]
    columns = [
        Column("from", "score from", "threshold"), Column("to", "to", "threshold"),
        *(
            Column(f"{key}_{when}", f"{words}, {when}", kind)
            for when in ("before", "after")
            for key, words, kind in (
                ("pairs", "pairs", "count"), ("matched", "matched", "count"), ("mean_score", "mean score", "metric"),
                ("share_matched", "share matched", "metric"),
            )
        ),
    ]  # fmt: skip
    keys = ("pairs", "matched", "mean_score", "share_matched")
    bins = zip(calibration["before"]["reliability"], calibration["after"]["reliability"], strict=True)
    rows = [
        [before["from"], before["to"], *(one[key] for one in (before, after) for key in keys)] for before, after in bins
    ]
    table = Table("reliability", "Reliability by bin of the score", columns, rows)
    ece = {when: calibration[when]["ece"]["value"] for when in ("before", "after")}
    finding = (
        f"The expected calibration error is {ece['before']:.3f} before and {ece['after']:.3f} after a temperature "
        "from the other folds."
    )
    numbers = [
        [label("brier"), *(estimate(calibration[when]["brier"]) for when in ("before", "after")),
         estimate(calibration["change"]["brier"])],
        ["Brier skill", *(calibration[when]["brier_skill"]["value"] for when in ("before", "after")), ""],
        [label("ece"), ece["before"], ece["after"], estimate(calibration["change"]["ece"])],
    ]  # fmt: skip
    summary = [
        NAME, Column("before", "before", "metric"), Column("after", "after", "metric"),
        Column("change", "change", "difference"),
    ]  # fmt: skip
    temperatures = ", ".join(f"{value:.2f}" for value in calibration["temperatures"])
    blocks: list[Block] = [
        figure("reliability", "Reliability", finding, evaluation, table),
        Table("calibration", "Calibration before and after the temperature", summary, numbers),
        Text(
            f"Temperatures by fold: {temperatures}. Above 1 the scores were too sure, below 1 not sure "
            "enough. Brier skill is the gain over always answering the prevalence, so 0 gains nothing."
        ),
    ]
    return Section("calibration", "Calibration", "Does a score of 0.8 mean 8 of 10?", blocks)


def _errors(evaluation: dict[str, Any]) -> Section:
    errors = evaluation["errors"]
    cells = ("true_positives", "false_positives", "false_negatives", "true_negatives")
    confusion = errors["confusion"]
    columns = [
        Column("point", "operating point"),
        *(Column(cell, label(cell), "count") for cell in cells),
    ]
    rows = [[label(name), *(counts[cell] for cell in cells)] for name, counts in confusion.items()]
    histogram = errors["histogram"]
    edges = histogram["edges"]
    counted = Table(
        "score_histogram",
        "Pairs by score",
        [
            Column("from", "score from", "threshold"), Column("to", "to", "threshold"),
            Column("matched", "matched", "count"), Column("unmatched", "unmatched", "count"),
        ],
        [list(row) for row in zip(edges[:-1], edges[1:], histogram["matched"], histogram["unmatched"], strict=True)],
    )  # fmt: skip
    hits, false, missed, rejected = (confusion["cross_fold"][cell] for cell in cells)
    finding = (
        f"At cross-fold thresholds the models miss {missed:,} of {missed + hits:,} matched pairs, and they label "
        f"{false:,} of {false + rejected:,} unmatched pairs matched."
    )
    blocks: list[Block] = [
        Table("confusion", "Confusion counts of all folds together", columns, rows),
        figure("score_histogram", "Scores of matched and unmatched pairs", finding, evaluation, counted),
    ]
    return Section("errors", "Errors", "What does it get wrong, and how often?", blocks)


def _floors(evaluation: dict[str, Any]) -> Section:
    section = evaluation["floors"]
    columns = [
        Column("floor", "floor"), Column("f1", "F1", "metric"), Column("difference", "model minus floor", "difference"),
        *(Column(m, label(m), "metric") for m in ("precision", "recall", "mcc", "roc_auc", "average_precision")),
    ]  # fmt: skip
    rows = [
        [
            label(row["name"]),
            estimate(row["metrics"]["f1"]),
            estimate(row["f1_difference"]),
            *(estimate(row["metrics"][m]) for m in ("precision", "recall", "mcc", "roc_auc", "average_precision")),
        ]
        for row in section["table"]
    ]
    f1 = next(row["metrics"]["f1"] for row in section["table"] if row["name"] == section["best"])
    finding = (
        f"The best floor is {label(section['best'])} with F1 {f1['value'] or 0:.3f}; the model has "
        f"{evaluation['verdict']['f1']['value'] or 0:.3f}."
    )
    table = Table("floors", "Floors on the same folds", columns, rows)
    blocks: list[Block] = [figure("floors", "Model and floors", finding, evaluation, table, len(rows) + 1)]
    if not evaluation["data"]["recorded"]["floor_scores"]:
        blocks.append(Text("Scores of TF-IDF and a logistic regression are not recorded."))
    blocks.append(Terms([(label(row["name"]), [row["meaning"]]) for row in section["table"]]))
    return Section("floors", "Floors", "What do simple answers reach on the same folds?", blocks)


def _data(evaluation: dict[str, Any], facts: Mapping[str, Any]) -> Section:
    data = evaluation["data"]
    stats = facts["data"]
    rows = [
        ["posts", f"{data['posts']:,}"],
        ["criteria", f"{len(data['criteria']):,}"],
        ["pairs", f"{data['pairs']:,}"],
        ["matched pairs", f"{data['matched']:,} ({data['prevalence']:.1%})"],
        ["posts without any match", f"{data['posts_without_match']:,}"],
        ["folds", f"{data['folds']}, with all pairs of a post in one fold"],
        ["hash of the data", stats.get("data_hash", NOT_RECORDED)],
        ["hash of the criteria", stats.get("criteria_hash", NOT_RECORDED)],
    ]
    by_fold = [[fold, *counts] for fold, counts in enumerate(data["matched_by_fold_and_criterion"])]
    criteria = [Column(f"criterion_{at}", name, "count") for at, name in enumerate(data["criteria"])]
    recorded = [[label(name), "recorded" if there else NOT_RECORDED] for name, there in data["recorded"].items()]
    blocks: list[Block] = [
        Table("data", "The data set", [NAME, Column("value", "value")], rows),
        Table("matched", "Matched pairs by fold and criterion", [Column("fold", "fold", "count"), *criteria], by_fold),
        Table("recorded", "What the run recorded", [NAME, Column("state", "state")], recorded),
    ]
    if not (data["recorded"]["floor_scores"] and data["recorded"]["near_duplicates"]):
        blocks += [
            Text(
                "An earlier version of raycv recorded less. With the same data set, floors, hard negatives and "
                "near-duplicates can be filled in:"
            ),
            Code(f"{facts['report_command']} data.dir=<folder>"),
        ]
    return Section("data", "Data and splits", "What was it trained and judged on?", blocks)


def _setup(facts: Mapping[str, Any]) -> Section:
    columns = [Column("key", "key"), Column("value", "value")]
    blocks: list[Block] = [
        Text("The page can be made again from the run folder, byte for byte:"),
        Code(facts["report_command"]),
        Text("To train it again, give python -m raycv.run the keys below as key=value, with the versions below."),
        Table("environment", "Environment", columns, facts["environment"]),
        Table("config", "Configuration", columns, facts["config"]),
    ]
    return Section("setup", "Configuration and environment", "How can I reproduce it?", blocks)


def _methods(evaluation: dict[str, Any]) -> Section:
    methods = evaluation["methods"]
    intro = f"Intervals rest on {evaluation['draws']:,} bootstrap draws with seed {evaluation['seed']}."
    terms = [
        (f"{heading}: {NAMES.get(name, label(name))}", [text])
        for heading, texts in (
            ("interval", methods["intervals"]), ("average", methods["averages"]), ("metric", methods["metrics"]),
        )
        for name, text in texts.items()
    ]  # fmt: skip
    blocks: list[Block] = [
        Text(intro),
        Text(
            "Unless a column says otherwise, the threshold is chosen again in every draw for operating points and "
            "floors, and held for criteria and slices. So one F1 can have two intervals: the one with the threshold "
            "chosen again counts its choice too."
        ),
        *map(Text, methods["notes"]),
        Terms(terms),
    ]
    return Section("methods", "Methods", "What exactly does each number mean?", blocks)


def _reporting(evaluation: dict[str, Any], facts: Mapping[str, Any]) -> Section:
    columns = [Column("item", "item"), Column("asks", "asks for"), Column("answer", "what the run knows")]
    blocks: list[Block] = [
        Text("TRIPOD+AI asks for these items. A tool knows a part of them. Fill in what is marked."),
        Table("tripod", "Items of TRIPOD+AI", columns, [list(row) for row in items(evaluation, facts)]),
    ]
    return Section("reporting", "Reporting checklist", "What must a paper say besides?", blocks)
