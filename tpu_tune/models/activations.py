"""Nonlinearities of the MLPs, by Hugging Face's names."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tpu_tune.errors import UserError


def gelu_tanh(x: Array) -> Array:
    """GELU's approximation x (1 + tanh u) / 2 (arXiv:1606.08415, section 2), written as x sigmoid(2 u).

    The same function; far below zero 1 + tanh u would be rounding alone, which a norm behind it magnifies.
    """
    return x * jax.nn.sigmoid(x * (2 * math.sqrt(2 / math.pi) * (1 + 0.044715 * x * x)))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": gelu_tanh,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def check_activation(name: str) -> str:
    """Return a Hugging Face activation's name here.

    Raises:
      UserError: it is not known.
    """
    known = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "relu2": "relu2"}
    known |= dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh")
    if name not in known:
        raise UserError(f"activation '{name}' is not known; the known ones are {', '.join(sorted(known))}")
    return known[name]
