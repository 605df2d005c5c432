"""Turns out-of-fold predictions into statistics: metrics, intervals, floors, calibration, checks, comparisons.

Comes in: a `Study`, the arrays of one run. Goes out: plain dicts that JSON can hold.
Does not belong here: files, figures, printing, training, Ray, MLflow.
"""
