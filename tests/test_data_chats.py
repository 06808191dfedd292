"""What chats say beside their words: calls, marks, variables, named templates; and where turns of real families end.

transformers' own rendering is the referee of the text, TRL's training templates (where trl is installed) of the mask.
"""

import importlib.util
import json
import logging
import pathlib
import re

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from test_data_tokens import CHATML, CHATML_TAGGED, examples, make_tokenizer, said
from tokenizers import AddedToken
from transformers.utils.chat_template_utils import render_jinja_template

from tpu_tune import config as configuration
from tpu_tune.cli import main
from tpu_tune.data import chat as chats
from tpu_tune.data import load_data
from tpu_tune.data.formats import Chat, Pair, RowError, convert, unused_keys
from tpu_tune.data.ingest import IngestOptions, read_source
from tpu_tune.data.look import look
from tpu_tune.data.pretokenize import tokenize_file
from tpu_tune.data.sources import read_rows
from tpu_tune.data.tokenize_options import TokenizeOptions
from tpu_tune.data.tokenizing import tokenize_rows
from tpu_tune.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def bot(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def called(arguments, **keys):
    return bot("", tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": arguments}}], **keys)


def chat_options(template, **keys):
    return TokenizeOptions("messages", 4096, chat_template=template, **keys)


def text_of(row, template, **keys):
    tokenizer = make_tokenizer()
    [(ids, _)] = examples(tokenize_rows([row], tokenizer, chat_options(template, **keys)))
    return tokenizer.decode(ids)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


TURN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}CALL<|im_end|>\n{% endfor %}"
    "{% if not m.tool_calls %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WANTS_OBJECT = TURN.replace("CALL", "{{ call.function.name }}: {{ call.function.arguments | tojson }}")
WANTS_TEXT = TURN.replace("CALL", "{{ call.function.name + ': ' + call.function.arguments }}")  # DeepSeek's
LOOPS = TURN.replace(  # GLM's
    "CALL",
    "{{ call.function.name }}{% for k, v in call.function.arguments.items() %}<{{ k }}>{{ v | tojson }}{% endfor %}",
)
MAPPING_ONLY = TURN.replace(  # Qwen3.5's: text is left out without a word
    "CALL",
    "{% if call.function.arguments is mapping %}{% for k in call.function.arguments %}<{{ k }}>"
    "{{ call.function.arguments[k] }}{% endfor %}{% endif %}",
)
TAKES_BOTH = TURN.replace(  # Qwen3's
    "CALL",
    "{% if call.function.arguments is string %}{{ call.function.arguments }}{% else %}"
    "{{ call.function.arguments | tojson }}{% endif %}",
)
PRINTS = TURN.replace("CALL", "{{ call.function.arguments }}")  # an object as Python writes it: text is wanted
IGNORES = TURN.replace("CALL", "")


@pytest.mark.parametrize("arguments", ['{"city":"Oslo", "days": [1, null]}', "{}", '{"straße": "\\u00fc \\"x\\""}'])
@pytest.mark.parametrize(
    ("template", "form"),
    [
        (WANTS_OBJECT, "object"),
        (LOOPS, "object"),
        (MAPPING_ONLY, "object"),
        (WANTS_TEXT, "text"),
        (PRINTS, "text"),
        (TAKES_BOTH, "as given"),
        (IGNORES, "as given"),
    ],
)
@pytest.mark.parametrize("given", ["text", "object"])
def test_arguments_of_calls_have_the_form_that_the_template_wants(template, form, arguments, given):
    value = json.loads(arguments) if given == "object" else arguments
    if form == "object":
        right = json.loads(arguments)
    elif form == "text":
        right = json.dumps(value, ensure_ascii=False) if given == "object" else arguments
    else:
        right = value
    messages = [user("Weather?"), called(right), {"role": "tool", "content": "4 C"}, bot("It is 4 C.")]
    reference = make_tokenizer().apply_chat_template(messages, chat_template=template, tokenize=False)
    row = {"messages": [messages[0], called(value), *messages[2:]]}
    before = json.dumps(row)
    assert text_of(row, template) == reference
    assert json.dumps(row) == before  # the row itself is left alone


def test_arguments_that_are_no_json():
    row = {"messages": [user("a"), called("city=Oslo")]}
    assert "weather: city=Oslo<|im_end|>" in text_of(row, WANTS_TEXT)
    with pytest.raises(UserError, match=r"row 1: the arguments of a tool call are not JSON \('city=Oslo'\)"):
        text_of(row, WANTS_OBJECT)
    assert "weather: {}<|im_end|>" in text_of({"messages": [user("a"), called("")]}, WANTS_OBJECT)


def test_calls_that_are_text_or_no_list():
    calls = [{"type": "function", "function": {"name": "weather", "arguments": '{"a": 1}'}}]
    as_text = {"messages": [user("a"), {"role": "assistant", "content": None, "tool_calls": json.dumps(calls)}]}
    assert text_of(as_text, WANTS_OBJECT) == text_of({"messages": [user("a"), called({"a": 1})]}, WANTS_OBJECT)
    for wrong in ({"name": "weather"}, ["weather"], "{", 3):
        with pytest.raises(RowError, match="tool_calls"):
            convert({"messages": [user("a"), bot("b", tool_calls=wrong)]}, "messages")


# --- nulls

TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"properties": {"city": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "g", "parameters": {"properties": {"zone": {"type": "string"}}}}},
]
WITH_TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}" + WANTS_OBJECT
CALLING = [
    {
        "messages": [user("a"), called({"city": "Oslo"}), {"role": "tool", "content": "4"}, bot("It is 4.")],
        "tools": TOOLS,
    },
    {"messages": [user("b"), called({"zone": "Rome"}), bot("noon", reasoning_content="x")], "tools": TOOLS[1:]},
]


