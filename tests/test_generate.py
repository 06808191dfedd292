"""Generation with a key-value cache: against decoding without one, in batches, and SmolLM2's answers."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_training import write_tiny_llama

import tpu_tune
from tpu_tune.cli import main
from tpu_tune.errors import UserError
from tpu_tune.inference import Sampling, generate_ids
from tpu_tune.inference.generation import choose, end_tokens


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tpu_tune.load(str(write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")))


GREEDY = Sampling(max_new_tokens=10)


def ids_of(model, prompts, sampling=GREEDY, ends=()):
    return generate_ids(model.architecture, model.params, prompts, sampling, ends, "float32")


def without_cache(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(np.asarray(model([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_with_a_cache_is_greedy_without_one(tiny):
    prompts = [[5, 9, 3], [7] * 9]
    assert ids_of(tiny, prompts, Sampling(max_new_tokens=5)) == [without_cache(tiny, prompt, 5) for prompt in prompts]


def test_prompts_of_any_length_in_a_batch_answer_as_alone(tiny):
    random = np.random.default_rng(1)
    prompts = [random.integers(0, 256, length).tolist() for length in (1, 33, 7, 32)]
    together = ids_of(tiny, prompts)
    assert together == [ids_of(tiny, [prompt])[0] for prompt in prompts]
    assert all(len(answer) == 10 for answer in together)


def test_an_end_token_ends_its_own_row_only(tiny):
    prompts = [[5, 9, 3], [7] * 9]
    free = ids_of(tiny, prompts)
    end = free[0][4]
    cut = ids_of(tiny, prompts, ends=(end,))
    assert cut == [row[: row.index(end)] if end in row else row for row in free]


def test_an_answer_may_be_longer_than_the_rounding(tiny):
    assert len(ids_of(tiny, [[1, 2]], Sampling(max_new_tokens=40))[0]) == 40


def test_the_same_seed_draws_the_same(tiny):
    def drawn(seed):
        return ids_of(tiny, [[1, 2, 3]], Sampling(max_new_tokens=20, temperature=1.0, seed=seed))

    assert drawn(1) == drawn(1) != drawn(2)


def distribution(temperature, top_k, top_p, draws=4000):
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), draws)
    draw = jax.jit(jax.vmap(lambda key: choose(logits, jnp.float32(temperature), top_k, jnp.float32(top_p), key)[0]))
    return np.bincount(np.asarray(draw(keys)), minlength=4) / draws


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "expected"),
    [
        (0.0, 0, 1.0, [1, 0, 0, 0]),
        (1.0, 0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (0.5, 0, 1.0, np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365),
        (1.0, 2, 1.0, [0.625, 0.375, 0, 0]),
        (1.0, 9, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (1.0, 0, 0.7, [0.625, 0.375, 0, 0]),
        (1.0, 0, 0.45, [1, 0, 0, 0]),
        (1.0, 0, 0.01, [1, 0, 0, 0]),
        (1.0, 3, 0.6, [0.625, 0.375, 0, 0]),
    ],
)
def test_temperature_top_k_and_top_p_shape_the_draw(temperature, top_k, top_p, expected):
    np.testing.assert_allclose(distribution(temperature, top_k, top_p), expected, atol=0.03)


@pytest.mark.parametrize(
    "setting", [{"max_new_tokens": 0}, {"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}]
)
def test_sampling_out_of_bounds(setting):
    with pytest.raises(UserError, match=f"{next(iter(setting))}={next(iter(setting.values()))}"):
        Sampling(**setting)


def test_an_empty_prompt_without_a_template(tiny):
    with pytest.raises(UserError, match="empty"):
        tiny.generate([""], chat=False)
    assert tiny.generate([], chat=False) == []


def test_lines_of_standard_input(tiny, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one line\n\nanother\n"))
    words = ["generate", "--model", tiny.source.path, "--no-chat", "--greedy", "--max-new-tokens", "4", "--json"]
    assert main(words) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["one line", "another"]
    assert [row["answer"] for row in rows] == tiny.generate(["one line", "another"], Sampling(4), chat=False)


def test_no_prompt_at_all(tiny, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main(["generate", "--model", tiny.source.path]) == 1
    assert "--prompt" in capsys.readouterr().err


def test_no_chat_template(tiny, capsys):
    assert main(["generate", "--model", tiny.source.path, "--prompt", "hi"]) == 1
    assert "no chat template; use --no-chat" in capsys.readouterr().err


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf):
    return tpu_tune.load(str(smollm2_gguf))


def test_smollm2_answers_alike_alone_and_in_company(smollm2):
    prompts = ["What is the capital of France?", "Hi!", "Name three colours, and say for each what fruit has it."]
    together = smollm2.generate(prompts, Sampling(max_new_tokens=16))
    assert "Paris" in together[0]
    assert together[1:2] == smollm2.generate(prompts[1:2], Sampling(max_new_tokens=16))
    assert all(answer and "<|im" not in answer for answer in together)


def test_smollm2_stops_at_its_end_token(smollm2):
    assert smollm2.tokenizer.eos_token_id in end_tokens(smollm2.tokenizer)
    answer = smollm2.generate(["What is the capital of France?"], Sampling(max_new_tokens=32))[0]
    assert len(smollm2.tokenizer(answer)["input_ids"]) < 32


def test_generate_as_a_command(smollm2_gguf, capsys):
    words = ["generate", "--model", str(smollm2_gguf), "--greedy", "--max-new-tokens", "16"]
    assert main([*words, "--prompt", "What is the capital of France?"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("> What is the capital of France?\n") and "Paris" in out
