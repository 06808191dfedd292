"""Evaluation tasks: what a model knows, measured on a file of questions or texts.

Each task is a function (model, rows or data, settings) -> `Outcome`: its figures, its measures question by question (from
which `intervals` makes confidence intervals and comparisons), and a prediction for each row. The models are scored and
generate in the inference room; here stand the prompts, the answers, and how both are counted.
"""

from tpu_tune.training.tasks.intervals import Interval, Measure, Outcome, compare, interval

__all__ = ["Interval", "Measure", "Outcome", "compare", "interval"]