@pytest.mark.parametrize("kind", ["parquet", "arrow file", "arrow stream", "datasets' parquet"])
def test_nulls_that_arrow_fills_in_do_not_reach_the_text(kind, tmp_path):
    table = pyarrow.Table.from_pylist(CALLING)
    file = tmp_path / ("rows.parquet" if "parquet" in kind else "rows.arrow")
    if kind == "parquet":
        pyarrow.parquet.write_table(table, file)
    elif kind == "datasets' parquet":
        datasets.Dataset.from_list(CALLING).to_parquet(str(file))
    else:
        new = pyarrow.ipc.new_file if kind == "arrow file" else pyarrow.ipc.new_stream
        with new(str(file), table.schema) as writer:
            writer.write_table(table)
    assert '"zone": null' in json.dumps(table.to_pylist())  # that is what Arrow makes of them
    tokenizer, options = make_tokenizer(), chat_options(WITH_TOOLS)
    right = tokenize_rows(read_rows(write(tmp_path / "rows.jsonl", CALLING))[0], tokenizer, options)
    assert examples(tokenize_rows(read_rows(str(file))[0], tokenizer, options)) == examples(right)
    ingested = [row["messages"] for row in read_source(str(file), IngestOptions())]
    assert ingested == [row["messages"] for row in read_source(str(tmp_path / "rows.jsonl"), IngestOptions())]


def test_nulls_of_json():
    # What a JSON file says of a call and of a schema's values is meant; elsewhere a null is an absent key.
    tool = {"name": "f", "strict": None, "parameters": {"properties": {"a": {"default": None}, "b": None}}}
    row = {"messages": [user("a"), {**called({"city": None}), "name": None}], "tools": [tool]}
    sample = convert(row, "messages")
    assert sample.tools == ({"name": "f", "parameters": {"properties": {"a": {"default": None}}}},)
    assert sample.messages[1] == called({"city": None})
    as_text = convert({**row, "tools": [json.dumps(tool)]}, "messages")
    assert as_text == sample


# --- marks

MARKED = [user("Capital of France?"), bot("London."), user("Sure?"), bot("Paris.")]


@pytest.mark.parametrize("template", [CHATML, CHATML_TAGGED])
@pytest.mark.parametrize(
    ("key", "no", "yes"),
    [
        ("weight", 0, 1),
        ("weight", 0.0, 1.0),
        ("train", False, True),
        ("training", False, None),
        ("weight", False, float("nan")),
    ],
)
def test_a_message_marked_as_context_is_not_trained_on(template, key, no, yes):
    messages = [MARKED[0], {**MARKED[1], key: no}, MARKED[2], {**MARKED[3], key: yes}]
    tokenizer, options = make_tokenizer(), chat_options(template)
    data = tokenize_rows([{"messages": messages}], tokenizer, options)
    assert said(tokenizer, data) == "Paris.<|im_end|>"
    plain = tokenize_rows([{"messages": MARKED}], tokenizer, options)
    assert data.tokens.tolist() == plain.tokens.tolist()  # the text does not depend on it
    assert said(tokenizer, plain) == "London.<|im_end|>Paris.<|im_end|>"


