"""Renders the statistics of a run for people: the page, its Markdown, tables for a paper, the model card.

Comes in: a finished run folder, and what `evaluation` returns for it. Goes out: `evaluation.json`, `report.html`,
`report.md`, `model_card.md`, `tables/` and `figures/` in that folder. Equal folders give equal bytes.
Does not belong here: a statistic (`evaluation`), MLflow (`tracking`), printing (`terminal`).
"""
