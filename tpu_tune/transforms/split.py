"""`split` and `combine`: what is trained, what stays frozen, and the tree that the model sees.

    full: everything is trained.            lora: adapters, modules_to_save and biases are; the base is frozen.

`combine` is what the jitted loss calls: it wraps frozen leaves and adapters in `LoraTensor` leaves without copying
either, so that the gradient is taken with respect to the small tree only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tpu_tune.tensors import LoraTensor, QuantizedTensor, SavedTensor, TokensTensor, Transposed, dense, embed
from tpu_tune.transforms.lora import Target, Targets, TokenRows, path_key

Tree = dict[str, Any]


def split(
    params: Mapping[str, Any], targets: Targets | None, adapters: Mapping[str, Array] | None = None
) -> tuple[Tree, Tree]:
    """Return (trainable, frozen) trees.

    Args:
      params: the base tree.
      targets: of the LoRA method; None trains everything.
      adapters: from `lora.init` or a PEFT directory; may hold saved modules and biases too.

    Trained leaves are float32: bfloat16 storage would lose a small learning rate's updates.
    """
    if targets is None:
        return {path: jnp.asarray(leaf, jnp.float32) for path, leaf in params.items()}, {}
    frozen = dict(params)
    trainable = dict(adapters or {})
    for module in targets.saved:
        for path in [module.weight] + ([f"{module.path}.bias"] if module.bias else []):
            trainable.setdefault(path, dense(frozen[path]))
            if module.kind != "embedding":  # a tied head goes on using the frozen embedding
                del frozen[path]
    for rows in targets.tokens:
        trainable.setdefault(rows.path, _original_rows(rows, frozen))
    for path in targets.biases:
        trainable.setdefault(path, jnp.asarray(frozen.pop(path), jnp.float32))
        frozen.pop(path, None)
    return trainable, frozen


def combine(
    trainable: Mapping[str, Any], frozen: Mapping[str, Any], targets: Targets | None, dropout_key: Array | None = None
) -> Tree:
    """Return the tree that the model runs on; pure, and free inside a jitted function.

    Args:
      trainable, frozen: from `split`.
      targets: the same as there.
      dropout_key: PRNG key of this micro-batch; None switches dropout off. Every layer of every leaf gets a key of its
        own from it, whatever else is targeted.
    """
    if targets is None:
        return {**frozen, **trainable}
    params = dict(frozen)
    for module in targets.saved:
        if module.weight in frozen:
            params[module.weight] = SavedTensor(frozen[module.weight], trainable[module.weight])
    for path, leaf in trainable.items():
        if not path.rsplit(".", 1)[1].startswith(("lora_", "trainable_tokens_delta")) and path not in frozen:
            params[path] = leaf
    for rows in targets.tokens:
        module, axis = rows.module, int(rows.module.is_head)
        base = Transposed(frozen[f"{module.tied_to}.weight"]) if module.tied_to else params[module.weight]
        params[module.weight] = TokensTensor(base, jnp.asarray(rows.ids, jnp.int32), trainable[rows.path], axis)
    for target in targets.adapted:
        module = target.module
        base = Transposed(frozen[f"{module.tied_to}.weight"]) if module.tied_to else params[module.weight]
        params[module.weight] = _wrap(target, targets, base, trainable, dropout_key)
    return params


def _original_rows(rows: TokenRows, frozen: Mapping[str, Any]) -> Array:
    module, ids = rows.module, np.asarray(rows.ids)
    if module.kind == "embedding" or module.tied_to:
        return embed(ids, frozen[f"{module.tied_to or module.path}.weight"], jnp.float32)
    leaf = frozen[module.weight]
    return (dense(leaf) if isinstance(leaf, QuantizedTensor) else jnp.asarray(leaf))[:, ids].T.astype(jnp.float32)


def _wrap(
    target: Target, targets: Targets, base: Any, trainable: Mapping[str, Any], dropout_key: Array | None
) -> LoraTensor:
    module, dropout = target.module, targets.spec.dropout
    a, b, magnitude = (trainable.get(f"{module.path}.{name}") for name in ("lora_A", "lora_B", "lora_magnitude_vector"))
    scales = np.asarray(target.scales, np.float32)
    key = None
    if dropout_key is not None and dropout > 0 and module.kind == "linear":
        key = path_key(dropout_key, module.path)
        if module.layers:
            key = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(module.layers))
    active = None
    if not module.layers:
        scale = jnp.asarray(scales[0])
    elif len(target.layers) == module.layers:
        scale = jnp.asarray(scales)
    else:
        chosen = np.asarray(target.layers)
        scale = jnp.zeros(module.layers, jnp.float32).at[chosen].set(scales)
        a, b = (jnp.zeros((module.layers, *part.shape[1:]), part.dtype).at[chosen].set(part) for part in (a, b))
        if magnitude is not None:
            # A layer without an adapter divides by its own norm nowhere: `active` is false there.
            magnitude = jnp.ones((module.layers, *magnitude.shape[1:]), magnitude.dtype).at[chosen].set(magnitude)
            active = jnp.zeros(module.layers, bool).at[chosen].set(True)
    return LoraTensor(base, a, b, scale, key, magnitude, active, dropout if key is not None else 0.0)
