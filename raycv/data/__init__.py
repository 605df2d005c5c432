"""Reads tables into a validated data set, and splits it into folds (FR-003, FR-012).

Comes in: folders of CSV or JSON, or arguments for synthetic posts. Goes out: `Dataset`, `Split`.
Does not belong here: prompts, tokens, models; files of pairs to score (`batch_inference`).
"""
