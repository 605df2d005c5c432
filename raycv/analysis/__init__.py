"""Answers questions about finished runs: numbers, figures, comparisons, mistakes, predictions for new pairs.

Comes in: run folders, files of scores. Goes out: data frames, figures, files of a comparison or of mistakes.
Does not belong here: statistics, training, Ray, MLflow.
"""
