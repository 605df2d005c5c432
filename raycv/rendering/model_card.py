"""The model card, and the items of the reporting guideline TRIPOD+AI (Collins et al. 2024) that a run can answer."""

from collections.abc import Mapping, Sequence
from typing import Any

from raycv.rendering.blocks import Section, shown
from raycv.rendering.page import rendered

BLANK = "[to fill in]"


def model_card(evaluation: Mapping[str, Any], facts: Mapping[str, Any], sections: Sequence[Section]) -> str:
    """Returns a model card in the format of the Hugging Face hub, with blanks for what only people know.

    Args:
        evaluation: The statistics, as `evaluate` returns them.
        facts: The facts about the run, as `facts_of` returns them.
        sections: The sections of the report, whose tables it shows.
    """
    tables = {table.name: table for section in sections for table in section.tables()}
    deployed = next(point for point in evaluation["operating_points"] if point["name"] == "pooled")
    found = [check for check in evaluation["checks"] if check["status"] == "found"]
    return rendered(
        "model_card.md.j2",
        metadata=_metadata(evaluation, facts),
        run=evaluation["run"],
        notice=evaluation["notice"],
        sentences=evaluation["verdict"]["sentences"],
        base_model=facts["base_model"],
        rank=facts["settings"].get("dora.r", BLANK),
        threshold=shown(deployed["threshold"], "threshold"),
        folds=evaluation["data"]["folds"],
        tuned=", ".join(f"fold {row['fold']}: {row['threshold']['tuned_in_fold']:.2f}" for row in evaluation["folds"]),
        blank=BLANK,
        findings=[f"{check['code']}: {check['finding']} {check['why']}" for check in found],
        **{name: tables[name] for name in ("data", "metrics", "criteria", "floors", "tripod")},
    )


