"""One cross-validation from config to published report: prepare, start or resume, run the folds, summarise.

Comes in: a config. Goes out: a run folder with its report, and the same in MLflow.
Does not belong here: how a step works; each has a room of its own.
"""
