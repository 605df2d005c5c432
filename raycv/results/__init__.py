"""The run folder: its files, the result of a fold, the report, facts about pairs, and the search for a run.

Comes in: results of folds, and the data set. Goes out: files of a run, without text, and the report over the folds.
A run folder may be the local copy of one in an object storage, which this room fetches and publishes.
Does not belong here: MLflow (`tracking`), printing (`rendering`), training.
"""