def _metadata(evaluation: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The YAML head of the card. A metric without a value is left out: the hub refuses it."""
    from huggingface_hub import EvalResult, ModelCardData

    honest = next(point for point in evaluation["operating_points"] if point["name"] == "cross_fold")
    metrics = {name: honest["pooled"][name]["value"] for name in ("f1", "precision", "recall")}
    metrics |= {name: evaluation["score_metrics"]["pooled"][name]["value"] for name in ("roc_auc", "average_precision")}
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type="other",
            dataset_name=f"data set {facts['data'].get('data_hash', 'of unknown hash')[:12]}, out of fold",
            metric_type=name,
            metric_value=value,
        )
        for name, value in metrics.items()
        if value is not None
    ]
    # A base that ships with raycv has no name on the hub.
    hub = facts["base_model"] if "://" not in facts["base_model"] and facts["base_model"].count("/") == 1 else None
    data = ModelCardData(
        base_model=hub,
        library_name="peft",
        pipeline_tag="text-classification",
        tags=["dora", "dsm-5", "raycv", "research-use-only"],
        model_name=evaluation["run"],
        eval_results=results,
    )
    return data.to_yaml(line_break="\n").strip()


def items(evaluation: Mapping[str, Any], facts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns number, question and answer of each item; `BLANK` marks what only people know.

    Args:
        evaluation: The statistics, as `evaluate` returns them.
        facts: The facts about the run, as `facts_of` returns them.
    """
    data, verdict = evaluation["data"], evaluation["verdict"]
    recorded = data["recorded"]
    answers = {
        "1": f"Cross-validated classifier of (post, criterion) pairs on {facts['base_model']}. {BLANK}: population",
        "5a": f"{data['posts']:,} posts x {len(data['criteria'])} criteria. {BLANK}: source",
        "7": f"Rows with empty cells: {facts['settings'].get('data.empty', BLANK)}. Long posts: "
        f"{facts['settings'].get('prompt.long_post', BLANK)}, at most "
        f"{facts['settings'].get('prompt.max_length', BLANK)} tokens.",
        "8a": f"Label 1: the post matches the criterion. {BLANK}: definition by the annotators",
        "9a": "The text of the post and of the criterion.",
        "10": f"{data['matched']:,} matched of {data['pairs']:,} pairs. {BLANK}: why this size",
        "12a": f"{data['folds']}-fold cross-validation, all pairs of a post in one fold; no external test.",
        "12c": f"{facts['base_model']} with DoRA adapters of rank {facts['settings'].get('dora.r', BLANK)} and a "
        "linear head.",
        "12e": "F1, precision, recall, specificity, MCC, ROC-AUC, average precision, Brier score, ECE; see Methods.",
        "13": f"{facts['settings'].get('train.imbalance', BLANK)}; thresholds tuned on other folds.",
        "14": f"Slices of posts, see Slices. {BLANK}: groups of people, which the data do not name",
        "15": "A score from 0 to 1, and a label by a threshold.",
        "16": "Folds of one data set: the same source, setting and annotators.",
        "18e": f"{BLANK}; hash of the data: {facts['data'].get('data_hash', BLANK)}",
        "18f": f"raycv, commit {facts['commit'] or BLANK}",
        "20a": f"{data['posts']:,} posts, {data['posts_without_match']:,} without any match. Shortened posts: "
        + ("see Slices." if recorded.get("shortened") else "not recorded."),
        "21": f"{data['matched']:,} matched pairs over {data['folds']} folds; by criterion: see Data and splits.",
        "22": "The run folder holds each fold's adapter, head and threshold.",
        "23a": verdict["sentences"][0],
        "23b": "See Slices and Criteria.",
    }
    return [(number, question, answers.get(number, BLANK)) for number, question in QUESTIONS]


QUESTIONS = (
    ("1", "title: model, population, outcome"),
    ("2", "abstract"),
    ("3a", "health context and reason for the model"),
    ("3b", "target population, intended use and users"),
    ("3c", "known health inequalities between groups"),
    ("4", "objectives"),
    ("5a", "sources of data"),
    ("5b", "dates of the data"),
    ("6a", "setting and places"),
    ("6b", "who was eligible"),
    ("6c", "treatments, if relevant"),
    ("7", "preparation and quality of the data"),
    ("8a", "outcome and how it was assessed"),
    ("8b", "qualification of the annotators"),
    ("8c", "blinding of the annotators"),
    ("9a", "predictors and why they were chosen"),
    ("9b", "definition of the predictors"),
    ("9c", "blinding and interpretation of the predictors"),
    ("10", "sample size and why"),
    ("11", "missing data"),
    ("12a", "use of the data for development and evaluation"),
    ("12b", "handling of predictors"),
    ("12c", "type of model and how it was built"),
    ("12d", "differences between clusters, such as hospitals"),
    ("12e", "measures of performance"),
    ("12f", "updating of the model"),
    ("12g", "how predictions were computed for evaluation"),
    ("13", "class imbalance"),
    ("14", "fairness"),
    ("15", "output of the model and thresholds"),
    ("16", "differences between training and evaluation data"),
    ("17", "ethical approval and consent"),
    ("18a", "funding"),
    ("18b", "conflicts of interest"),
    ("18c", "protocol"),
    ("18d", "registration"),
    ("18e", "availability of the data"),
    ("18f", "availability of the code"),
    ("19", "involvement of patients and the public"),
    ("20a", "flow of participants"),
    ("20b", "characteristics of participants"),
    ("20c", "comparison of development and evaluation data"),
    ("21", "participants and outcomes in each analysis"),
    ("22", "the full model"),
    ("23a", "performance with intervals"),
    ("23b", "heterogeneity of performance"),
    ("24", "results of updating"),
    ("25", "interpretation"),
    ("26", "limitations"),
    ("27a", "handling of poor input at use"),
    ("27b", "interaction with users, and their skills"),
    ("27c", "next steps of research"),
)
"""Number and subject of each item, in our words."""
