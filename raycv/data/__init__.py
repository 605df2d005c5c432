"""Reads tables into a data set, splits it into folds, turns its pairs into tokens (FR-002, FR-003, FR-012).

Comes in: folders of CSV or JSON, or arguments for synthetic posts; a tokenizer. Goes out: `Dataset`, `Split`,
prompts, `EncodedPairs`, and counts of shortened posts.
Does not belong here: loading a tokenizer (`model`), batches (`training`), files of pairs to score (`batch_inference`).
"""
