"""Embeddings against torch's transformers, over ragged texts, windows and devices."""

import jax
import numpy as np
import pytest
from helpers_training import write_tiny_llama

import tpu_tune
from tpu_tune.errors import UserError
from tpu_tune.inference.embeddings import embed

TEXTS = [
    "hello world",
    "",
    "a much longer text " * 20,
    "é🙂",
    *[f"row {number} " * (number % 13) for number in range(20)],
]
OPTIONS = {"max_length": 64, "batch_tokens": 512}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tpu_tune.load(str(write_tiny_llama(tmp_path_factory.mktemp("embed") / "tiny")))


@pytest.fixture(scope="module")
def embeddings(tiny):
    parts = list(embed(tiny, [TEXTS[:7], [], TEXTS[7:]], **OPTIONS))
    assert [len(part) for part in parts] == [7, 0, len(TEXTS) - 7]
    return np.concatenate([part for part in parts if len(part)])


def test_the_mean_of_torchs_last_hidden_states(tiny, embeddings):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(tiny.source.path)
    for text, found in zip(TEXTS, embeddings, strict=True):
        ids = tiny.tokenizer(text, add_special_tokens=False)["input_ids"][: OPTIONS["max_length"]]
        if not ids:
            assert not found.any()
            continue
        with torch.no_grad():
            expected = model(torch.tensor([ids])).last_hidden_state.mean(1)[0].numpy()
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_eight_devices_give_what_one_gives(tiny, embeddings):
    assert jax.device_count() == 8
    short = [text[:32] for text in TEXTS]  # one width, so that one function is compiled
    found = np.concatenate(list(embed(tiny, [short], devices=jax.devices(), **OPTIONS)))
    unchanged = [number for number, text in enumerate(TEXTS) if text == short[number]]
    assert len(unchanged) > 8
    np.testing.assert_allclose(found[unchanged], embeddings[unchanged], atol=1e-5)


def test_bad_length(tiny):
    with pytest.raises(UserError, match="max_length is 0"):
        list(embed(tiny, [TEXTS], max_length=0))