def test_marks_in_other_formats(tmp_path):
    tokenizer = make_tokenizer()
    tags = {"user": "human", "assistant": "gpt"}
    row = {"conversations": [{"from": tags[m["role"]], "value": m["content"]} for m in MARKED]}
    row["conversations"][3]["weight"] = 0
    options = TokenizeOptions("sharegpt", 512, chat_template=CHATML)
    assert said(tokenizer, tokenize_rows([row], tokenizer, options)) == "London.<|im_end|>"
    [ingested] = read_source(write(tmp_path / "rows.jsonl", [row]), IngestOptions())
    assert [m.get("weight") for m in ingested["messages"]] == [None, None, None, 0]
    pair = {"prompt": MARKED[:1], "completion": [{**MARKED[1], "train": False}, *MARKED[2:]]}
    options = TokenizeOptions("prompt-completion", 512, chat_template=CHATML)
    assert said(tokenizer, tokenize_rows([pair], tokenizer, options)) == "Paris.<|im_end|>"
    nothing = {"messages": [MARKED[0], {**MARKED[1], "weight": 0}]}
    data = tokenize_rows([nothing], tokenizer, chat_options(CHATML))
    assert data.summary["dropped"] == {"nothing said by the assistant": 1}


def test_marks_that_cannot_be_followed():
    for value in (0.5, "0", [0], 2):
        with pytest.raises(RowError, match=r"message 2 has 'weight' .*; it must be 0 or 1"):
            convert({"messages": [MARKED[0], {**MARKED[1], "weight": value}]}, "messages")
    row = {"messages": [{**MARKED[0], "weight": 0}, *MARKED[1:]]}
    with pytest.raises(UserError, match="marked not to be trained on .* data.train_on_source"):
        tokenize_rows([row], make_tokenizer(), chat_options(CHATML, train_on_source=True))
    row = {"messages": [{**MARKED[0], "train": True}, *MARKED[1:]]}
    unused = tokenize_rows([row], make_tokenizer(), chat_options(CHATML)).summary["unused"]
    assert unused == {"train or training of a message that is not the assistant's": 1}
    row = {
        "messages": [MARKED[0], {**MARKED[1], "train_detail": [{"begin_offset": 0, "end_offset": 2, "train": False}]}]
    }
    assert tokenize_rows([row], make_tokenizer(), chat_options(CHATML)).summary["unused"] == {
        "train_detail of a message": 1
    }


# --- alpaca


def test_history_and_system_of_alpaca(tmp_path):
    row = {"instruction": "And of Spain?", "input": "", "output": "Madrid."}
    plain = convert(row, "alpaca")
    assert plain == convert({**row, "system": "", "history": []}, "alpaca")
    assert plain == convert({**row, "system": None, "history": None, "input": float("nan")}, "alpaca")
    earlier = [["Capital of France?", "Paris."], ["And of Italy?", "Rome."]]
    turns = (
        "\n\n### Instruction:\nCapital of France?\n\n### Response:Paris."
        "\n\n### Instruction:\nAnd of Italy?\n\n### Response:Rome."
        "\n\n### Instruction:\nAnd of Spain?\n\n### Response:"
    )
    full = {**row, "system": "You know capitals.", "history": earlier}
    assert convert(full, "alpaca") == Pair("You know capitals." + turns, "Madrid.")
    assert convert({**full, "history": json.dumps(earlier)}, "alpaca") == Pair("You know capitals." + turns, "Madrid.")
    without_system = convert({**row, "history": earlier}, "alpaca").source
    assert without_system == plain.source.partition("\n\n###")[0] + turns
    with_input = convert({**full, "input": "Europe"}, "alpaca").source
    assert with_input == "You know capitals." + turns.replace("Spain?\n", "Spain?\n\n### Input:\nEurope\n")
    [ingested] = read_source(write(tmp_path / "rows.jsonl", [full]), IngestOptions())
    assert convert(ingested, "alpaca") == convert(full, "alpaca")
    for wrong in ([["a"]], [["a", None]], "[", {"a": "b"}, ["ab"]):
        with pytest.raises(RowError, match="'history'"):
            convert({**row, "history": wrong}, "alpaca")


