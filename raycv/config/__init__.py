"""The config of each command: the schema of its keys, the checks, the command line (FR-004).

Comes in: YAML files in `configs/` and the words of a command line. Goes out: one typed config, or every fault at once.
Does not belong here: code that acts on a key. Default values are in `configs/`, meanings in `schema.py`.
"""
