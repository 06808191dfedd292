"""Where a text begins and an answer ends: alike in training, generation and evaluation, and as transformers has it."""

from __future__ import annotations

import json

import helpers_training as helpers
import jax
import numpy as np
import pytest
from test_data_tokens import examples, make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import tpu_tune
from tpu_tune import UserError
from tpu_tune.checkpoints.chat_template import with_template
from tpu_tune.checkpoints.ends import end_ids
from tpu_tune.checkpoints.gguf import open_gguf
from tpu_tune.checkpoints.gguf_config import llama_like_config
from tpu_tune.checkpoints.gguf_file import open_gguf_file
from tpu_tune.checkpoints.gguf_write import write_gguf
from tpu_tune.checkpoints.huggingface import open_huggingface
from tpu_tune.checkpoints.huggingface_write import tensors_with_head, write_model
from tpu_tune.checkpoints.params import load_params, open_architecture
from tpu_tune.checkpoints.peft import write_adapter
from tpu_tune.checkpoints.tokenizers import encode_text
from tpu_tune.checkpoints.vocabulary import with_added_tokens
from tpu_tune.cli import main
from tpu_tune.cli.hf import command_line
from tpu_tune.cli.hf.translate import translate
from tpu_tune.cli.program import parse
from tpu_tune.data.tokenize_options import TokenizeOptions
from tpu_tune.data.tokenizing import tokenize_rows
from tpu_tune.inference import Sampling, generate_ids
from tpu_tune.inference.generation import encode_prompt, end_tokens
from tpu_tune.inference.run_model import load_any
from tpu_tune.training.tasks import exact_match
from tpu_tune.transforms import LoraConfig, find_targets

# --- EOS


def texts_of(rows, format="input-output", tokenizer=None, max_length=64, **options):
    tokenizer = tokenizer or make_tokenizer()
    data = tokenize_rows(rows, tokenizer, TokenizeOptions(format, max_length, **options))
    return [tokenizer.decode(ids) for ids, _ in examples(data)], data


def test_an_answer_that_ends_has_no_second_end():
    rows = [{"input": "a", "output": text} for text in ("b", "b</s>", "b</s></s>", "b</s>c", "</s>b")]
    found, data = texts_of(rows)
    # TRL's add_eos: `if not example["completion"].endswith(eos_token)`
    assert found == ["a" + row["output"] + "</s>" * (not row["output"].endswith("</s>")) for row in rows]
    assert all(mask[1:].count(True) == len(ids) - 1 for ids, mask in examples(data))
    for format, keys in {"prompt-completion": ("prompt", "completion"), "alpaca": ("instruction", "output")}.items():
        (text,), _ = texts_of([dict(zip(keys, ("a", "b</s>"), strict=True))], format, max_length=512)
        assert text.endswith("b</s>") and text.count("</s>") == 1


@pytest.mark.parametrize("num_eos", [0, 1, 3])
@pytest.mark.parametrize("there", [0, 1, 2, 3, 4])
def test_ends_that_are_there_count(num_eos, there):
    ends = "</s>" * max(num_eos, there)
    assert texts_of([{"input": "a", "output": "bc" + "</s>" * there}], num_eos=num_eos)[0] == ["abc" + ends]
    assert texts_of([{"text": "bc" + "</s>" * there}], "text", num_eos=num_eos)[0] == ["bc" + ends]


def test_an_answer_of_an_end_alone_says_nothing():
    _, data = texts_of([{"input": "a", "output": "</s>"}, {"input": "a", "output": ""}, {"input": "a", "output": "b"}])
    assert len(data) == 1 and data.summary["dropped"] == {"empty answer": 2}
    found, _ = texts_of([{"input": "a", "output": "b</s>"}], tokenizer=make_tokenizer(eos=None))
    assert found == ["ab</s>"]  # a tokenizer without an end of its own


# --- BOS