# --- variables of the template

SWITCH = (
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<|im_start|>system\n/no_think<|im_end|>\n' }}"
    "{% endif %}" + CHATML
)


@pytest.mark.parametrize("template", [SWITCH, SWITCH.replace(CHATML, CHATML_TAGGED)])
def test_variables_reach_the_template(template):
    tokenizer = make_tokenizer()
    plain, off = ({"messages": MARKED}, {"messages": MARKED, "chat_template_kwargs": {"enable_thinking": False}})
    reference = tokenizer.apply_chat_template(MARKED, chat_template=template, enable_thinking=False, tokenize=False)
    assert "/no_think" in reference and "/no_think" not in text_of(plain, template)
    assert text_of(off, template) == reference
    assert text_of({**off, "chat_template_kwargs": '{"enable_thinking": false}'}, template) == reference
    assert text_of(plain, template, chat_template_kwargs={"enable_thinking": False}) == reference
    on = {"messages": MARKED, "chat_template_kwargs": {"enable_thinking": True}}  # the row's own come first
    assert text_of(on, template, chat_template_kwargs={"enable_thinking": False}) == text_of(plain, template)
    data = tokenize_rows([off], tokenizer, chat_options(template))
    assert said(tokenizer, data) == "London.<|im_end|>Paris.<|im_end|>"


def test_variables_that_are_none_of_the_templates():
    for wrong, message in (
        ({"tokenize": True}, "may not hold 'tokenize'"),
        ({"messages": []}, "may not hold 'messages'"),
        ([1], "'chat_template_kwargs' must be an object"),
        ("{", "'chat_template_kwargs' is not valid JSON"),
    ):
        with pytest.raises(UserError, match=message):
            text_of({"messages": MARKED, "chat_template_kwargs": wrong}, CHATML)
    row = {"messages": MARKED, "chat_template_kwargs": {"enable_thinking": False}}
    unused = tokenize_rows([row], make_tokenizer(), chat_options(CHATML)).summary["unused"]
    assert unused == {"chat_template_kwargs.enable_thinking": 1}


