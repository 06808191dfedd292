"""Python's documentation, 530 HTML pages, to blocks of tokens: text to go on training a model with.

    python launch/fetch.py python-docs base                 # from Debian and PyPI; prints the two folders
    tpu-tune data run --config configs/data_python_docs.py

Expected: five steps, a page with the map of the clusters in output/data/python-docs/report.html, and train.arrow and
val.arrow in 5-tokenize/, which `tpu-tune train --config.data.train=...` reads as they are. A second start does nothing.
Every key and its default: tpu_tune/data/recipe/settings.py and the dataclasses that it names.
"""

import os
import pathlib

from ml_collections import ConfigDict

from tpu_tune.data.recipe import default


def get_config() -> ConfigDict:
    """Return the recipe. `launch/fetch.py` puts its inputs into $TPU_TUNE_CACHE."""
    downloads = pathlib.Path(os.environ.get("TPU_TUNE_CACHE") or "~/.cache/tpu_tune").expanduser() / "downloads"
    recipe = default()
    recipe.output_dir = "output/data/python-docs"
    recipe.inputs = [str(downloads / "python-docs-python3.11-doc")]

    recipe.clean.lists = []  # nobody says "As an AI language model" here
    recipe.clean.near_duplicates = 0.9
    recipe.clean.min_words = 50  # pages of nothing but links

    recipe.cluster.k = 12
    recipe.cluster.drop_outliers = False

    recipe.split.ratio = "0.95,0.05"
    recipe.split.stratify_key = "cluster"

    recipe.tokenize.tokenizer_path = str(downloads / "base-0.1.2" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    recipe.tokenize.max_length = 512
    return recipe