def metaspace(prepend, frame):
    """A tokenizer that cuts the first word of a text by `prepend`; `frame`: what it puts round one."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁a": 3, "a": 4, "▁b": 5, "b": 6, "▁": 7}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    if frame:
        core.post_processor = processors.TemplateProcessing(single=frame, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("prepend", ["first", "always", "never"])
@pytest.mark.parametrize("frame", ["", "<s> $A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize("prompt", ["a b", "<s>a b", "", "b"])
def test_a_prompt_is_the_same_in_training_and_in_use(prepend, frame, prompt):
    tokenizer = metaspace(prepend, frame)
    data = tokenize_rows([{"input": prompt, "output": "b"}], tokenizer, TokenizeOptions("input-output", 64))
    (ids, mask) = examples(data)[0]
    target = len(tokenizer("b</s>", add_special_tokens=False)["input_ids"])
    trained = ids[:-target]
    assert encode_text(tokenizer, prompt) == encode_prompt(tokenizer, prompt, chat=False) == trained
    theirs = tokenizer(prompt)["input_ids"]  # as TRL and transformers encode it
    if frame.endswith("</s>"):
        theirs = theirs[:-1]  # an end is nothing to go on from
    if prompt.startswith("<s>") and frame.startswith("<s>"):
        theirs = theirs[1:]
    assert trained == theirs
    if trained:
        assert trained.count(1) == ("<s>" in frame or "<s>" in prompt)


def test_pairs_have_no_bos_where_the_tokenizer_adds_none():
    rows = [{"input": "a", "output": "b"}]
    assert texts_of(rows)[0] == ["ab</s>"]
    assert texts_of(rows, tokenizer=make_tokenizer(adds_bos=True))[0] == ["<s>ab</s>"]
    assert texts_of(rows, always_bos=True)[0] == ["<s>ab</s>"]
    _, data = texts_of([{"input": "a" * 99, "output": "b"}], tokenizer=make_tokenizer(adds_bos=True), source_max_len=4)
    assert data.tokens[:4].tolist() == make_tokenizer(adds_bos=True)("a" * 99, truncation=True, max_length=4).input_ids
    long = [{"input": "a" * 62, "output": "b"}]  # 64 tokens, and BOS
    _, data = texts_of(long, tokenizer=make_tokenizer(adds_bos=True), drop_long=True)
    assert data.summary["dropped"] == {"longer than max_length": 1} and len(texts_of(long, drop_long=True)[1]) == 1


@pytest.mark.parametrize(
    ("flags", "bos"),
    [
        (["--bits", "4"], "always"),
        (["--source_max_len", "16", "--target_max_len", "16"], "always"),
        (["--dataset_format", "alpaca", "--full_finetune"], "always"),
        ([], "auto"),
        (["--use_lora", "true", "--lora_rank", "4"], "auto"),
    ],
)
def test_qloras_bos_stays_with_qloras_flags(flags, bos):
    words = ["--model_name_or_path", "m", "--train_file", "d.jsonl", "--output_dir", "o"]
    config = translate(command_line.parse([*words, *flags]), lambda: "cpu", {}).config
    assert config.data.add_bos_token == bos
    with pytest.raises(UserError, match="add_bos_token"):
        helpers.make_config(data__add_bos_token="never")


# --- ends of generation


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory):
    return helpers.write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


PROMPTS = ["hello", "a word and another"]


@pytest.fixture(scope="module")
def free(tiny_dir):
    """Ids of greedy answers that nothing has ended."""
    model = tpu_tune.load(str(tiny_dir))
    prompts = [model.encode_prompt(prompt) for prompt in PROMPTS]
    return generate_ids(model.architecture, model.params, prompts, Sampling(12), [], "float32")


def write_ends(tiny_dir, tmp_path, generation=None, **config):
    """Copy the tiny model with other ends in its files."""
    path = helpers.write_tiny_llama(tmp_path / "ends", **config)
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def torch_answers(path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer, answers = AutoTokenizer.from_pretrained(path), []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
        answers.append(ids[inputs["input_ids"].shape[1] :].tolist())
    return answers


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", ["generation", "generation list", "config", "config list"])
def test_it_ends_where_transformers_ends(tiny_dir, free, tmp_path, where):
    end = free[0][5]
    ends = [263, end] if "list" in where else end
    changes = {"eos_token_id": ends} if where.startswith("config") else {"generation": {"eos_token_id": ends}}
    path = write_ends(tiny_dir, tmp_path, **changes)
    model = tpu_tune.load(str(path))
    assert end in model.ends and model.tokenizer.eos_token_id in model.ends
    cut = [row[: row.index(end)] if end in row else row for row in free]
    assert cut != free
    theirs = [row[: row.index(end)] if end in row else row for row in torch_answers(path)]
    assert theirs == cut
    said = [model.tokenizer.decode(row, skip_special_tokens=True) for row in cut]
    assert model.generate(PROMPTS, Sampling(12), chat=False) == said
    # exact-match evaluation, which asks in other words, ends at the same ids
    prompts = [model.encode_prompt(prompt) for prompt in PROMPTS]
    assert exact_match.answer_all(model, prompts, Sampling(12)) == said


def test_all_files_ends_count_together(tiny_dir, tmp_path):
    path = write_ends(tiny_dir, tmp_path, {"eos_token_id": [5, 6]}, eos_token_id=7, text_config={"eos_token_id": [8]})
    source = open_huggingface(str(path))
    assert end_ids(source) == {5, 6, 7, 8}
    assert end_tokens(source.load_tokenizer(), source) == (5, 6, 7, 8, 256)
    assert end_tokens(source.load_tokenizer()) == (256,)


@pytest.mark.parametrize("content", ["[1]", "{", '{"eos_token_id": "</s>"}', '{"eos_token_id": [true]}', "\xff"])
def test_a_broken_generation_config_is_one_line(tiny_dir, tmp_path, content):
    path = helpers.write_tiny_llama(tmp_path / "tiny")
    (path / "generation_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="generation_config.json") as error:
        end_ids(open_huggingface(str(path)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("closing", "ends"),
    [("<|stop|>", {256, 262}), ("<|stop|>\n", {256, 262}), ("\n<|stop|>", {256, 262}), (" ", {256})],
)
def test_the_templates_closing_token_ends_an_answer(tiny_dir, closing, ends):
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>", "<c>", "<d>", "<|stop|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + m.content + " + repr(closing) + " }}{% endfor %}"
    assert set(end_tokens(tokenizer)) == ends
    tokenizer.chat_template = "{{ raise_exception('no chats') }}"
    assert set(end_tokens(tokenizer)) == {256}
    with pytest.raises(
        UserError, match=r"the chat template refuses the prompt \(no chats\); --no-chat goes on from plain text"
    ):
        encode_prompt(tokenizer, "hi", chat=True)


def test_a_gguf_files_end_of_turn_is_an_end():
    class File:
        path = "m.gguf"
        tensors = {"token_embd.weight": np.zeros((264, 32))}
        metadata = {"general.architecture": "llama", "tokenizer.ggml.eos_token_id": 5} | {
            f"llama.{key}": 4
            for key in ("embedding_length", "feed_forward_length", "block_count", "attention.head_count",
                        "context_length")
        } | {"llama.attention.layer_norm_rms_epsilon": 1e-5}  # fmt: skip

    assert llama_like_config(File, "llama", "LlamaForCausalLM")["eos_token_id"] == 5
    File.metadata |= {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 5}
    assert llama_like_config(File, "llama", "LlamaForCausalLM")["eos_token_id"] == [5, 7]


# --- ends that an export names

CLOSED = "{% for m in messages %}<s>{{ m.content }}<|stop|>{% endfor %}"  # the tiny model's files know no <|stop|>


def closed(path, template=CLOSED):
    return with_template(with_added_tokens(open_huggingface(str(path)), ["<|stop|>"]), template)


def written(source, directory):
    arch = open_architecture(source)
    write_model(str(directory), load_params(source, arch), source, arch)
    return directory


@pytest.mark.parametrize(
    ("generation", "ends"),
    [(None, [256, 258]), ({"eos_token_id": 5, "top_k": 7}, [5, 258]), ({"eos_token_id": [5, 6]}, [5, 6, 258])],
)
def test_a_written_model_ends_where_its_template_closes_an_answer(tiny_dir, tmp_path, generation, ends):
    path = written(closed(write_ends(tiny_dir, tmp_path, generation)), tmp_path / "out")
    theirs = GenerationConfig.from_pretrained(path)
    assert theirs.eos_token_id == ends  # transformers stops at any of them
    assert theirs.top_k == (generation or {}).get("top_k", theirs.top_k)
    assert set(tpu_tune.load(str(path)).ends) == {*ends, 256}
    again = written(open_huggingface(str(path)), tmp_path / "again")
    assert (again / "generation_config.json").read_bytes() == (path / "generation_config.json").read_bytes()


def test_an_adapter_ends_where_its_template_closes_an_answer(tiny_dir, tmp_path):
    def written_adapter(source, name):
        arch = open_architecture(source)
        targets = find_targets(arch.modules(), LoraConfig(rank=2, target_modules=["q_proj"]), arch.default_targets)
        trained = targets.init(load_params(source, arch), jax.random.key(0))
        write_adapter(str(tmp_path / name), trained, targets, arch, "base", source=source)
        return tmp_path / name

    path = written_adapter(closed(write_ends(tiny_dir, tmp_path, {"eos_token_id": 5, "top_k": 7})), "adapter")
    theirs = GenerationConfig.from_pretrained(path)
    assert theirs.eos_token_id == [5, 258] and theirs.top_k == 7
    own = written_adapter(closed(tiny_dir, CLOSED.replace("<|stop|>", "</s>")), "own")
    assert not (own / "generation_config.json").exists()


def test_a_written_model_without_such_a_token_keeps_its_files(tiny_dir, tmp_path):
    path = written(closed(tiny_dir, "{% for m in messages %}{{ m.content }}</s>{% endfor %}"), tmp_path / "out")
    assert not (path / "generation_config.json").exists()
    bare = write_ends(tiny_dir, tmp_path, {"eos_token_id": 5})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    kept = written(open_huggingface(str(bare)), tmp_path / "bare") / "generation_config.json"
    assert kept.read_bytes() == (bare / "generation_config.json").read_bytes()


def test_a_gguf_file_names_the_templates_closing_token(tiny_dir, tmp_path):
    def metadata(source, name):
        arch = open_architecture(source)
        write_gguf(str(tmp_path / name), tensors_with_head(load_params(source, arch), arch, False), source)
        return open_gguf_file(str(tmp_path / name)).metadata

    key = "tokenizer.ggml.eot_token_id"
    found = metadata(closed(tiny_dir), "a.gguf")
    assert found[key] == 258 and found["tokenizer.ggml.eos_token_id"] == 256
    assert open_gguf(str(tmp_path / "a.gguf")).config["eos_token_id"] == [256, 258]
    plain = metadata(closed(tiny_dir, CLOSED.replace("<|stop|>", "</s>")), "b.gguf")
    assert key not in plain  # its EOS closes an answer, as in llama.cpp's own converter
    # A base in GGUF, trained with a template of the run's own:
    assert metadata(with_template(open_gguf(str(tmp_path / "b.gguf")), CLOSED), "c.gguf")[key] == 258


# --- runs


@pytest.fixture(scope="module")
def qlora_run(tiny_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("qlora")
    config = helpers.make_config(
        output_dir=str(root / "run"), model__path=str(tiny_dir), model__dtype="float32", lora__rank=2,
        data__train=str(helpers.write_rows(root / "rows.jsonl", 8)), data__cache_dir=str(root), data__max_length=64,
        data__eval_ratio=0.0, data__num_workers=1, data__add_bos_token="always", train__max_steps=1,
        train__eval_strategy="no", train__per_device_train_batch_size=1,
    )  # fmt: skip
    return tpu_tune.train(config).output_dir


def test_a_run_is_used_as_it_was_trained(qlora_run, tiny_dir, capsys):
    model = load_any(qlora_run)
    assert model.encode_prompt("a") == model.encode_prompt("<s>a") == [257, 97]
    assert load_any(qlora_run, before=True).encode_prompt("a") == [257, 97]
    assert tpu_tune.load(str(tiny_dir)).encode_prompt("a") == [97]
    assert model.generate(["a b"], Sampling(6), chat=False) == model.generate(["<s>a b"], Sampling(6), chat=False)
    words = ["generate", "--no-chat", "--greedy", "--max-new-tokens", "6", "--json", "--prompt", "a b"]
    answers = []
    for more in (["--model", qlora_run], ["--model", qlora_run, "--quantize", "none", "--dtype", "float32"]):
        assert main([*words, *more]) == 0
        answers.append(json.loads(capsys.readouterr().out)["answer"])
    assert answers == model.generate(["a b"], Sampling(6), chat=False) * 2


@pytest.mark.parametrize("spelling", ["--output", "--output-file", "--output_file", "-o"])
@pytest.mark.parametrize("source", ["--input", "--input-file", "-i"])
def test_data_tokenize_takes_the_output_by_any_name(spelling, source):
    options = parse(["data", "tokenize", source, "a.jsonl", spelling, "b.arrow", "-t", "m", "--output-key", "answer"])
    assert (options.input_file, options.output_file, options.output_key) == ("a.jsonl", "b.arrow", "answer")


def test_an_abbreviation_of_one_options_two_spellings_is_not_ambiguous(capsys):
    split = parse(["data", "split", "--input", "a.jsonl", "--output", "there", "--split", "0.1", "--skip"])
    assert (split.output_dir, split.split_ratio, split.skip_bad) == ("there", "0.1", True)
    words = ["data", "tokenize", "-i", "a", "-o", "b", "-t", "m"]
    assert parse([*words, "--max-len", "8", "--train-on"]).max_length == 8
    with pytest.raises(SystemExit):
        parse([*words, "--out", "x"])  # the file, or the key of the answer
    assert "ambiguous option: --out could match --output" in capsys.readouterr().err
