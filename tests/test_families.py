"""What every family owes beyond its logits: adapters both ways with peft, gradients, and merged exports for torch.

One case a family (`tiny_models.FAMILY_CASES`); logits and generation are in `test_models.py`.
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from safetensors.numpy import load_file
from test_peft import randomized
from tokenizers import Tokenizer, models

from tpu_tune.checkpoints.expert_adapters import stacked_form
from tpu_tune.checkpoints.huggingface_write import write_model
from tpu_tune.checkpoints.peft import PREFIX, adapter_tensors, read_adapter, write_adapter
from tpu_tune.errors import UserError
from tpu_tune.inference.inspection import inspect_model
from tpu_tune.models import Execution, architecture
from tpu_tune.models.activations import ACTIVATIONS
from tpu_tune.models.architecture import RelativePositions
from tpu_tune.models.relative import buckets_of
from tpu_tune.training.objectives import CrossEntropy
from tpu_tune.training.step import ModelLoss
from tpu_tune.transforms import LoraConfig, QuantizeConfig, find_targets, quantized_paths

CASES = tiny_models.seldom_slow(tiny_models.FAMILY_CASES)
# PEFT 0.21's default targets (TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING).
DEFAULTS = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gptj", "opt", "gemma", "gemma2", "gemma3_text"), ("q_proj", "v_proj")
    ),
    "gpt_neox": ("query_key_value",),
    "gpt2": ("c_attn",),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "t5": ("q", "v"),
}
# Beside all linear layers: embeddings and heads by their names there. T5's `shared` cannot carry an adapter, and peft's
# own OPT does not run with one on `embed_positions`.
ENDS = {
    "gpt_neox": ["embed_in", "embed_out"], "gptj": ["wte", "lm_head"], "gpt2": ["wte", "wpe"], "t5": ["lm_head"],
    "opt": ["embed_tokens", "project_in"],
}  # fmt: skip


def adapted(case, targets, **settings):
    """Return (arch, params, targets, trainable, frozen) with a random adapter."""
    arch, params = tiny_models.load(tiny_models.CONFIGS[case])
    # T5's scores are not scaled: a large change of q would make its softmax a step, and float32 too coarse for it. So
    # is the gate of Gemma 4's inputs by layer.
    is_sharp = arch.encoder or arch.layer_input_size
    if arch.family in ("glm4_moe", "qwen3_next"):  # PEFT takes their dense MLPs' names for experts, and drops them
        settings = {"exclude_modules": r".*(shared_expert.*|layers\.\d+\.mlp\.(gate|up|down)_proj)", **settings}
    spec = LoraConfig(rank=4, alpha=4.0 if is_sharp else 12.0, target_modules=targets, **settings)
    found = find_targets(arch.modules(), spec, arch.default_targets)
    trainable, frozen = found.split(params, found.init(params, jax.random.key(0)))
    return arch, params, found, randomized(trainable, arch), frozen


def all_linear_and(case):
    """Return the names of all linear modules of a case, and of its embeddings and head."""
    arch = architecture(tiny_models.CONFIGS[case])
    linear = [m for m in arch.modules() if m.kind == "linear" and not (m.is_head or m.is_router)]
    unable = {m.path.rsplit(".")[-1] for m in linear if m.no_adapter or m.by_name}
    linear = {m.path.rsplit(".")[-1] for m in linear} - unable
    return sorted(linear) + ENDS.get(arch.family, ["embed_tokens", "lm_head"])


def with_peft(base, adapter, **options):
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(tiny_models.torch_model(base), str(adapter), **options).eval()


@pytest.mark.parametrize("case", CASES)
def test_default_targets_are_pefts(case):
    arch = architecture(tiny_models.CONFIGS[case])
    assert arch.default_targets == DEFAULTS.get(arch.family, arch.default_targets)
    constants = pytest.importorskip("peft.utils.constants")
    theirs = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert arch.family not in theirs or list(arch.default_targets) == theirs[arch.family]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_all_linear_is_torchs_and_they_alone_are_quantized(case):
    """LoRA's all-linear, and what four bits store by default: every linear layer but the head; nothing else.

    Experts, which transformers 5 keeps in parameters, count as the linear layers that they are; what is delicate is
    adapted and not quantized.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    arch = architecture(tiny_models.CONFIGS[case])
    kind = transformers.AutoModelForSeq2SeqLM if arch.encoder else transformers.AutoModelForCausalLM
    config = {key: value for key, value in tiny_models.CONFIGS[case].items() if key != "model_type"}
    with torch.device("meta"):
        model = kind.from_config(transformers.CONFIG_MAPPING[tiny_models.CONFIGS[case]["model_type"]](**config))
    kinds, head = (torch.nn.Linear, transformers.pytorch_utils.Conv1D), model.get_output_embeddings()
    theirs = {name for name, part in model.named_modules() if isinstance(part, kinds) and part is not head}
    modules = arch.modules()
    adapted_ones = find_targets(modules, LoraConfig(target_modules="all-linear"), arch.default_targets).adapted
    stored = quantized_paths(modules, QuantizeConfig("nf4"))
    experts = {module for module in modules if module.experts}
    able = {module for module in experts if not module.by_name}
    assert {target.module for target in adapted_ones if target.module.experts} == able
    assert {name for one in adapted_ones if not one.module.experts for name in one.module.names()} == theirs
    delicate = {name for module in modules if module.is_delicate for name in module.names()}
    quantized = {module for module in modules if module.weight in stored}
    assert {name for module in quantized - experts for name in module.names()} == theirs - delicate
    assert experts <= quantized


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_adapters_on_everything_both_ways(case, tmp_path):
    arch, params, targets, trainable, frozen = adapted(case, all_linear_and(case))
    ours = tiny_models.logits_of(case, arch, targets.combine(trainable, frozen))
    assert tiny_models.difference(tiny_models.logits_of(case, arch, params), ours) > 1e-2
    base = tiny_models.write(tmp_path / "base", tiny_models.CONFIGS[case])
    write_adapter(str(tmp_path / "adapter"), trainable, targets, arch, base, params)
    model = with_peft(base, tmp_path / "adapter")
    assert tiny_models.difference(ours, tiny_models.torch_logits_of(case, model)) < 1e-4
    model.save_pretrained(tmp_path / "theirs")
    spec, back = read_adapter(str(tmp_path / "theirs"), arch)
    again = find_targets(arch.modules(), spec, arch.default_targets)
    assert (
        tiny_models.difference(tiny_models.logits_of(case, arch, again.combine(*again.split(params, back))), ours)
        < 1e-6
    )


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("gpt2", {"use_dora": True}),
        ("phi3", {"use_dora": True}),
        ("gpt2", {"bias": "all"}),
        ("t5", {"use_dora": True}),
        ("phi3", {"modules_to_save": ["qkv_proj"]}),
        ("gemma3", {"modules_to_save": ["q_norm"]}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_follows_the_columns_of_a_fused_matrix(case, settings, tmp_path):
    """Magnitudes, biases and saved modules are reordered as their matrix is."""
    targets = "all-linear" if "modules_to_save" not in settings else ["o_proj"]
    arch, params, targets, trainable, frozen = adapted(case, targets, **settings)
    ours = tiny_models.logits_of(case, arch, targets.combine(trainable, frozen))
    base = tiny_models.write(tmp_path / "base", tiny_models.CONFIGS[case])
    write_adapter(str(tmp_path / "adapter"), trainable, targets, arch, base, params)
    _, back = read_adapter(str(tmp_path / "adapter"), arch)
    for path, leaf in trainable.items():
        np.testing.assert_array_equal(back[path], leaf, err_msg=path)
    assert tiny_models.difference(ours, tiny_models.torch_logits_of(case, with_peft(base, tmp_path / "adapter"))) < 1e-4


def loss_and_gradients(case, directory):
    """Return our (loss, gradients) of one step's LoRA and those of torch and PEFT, gradients by PEFT's names."""
    import torch

    arch, _, targets, trainable, frozen = adapted(case, "all-linear")
    ids = tiny_models.input_ids(case)
    labels = np.where(np.random.default_rng(0).random(ids.shape) < 0.7, np.roll(ids, -1, axis=1), -100)
    batch = {
        "input_ids": ids,
        "targets": labels,
        "segment_ids": np.ones_like(ids),
        "positions": np.broadcast_to(np.arange(ids.shape[1]), ids.shape),
    }
    if arch.encoder:
        batch |= dict(zip(("encoder_ids", "encoder_segment_ids"), tiny_models.encoder_input(case), strict=True))
    batch = {name: jnp.asarray(array, jnp.int32) for name, array in batch.items()}
    model_loss = ModelLoss(arch, Execution(remat="full"), targets, CrossEntropy(7))

    def mean_loss(trainable):
        return model_loss(trainable, frozen, batch, None)[0] / np.sum(labels != -100)

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(trainable)
    base = tiny_models.write(directory / "base", tiny_models.CONFIGS[case])
    write_adapter(str(directory / "adapter"), trainable, targets, arch, base)
    model = with_peft(base, directory / "adapter", is_trainable=True).double()  # one side's rounding is enough
    if arch.experts:  # the default's product takes no float64
        model.get_base_model().set_experts_implementation("eager")
    inputs = {"input_ids": torch.tensor(ids)}
    if arch.encoder:
        encoder, mask = (torch.tensor(part) for part in tiny_models.encoder_input(case))
        inputs = {"input_ids": encoder, "attention_mask": mask, "decoder_input_ids": torch.tensor(ids)}
    logits = model(**inputs, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(labels).flatten())
    expected.backward()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    theirs = {name.replace(".default", ""): weight.grad.numpy() for name, weight in trained.items()}
    experts = tuple(target for target in targets.adapted if target.module.experts)
    others = dataclasses.replace(targets, adapted=tuple(one for one in targets.adapted if one not in experts))
    ours = adapter_tensors(grads, others, arch)
    if experts:  # in memory PEFT has gate and up in one matrix, whose other two blocks no file holds
        stacked, ones = (
            stacked_form(experts, tree, targets, arch, PREFIX)[0]
            for tree in (grads, jax.tree.map(jnp.ones_like, trainable))
        )
        ours |= stacked
        theirs |= {name: theirs[name] * mask for name, mask in ones.items()}
    return float(loss), ours, expected.item(), theirs


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in ("gemma4_wide", "gemma4_alike"))]
)
@pytest.mark.filterwarnings("ignore")
def test_loss_and_gradients_equal_torch_and_peft(case, tmp_path):
    pytest.importorskip("torch")
    loss, ours, expected, theirs = loss_and_gradients(case, tmp_path)
    assert abs(loss / expected - 1) < 1e-4
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, grad in theirs.items():
        assert tiny_models.difference(ours[name], grad) < 1e-4, name


