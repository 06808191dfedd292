"""The configuration of a run, as one `ml_collections.ConfigDict`.

`sections` says what keys there are, with their types, choices, bounds, defaults and meanings. A config file defines
`get_config()`, which starts from `default()`; the command line overrides single keys
(`--config.train.learning_rate=1e-4`). `engine` reads them, here and for the recipes of `tpu_tune.data`; `rules` holds
what keys ask of each other.
"""

from tpu_tune.config.engine import config_get, to_dict
from tpu_tune.config.rules import SCHEMA, assign, check, default, evaluates, flatten, from_dict, from_file, source_paths
from tpu_tune.config.sections import Config, LoraConfig, Pattern, QuantizeConfig, TokenIndices

__all__ = [
    "SCHEMA",
    "Config",
    "LoraConfig",
    "Pattern",
    "QuantizeConfig",
    "TokenIndices",
    "assign",
    "check",
    "config_get",
    "default",
    "evaluates",
    "flatten",
    "from_dict",
    "from_file",
    "source_paths",
    "to_dict",
]
