"""The run folder: the names of its files, the result of a fold, the report, and the search for a run.

Comes in: results of folds. Goes out: files of a run, and the report over the folds.
Does not belong here: MLflow (`tracking`), printing (`terminal`), training.
"""
