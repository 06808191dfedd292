"""The TPU compiler's own figures: the scratch of a QLoRA step keeps no dequantized weight.

libtpu compiles for a chip that is not there. The step is built from shapes alone, in a process of its own, because
libtpu reads its environment when jax is imported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler")

WIDTH, INNER, TOKENS, ROWS = 1024, 2816, 512, 4
DEEP, SHALLOW = 24, 16  # of fewer layers the compiler keeps part of the residuals on the chip, outside this count

PROGRAM = f"""
import json, re, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from tpu_tune import config as configuration
from tpu_tune.training.setup import abstract_model, prepare_steps
from tpu_tune.transforms import sharding

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=[1, 1, 1]).devices
found = {{}}
for layers in map(int, sys.argv[1:]):
    llama = dict(
        model_type="llama", vocab_size=8192, hidden_size={WIDTH}, intermediate_size={INNER}, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=2048, rms_norm_eps=1e-5,
        rope_theta=1e4, hidden_act="silu", tie_word_embeddings=False,
    )
    config = configuration.from_dict(dict(
        method="lora", model=dict(dtype="bfloat16", remat="full"), quantize=dict(format="nf4", double_quant=True),
        lora=dict(rank=16), train=dict(per_device_train_batch_size={ROWS}), mesh=dict(fsdp=1),
    ))
    mesh = sharding.make_mesh(config.mesh, devices)
    model = abstract_model(config, llama, mesh)
    steps = prepare_steps(config, model, 10)
    home = jax.sharding.NamedSharding(mesh, sharding.batch_spec(1))
    shape = (1, {ROWS}, {TOKENS})
    batch = {{
        name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=home)
        for name in ("input_ids", "targets", "positions", "segment_ids")
    }}
    compiled = steps.train.lower(steps.initial_state, model.frozen, batch).compile()
    memory = compiled.memory_analysis()
    matrices = r"(?:f32|bf16|f16)\\[%d,(?:1,)?(?:%d,%d|%d,%d|%d,%d)\\]" % (
        layers, {WIDTH}, {WIDTH}, {WIDTH}, {INNER}, {INNER}, {WIDTH}
    )
    frozen = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model.frozen))
    trained = sum(leaf.size * 4 for leaf in model.trainable.values())
    found[layers] = dict(
        temp=memory.temp_size_in_bytes, arguments=memory.argument_size_in_bytes, frozen=frozen, trained=trained,
        dequantized=sorted(set(re.findall(matrices, compiled.as_text()))),
    )
print(json.dumps(found))
"""


def test_the_scratch_of_a_qlora_step_holds_no_dequantized_weight() -> None:
    env = {
        **os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "XLA_FLAGS": "",
        "JAX_DEFAULT_MATMUL_PRECISION": "default",
    }  # fmt: skip
    words = [sys.executable, "-c", PROGRAM, str(SHALLOW), str(DEEP)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    shallow, deep = found[str(SHALLOW)], found[str(DEEP)]
    assert not shallow["dequantized"] and not deep["dequantized"], "stacks of dequantized weights in the compiled step"
    residuals = (DEEP - SHALLOW) * ROWS * TOKENS * WIDTH * 2  # each layer's input, bfloat16
    adapters = deep["trained"] - shallow["trained"]  # float32
    weights = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)  # one layer, bfloat16
    grown = deep["temp"] - shallow["temp"] - residuals
    # What belongs to the adapters: their gradients, their updates, their copies in bfloat16. One layer's codes alone would
    # be five times its adapters.
    assert grown <= 3 * adapters, f"{grown / 1e6:.1f} MB more than the residuals; the adapters are {adapters / 1e6:.1f}"
    # The codes are what is passed in: half a byte a weight, scales on top.
    per_layer = (deep["frozen"] - shallow["frozen"]) / (DEEP - SHALLOW)
    assert per_layer < 0.27 * weights
