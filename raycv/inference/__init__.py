"""Turns checkpoints into answers: it chooses checkpoints, loads the model, scores, labels, and logs to MLflow.

Comes in: a run, a fold, and questions. Goes out: probabilities, labels, answers as JSON or text.
Does not belong here: files of many pairs (`batch_inference`), HTTP (`serving`).
"""
