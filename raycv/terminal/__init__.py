"""Shows the user how a command proceeds: lines, and the live view of the folds.

Comes in: texts, and the progress of the folds. Goes out: characters on the terminal, with secrets masked.
Does not belong here: any decision.
"""
