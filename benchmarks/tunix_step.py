"""A QLoRA step of Tunix with qwix, compiled for a TPU that is not there: the peer beside `tpu_speed.py`'s rows.

Tunix and qwix live in an environment of their own, with the jax and libtpu of the rows that they stand beside:

    python -m venv tunix-env
    tunix-env/bin/pip install google-tunix==0.1.7 qwix==0.1.8 "jax[tpu]==0.10.2" libtpu==0.0.42.1
    python benchmarks/tpu_speed.py --python tunix-env/bin/python --step tunix-int4-block tunix-int4-decoder

The second line runs this file with that interpreter; nothing of tpu_tune is imported here. The step is Tunix's own:
`PeftTrainer`'s train step and default loss, jitted as the trainer does (it donates the optimizer's state and not the
model, whose frozen weights the program therefore returns as copies), over Tunix's Llama 3 at LLaMA-7B's sizes with
bfloat16 weights, and qwix's `LoraProvider`: rank 16 on the seven linear layers, tiles of 64 (32 layers, 1 x 2,048
tokens, AdamW, no dropout, attention by XLA: that model has no other). Everything is abstract: no weight is made.

    python benchmarks/tunix_step.py '{"layers": 2, "remat": "BLOCK", "format": "int4", "donate": false}' DIR
"""

from __future__ import annotations

import json
import pathlib
import sys
from importlib.metadata import version
from typing import Any

try:
    import jax
    import jax.numpy as jnp
    import optax
    import qwix
    from flax import nnx
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding
    from tunix.models.llama3 import model as llama3
    from tunix.sft import peft_trainer, utils
except ModuleNotFoundError as error:
    raise SystemExit(
        f'{sys.executable} has no {error.name}: pip install google-tunix qwix "jax[tpu]" into an environment '
        "of its own and give its interpreter, --python PATH"
    ) from None

TOKENS = 2048
LINEAR = ".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
SIZES = {
    "vocab_size": 32000, "embed_dim": 4096, "hidden_dim": 11008, "num_heads": 32, "head_dim": 128, "num_kv_heads": 32,
    "rope_theta": 10000, "norm_eps": 1e-6,
}  # fmt: skip


def build(job: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Return Tunix's trainer, its model and its optimizer, both abstract."""
    config = llama3.ModelConfig(num_layers=job["layers"], remat_config=llama3.RematConfig[job["remat"]], **SIZES)
    trainers = []

    def make() -> tuple[Any, Any]:
        model = llama3.Llama3(config, rngs=nnx.Rngs(0))
        nnx.update(model, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nnx.state(model, nnx.Param)))
        how = {"weight_qtype": job["format"], "tile_size": 64}
        provider = qwix.LoraProvider(module_path=LINEAR, rank=16, alpha=32.0, **how)
        given = model.get_model_input()
        model = qwix.apply_lora_to_model(model, provider, **given, rngs=nnx.Rngs(1))
        # Traced, qwix gives nnx.Linear its adapters in a second call; eagerly it does so in the first.
        model.set_attributes(qwix_rngs=nnx.Rngs(1))
        model(**given)
        model.set_attributes(qwix_rngs=None)
        settings = peft_trainer.TrainingConfig(eval_every_n_steps=1)
        trainers.append(peft_trainer.PeftTrainer(model, optax.adamw(2e-4), settings))
        return model, trainers[0].optimizer

    model, optimizer = nnx.eval_shape(make)
    return trainers[0].with_gen_model_input_fn(model_input), model, optimizer


def model_input(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return what Tunix's default loss takes, as its own examples make it from tokens and their mask."""
    mask = batch["input_mask"]
    return {
        **batch,
        "positions": utils.build_positions_from_mask(mask),
        "attention_mask": utils.make_causal_attn_mask(mask),
    }


def main() -> None:
    """Compile the step; write its program and its facts into a directory."""
    job, place = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
    chip = {"topology_name": "v5e:1x1", "chips_per_host_bounds": [1, 1, 1]}
    home = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", **chip).devices[0])

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=home)

    trainer, *state = build(job)
    graph, leaves = nnx.split(tuple(state))
    model, optimizer = nnx.merge(graph, jax.tree.map(placed, leaves))
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))]
    row = (1, TOKENS)
    batch = {
        "input_tokens": placed(jax.ShapeDtypeStruct(row, jnp.int32)),
        "input_mask": placed(jax.ShapeDtypeStruct(row, jnp.bool_)),
    }
    donated = ("model", "optimizer") if job["donate"] else ("optimizer",)
    step = nnx.jit(trainer.create_train_step_fn(), donate_argnames=donated)
    try:
        compiled = step.lower(model, optimizer, batch).compile().compiled
    except jax.errors.JaxRuntimeError as error:  # most often what does not fit, with a long list of buffers behind it
        raise SystemExit(str(error)[:500]) from None
    names = ("libtpu", "jax", "google-tunix", "qwix", "flax")
    facts = {
        "compiler": ", ".join(f"{name} {version(name)}" for name in names),
        "peak": compiled.memory_analysis().peak_memory_in_bytes,
        "tokens": TOKENS,
        "adapters": sum(sizes),
    }
    (place / "program.txt").write_text(compiled.as_text())
    (place / "compiled.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
