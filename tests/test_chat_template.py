"""The chat template that a run was trained with, in all that it makes: as transformers, gguf and generation read it."""

from __future__ import annotations

import json
import shutil

import gguf
import helpers_training as helpers
import numpy as np
import pytest
import tiny_models
from test_gguf_write import in_memory
from transformers import AutoTokenizer

import tpu_tune
from tpu_tune import UserError
from tpu_tune.checkpoints.chat_template import read_text, template_of, with_template
from tpu_tune.checkpoints.gguf import open_gguf
from tpu_tune.checkpoints.gguf_file import open_gguf_file
from tpu_tune.checkpoints.gguf_tokenizer_write import template_metadata
from tpu_tune.checkpoints.gguf_write import write_gguf
from tpu_tune.checkpoints.huggingface import open_huggingface
from tpu_tune.checkpoints.huggingface_write import write_tokenizer
from tpu_tune.checkpoints.vocabulary import open_configured, with_added_tokens
from tpu_tune.cli import main
from tpu_tune.inference import Sampling
from tpu_tune.inference.run_model import load_any

TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']MARK ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]MARK ' }}{% endif %}"
)
OWN = TEMPLATE.replace("MARK", "OWN")
NAMED = {"default": OWN, "tool_use": OWN.replace("OWN", "TOOLS"), "rag": OWN.replace("OWN", "RAG")}
CHAT = [{"role": "user", "content": "hi"}]


def put_template(directory, template, kind):
    """Give a model directory a template as one of transformers' ways has it."""
    if kind == "config":
        file = directory / "tokenizer_config.json"
        named = [{"name": name, "template": text} for name, text in NAMED.items()]
        value = template if isinstance(template, str) else named
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": value}))
    else:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model whose own template is not the one that it is trained with."""
    return put_template(helpers.write_tiny_llama(tmp_path_factory.mktemp("base") / "tiny"), OWN, "config")


def keys(base, root, method="lora", **more):
    (root / "rows.jsonl").write_text(
        "".join(
            json.dumps({"messages": [*CHAT, {"role": "assistant", "content": f"answer {number}"}]}) + "\n"
            for number in range(8)
        )
    )
    (root / "template.jinja").write_text(TEMPLATE)
    settings = {
        "output_dir": str(root / method), "method": method, "model__path": str(base), "model__dtype": "float32",
        "lora__rank": 2, "lora__target_modules": ["q_proj"], "data__train": str(root / "rows.jsonl"),
        "data__chat_template": str(root / "template.jinja"), "data__cache_dir": str(root), "data__max_length": 64,
        "data__eval_ratio": 0.0, "data__num_workers": 1, "train__per_device_train_batch_size": 1, "train__max_steps": 1,
        "train__eval_strategy": "no",
    }  # fmt: skip
    return {**settings, **more}


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A finished run, whose template's file is gone."""
    root = tmp_path_factory.mktemp("run")
    output = tpu_tune.train(helpers.make_config(**keys(base, root))).output_dir
    (root / "template.jinja").unlink()
    return output


def rendered(tokenizer):
    return tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)


def test_it_stands_beside_the_adapter_and_in_every_export(run, base, tmp_path, capsys):
    for form in ("merge", "base"):
        assert main(["export", run, f"--{form}", "--output", str(tmp_path / form)]) == 0
    assert main(["export", run, "--output", str(tmp_path / "adapter")]) == 0
    assert main(["export", run, "--gguf", "--output", str(tmp_path / "m.gguf")]) == 0
    for directory in (f"{run}/adapter", tmp_path / "adapter", tmp_path / "merge", tmp_path / "base"):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        assert tokenizer.chat_template == TEMPLATE and rendered(tokenizer) == "[user]MARK hi</s>[assistant]MARK "
        assert tokenizer("a b </s>").input_ids == AutoTokenizer.from_pretrained(base)("a b </s>").input_ids
    for words in ("merge", "base"):  # readers of tokenizer_config.json find it too
        assert json.loads((tmp_path / words / "tokenizer_config.json").read_text())["chat_template"] == TEMPLATE
    field = gguf.GGUFReader(str(tmp_path / "m.gguf")).fields["tokenizer.chat_template"]
    assert field.contents() == TEMPLATE
    assert (base / "tokenizer.json").read_bytes() == (tmp_path / "merge" / "tokenizer.json").read_bytes()


