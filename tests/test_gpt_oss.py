"""gpt-oss from its own files, experts in mxfp4 blocks: against transformers, trained, and written again."""

import dataclasses
import json

import helpers_training as helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from safetensors.numpy import load_file, save_file
from test_peft import randomized
from tokenizers import Tokenizer, models

from tpu_tune.checkpoints.expert_adapters import stacked_form
from tpu_tune.checkpoints.huggingface import open_huggingface
from tpu_tune.checkpoints.huggingface_write import write_model
from tpu_tune.checkpoints.params import load_params, open_architecture
from tpu_tune.checkpoints.peft import adapter_tensors, write_adapter
from tpu_tune.config import default
from tpu_tune.errors import UserError
from tpu_tune.models import Execution, architecture
from tpu_tune.tensors import QuantizedTensor
from tpu_tune.training.objectives import CrossEntropy
from tpu_tune.training.prepare_model import abstract_model
from tpu_tune.training.step import ModelLoss
from tpu_tune.transforms import FULL, LoraConfig, find_targets
from tpu_tune.transforms.sharding import make_mesh

CONFIG = {**tiny_models.CONFIGS["gpt_oss"], "num_hidden_layers": 2, "dtype": "bfloat16"}
PACKED = {
    **CONFIG,
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    },
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
IDS = tiny_models.input_ids("gpt_oss")


