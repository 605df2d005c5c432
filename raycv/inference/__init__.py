"""Checkpoints to answers: which checkpoints, the model, questions, labels, and what MLflow keeps of them.

Comes in: a run, a fold, and questions. Goes out: probabilities, labels, answers as JSON or text.
Does not belong here: files of many pairs (`batch_inference`), HTTP (`serving`).
"""
