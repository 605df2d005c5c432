"""Turns a file of pairs into a file of scores, chunk by chunk, and continues one that was interrupted.

Comes in: CSV, JSON lines or Parquet with posts. Goes out: scores in the same formats, and a list of bad rows.
Does not belong here: the model (`inference`), Ray Data (`orchestration`).
"""