def test_variables_in_the_configuration_and_on_the_command_line(tmp_path, capsys):
    tokenizer = make_tokenizer(chat_template=SWITCH)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = configuration.default()
    config.data.train = file = write(tmp_path / "rows.jsonl", [{"messages": MARKED}] * 2)
    config.data.eval_ratio, config.data.cache_dir = 0.0, str(tmp_path / "cache")
    plain = load_data(config, tokenizer).train.data.tokens.tolist()
    config.data.chat_template_kwargs = {"enable_thinking": False}
    off = load_data(config, tokenizer).train.data.tokens.tolist()  # under a key of its own in the cache
    assert "/no_think" in tokenizer.decode(off) and "/no_think" not in tokenizer.decode(plain)
    words = ["data", "tokenize", "-i", file, "-o", str(tmp_path / "out.arrow"), "-t", str(tmp_path / "tokenizer")]
    assert main([*words, "--chat-template-kwargs", '{"enable_thinking": false}', "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == len(off)
    for value in ("False", "false"):
        key = f"--config.data.chat_template_kwargs.enable_thinking={value}"
        assert main(["data", "look", file, "-t", str(tmp_path / "tokenizer"), key, "--row", "1"]) == 0
        assert "/no_think" in capsys.readouterr().out
    assert main([*words, "--chat-template-kwargs", "[1]"]) == 1
    assert "is no JSON object" in capsys.readouterr().err


# --- templates by name

NAMED = {
    "default": CHATML,
    "tool_use": "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}" + CHATML,
    "rag": "{% for document in documents %}{{ document.text }}\n{% endfor %}" + CHATML,
}


def test_templates_by_name_are_chosen_as_transformers_does(tmp_path):
    make_tokenizer(chat_template=NAMED).save_pretrained(tmp_path)
    tokenizer = type(make_tokenizer()).from_pretrained(tmp_path)
    templates = chats.read_template(tokenizer)
    assert templates == NAMED
    documents = [{"title": "t", "text": "A document."}]
    for row in ({"messages": MARKED}, {"messages": MARKED, "tools": TOOLS}):
        reference = tokenizer.apply_chat_template(MARKED, tools=row.get("tools"), tokenize=False)
        assert text_of(row, templates) == reference
    reference = tokenizer.apply_chat_template(MARKED, documents=documents, chat_template="rag", tokenize=False)
    assert text_of({"messages": MARKED, "documents": documents}, templates) == reference
    assert chats.read_template(tokenizer, CHATML_TAGGED) == CHATML_TAGGED
    with pytest.raises(UserError, match=r"\(tool_use, rag\) none is 'default'; give data.chat_template"):
        text_of({"messages": MARKED}, {name: text for name, text in NAMED.items() if name != "default"})
    config = configuration.default()
    config.data.train = write(tmp_path / "rows.jsonl", [{"messages": MARKED, "tools": TOOLS}] * 2)
    config.data.cache_dir = str(tmp_path / "cache")
    assert '"zone"' in tokenizer.decode(load_data(config, tokenizer).train.data.tokens)


# --- what is not used is said


@pytest.mark.parametrize(
    ("row", "format", "unused"),
    [
        (
            {"input": "a", "output": "b", "system": "Be brief.", "history": [["c", "d"]]},
            "input-output",
            "system history",
        ),
        (
            {"prompt": "a", "completion": "b", "chat_template_kwargs": {"x": 1}},
            "prompt-completion",
            "chat_template_kwargs",
        ),
        ({"prompt": [user("a")], "completion": [bot("b")], "system": "s", "tools": TOOLS}, "prompt-completion", ""),
        ({"question": "a", "output": "b", "context": "c"}, "input-output", "context"),
        ({"messages": MARKED, "images": ["a.png"], "system": "s"}, "messages", "images"),
        ({"messages": MARKED, "images": [], "tools": None, "id": "7", "source": "x"}, "messages", ""),
        ({"instruction": "a", "input": "b", "output": "c", "system": "s", "text": "..."}, "alpaca", ""),
        ({"text": "a", "input": "b", "system": "s"}, "text", ""),
    ],
)
def test_columns_that_would_change_the_text(row, format, unused):
    columns = {"question": "input"} if "question" in row else None
    convert(row, format, columns)
    assert unused_keys(row, format, columns) == unused.split()


def test_what_is_not_used_is_said_once_with_its_rows(tmp_path, caplog, capsys):
    rows = [{"input": "a", "output": "b", "system": "Be brief."}] * 3 + [{"input": "a", "output": "b", "system": ""}]
    config = configuration.default()
    config.data.train, config.data.cache_dir = write(tmp_path / "rows.jsonl", rows), str(tmp_path / "cache")
    tokenizer = make_tokenizer()
    for _ in range(2):  # from the cache too
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load_data(config, tokenizer)
        assert caplog.text.count("'system' of 3 rows is not used: it is not in the text that is trained on") == 1
    options = TokenizeOptions("auto", 64)
    assert tokenize_file(config.data.train, tmp_path / "out.arrow", tokenizer, options)["unused"] == {"system": 3}
    assert look(config.data.train, tokenizer, options, row=1)[0].notes == [
        "'system' is not used: it is not in the text"
    ]


def test_what_a_template_does_not_read_is_said():
    row = {"messages": [user("a"), called({"a": 1}), bot("b", reasoning="hm")], "tools": TOOLS, "documents": [{"a": 1}]}
    unused = tokenize_rows([row], make_tokenizer(), chat_options(CHATML)).summary["unused"]
    assert unused == {"tools": 1, "documents": 1, "tool_calls": 1, "reasoning_content": 1}
    assert tokenize_rows([row], make_tokenizer(), chat_options(WITH_TOOLS)).summary["unused"] == {
        "documents": 1,
        "reasoning_content": 1,
    }


# --- where turns begin and end, in templates built as those of real families are

PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
R1 = (  # DeepSeek-R1: the prompt opens a thought, history has none
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|assistant|>' + m.content.split('</think>')[-1] + '<|end|>' }}{% else %}"
    "{{ '<|user|>' + m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
QWEN35 = (  # Qwen3.5: the last turn has a thought, if an empty one; the prompt opens it, or closes it at once
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}"
)
NEMOTRON = (  # history keeps an empty thought
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% if loop.last and m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n' }}"
    "{% else %}{{ '<think></think>' }}{% endif %}"
    "{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
GPT_OSS = (  # the last turn ends otherwise, and only it has its thoughts
    "{% for m in messages %}{{ '<|start|>' + m.role }}{% if m.role != 'assistant' %}"
    "{{ '<|message|>' + m.content + '<|end|>' }}{% elif loop.last %}{% if m.thinking %}"
    "{{ '<|channel|>analysis<|message|>' + m.thinking + '<|end|><|start|>assistant' }}{% endif %}"
    "{{ '<|channel|>final<|message|>' + m.content + '<|return|>' }}{% else %}"
    "{{ '<|channel|>final<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
GLM = (  # no turn is closed: the next role's token is what the model stops at
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MISTRAL = (  # the system prompt stands in the last user's turn
    "{% set last = messages | selectattr('role', 'equalto', 'user') | list | last %}"
    "{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}{{ bos_token }}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system if m == last else '') + m.content + '[/INST]' }}{% elif m.role == 'assistant' %}"
    "{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
TWO = [user("q one"), bot("ans one"), user("q two"), bot("ans two")]
THOUGHT = [
    user("q one"),
    bot("ans one", reasoning_content="hm 1"),
    user("q two"),
    bot("ans two", reasoning_content="hm 2"),
]
SYSTEM = [{"role": "system", "content": "Be brief."}]
CONTROL = "<|user|> <|assistant|> <|system|> <|end|> <|start|> <|channel|> <|message|> <|return|>".split()


def family_tokenizer(tokens=CONTROL):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens])
    return tokenizer


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (PHI3, TWO, ["ans one<|end|>", "ans two<|end|>\n</s>"]),
        (PHI3, TWO[:2], ["ans one<|end|>\n</s>"]),
        (PHI3, TWO[:3], ["ans one<|end|>"]),
        (PHI3, SYSTEM + TWO, ["ans one<|end|>", "ans two<|end|>\n</s>"]),
        (PHI3, TWO[1:], ["ans one<|end|>", "ans two<|end|>\n</s>"]),
        (R1, TWO, ["ans one<|end|>", "ans two<|end|>"]),
        (R1, [*TWO[:1], bot("<think>\nhm\n</think>ans one"), *TWO[2:]], ["ans one<|end|>", "ans two<|end|>"]),
        (QWEN35, TWO, ["ans one<|im_end|>", "<think>\n\n</think>\n\nans two<|im_end|>"]),
        (QWEN35, THOUGHT, ["ans one<|im_end|>", "<think>\nhm 2\n</think>\n\nans two<|im_end|>"]),
        (QWEN35, TWO[:3], ["ans one<|im_end|>"]),
        (NEMOTRON, TWO, ["<think></think>ans one<|im_end|>", "<think></think>ans two<|im_end|>"]),
        (NEMOTRON, THOUGHT, ["<think></think>ans one<|im_end|>", "<think>\nhm 2\n</think>\nans two<|im_end|>"]),
        (GPT_OSS, TWO, ["<|channel|>final<|message|>ans one<|end|>", "<|channel|>final<|message|>ans two<|return|>"]),
        (
            GPT_OSS,
            THOUGHT,
            [
                "<|channel|>final<|message|>ans one<|end|>",
                "<|channel|>analysis<|message|>hm 2<|end|><|start|>assistant"
                "<|channel|>final<|message|>ans two<|return|>",
            ],
        ),
        (GLM, TWO, ["\nans one<|user|>", "\nans two"]),
        (GLM, TWO[:3], ["\nans one<|user|>"]),
        (MISTRAL, TWO, [" ans one</s>", " ans two</s>"]),
        (MISTRAL, SYSTEM + TWO, [" ans one</s>", " ans two</s>"]),
        (MISTRAL, [*SYSTEM, *TWO, user("q one"), bot("ans one")], [" ans one</s>", " ans two</s>", " ans one</s>"]),
    ],
)
def test_the_assistants_words_in_templates_of_families(template, messages, expected):
    tokenizer = family_tokenizer()
    text, spans = chats.assistant_spans(tokenizer, template, Chat(tuple(messages)))
    assert [text[a:b] for a, b in spans] == expected
    assert text == tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    data = tokenize_rows([{"messages": messages}], tokenizer, chat_options(template))
    assert said(tokenizer, data) == "".join(expected)


@pytest.mark.parametrize("template", [PHI3, R1, QWEN35, NEMOTRON, GPT_OSS, MISTRAL])
def test_marks_in_templates_of_families(template):
    messages = [TWO[0], {**TWO[1], "weight": 0}, *TWO[2:]]
    text, spans = chats.assistant_spans(family_tokenizer(), template, Chat(tuple(messages)))
    assert len(spans) == 1 and "ans two" in text[slice(*spans[0])] and "one" not in text[slice(*spans[0])]


def test_thinking_switched_off():
    messages = Chat(tuple(TWO), template_kwargs={"enable_thinking": False})
    text, spans = chats.assistant_spans(family_tokenizer(), QWEN35, messages)
    assert [text[a:b] for a, b in spans] == ["ans one<|im_end|>", "<think>\n\n</think>\n\nans two<|im_end|>"]


@pytest.mark.parametrize(
    "template",
    [
        PHI3.replace("eos_token", "'!'"),  # what ends the text is no token
        GPT_OSS.replace("<|end|>", "."),  # and what ends a turn
        MISTRAL.replace("[INST] ", "[INST] {{ messages | length }}").replace("'[/INST]'", "' ->'"),
    ],
)
def test_differences_that_are_not_known_are_errors(template):
    with pytest.raises(UserError, match="does not say which tokens are the assistant's"):
        chats.assistant_spans(family_tokenizer(), template, Chat((*SYSTEM, *TWO)))


# --- TRL's masks

_TRL = importlib.util.find_spec("trl")  # looked for, not imported
TEMPLATES = pathlib.Path(_TRL.submodule_search_locations[0], "chat_templates") if _TRL else pathlib.Path("none")
TRAINED = sorted(path.name.removesuffix("_training.jinja") for path in TEMPLATES.glob("*_training.jinja"))
# What TRL trains on too in these, though the generation prompt brings it: the role's header.
HEADERS = {"gptoss": "<[|]start[|]>assistant", "deepseekv3": "<｜Assistant｜>|<｜tool▁outputs▁end｜>"}
CALL = [{"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": {"a": "b"}}}]
CONVERSATIONS = {
    "one turn": TWO[:2],
    "two turns": TWO,
    "system": SYSTEM + TWO,
    "a question last": TWO[:3],
    "thoughts": THOUGHT,
    "a call": [TWO[0], bot("", tool_calls=CALL), {"role": "tool", "name": "f", "content": "4"}, TWO[3]],
}


@pytest.mark.skipif(not TRAINED, reason="trl is not installed")
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", TRAINED)
def test_masks_are_trls(family, conversation):
    """Where TRL's training template gives the family's own text, the same characters are trained on, but spaces."""
    if (family, conversation) == ("diffusion_gemma", "a call"):
        pytest.skip("the template's prompt has no header behind a tool's answer, and its text has one")
    own, training = ((TEMPLATES / f"{family}{end}.jinja").read_text() for end in ("", "_training"))
    tokens = re.findall(r"<\|\w+\|>|<｜[^｜]+｜>|<(?:start|end)_of_turn>|<\|?turn\|?>|<end_of_utterance>", own)
    tokenizer, messages = family_tokenizer(dict.fromkeys(tokens)), CONVERSATIONS[conversation]
    variables = tokenizer.special_tokens_map
    try:
        [reference], [blocks] = render_jinja_template(
            [messages], chat_template=training, return_assistant_tokens_mask=True, **variables
        )
    except Exception as error:  # the family has no such chats
        with pytest.raises(RowError):
            chats.assistant_spans(tokenizer, own, Chat(tuple(messages)))
        pytest.skip(str(error))
    chat = chats.with_arguments(tokenizer, own, Chat(tuple(messages)))
    text, spans = chats.assistant_spans(tokenizer, own, chat)
    assert len(spans) == sum(m["role"] == "assistant" for m in messages)
    if text != reference:  # TRL's template puts thoughts into every turn, or the next role's token at the text's end
        for (a, b), (start, end) in zip(spans, blocks, strict=True):
            words = text[a:b].split("</think>")[-1].strip()
            assert words and re.sub(r"<\|(?:user|observation)\|>\Z", "", reference[start:end].rstrip()).endswith(
                re.sub(r"<\|(?:user|observation)\|>\Z", "", words)
            )
        return
    ours, theirs = ({i for a, b in found for i in range(a, b)} for found in (spans, blocks))
    assert not "".join(text[i] for i in sorted(ours - theirs)).strip()
    assert not re.sub(HEADERS.get(family, "\\s"), "", "".join(text[i] for i in sorted(theirs - ours))).strip()
