"""The sparse MLP: a router sends each token to a few of many experts, and adds up their results by weight.

Rows are sorted by expert and multiplied group by group (`kernels.grouped_matmul`), so that no token is dropped however
uneven the load is; padding goes to no expert. On a mesh every device sorts and multiplies its own tokens with all
experts, whose weights have come to it over the storage axes. `load` is what the load-balancing loss is made of.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from tpu_tune.kernels.mesh import ROWS, SEQUENCE
from tpu_tune.models.architecture import Experts
from tpu_tune.tensors import dense, grouped_matmul, matmul

Leaves = Mapping[str, Any]  # role or name -> leaf


def router_logits(x: Float[Array, "B T D"], weight: Any, bias: Any = None) -> Float[Array, "B T E"]:
    """Return the router's logits, in float32 whatever x is."""
    with jax.default_matmul_precision("float32"):
        logits = matmul(x.astype(jnp.float32), weight)
    return logits if bias is None else logits + dense(bias)


def route(
    experts: Experts, logits: Float[Array, "*tokens E"], choice_bias: Float[Array, " E"] | None = None
) -> tuple[Float[Array, "*tokens k"], Int[Array, "*tokens k"]]:
    """Return the weights of the experts that each token goes to, and their numbers.

    Args:
      experts: number of experts a token goes to, and the rule.
      logits: the router's, float32.
      choice_bias: added to the scores for the choice alone.
    """
    weights, chosen = RULES[experts.rule](experts, logits, choice_bias)
    if experts.renormalize:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return weights * jnp.float32(experts.scale), chosen


def _softmax(experts: Experts, logits: Array, choice_bias: Array | None) -> tuple[Array, Array]:
    """Softmax over all experts, of which the largest are taken."""
    return jax.lax.top_k(jax.nn.softmax(logits, axis=-1), experts.per_token)


def _softmax_of_chosen(experts: Experts, logits: Array, choice_bias: Array | None) -> tuple[Array, Array]:
    """Softmax over the largest logits alone."""
    largest, chosen = jax.lax.top_k(logits, experts.per_token)
    return jax.nn.softmax(largest, axis=-1), chosen


def _sigmoid(experts: Experts, logits: Array, choice_bias: Array | None) -> tuple[Array, Array]:
    """Sigmoids, chosen by score plus bias within the best groups of experts (DeepSeek-V3, arXiv:2412.19437).

    A group is as good as its two best experts together.
    """
    scores = jax.nn.sigmoid(logits)
    choice = scores if choice_bias is None else scores + choice_bias
    if experts.groups > 1:
        grouped = choice.reshape(*choice.shape[:-1], experts.groups, -1)
        group_scores = jnp.sum(jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0], axis=-1)
        best = jax.lax.top_k(group_scores, experts.top_groups)[1]
        open_groups = jnp.any(best[..., None] == jnp.arange(experts.groups), axis=-2)
        choice = jnp.where(open_groups[..., None], grouped, -jnp.inf).reshape(choice.shape)
    chosen = jax.lax.top_k(jax.lax.stop_gradient(choice), experts.per_token)[1]
    return jnp.take_along_axis(scores, chosen, axis=-1), chosen


# How a router's logits become weights and a choice: function of (experts, logits, bias on the choice).
RULES: dict[str, Callable[[Experts, Array, Array | None], tuple[Array, Array]]] = {
    "softmax": _softmax,
    "softmax_of_chosen": _softmax_of_chosen,
    "sigmoid": _sigmoid,
}