@pytest.mark.parametrize("case", [*CASES, "t5_gated", "gemma", "phi_head_norms"])
@pytest.mark.filterwarnings("ignore")
def test_a_merged_export_is_the_same_model_to_torch(case, tmp_path):
    from transformers import PreTrainedTokenizerFast

    arch, _, targets, trainable, frozen = adapted(case, "all-linear")
    tree = targets.combine(trainable, frozen)
    config = {**tiny_models.CONFIGS[case], "torch_dtype": "float32"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    source = dataclasses.replace(tiny_models.source(config), load_tokenizer=lambda: tokenizer)
    write_model(str(tmp_path / "merged"), tree, source, arch)
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == config
    original, written = tiny_models.weights(config), load_file(tmp_path / "merged" / "model.safetensors")
    assert {name: (value.shape, value.dtype) for name, value in written.items()} == {
        name: (value.shape, value.dtype) for name, value in original.items()
    }
    pytest.importorskip("torch")
    found = tiny_models.torch_logits_of(case, tiny_models.torch_model(str(tmp_path / "merged")))
    assert tiny_models.difference(tiny_models.logits_of(case, arch, tree), found) < 1e-4


def test_an_adapter_that_peft_would_not_reach_is_refused():
    arch = architecture(tiny_models.CONFIGS["t5"])
    for settings in ({"target_modules": ["q", "shared"]}, {"target_modules": ["q"], "modules_to_save": ["shared"]}):
        with pytest.raises(UserError, match="'shared' cannot carry an adapter"):
            find_targets(arch.modules(), LoraConfig(**settings))


def test_fused_columns_lie_in_units_and_come_back():
    for case, name in (("gpt2", "c_attn"), ("phi3", "qkv_proj"), ("phi3", "gate_up_proj")):
        module = next(m for m in architecture(tiny_models.CONFIGS[case]).modules() if m.path.endswith(name))
        weight = np.arange(np.prod(module.torch_shape)).reshape(module.torch_shape)
        np.testing.assert_array_equal(module.to_torch(module.from_torch(weight)), weight)
        columns = np.concatenate([np.full(width, part) for part, width in enumerate(module.segments)])
        units = module.interleave(columns).reshape(-1, module.unit)
        shares = [width * module.unit // sum(module.segments) for width in module.segments]
        np.testing.assert_array_equal(units, np.broadcast_to(np.repeat(np.arange(len(shares)), shares), units.shape))


@pytest.mark.parametrize("case", [*CASES, "t5_gated", "opt"])
def test_inspect_says_what_each_module_does(case, tmp_path):
    base = tiny_models.write(tmp_path, tiny_models.CONFIGS[case])
    arch = architecture(tiny_models.CONFIGS[case])
    facts = inspect_model(base, LoraConfig(rank=4, target_modules="all-linear"))
    assert [module["name"].count(".N.") for module in facts["modules"]] == [bool(m.layers) for m in arch.modules()]
    assert all(module["role"] for module in facts["modules"])
    assert facts["parameters"] == sum(np.prod(shape) for shape in arch.leaf_shapes().values())
    assert facts["lora"]["trainable"] == sum(
        4 * sum(m.shape) * (len(m.layers) or 1) * (m.experts or 1)
        for m in arch.modules()
        if m.kind == "linear" and not (m.is_head or m.is_router or m.no_adapter or m.by_name)
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "longest"), [(32, 128), (8, 12), (64, 256)])
def test_buckets_of_distances_are_t5s(causal, buckets, longest):
    torch = pytest.importorskip("torch")
    from transformers.models.t5.modeling_t5 import T5Attention

    arch = dataclasses.replace(
        architecture(tiny_models.CONFIGS["t5"]), relative=RelativePositions(buckets, longest), causal=causal
    )
    distances = np.arange(-400, 401)
    theirs = T5Attention._relative_position_bucket(torch.tensor(distances), not causal, buckets, longest)
    np.testing.assert_array_equal(jax.jit(lambda d: buckets_of(arch, d))(distances), theirs.numpy())


def test_gelus_approximation_keeps_its_digits_far_below_zero():
    """In float32 1 + tanh(-4) is rounding by a thousandth; a norm behind it makes that the result."""
    x = np.linspace(-5.5, 5, 200)
    u, slope = (math.sqrt(2 / math.pi) * part for part in (x + 0.044715 * x**3, 1 + 3 * 0.044715 * x**2))
    share = 1 / (1 + np.exp(-2 * u))
    np.testing.assert_allclose(x * share, x * (1 + np.tanh(u)) / 2, rtol=1e-8)  # in float64 both are right
    values, slopes = jax.vmap(jax.value_and_grad(ACTIVATIONS["gelu_tanh"]))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(values, x * share, rtol=1e-5)
    np.testing.assert_allclose(slopes, share + 2 * x * share * (1 - share) * slope, rtol=1e-4, atol=1e-9)
