"""Tools for every room: whole files, strict text files and tables, locations, retries, secrets, environment.

Comes in: paths, texts, errors of other libraries. Goes out: plain values and `UserError`.
Does not belong here: code that knows a post, a model, a run or a config key.
"""