def load(experts: Experts, logits: Float[Array, "B T E"], real: Bool[Array, "B T"]) -> Float[Array, "2 E"]:
    """Return for each expert how many real tokens chose it, and the sum of its softmax probabilities over them."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    chosen = jax.lax.top_k(jax.lax.stop_gradient(probabilities), experts.per_token)[1]
    counts = jnp.sum(chosen[..., None] == jnp.arange(experts.count), axis=-2)
    return jnp.stack([jnp.sum(jnp.where(real[..., None], part, 0.0), axis=(0, 1)) for part in (counts, probabilities)])


def load_balancing_loss(loads: Float[Array, "2 E"], per_token: int) -> Float[Array, ""]:
    """Return the loss of Switch Transformers (arXiv:2101.03961, equations 4 to 6) as transformers computes it.

    Args:
      loads: sums of `load` over all layers.
      per_token: to how many experts each token goes: the loss where all are equally busy.
    """
    counts, probabilities = loads
    rows = jnp.maximum(jnp.sum(counts) / per_token, 1.0)  # tokens times layers
    return len(counts) * jnp.sum(counts / rows * (probabilities / rows))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["order", "inverse", "sizes"], meta_fields=["copies"])
@dataclasses.dataclass(frozen=True)
class Dispatch:
    """How copies of tokens, one for each expert that a token goes to, are sorted by expert.

    Attributes:
      order: (copies of all tokens,) which copy stands in each sorted row; copy i * k + j is token i's j-th.
      inverse: the sorted row of each copy.
      sizes: (experts,) number of rows of each expert; those behind the last belong to padding.
      copies: copies of each token, k.
    """

    order: Int[Array, " rows"]
    inverse: Int[Array, " rows"]
    sizes: Int[Array, " experts"]
    copies: int

    @classmethod
    def of(cls, chosen: Int[Array, "tokens k"], experts: int) -> Dispatch:
        """Sort; a number of `experts` or more means no expert."""
        flat = chosen.reshape(-1)
        order = jnp.argsort(flat, stable=True)
        sizes = jnp.sum(flat[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
        return cls(order, jnp.argsort(order), sizes, chosen.shape[1])

    def experts(self) -> Int[Array, " rows"]:
        """Return each sorted row's expert; the last one for padding."""
        ends = jnp.cumsum(self.sizes)
        return jnp.minimum(jnp.searchsorted(ends, jnp.arange(len(self.order)), side="right"), len(ends) - 1)

    def rows(self, x: Float[Array, "tokens D"]) -> Float[Array, "rows D"]:
        """Return the copies of tokens, sorted."""
        return _sorted_copies(x, self)

    def tokens(self, rows: Float[Array, "rows D"]) -> Float[Array, "tokens k D"]:
        """Return each token's rows."""
        return _unsorted(rows, self).reshape(-1, self.copies, rows.shape[-1])


# A gather's derivative is a scatter; of these two it is the other one, since rows are a permutation of copies.
@jax.custom_vjp
def _sorted_copies(x: Array, dispatch: Dispatch) -> Array:
    return x[dispatch.order // dispatch.copies]


@jax.custom_vjp
def _unsorted(rows: Array, dispatch: Dispatch) -> Array:
    return rows[dispatch.inverse]


_sorted_copies.defvjp(
    lambda x, dispatch: (x[dispatch.order // dispatch.copies], dispatch),
    lambda dispatch, g: (jnp.sum(g[dispatch.inverse].reshape(-1, dispatch.copies, g.shape[-1]), axis=1), None),
)
_unsorted.defvjp(
    lambda rows, dispatch: (rows[dispatch.inverse], dispatch), lambda dispatch, g: (g[dispatch.order], None)
)


def grouped_linear(leaves: Leaves, rows: Array, dispatch: Dispatch, name: str) -> Array:
    """Return each sorted row's product with its expert's weight, plus its bias; `name` is for remat's policies."""
    y = checkpoint_name(grouped_matmul(rows, leaves["weight"], dispatch.sizes), name)
    return y if "bias" not in leaves else y + dense(leaves["bias"])[dispatch.experts()].astype(y.dtype)


def over_experts(
    run: Callable[[Leaves, Array, Dispatch], Array],
    leaves: Leaves,
    x: Float[Array, "B T D"],
    weights: Float[Array, "B T k"],
    chosen: Int[Array, "B T k"],
    count: int,
    mesh: Mesh | None,
) -> Float[Array, "B T D"]:
    """Return the weighted sum of the chosen experts' results, in x's dtype; each is rounded to it, the sum is float32.

    Args:
      run: (leaves, sorted rows, how they are sorted) -> the experts' results, row by row.
      leaves: what `run` needs, all experts of it.
      x: what the experts read.
      weights: float32, from `route`.
      chosen: numbers of the experts, from `route`; `count` or more for none.
      count: number of experts.
      mesh: the devices; None on one.
    """

    def here(leaves: Leaves, x: Array, weights: Array, chosen: Array) -> Array:
        dispatch = Dispatch.of(chosen.reshape(-1, chosen.shape[-1]), count)
        results = dispatch.tokens(run(leaves, dispatch.rows(x.reshape(-1, x.shape[-1])), dispatch))
        weighted = results.astype(jnp.float32) * weights.reshape(-1, weights.shape[-1])[..., None]
        return jnp.sum(weighted, axis=1).astype(x.dtype).reshape(x.shape)

    if mesh is None:
        return here(leaves, x, weights, chosen)
    # The axis `tensor` shares out tokens here, where they divide: every device has all of every expert anyway.
    shared = x.shape[1] % (mesh.shape[SEQUENCE] * mesh.shape["tensor"]) == 0
    tokens = PartitionSpec(ROWS, (SEQUENCE, "tensor") if shared else SEQUENCE, None)
    return jax.shard_map(
        here, mesh=mesh, in_specs=(PartitionSpec(), tokens, tokens, tokens), out_specs=tokens, check_vma=False
    )(leaves, x, weights, chosen)