def stored_tensors(config=CONFIG):
    """Return the tensors of a file as OpenAI's are: the experts' matrices in random blocks, under scales near 1."""
    found = {}
    for name, value in tiny_models.weights(config).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[name] = value
            continue
        random = np.random.default_rng(len(name) + int(name.split(".")[2]))
        experts, rows, columns = value.shape
        found[f"{name}_blocks"] = random.integers(0, 256, (experts, columns, rows // 32, 16)).astype(np.uint8)
        found[f"{name}_scales"] = random.integers(122, 126, (experts, columns, rows // 32)).astype(np.uint8)
    return found


def dequantized(tensors):
    """Return them as transformers dequantizes them, in float32."""
    torch = pytest.importorskip("torch")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    found = {name: value for name, value in tensors.items() if not name.endswith(("_blocks", "_scales"))}
    for name in tensors:
        if name.endswith("_blocks"):
            name = name.removesuffix("_blocks")
            parts = (torch.from_numpy(tensors[f"{name}_{part}"]) for part in ("blocks", "scales"))
            found[name] = mxfp4.convert_moe_packed_tensors(*parts, dtype=torch.float32).numpy()
    return found


def write(directory, config, tensors):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gpt_oss") / "packed", PACKED, stored_tensors())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gpt_oss") / "plain", CONFIG, dequantized(stored_tensors()))


@pytest.fixture(scope="module")
def loaded(packed):
    source = open_huggingface(packed)
    arch = open_architecture(source)
    return source, arch, load_params(source, arch)


@pytest.fixture(scope="module")
def model(plain):
    return tiny_models.torch_model(str(plain))


def test_blocks_stay_packed_and_the_logits_are_transformers(loaded, packed, model):
    _, arch, params = loaded
    leaves = {path: leaf for path, leaf in params.items() if isinstance(leaf, QuantizedTensor)}
    assert {path.rsplit(".", 2)[1] for path in leaves} == {"gate_up_proj", "down_proj"}
    for leaf in leaves.values():
        count = np.prod(leaf.codes.shape) * 2
        assert leaf.format == "mxfp4" and leaf.nbytes == count // 2 + count // 32
    ours = tiny_models.logits(arch, params, IDS)
    assert tiny_models.difference(ours, tiny_models.torch_logits(model, IDS)) < 1e-4
    theirs = tiny_models.torch_model(str(packed))  # transformers reads the blocks itself, and dequantizes them
    assert tiny_models.difference(ours, tiny_models.torch_logits(theirs, IDS)) < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_lora_over_blocks_has_the_gradients_of_torch_and_peft(loaded, plain, model, tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    _, arch, params = loaded
    modules = [*ATTENTION, "gate_up_proj", "down_proj"]
    targets = find_targets(arch.modules(), LoraConfig(rank=4, alpha=12.0, target_modules=modules))
    trainable, frozen = targets.split(params, targets.init(params, jax.random.key(0)))
    trainable = randomized(trainable, arch)
    labels = np.where(np.random.default_rng(0).random(IDS.shape) < 0.7, np.roll(IDS, -1, axis=1), -100)
    batch = {
        "input_ids": IDS,
        "targets": labels,
        "segment_ids": np.ones_like(IDS),
        "positions": np.broadcast_to(np.arange(IDS.shape[1]), IDS.shape),
    }
    batch = {name: jnp.asarray(array, jnp.int32) for name, array in batch.items()}
    model_loss = ModelLoss(arch, Execution(remat="full"), targets, CrossEntropy(7))

    def mean_loss(trainable):
        return model_loss(trainable, frozen, batch, None)[0] / np.sum(labels != -100)

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(trainable)
    write_adapter(str(tmp_path / "adapter"), trainable, targets, arch, str(plain))
    base = tiny_models.torch_model(str(plain))
    base.set_experts_implementation("eager")  # the default's product takes no float64
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True).double()
    logits = adapted(input_ids=torch.tensor(IDS), use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(labels).flatten())
    expected.backward()
    assert abs(float(loss) / expected.item() - 1) < 1e-4
    experts = tuple(target for target in targets.adapted if target.module.experts)
    others = dataclasses.replace(targets, adapted=tuple(one for one in targets.adapted if one not in experts))
    ours = adapter_tensors(grads, others, arch) | stacked_form(experts, grads, targets, arch, "base_model.model.")[0]
    count = 0
    for name, weight in adapted.named_parameters():
        if weight.requires_grad:
            count += 1
            assert tiny_models.difference(ours[name.replace(".default", "")], weight.grad.numpy()) < 1e-4, name
    assert count == len(ours) == 24


def exportable(source):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    return dataclasses.replace(source, load_tokenizer=lambda: tokenizer)


def test_an_export_keeps_the_blocks_that_nothing_touches(loaded, packed, tmp_path):
    source, arch, params = loaded
    targets = find_targets(arch.modules(), LoraConfig(rank=4, target_modules=ATTENTION))
    trainable, frozen = targets.split(params, targets.init(params, jax.random.key(0)))
    tree = targets.combine(randomized(trainable, arch), frozen)
    write_model(str(tmp_path / "merged"), tree, exportable(source), arch)
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == PACKED
    written, original = load_file(tmp_path / "merged" / "model.safetensors"), load_file(packed / "model.safetensors")
    assert written.keys() == original.keys()
    for name, value in original.items():
        if name.endswith(("_blocks", "_scales")):
            np.testing.assert_array_equal(written[name], value, err_msg=name)
    assert tiny_models.difference(written["model.layers.0.self_attn.q_proj.weight"].astype(np.float32),
                                  original["model.layers.0.self_attn.q_proj.weight"]) > 1e-2  # fmt: skip
    back = load_params(open_huggingface(tmp_path / "merged"), arch)
    found = tiny_models.torch_logits(tiny_models.torch_model(str(tmp_path / "merged")), IDS)
    assert tiny_models.difference(found, tiny_models.logits(arch, back, IDS)) < 1e-4


def test_an_export_by_dtype_or_with_a_touched_expert_is_plain(loaded, plain, tmp_path):
    source, arch, params = loaded
    wanted = load_file(plain / "model.safetensors")
    path = "model.layers.mlp.experts.down_proj.weight"
    for name, tree, dtype in (("all", params, "float32"), ("one", {**params, path: params[path].dequantize()}, "")):
        write_model(str(tmp_path / name), tree, exportable(source), arch, dtype)
        assert "quantization_config" not in json.loads((tmp_path / name / "config.json").read_text())
        written = load_file(tmp_path / name / "model.safetensors")
        assert written.keys() == wanted.keys()
        for tensor, value in wanted.items():
            if "experts" in tensor and not tensor.endswith("bias"):
                np.testing.assert_array_equal(written[tensor].astype(np.float32), value, err_msg=tensor)


def test_what_is_wrong_with_blocks_is_named(packed, tmp_path):
    name = "model.layers.1.mlp.experts.down_proj"
    for number, (change, says) in enumerate((
        ({f"{name}_scales": None}, f"{name}_scales is missing"),
        ({f"{name}_scales": np.zeros((5, 64, 2), np.uint8)}, r"has shape \(5, 64, 1, 16\) and its scales \(5, 64, 2\)"),
        ({f"{name}_blocks": np.zeros((5, 32, 1, 16), np.uint8), f"{name}_scales": np.zeros((5, 32, 1), np.uint8)},
         f"'{name}' has shape .5, 32, 32., the config asks for .5, 32, 64."),
    )):  # fmt: skip
        tensors = {key: value for key, value in (stored_tensors() | change).items() if value is not None}
        with pytest.raises(UserError, match=says):
            source = open_huggingface(write(tmp_path / str(number), PACKED, tensors))
            load_params(source, open_architecture(source))


def test_all_of_a_model_in_blocks_cannot_be_trained(loaded):
    with pytest.raises(UserError, match="files have model.layers.mlp.experts.gate_up_proj.weight in mxfp4; set method"):
        FULL.split(loaded[2], {})


def test_a_plan_knows_the_blocks(loaded):
    """`abstract_model` has the shapes and dtypes that loading gives."""
    config = default()
    config.lora.target_modules = ATTENTION
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}, jax.devices()[:1])
    planned = abstract_model(config, PACKED, mesh).frozen
    for path, leaf in loaded[2].items():
        if isinstance(leaf, QuantizedTensor):
            found = [(part.shape, part.dtype) for part in jax.tree.leaves(planned[path])]
            assert found == [(part.shape, part.dtype) for part in jax.tree.leaves(leaf)]
    assert jax.tree.structure(planned) == jax.tree.structure(loaded[2])


