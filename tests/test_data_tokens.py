"""Token ids and loss masks, against qlora's collator restated here and against Hugging Face's own chat masks."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tpu_tune.data import chat as chats
from tpu_tune.data.formats import Chat
from tpu_tune.data.tokenize_options import TokenizeOptions
from tpu_tune.data.tokenized_set import merge
from tpu_tune.data.tokenizing import response_spans, tokenize_rows
from tpu_tune.data.workers import tokenize_parallel
from tpu_tune.errors import UserError

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
# As SmolLM2's: a system prompt of its own comes first where the chat brings none.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TAGGED = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama 3's first one: the header of an answer comes last, asked for or not.
ALWAYS_HEADER = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n\n' }}"
)
# As Qwen 3's: the last turn carries thoughts, earlier ones lose them.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(bos="<s>", eos="</s>", adds_bos=False, chat_template=None):
    """Bytes as tokens, with a few merges so that tokens do not stand for characters one to one."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w"), ("a", "n"), ("Ċ", "Ċ")]
    vocab = {token: i for i, token in enumerate([*symbols, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    if adds_bos:
        special = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, chat_template=chat_template
    )


def examples(data):
    return [
        (data.tokens[a:b].tolist(), data.loss_mask[a:b].tolist())
        for a, b in zip(data.offsets[:-1], data.offsets[1:], strict=True)
    ]


def said(tokenizer, data, i=0):
    ids, mask = examples(data)[i]
    return tokenizer.decode([token for token, marked in zip(ids, mask, strict=True) if marked])


# --- pairs


def qlora_collator(row, tokenizer, source_max_len, target_max_len, train_on_source):
    """qlora.py's DataCollatorForCausalLM, one row, without torch and padding: (ids, labels)."""
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    source = tokenizer(bos + row["input"], max_length=source_max_len, truncation=True, add_special_tokens=False)
    target = tokenizer(row["output"] + eos, max_length=target_max_len, truncation=True, add_special_tokens=False)
    ids = source["input_ids"] + target["input_ids"]
    labels = ids if train_on_source else [-100] * len(source["input_ids"]) + target["input_ids"]
    return ids, labels


PAIRS = [
    {"input": "hello world", "output": " and so on"},
    {"input": "", "output": "x"},
    {"input": "hello " * 20, "output": "well " * 20},
    {"input": "ü€", "output": "漢字"},
]


@pytest.mark.parametrize("train_on_source", [False, True])
@pytest.mark.parametrize("bos", ["<s>", None])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_pairs_equal_qloras_collator(train_on_source, bos, adds_bos):
    if bos is None and adds_bos:
        return
    tokenizer = make_tokenizer(bos=bos, adds_bos=adds_bos)
    options = TokenizeOptions(
        "input-output", 512, train_on_source=train_on_source, source_max_len=16, target_max_len=12, always_bos=True
    )
    data = tokenize_rows(PAIRS, tokenizer, options)
    expected = [qlora_collator(row, tokenizer, 16, 12, train_on_source) for row in PAIRS]
    for (ids, mask), (wanted_ids, labels) in zip(examples(data), expected, strict=True):
        assert ids == wanted_ids
        # The first label is shifted out of the loss, so it is not marked.
        assert mask == [False, *(label != -100 for label in labels[1:])]
    assert data.summary["truncated"] == 1 and data.summary["eos_lost"] == 1
    assert data.source_rows.tolist() == [0, 1, 2, 3]
    assert data.tokens.dtype == np.int32 and data.loss_mask.dtype == bool and data.offsets.dtype == np.int64


def test_a_pair_ends_with_eos_and_has_no_word_none():
    tokenizer = make_tokenizer(bos=None)
    ids, mask = examples(tokenize_rows([{"input": "a", "output": "b"}], tokenizer, TokenizeOptions("input-output", 8)))[
        0
    ]
    assert tokenizer.decode(ids) == "ab</s>" and mask == [False, True, True]


def test_pairs_within_max_length():
    tokenizer = make_tokenizer()
    rows = [{"input": "x" * 40, "output": "y"}, {"input": "x", "output": "y" * 40}, {"input": "x", "output": ""}]
    data = tokenize_rows(rows, tokenizer, TokenizeOptions("input-output", 10, always_bos=True))
    assert tokenizer.decode(examples(data)[0][0]) == "<s>x" + "y" * 8
    assert data.summary["dropped"] == {"empty answer": 1, "no room for the answer within max_length": 1}
    assert data.summary["eos_lost"] == 2


# --- texts


@pytest.mark.parametrize("adds_bos", [False, True])
def test_text_has_eos_and_the_bos_that_the_tokenizer_adds(adds_bos):
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    start = "<s>" if adds_bos else ""
    rows = [{"text": "hello"}, {"text": start + "hello</s>"}, {"text": ""}]
    data = tokenize_rows(rows, tokenizer, TokenizeOptions("text", 64))
    assert [tokenizer.decode(ids) for ids, _ in examples(data)] == [start + "hello</s>"] * 2
    assert all(mask == [False] + [True] * (len(mask) - 1) for _, mask in examples(data))
    assert data.summary["dropped"] == {"empty text": 1}


def test_long_text_is_cut_into_blocks():
    tokenizer = make_tokenizer()
    data = tokenize_rows([{"text": "a"}, {"text": "xyz" * 7}], tokenizer, TokenizeOptions("text", 8))
    assert [len(ids) for ids, _ in examples(data)] == [2, 8, 8, 6]
    assert tokenizer.decode(data.tokens[2:]) == "xyz" * 7 + "</s>"
    assert data.source_rows.tolist() == [0, 1, 1, 1] and data.summary["split"] == 1


def test_response_markers():
    tokenizer = make_tokenizer()
    options = TokenizeOptions("text", 99, response_markers=("B:", "Bot:"), instruction_markers=("A:",))
    rows = [{"text": "A: hello\nB: hell\nA: and\nBot: wet"}, {"text": "A: hello"}]
    data = tokenize_rows(rows, tokenizer, options)
    assert said(tokenizer, data) == " hell\n wet</s>"
    assert data.summary["dropped"] == {"no response marker in the text": 1}
    assert response_spans("B: x A: B: y", ["B:"], []) == [(2, 12)]
    closed = tokenize_rows([{"text": "A: a B: b A: c"}], tokenizer, options)
    assert said(tokenizer, closed) == " b "  # an open question is not answered by EOS


# --- chats

TURNS = [
    {"role": "user", "content": "hello, w"},
    {"role": "assistant", "content": "well\n\nhell"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "\nwand ü"},
]
SYSTEM = [{"role": "system", "content": "Be brief."}]


@pytest.mark.parametrize("messages", [TURNS, TURNS[:2], SYSTEM + TURNS, TURNS[1:], [*TURNS, TURNS[0]]])
def test_prefixes_find_what_generation_tags_say(messages):
    tokenizer = make_tokenizer()
    plain = tokenize_rows([{"messages": messages}], tokenizer, TokenizeOptions("messages", 512, chat_template=CHATML))
    tagged = tokenize_rows(
        [{"messages": messages}], tokenizer, TokenizeOptions("messages", 512, chat_template=CHATML_TAGGED)
    )
    reference = tokenizer.apply_chat_template(
        messages, chat_template=CHATML_TAGGED, return_assistant_tokens_mask=True, return_dict=True
    )
    assert examples(plain) == examples(tagged)
    assert examples(plain)[0][0] == reference["input_ids"]
    assert examples(plain)[0][1] == [bool(marked) for marked in reference["assistant_masks"]]
    assert said(tokenizer, plain).count("<|im_end|>") == sum(m["role"] == "assistant" for m in messages)


def test_no_second_bos():
    tokenizer = make_tokenizer(adds_bos=True)
    data = tokenize_rows(
        [{"messages": TURNS}], tokenizer, TokenizeOptions("messages", 512, chat_template=ALWAYS_HEADER)
    )
    assert examples(data)[0][0].count(tokenizer.bos_token_id) == 1


def test_a_header_that_always_comes_is_not_the_assistants():
    tokenizer = make_tokenizer()
    text, spans = chats.assistant_spans(tokenizer, ALWAYS_HEADER, Chat(tuple(TURNS)))
    assert [text[a:b] for a, b in spans] == ["well\n\nhell<|im_end|>", "wand ü<|im_end|>"]
    assert text.endswith("<|im_end|>")


def test_thoughts_left_out_of_earlier_turns():
    tokenizer = make_tokenizer()
    text, spans = chats.assistant_spans(tokenizer, THINKING, Chat(tuple(TURNS)))
    assert [text[a:b] for a, b in spans] == ["well\n\nhell<|im_end|>", "<think>\n\n</think>\n\n\nwand ü<|im_end|>"]


def test_a_template_without_an_end_token_is_reported():
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = make_tokenizer()
    data = tokenize_rows([{"messages": TURNS[:2]}], tokenizer, TokenizeOptions("messages", 512, chat_template=template))
    # The token " w" lies across the border and counts as the assistant's, as it does in Hugging Face's masks.
    assert said(tokenizer, data) == " well\n\nhell\n" and data.summary["open_ended"] == 1


def test_conversational_prompt_is_context_only():
    tokenizer = make_tokenizer()
    row = {"prompt": TURNS[:3], "completion": TURNS[3:]}
    for template in (CHATML, CHATML_TAGGED):
        data = tokenize_rows([row], tokenizer, TokenizeOptions("prompt-completion", 512, chat_template=template))
        assert said(tokenizer, data) == "\nwand ü<|im_end|>"


def test_train_on_source_takes_all_of_a_chat():
    options = TokenizeOptions("messages", 512, chat_template=CHATML, train_on_source=True)
    mask = examples(tokenize_rows([{"messages": TURNS}], make_tokenizer(), options))[0][1]
    assert mask == [False] + [True] * (len(mask) - 1)


def test_chats_without_a_target_are_dropped_and_counted():
    tokenizer = make_tokenizer()
    data = tokenize_rows(
        [{"messages": TURNS[:1]}, {"messages": TURNS}], tokenizer, TokenizeOptions("messages", 20, chat_template=CHATML)
    )
    assert len(data) == 0 and data.summary["truncated"] == 2
    assert data.summary["dropped"] == {"nothing said by the assistant within max_length": 2}
    data = tokenize_rows([{"messages": TURNS[:1]}], tokenizer, TokenizeOptions("messages", 512, chat_template=CHATML))
    assert data.summary["dropped"] == {"nothing said by the assistant": 1}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "the tokenizer has no chat template; set data.chat_template"),
        ("{% for %}", "the chat template is not valid Jinja"),
        (CHATML.replace("assistant\n' }}", "bot\n' }}"), "its prompt for message 2 is not the beginning of the"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
            "its prompt for message 2 is not the beginning of the whole text",
        ),
        (
            "{% for m in messages %}{{ m['content'] }}{{ '!' if loop.last and m['role'] != 'user' }}{% endfor %}",
            "a turn is rendered otherwise once other messages follow",
        ),
    ],
)
def test_templates_that_do_not_tell(template, message):
    with pytest.raises(UserError, match=message) as error:
        tokenize_rows([{"messages": TURNS}], make_tokenizer(), TokenizeOptions("messages", 512, chat_template=template))
    assert "\n" not in str(error.value)


