"""Evaluation tasks: what a model knows, measured on a file of questions or texts.

Each task is a function (model, rows or data, settings) -> `Outcome`: its figures, its measures question by question
(from which `intervals` makes confidence intervals and comparisons), and a prediction for each row. Scoring and
generating are `tpu_tune.inference`'s; here are the prompts, the right answers, and the counting.
"""

from tpu_tune.training.tasks.intervals import Interval, Measure, Outcome, compare, interval

__all__ = ["Interval", "Measure", "Outcome", "compare", "interval"]