def test_generation_knows_it(run, base, capsys):
    models = [
        load_any(run),
        tpu_tune.load(str(base), adapter=f"{run}/adapter"),
        load_any(run, before=True),
        load_any(run, adapter=f"{run}/adapter"),
    ]
    for model in models:
        assert rendered(model.tokenizer) == "[user]MARK hi</s>[assistant]MARK "
    assert rendered(tpu_tune.load(str(base)).tokenizer).startswith("[user]OWN")
    answers = []
    for words in (["--model", run], ["--model", str(base), "--adapter", f"{run}/adapter"]):
        asked = ["generate", *words, "--prompt", "hi", "--max-new-tokens", "4", "--greedy", "--json"]
        assert main(asked) == 0
        answers.append(json.loads(capsys.readouterr().out)["answer"])
    written = "[user]MARK hi</s>[assistant]MARK "
    assert answers == models[0].generate([written], Sampling(4), chat=False) * 2


def test_a_runs_variables_are_its_prompts_too(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    config = json.loads((copy / "config.json").read_text())
    config["data"]["chat_template_kwargs"] = {"mood": "calm"}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "adapter" / "chat_template.jinja").write_text("{{ mood }}: {{ messages[0].content }}")
    model = load_any(str(copy))
    assert model.tokenizer.decode(model.encode_prompt("hi", chat=True)) == "calm: hi"
    expected = model.generate(["calm: hi"], Sampling(4), chat=False)
    assert model.generate(["hi"], Sampling(4)) == expected


