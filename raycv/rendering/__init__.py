"""Shows a run to people: lines, live view and summary in the terminal; page, Markdown, tables, model card as files.

Comes in: texts, progress of the folds, a finished run folder, and what `evaluation` returns for it. Goes out:
characters on the terminal with secrets masked; `evaluation.json`, `report.html`, `report.md`, `model_card.md`,
`tables/` and `figures/` in that folder. Equal folders give equal bytes.
Does not belong here: a statistic (`evaluation`), MLflow (`tracking`), any decision.
"""
