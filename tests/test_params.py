"""Loading weights into the tree: errors name what is wrong, memory stays bounded, quantizing on the way is the same."""

import json
import os
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny_models
from safetensors.numpy import save_file

from tpu_tune.checkpoints.params import load_params, torch_shapes
from tpu_tune.errors import UserError
from tpu_tune.models import architecture
from tpu_tune.tensors import QuantizedTensor
from tpu_tune.transforms import QuantizeConfig, quantize

CONFIG = tiny_models.CONFIGS["llama2"]
NAME = "model.layers.1.mlp.up_proj.weight"


def load(tensors, config=CONFIG):
    return load_params(tiny_models.source(config, tensors), architecture(config))


def test_missing_extra_and_misshapen_tensors_are_named():
    tensors = tiny_models.weights(CONFIG)
    with pytest.raises(UserError, match=f"tiny: 1 tensor is missing: {NAME}"):
        load({name: value for name, value in tensors.items() if name != NAME})
    with pytest.raises(UserError, match="1 tensor is not part of a llama model: model.layers.0.self_attn.q_proj.bias"):
        load(tensors | {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)})
    with pytest.raises(UserError, match=rf"'{NAME}' has shape \(48, 31\), the config asks for \(48, 32\)"):
        load(tensors | {NAME: tensors[NAME][:, :31]})
    renamed = {name.replace("up_proj", "upper_proj"): value for name, value in tensors.items()}
    with pytest.raises(UserError, match="2 tensors are missing.*the file has 'model.layers.0.mlp.upper_proj.weight'"):
        load(renamed)
    few = {name: value for name, value in tensors.items() if "layers" not in name}
    with pytest.raises(UserError, match="18 tensors are missing.* and 13 more"):
        load(few)


@pytest.mark.parametrize("case", ["llama_tied", "neox_full_rotary"])
def test_a_tied_head_in_the_file_and_old_buffers_are_passed_over(case):
    config = tiny_models.CONFIGS[case]
    tensors = tiny_models.weights(config)
    embedding = next(value for name, value in tensors.items() if "embed" in name)
    for head in ("lm_head.weight", "embed_out.weight") if case.startswith("neox") else ("lm_head.weight",):
        tree = load(
            tensors | {head: embedding, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}, config
        )
        assert tree.keys() == architecture(config).leaf_shapes().keys()


def test_names_without_the_models_prefix_are_found():
    tensors = {name.removeprefix("model."): value for name, value in tiny_models.weights(CONFIG).items()}
    assert load(tensors).keys() == architecture(CONFIG).leaf_shapes().keys()


def test_the_tree_is_the_files_tensors_turned_and_stacked():
    tensors, tree = tiny_models.weights(CONFIG), load(tiny_models.weights(CONFIG))
    assert {path: leaf.shape for path, leaf in tree.items()} == architecture(CONFIG).leaf_shapes()
    np.testing.assert_array_equal(tree["model.layers.mlp.up_proj.weight"][1], tensors[NAME].T)
    np.testing.assert_array_equal(tree["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_quantizing_while_loading_equals_quantizing_after(format):
    arch = architecture(CONFIG)
    quantization = QuantizeConfig(format, 16)
    loaded = load_params(tiny_models.source(CONFIG), arch, quantization=quantization)
    after = quantize(load(tiny_models.weights(CONFIG)), arch.modules(), quantization)
    assert isinstance(loaded["model.layers.mlp.up_proj.weight"], QuantizedTensor)
    assert jax.tree.structure(loaded) == jax.tree.structure(after)
    for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(after), strict=True):
        assert one.dtype == other.dtype
        if one.dtype == np.uint8:
            np.testing.assert_array_equal(one, other)
        else:
            np.testing.assert_allclose(one, other, rtol=1e-6)


LARGE = {
    "model_type": "llama", "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8,
    "num_attention_heads": 8, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
# What does not grow with the model: threads, file handles, pieces of the compiler.
CONSTANT = 60e6

MEASURE = """
import gc, sys, threading, time
import jax, jax.numpy as jnp, numpy as np
from tpu_tune.checkpoints.params import load_params
from tpu_tune.checkpoints.source import open_source
from tpu_tune.models import architecture
from tpu_tune.transforms import QuantizeConfig, quantize_weight, quantized_paths

def held():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

source = open_source(sys.argv[1])
arch = architecture(source.config)
quantization = QuantizeConfig(sys.argv[2])
quantized = quantized_paths(arch.modules(), quantization)
for shape in {module.shape for module in arch.modules() if module.weight in quantized}:  # the quantizer is compiled
    jax.block_until_ready(quantize_weight(jnp.zeros(shape, jnp.bfloat16), quantization))
jnp.ones((256, 64)).block_until_ready()
gc.collect()
start = peak = held()
going = True
def watch():
    global peak
    while going:
        peak = max(peak, held())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
tree = load_params(source, arch, jnp.bfloat16, quantization)
jax.block_until_ready(tree)
going = False
thread.join()
print(peak - start, sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("format", ["none", "nf4"])
def test_peak_memory_of_loading(tmp_path_factory, format):
    """At most the resulting tree, twice the largest tensor in float32, and a constant; no second copy of the model."""
    folder = tmp_path_factory.getbasetemp() / "large"
    if not folder.exists():
        folder.mkdir()
        random = np.random.default_rng(0)
        tensors = {
            name: random.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
            for name, shape in torch_shapes(architecture(LARGE)).items()
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(LARGE))
        assert sum(value.nbytes for value in tensors.values()) > 250e6
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}  # one device, as a user has
    # glibc would keep freed pieces for each thread, more of them the more cores there are: freed shall mean freed.
    environment |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    command = [sys.executable, "-c", MEASURE, str(folder), format]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    growth, tree = (int(word) for word in done.stdout.split())
    largest_tensor = max(8192 * 1024, 4096 * 1024) * 4
    assert growth <= tree + 2 * largest_tensor + CONSTANT, f"{growth / 1e6:.0f} MB for a tree of {tree / 1e6:.0f} MB"
