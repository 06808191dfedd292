"""Training the rows of single tokens: gradients as peft's, the same on eight devices, float32 over a bfloat16 base."""

from __future__ import annotations

import helpers_training as helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from test_vocabulary import TOKENS, nested, write_models

from tpu_tune import UserError
from tpu_tune.checkpoints.huggingface_write import write_model
from tpu_tune.training.prepare_model import abstract_model, prepare_model
from tpu_tune.transforms import sharding


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


def problem(models, name, mesh=None, **changes):
    keys = {
        "model.path": models(name),
        "model.dtype": "float32",
        "model.add_special_tokens": TOKENS,
        "lora.rank": 2,
        "model.train_added_tokens": True,
        "lora.target_modules": ["v_proj"],
        "train.max_grad_norm": 0.0,
        "train.optim": "sgd",
        "train.learning_rate": 1.0,
        "train.lr_scheduler_type": "constant",
        **changes,
    }
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1, **(mesh or {})}
    keys |= {f"mesh.{axis}": size for axis, size in sizes.items()}
    return helpers.prepare(nested(keys), 10, int(np.prod(list(sizes.values()))))


def batches():
    documents = helpers.documents(260, 10, 16, 8, 3)
    for document in documents:
        document[::3] = 258 + document[::3] % 2
    return [helpers.window(helpers.rows_of([[document] for document in documents], 16), 1)]


@pytest.mark.parametrize("name", ["padded", "full"])
@pytest.mark.filterwarnings("ignore")
def test_the_rows_gradients_are_peft_s(models, name, tmp_path):
    """One step of plain gradient descent: what it subtracts is the gradient."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    model, steps = problem(models, name)
    before = {path: np.asarray(leaf) for path, leaf in model.trainable.items() if "tokens_delta" in path}
    assert len(before) == (1 if name == "padded" else 2)
    state, rows = helpers.run_steps(model, steps, batches())
    arch, params = model.architecture, {**model.frozen, **before, **state.trainable}
    base = {path: leaf for path, leaf in params.items() if "lora" not in path and "tokens_delta" not in path}
    write_model(str(tmp_path / "base"), base, model.source, arch)
    indices = {"embed_tokens": [258, 259]} | ({} if name == "padded" else {"lm_head": [258, 259]})
    theirs = peft.get_peft_model(
        tiny_models.torch_model(str(tmp_path / "base")),
        peft.LoraConfig(r=2, target_modules=["v_proj"], trainable_token_indices=indices, task_type="CAUSAL_LM"),
    )
    batch = {key: torch.as_tensor(array[0]).long() for key, array in batches()[0].items()}
    logits = theirs(input_ids=batch["input_ids"], attention_mask=(batch["segment_ids"] > 0).long()).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
    loss.backward()
    assert abs(rows[0]["loss"] - loss.item()) < 1e-5
    found = {
        path.split(".token_adapter")[0].split("model.")[-1]: leaf.grad
        for path, leaf in theirs.named_parameters()
        if "trainable_tokens_delta" in path
    }
    for path, leaf in before.items():
        moved = leaf - np.asarray(state.trainable[path])
        gradient = found[path.split(".trainable_tokens")[0].split("model.")[-1]].numpy()
        assert tiny_models.difference(moved, gradient) < 1e-4


@pytest.mark.parametrize("name", ["padded", "full"])
def test_eight_devices_train_as_one_does(models, name):
    results = {}
    for mesh in ({}, {"fsdp": 4, "tensor": 2}):
        model, steps = problem(models, name, mesh)
        state, rows = helpers.run_steps(model, steps, batches() * 2)
        results[len(mesh)] = (state.trainable, [row["loss"] for row in rows])
    np.testing.assert_allclose(results[2][1], results[0][1], rtol=1e-5)
    for path, leaf in results[0][0].items():
        np.testing.assert_allclose(results[2][0][path], leaf, rtol=1e-4, atol=1e-5, err_msg=path)


def test_bfloat16_steps_reach_the_rows(models):
    """Float32 rows over a bfloat16 base: a small step is not lost."""
    changes = {"model.dtype": "bfloat16", "train.learning_rate": 1e-5}
    model, steps = problem(models, "full", **changes)
    before = {path: np.array(leaf) for path, leaf in model.trainable.items()}
    state, _ = helpers.run_steps(model, steps, batches())
    for path in [path for path in before if "tokens_delta" in path]:
        assert state.trainable[path].dtype == jnp.float32 and (np.asarray(state.trainable[path]) != before[path]).all()


def test_shapes_alone_are_those_of_the_real_model(models):
    keys = {"model.path": models("full"), "model.add_special_tokens": TOKENS, "model.train_added_tokens": True}
    config = nested(keys)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}, jax.devices()[:1])
    real = prepare_model(config, mesh)
    shapes = abstract_model(config, real.source.config, mesh)
    assert {path: leaf.shape for path, leaf in shapes.trainable.items()} == {
        path: leaf.shape for path, leaf in real.trainable.items()
    }
    assert shapes.frozen["lm_head.weight"].shape == (32, 260) and shapes.num_trainable == real.num_trainable


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.trainable_token_indices": [260]}, "260 is not one of the 260 tokens of 'model.embed_tokens'"),
        ({"lora.trainable_token_indices": [-1]}, "holds -1; its entries must not be negative"),
        ({"lora.trainable_token_indices": [4, 4]}, "4 stands there twice"),
        (
            {"lora.trainable_token_indices": {"q_proj": [4]}},
            "'q_proj' is neither embedding nor head; choose among embed_t",
        ),
        (
            {"lora.target_modules": ["lm_head"]},
            r"\(model.train_added_tokens sets it\) trains tokens of 'lm_head', which lora.target_modules takes too",
        ),
        ({"lora.modules_to_save": ["embed_tokens"], "lora.trainable_token_indices": [4]}, "which lora.modules_to_save"),
    ],
)
def test_tokens_that_cannot_be_trained_are_named(models, changes, message):
    with pytest.raises(UserError, match=message):
        problem(models, "full", **changes)


def test_saved_modules_train_their_new_rows_already(models):
    model, _ = problem(models, "full", **{"lora.modules_to_save": ["embed_tokens", "lm_head"]})
    assert not [path for path in model.trainable if "tokens_delta" in path]
    assert model.trainable["lm_head.weight"].shape == (32, 260)
