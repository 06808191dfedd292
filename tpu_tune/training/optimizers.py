"""Optimizers by Hugging Face's names, as optax transformations over the trainable tree.

The trainable tree holds float32 arrays under dotted Hugging Face names; a leaf may stack its layers on axis 0, which
its `LeafSpec` tells. Whatever computes a statistic per matrix then works layer by layer, and whether weight decay
applies is the module's fact, as in Hugging Face's Trainer: not to biases and norms, but to LoRA's matrices. The
learning rate of update s is `schedule(s)`; clipping is a separate function, because the train step also reports the
norm.

How each relates to torch:
- adamw: `torch.optim.AdamW` (decay decoupled and multiplied by the learning rate, epsilon outside the root).
- adamw_8bit: the same with both moments in 8-bit blocks; see `adam8bit`.
- adafactor: `transformers.Adafactor` as its Trainer sets it up (relative_step and scale_parameter off, update clipped
  to a root mean square of 1, no first moment, every matrix factored, vectors not).
- sgd: `torch.optim.SGD` without momentum.
- lion: bitsandbytes' Lion; its betas are `adam_beta1` and `adam_beta2`, as the Trainer passes them.
- muon: `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"` for matrices, adapters' too, and adamw for embeddings,
  heads, norms and biases; see `muon`.
- schedule_free_adamw: `schedulefree.AdamWScheduleFree`, whose weights to use are not those it trains; see
  `schedule_free`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tpu_tune.errors import UserError
from tpu_tune.tensors import LeafSpec
from tpu_tune.training.adam8bit import scale_by_adam_8bit
from tpu_tune.training.muon import is_for_muon, scale_by_muon
from tpu_tune.training.schedule_free import schedule_free

OPTIMIZERS: dict[str, tuple[str, ...]] = {  # our name -> Hugging Face's and bitsandbytes' spellings of it
    "adamw": (
        "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_hf", "paged_adamw", "paged_adamw_32bit",
    ),
    "adamw_8bit": ("adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_8bit"),
    "adafactor": (),
    "sgd": (),
    "lion": ("lion_32bit", "paged_lion", "paged_lion_32bit"),
    "muon": (),
    "schedule_free_adamw": (),
}  # fmt: skip


def canonical_name(name: str) -> str:
    """Our name of an optimizer, from ours or one of Hugging Face's spellings.

    Raises:
      UserError: the name is not known, or not supported here; the nearest known one is suggested.
    """
    spellings = {alias: ours for ours, aliases in OPTIMIZERS.items() for alias in (ours, *aliases)}
    if name in spellings:
        return spellings[name]
    near = difflib.get_close_matches(name, spellings, 1, 0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise UserError(f"unknown train.optim '{name}'; {hint}choose {', '.join(OPTIMIZERS)}")


def is_schedule_free(train: Any) -> bool:
    """Whether the `train` part of a configuration names a schedule-free optimizer."""
    return canonical_name(train.optim).startswith("schedule_free")


def dotted(path: tuple[Any, ...]) -> str:
    """A JAX key path as one dotted name: ('model.layers.q_proj', 'a') -> 'model.layers.q_proj.a'."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def make_optimizer(
    train: Any,
    schedule: optax.Schedule | None,
    specs: Mapping[str, LeafSpec],
) -> optax.GradientTransformation:
    """Build the optimizer that `train.optim` names.

    Args:
      train: the `train` part of the configuration: `optim`, `adam_beta1`, `weight_decay`, ...
      schedule: update index -> learning rate. None: the rate is a value in the optimizer's state, `learning_rate` until
        `set_learning_rate` puts another one there, so that runs at many rates share one compiled step.
      specs: path -> facts of every leaf of the trainable tree: whether it is stacked, decays, and its LoRA+ rate.

    Returns:
      An optax transformation. Its updates are to be added to the parameters (`optax.apply_updates`).

    Raises:
      UserError: the optimizer is not known.
    """
    name, factor = canonical_name(train.optim), loraplus_factor(train, specs)

    def mask(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: specs[dotted(path)].decay, params)

    steps = [_direction(name, train, specs)]
    if train.weight_decay:
        steps.append(optax.add_decayed_weights(train.weight_decay, mask))
    if factor is not None:
        steps.append(scale_each(factor))
    if is_schedule_free(train):
        return schedule_free(optax.chain(*steps), schedule, train.adam_beta1, float(train.learning_rate))
    if schedule is None:
        return optax.chain(
            *steps, optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate=float(train.learning_rate))
        )
    return optax.chain(*steps, optax.scale_by_learning_rate(schedule))