def test_template_sources(tmp_path):
    tokenizer = make_tokenizer(chat_template=CHATML)
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML_TAGGED)
    assert chats.read_template(tokenizer) == CHATML
    assert chats.read_template(tokenizer, str(file)) == CHATML_TAGGED
    assert chats.read_template(tokenizer, CHATML_TAGGED) == CHATML_TAGGED
    assert chats.has_generation_tag(CHATML_TAGGED) and not chats.has_generation_tag(CHATML)
    with pytest.raises(UserError, match="'no.jinja' is neither Jinja text nor a readable file"):
        chats.read_template(tokenizer, "no.jinja")


def test_bad_rows():
    refusing = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('users begin') }}{% endif %}" + CHATML
    rows = [{"messages": TURNS}, {"messages": TURNS[1:]}, {"messages": "hello"}]
    options = TokenizeOptions("messages", 512, chat_template=refusing)
    with pytest.raises(UserError, match=r"f\.jsonl, row 2: the chat template refuses it \(users begin\); fix it"):
        tokenize_rows(rows, make_tokenizer(), options, "f.jsonl, row")
    skipping = TokenizeOptions("messages", 512, chat_template=refusing, skip_bad_rows=True)
    data = tokenize_rows(rows, make_tokenizer(), skipping, "f.jsonl, row")
    assert len(data) == 1 and data.summary["bad_rows"] == 2 and data.summary["rows"] == 3


