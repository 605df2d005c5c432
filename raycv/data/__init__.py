"""Tables to a validated data set, and the data set to folds (FR-003, FR-012).

Comes in: folders of CSV or JSON, or arguments for synthetic posts. Goes out: `Dataset`, `Split`.
Does not belong here: prompts, tokens, models; files of pairs to be scored (`batch_inference`).
"""
