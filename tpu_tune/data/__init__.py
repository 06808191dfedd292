"""The data room: from files of text or chats to packed batches with a loss mask.

`load_data` does all of it for a run, `Batches` says which rows a step sees, `eval_batches` iterates over the held-out
ones. Preparing data before a run (`tpu-tune data`) is in `ingest`, `clean`, `cluster`, `split`, `pretokenize` and
`recipe`.
"""

from tpu_tune.data.loading import Batches, PackedRows, eval_batches, num_target_tokens, prefetch
from tpu_tune.data.pairs import PairRows
from tpu_tune.data.training_sets import Datasets, load_data

__all__ = [
    "Batches",
    "Datasets",
    "PackedRows",
    "PairRows",
    "eval_batches",
    "load_data",
    "num_target_tokens",
    "prefetch",
]
