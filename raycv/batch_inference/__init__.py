"""A file of pairs to a file of scores, chunk by chunk, with an end that can be continued.

Comes in: CSV, JSON lines or Parquet with posts. Goes out: scores in the same formats, and a list of bad rows.
Does not belong here: the model (`inference`), Ray Data (`orchestration`).
"""