def _direction(name: str, train: Any, specs: Mapping[str, LeafSpec]) -> optax.GradientTransformation:
    """Return an optimizer's update, before weight decay and the learning rate."""
    b1, b2, eps = train.adam_beta1, train.adam_beta2, train.adam_epsilon

    def leading(path: str) -> int:
        return specs[path].leading

    if name == "adamw":
        return optax.scale_by_adam(b1, b2, eps, mu_dtype=jnp.float32)
    if name == "adamw_8bit":
        return scale_by_adam_8bit(b1, b2, eps, lambda path: specs[path].stacked)
    if name == "adafactor":
        # Hugging Face factors every matrix, however small. Rows and columns change roles with the sizes in optax; the
        # product of the two factors is the same.
        matrix = optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=1), optax.clip_by_block_rms(1.0))
        return per_matrix(lambda path: matrix, leading)
    if name == "muon":
        adam, muon = optax.scale_by_adam(b1, b2, eps), scale_by_muon()
        return per_matrix(lambda path: muon if is_for_muon(specs[path].axes) else adam, leading)
    if name == "schedule_free_adamw":
        return optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True)
    if name == "lion":
        return optax.scale_by_lion(b1, b2)
    if name == "sgd":
        return optax.identity()
    raise NotImplementedError(f"{name} stands in OPTIMIZERS, but has no update here")


def scale_each(factor: Callable[[str], float]) -> optax.GradientTransformation:
    """Multiply each leaf's update by what `factor` says of its dotted path."""
    return optax.stateless(
        lambda updates, _: jax.tree_util.tree_map_with_path(lambda path, leaf: leaf * factor(dotted(path)), updates)
    )


def loraplus_factor(train: Any, specs: Mapping[str, LeafSpec]) -> Callable[[str], float] | None:
    """Return what LoRA+ (Hayou et al. 2024, arXiv:2402.12354) multiplies each leaf's learning rate by; None without it.

    As PEFT's `create_loraplus_optimizer`: lora_B and everything with one axis in torch (biases, DoRA's magnitudes)
    learn `loraplus_lr_ratio` times faster, adapters of embeddings at `loraplus_lr_embedding`. Weight decay follows the
    rate.

    Args:
      train: the `train` part of the configuration.
      specs: path -> facts of every leaf of the trainable tree.
    """
    if not train.loraplus_lr_ratio:
        return None
    of_embedding = train.loraplus_lr_embedding / train.learning_rate if train.learning_rate else 0.0

    def factor(path: str) -> float:
        spec = specs[path]
        if spec.lora_plus == "embedding":
            return of_embedding
        return train.loraplus_lr_ratio if spec.lora_plus == "ratio" or len(spec.axes) == 1 else 1.0

    return factor


def learning_rate(opt_state: Any) -> float:
    """Return the learning rate in the state of an optimizer without a schedule."""
    return float(optax.tree.get(opt_state, "learning_rate"))


def set_learning_rate(opt_state: Any, rate: float) -> Any:
    """Return the state with another learning rate, sharded as the old one; its optimizer has no schedule."""
    old = optax.tree.get(opt_state, "learning_rate")
    return optax.tree.set(opt_state, learning_rate=jax.device_put(np.asarray(rate, old.dtype), old.sharding))


def per_matrix(
    inner: Callable[[str], optax.GradientTransformation], leading: Callable[[str], int]
) -> optax.GradientTransformation:
    """Apply to each leaf what `inner` says, to each matrix alone of those with leading axes of layers and experts.

    The state is a dict from dotted path to the inner state of that leaf, whose arrays (the update count too) have the
    leaf's leading axes.
    """

    def each(function, path):
        for _ in range(leading(path)):
            function = jax.vmap(function)
        return function

    def init(params):
        leaves = jax.tree_util.tree_flatten_with_path(params)[0]
        return {dotted(path): each(inner(dotted(path)).init, dotted(path))(leaf) for path, leaf in leaves}

    def update(grads, state, params=None):
        leaves, treedef = jax.tree_util.tree_flatten_with_path(grads)
        weights = treedef.flatten_up_to(params)
        steps, new_state = [], {}
        for (path, grad), weight in zip(leaves, weights, strict=True):
            name = dotted(path)
            step, new_state[name] = each(inner(name).update, name)(grad, state[name], weight)
            steps.append(step)
        return treedef.unflatten(steps), new_state

    return optax.GradientTransformation(init, update)


def clip_by_global_norm(grads: Any, max_norm: float) -> tuple[Any, jax.Array]:
    """Scale the gradients so that their global norm is at most `max_norm`; as `torch.nn.utils.clip_grad_norm_`.

    Args:
      grads: any tree of arrays.
      max_norm: the limit; zero or less leaves the gradients as they are.

    Returns:
      The gradients (same tree and dtypes) and their norm before clipping (float32 scalar).
    """
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(grad.astype(jnp.float32))) for grad in jax.tree.leaves(grads)))
    if max_norm <= 0:
        return grads, norm
    factor = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda grad: (grad * factor).astype(grad.dtype), grads), norm
