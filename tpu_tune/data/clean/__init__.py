"""Cleaning rows: `clean` is the step.

Its parts serve other engines too: `row_cleaner(options)` is a function of one row that pickles, and
`Duplicates(options)` says of each row in turn whether an equal or similar one came before it.
"""

from tpu_tune.data.clean.clean_options import CleanOptions
from tpu_tune.data.clean.clean_report import CleanReport, table
from tpu_tune.data.clean.cleaning import clean
from tpu_tune.data.clean.duplicates import Duplicates
from tpu_tune.data.clean.phrases import LISTS, read_phrases
from tpu_tune.data.clean.rules import Hit, row_cleaner

__all__ = ["LISTS", "CleanOptions", "CleanReport", "Duplicates", "Hit", "clean", "read_phrases", "row_cleaner", "table"]
