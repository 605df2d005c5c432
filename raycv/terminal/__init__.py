"""Prints what the user sees while a command runs: lines, the live view of the folds, the summary of a run.

Comes in: texts, the progress of the folds, and a report. Goes out: characters on the terminal, with secrets masked.
Does not belong here: any decision.
"""
