"""What the user sees while a command runs: lines, and the live view of the folds.

Comes in: texts, and how far the folds are. Goes out: characters on the terminal, secrets masked.
Does not belong here: deciding anything.
"""
