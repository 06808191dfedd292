"""A recipe: the steps of data preparation in one file, run in order, each kept, with one report at the end.

`settings` is the recipe's configuration, `steps` makes stages of it, `stages` runs them and skips finished ones, `beam`
gives ingest, clean and tokenize to Apache Beam, `recipe_report` writes the page.
"""

from tpu_tune.data.recipe import settings
from tpu_tune.data.recipe.running import REPORT, run_recipe
from tpu_tune.data.recipe.settings import default
from tpu_tune.data.recipe.stages import Done
from tpu_tune.data.recipe.steps import advice

__all__ = ["REPORT", "Done", "advice", "default", "run_recipe", "settings"]