def test_the_config_alone_means_what_openai_trained():
    """Defaults of transformers: yarn by 32, windows of 128 in every other layer."""
    bare = {key: CONFIG[key] for key in ("model_type", "vocab_size", "hidden_size", "intermediate_size",
                                         "num_hidden_layers")}  # fmt: skip
    arch = architecture({**bare, "num_attention_heads": 64})
    assert [kind.window for kind in arch.layer_kinds] == [128, None]
    rotary, experts = arch.layer_kinds[0].rope, arch.experts
    assert (rotary.theta, rotary.factor, rotary.original_length, rotary.truncate) == (150000.0, 32.0, 4096, False)
    assert (experts.count, experts.per_token, experts.clamp, experts.gain) == (128, 4, 7.0, 1.702)


@pytest.mark.slow
def test_qlora_over_blocks_on_eight_devices_has_the_losses_of_one(tmp_path):
    """Attention in nf4, experts in their blocks, each device with its share of the codes; both attend with sinks."""
    directory = helpers.write_tiny_llama(tmp_path / "base")  # for its tokenizer
    config = {**helpers.TINY, **PACKED, "vocab_size": helpers.TINY["vocab_size"]}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(stored_tensors(config), directory / "model.safetensors", metadata={"format": "pt"})
    losses = {}
    for sizes in ((1, 1, 1), (2, 2, 2), (8, 1, 1)):
        fsdp, tensor, sequence = sizes
        settings = helpers.make_config(
            model__path=str(directory),
            model__dtype="float32",
            method="lora",
            quantize__format="nf4",
            quantize__group_size=16,
            lora__rank=4,
            train__learning_rate=1e-3,
            train__lr_scheduler_type="constant",
            train__per_device_train_batch_size=8 // fsdp,
            mesh__data=1,
            mesh__fsdp=fsdp,
            mesh__tensor=tensor,
            mesh__sequence=sequence,
        )
        model, steps = helpers.prepare(settings, 2, int(np.prod(sizes)))
        batches = []
        for seed in range(2):
            first, second = (helpers.documents(24, 3, 8, 8, seed + part) for part in (0, 50))
            batches.append(helpers.window(helpers.rows_of(list(zip(first, second, strict=True)), 16), 1))
        losses[sizes] = [row["loss"] for row in helpers.run_steps(model, steps, batches)[1]]
        for name in ("gate_up_proj", "down_proj"):
            leaf = model.frozen[f"model.layers.mlp.experts.{name}.weight"]
            assert leaf.format == "mxfp4"
            for part in (leaf.codes, leaf.scales):
                assert {shard.data.size for shard in part.addressable_shards} == {part.size // np.prod(sizes)}
    assert losses[1, 1, 1][0] != losses[1, 1, 1][1]
    for sizes, found in losses.items():
        np.testing.assert_allclose(found, losses[1, 1, 1], rtol=1e-4, err_msg=str(sizes))
