"""Using a model: logits, generation with a key-value cache, log-likelihoods."""

from tpu_tune.inference.generation import Sampling, generate_ids
from tpu_tune.inference.model import Model
from tpu_tune.inference.run_model import load_any as load

__all__ = ["Model", "Sampling", "generate_ids", "load"]