def test_processes_give_what_one_gives():
    tokenizer = make_tokenizer(chat_template=CHATML)
    rows = [{"messages": TURNS[:2]}, {"messages": TURNS}, {"messages": TURNS[:1]}, {"messages": TURNS[2:]}]
    options = TokenizeOptions("messages", 512, chat_template=CHATML)
    one, two = tokenize_rows(rows, tokenizer, options), tokenize_parallel(rows, tokenizer, options, num_workers=2)
    parts = merge([tokenize_rows(rows[i : i + 1], tokenizer, options, first=i) for i in range(4)])
    for other in (two, parts):
        assert other.summary == one.summary
        for name in ("tokens", "loss_mask", "offsets", "source_rows"):
            left, right = getattr(other, name), getattr(one, name)
            assert np.array_equal(left, right) and left.dtype == right.dtype
    with pytest.raises(UserError, match=r"row 4: no 'messages'"):
        tokenize_parallel([*rows[:3], {"text": "a"}], tokenizer, options, num_workers=2)


def test_what_a_tokenizers_class_does_to_texts_is_done():
    """The core is asked directly only where a call does nothing else; what earlier calls have set in it is undone."""

    class Loud(PreTrainedTokenizerFast):
        def __call__(self, text, **keys):
            return super().__call__(
                [part.replace("quiet", "LOUD") for part in text] if isinstance(text, list) else text, **keys
            )

    plain = make_tokenizer()
    loud = Loud(tokenizer_object=plain.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    rows, options = [{"text": "quiet hello"}], TokenizeOptions(format="text", max_length=64)
    plain("something long", truncation=True, max_length=2)
    for tokenizer, text in ((plain, "quiet hello</s>"), (loud, "LOUD hello</s>")):
        ids = tokenize_rows(rows, tokenizer, options).tokens.tolist()
        assert tokenizer.decode(ids) == text and ids == plain(text)["input_ids"]