def test_another_adapter_brings_its_own(run, tmp_path):
    adapter = shutil.copytree(f"{run}/adapter", tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text(TEMPLATE.replace("MARK", "OTHER"))
    assert "OTHER" in rendered(load_any(run, adapter=str(adapter)).tokenizer)
    assert "MARK" in rendered(load_any(run).tokenizer)


def test_going_on_from_an_adapter_goes_on_with_its_template(run, base, tmp_path):
    config = helpers.make_config(model__path=str(base), model__adapter=f"{run}/adapter")
    assert open_configured(config).load_tokenizer().chat_template == TEMPLATE
    assert open_configured(config, OWN).load_tokenizer().chat_template == OWN


def test_a_run_from_before_says_what_it_lacks(run, tmp_path, caplog):
    old = shutil.copytree(run, tmp_path / "old")
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        (old / "adapter" / name).unlink()
    model = load_any(str(old))
    assert "is neither Jinja text nor a readable file; going on with the chat template of its base" in caplog.text
    assert "OWN" in rendered(model.tokenizer)


def test_a_full_run_has_it_in_its_model(base, tmp_path):
    output = tpu_tune.train(helpers.make_config(**keys(base, tmp_path, "full"))).output_dir
    assert AutoTokenizer.from_pretrained(f"{output}/model").chat_template == TEMPLATE
    assert rendered(load_any(output).tokenizer) == "[user]MARK hi</s>[assistant]MARK "
    assert main(["export", output, "--gguf", "--output", str(tmp_path / "m.gguf")]) == 0
    assert open_gguf_file(str(tmp_path / "m.gguf")).metadata["tokenizer.chat_template"] == TEMPLATE


def test_without_one_the_adapter_stays_two_files_and_the_base_keeps_its_own(base, tmp_path):
    output = tpu_tune.train(helpers.make_config(**keys(base, tmp_path, data__chat_template=""))).output_dir
    files = {file.name for file in (tmp_path / "lora" / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    assert "OWN" in rendered(load_any(output).tokenizer)


# --- files


@pytest.mark.parametrize("kind", ["config", "saved"])
@pytest.mark.parametrize("own", [OWN, NAMED, ""], ids=["one", "named", "none"])
@pytest.mark.parametrize("new", [TEMPLATE, NAMED, ""], ids=["one", "named", "kept"])
def test_files_say_one_thing_to_every_reader(tmp_path, kind, own, new):
    directory = helpers.write_tiny_llama(tmp_path / "tiny")
    if own:
        put_template(directory, own, kind)
    (tmp_path / "out").mkdir()
    write_tokenizer(str(tmp_path / "out"), with_template(open_huggingface(str(directory)), new))
    expected = new or own or None
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == expected
    assert template_of(str(tmp_path / "out")) == (expected or "")
    theirs = gguf.SpecialVocab(tmp_path / "out").chat_template
    if isinstance(theirs, list):
        theirs = {entry["name"]: entry["template"] for entry in theirs}
    assert theirs == expected
    if not new:
        written, original = (
            {file.relative_to(root): file.read_bytes() for file in root.rglob("*") if file.is_file()}
            for root in (tmp_path / "out", directory)
        )
        assert all(original[name] == content for name, content in written.items())


def test_named_templates_in_gguf_are_as_its_own_writer_has_them(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_chat_template([{"name": name, "template": text} for name, text in NAMED.items()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    theirs = gguf.GGUFReader(tmp_path / "theirs.gguf").fields
    ours = template_metadata(NAMED)
    assert set(ours) == {name for name in theirs if name.startswith("tokenizer.")}
    for name, value in ours.items():
        found = theirs[name].contents()
        assert sorted(found) == value if isinstance(value, list) else found == value, name
    assert template_metadata(OWN) == template_metadata({"default": OWN}) == {"tokenizer.chat_template": OWN}
    assert template_metadata(None) == {}


@pytest.fixture
def gguf_source(base, tmp_path):
    config = tiny_models.CONFIGS["llama2"] | {"vocab_size": 264}
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = NAMED
    tensors = tiny_models.weights(config)
    source = in_memory(config, tensors, tokenizer)
    write_gguf(str(tmp_path / "base.gguf"), tensors.items(), source)
    return open_gguf(str(tmp_path / "base.gguf"))


def test_a_gguf_base_has_several_and_takes_another(gguf_source, tmp_path):
    assert gguf_source.load_tokenizer().chat_template == NAMED
    source = with_template(gguf_source, TEMPLATE)
    tensors = ((name, np.asarray(source.read(name))) for name in source.shapes)
    write_gguf(str(tmp_path / "new.gguf"), tensors, source)
    metadata = open_gguf_file(str(tmp_path / "new.gguf")).metadata
    named = {key: value for key, value in metadata.items() if key.startswith("tokenizer.chat_template")}
    assert named == {"tokenizer.chat_template": TEMPLATE}
    (tmp_path / "out").mkdir()
    write_tokenizer(str(tmp_path / "out"), source)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATE


def test_tokens_added_to_a_gguf_base_are_in_the_gguf_file(gguf_source, tmp_path):
    source = with_added_tokens(with_template(gguf_source, TEMPLATE), ["<|new|>"])
    tensors = ((name, np.asarray(source.read(name))) for name in source.shapes)
    write_gguf(str(tmp_path / "new.gguf"), tensors, source)
    tokenizer = open_gguf(str(tmp_path / "new.gguf")).load_tokenizer()
    assert tokenizer.convert_tokens_to_ids("<|new|>") == source.added_tokens["<|new|>"] == 258
    assert tokenizer("a<|new|>b").input_ids[1] == 258 and tokenizer.chat_template == TEMPLATE


def test_what_cannot_be_read_is_named(tmp_path):
    assert (template_of(str(tmp_path)), read_text("")) == ("", "")
    (tmp_path / "t.jinja").write_bytes(b"{{ 'a' }}\r\n")
    assert read_text(str(tmp_path / "t.jinja")) == "{{ 'a' }}\n" and read_text("{{ x }}") == "{{ x }}"
    with pytest.raises(UserError, match=r"^data\.chat_template 'nowhere' is neither Jinja text nor a readable file$"):
        read_text("nowhere")
    for content in ('{"chat_template": 5}', '{"chat_template": [{"name": "a"}]}', "{", '{"chat_template": {"a": 1}}'):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(UserError, match="tokenizer_config.json") as error:
            template_of(str(tmp_path))
        assert "\n" not in str(error.value)


def test_look_shows_the_adapters_template(run, base, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [*CHAT, {"role": "assistant", "content": "yes"}]}))
    words = ["data", "look", str(tmp_path / "rows.jsonl"), "-t", str(base), "--json"]
    for more, mark in (([], "OWN"), ([f"--config.model.adapter={run}/adapter"], "MARK")):
        assert main([*words, *more]) == 0
        assert mark in "".join(json.loads(capsys.readouterr().out)[0]["texts"])
