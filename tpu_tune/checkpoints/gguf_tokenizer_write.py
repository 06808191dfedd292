"""A tokenizer as GGUF metadata: the inverse of gguf_tokenizer.py.

GGUF names a way of cutting text, or implies one by its kind; whatever else a tokenizer.json does is lost. So the
tokenizer is built again from the metadata and has to give the same ids on texts on which tokenizers tend to differ.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers

from tpu_tune.checkpoints.ends import closing_ids
from tpu_tune.checkpoints.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WHOLE_WORDS,
    build_tokenizer,
    pre_tokenizer_of,
)
from tpu_tune.errors import UserError

TEMPLATE = "tokenizer.chat_template"
# None begins with a blank: whether ▁ comes before one differs between tokenizer.json files (and transformers' versions)
# of the same SentencePiece model; llama.cpp does as SentencePiece does.
_PROBE = (
    "Hello  World,   it's I'VE don't 'RE\t\ttabs\n\n \nlines\r\n\r\nCRLF   ",
    "1 12 123 1234 12345 3.14 1,000 ½ ٣٤٥ x1y22",
    "e\u0301 é ſ's ﬁ Å \u1100\u1161 你好，世界 한국어 नमस्ते مرحبا 🙂👩\u200d👩\u200d👧 \x00\x07\u00a0\u3000|",
    "def f(x):\n    return x**2  # ok //\n\n'''====''' !!!??? camelCaseWord ALLCAPS a_b-c "
    "http://x.y/?z=%20#w ▁▁ <0x41>",
)


def tokenizer_metadata(tokenizer: Any, rows: int, architecture: str) -> dict[str, Any]:
    """Describe a tokenizer as llama.cpp's converter does.

    Args:
      tokenizer: a fast `transformers` tokenizer.
      rows: the embedding's rows; the vocabulary is padded to as many, as llama.cpp requires.
      architecture: GGUF's name of the model's family.

    Raises:
      UserError: it is of a kind, or cuts text in a way, that GGUF has no name for.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"GGUF needs the tokenizer as a tokenizer.json, and this is a {type(tokenizer).__name__}")
    content = json.loads(backend.to_str())
    metadata = _model(backend, content, rows, architecture) | _special(tokenizer)
    metadata |= end_of_turn(tokenizer, metadata)
    rebuilt = build_tokenizer("the tokenizer", metadata | {"general.architecture": architecture})
    for text in _PROBE:
        if rebuilt.backend_tokenizer.encode(text, add_special_tokens=False).ids != (
            backend.encode(text, add_special_tokens=False).ids
        ):
            raise UserError(
                f"GGUF cannot express this tokenizer ({content['model']['type']}, {metadata['tokenizer.ggml.model']!r} "
                f"in GGUF): it would give other tokens for {text[:20]!r}; export the model with --merge"
            )
    return metadata


def fit_to_rows(metadata: dict[str, Any], rows: int) -> dict[str, Any]:
    """Return tokenizer metadata with as many tokens as the embedding has rows: filled up, or without the last ones."""
    values = dict(metadata)
    padding = {"tokens": lambda at: f"[PAD{at}]", "scores": lambda at: -10000.0, "token_type": lambda at: UNUSED}
    for key, fill in padding.items():
        full = f"tokenizer.ggml.{key}"
        if full in values:
            value = list(values[full])[:rows]
            value += [fill(at) for at in range(len(value), rows)]
            values[full] = value if key == "tokens" else np.array(value, np.asarray(values[full]).dtype)
    return values


def _model(backend: tokenizers.Tokenizer, content: dict[str, Any], rows: int, architecture: str) -> dict[str, Any]:
    """Kind, vocabulary, and what the kind needs to cut text."""
    model = content["model"]
    metadata: dict[str, Any] = {"tokenizer.ggml.pre": "default"}
    if model["type"] == "Unigram":
        kind, scores = "t5", dict(map(tuple, model["vocab"]))
        metadata |= _unigram_settings(backend, content)
    elif model["type"] == "BPE" and model.get("byte_fallback"):
        # llama.cpp merges Gemma 4's pieces in the order of the merges, and no other family's that have ▁ for a space.
        kind, scores = ("gemma4" if architecture == "gemma4" else "llama"), _scores(model["merges"])
        if kind == "gemma4":
            metadata["tokenizer.ggml.merges"] = _spelled(model["merges"])
        first = backend.encode("a", add_special_tokens=False).tokens
        metadata["tokenizer.ggml.add_space_prefix"] = bool(first) and first[0].startswith("▁")
    elif model["type"] == "BPE" and '"ByteLevel"' in json.dumps(content["pre_tokenizer"]):
        kind, scores = "gpt2", None
        metadata["tokenizer.ggml.pre"] = _pre_tokenizer_name(backend, model)
        metadata["tokenizer.ggml.merges"] = _spelled(model["merges"])
    else:
        raise UserError(f"GGUF knows no tokenizer of the kind {model['type']} without bytes; export with --merge")
    if (size := backend.get_vocab_size(with_added_tokens=False)) > rows:
        raise UserError(
            f"the tokenizer has {size} tokens and the model's embedding {rows} rows; they do not belong together"
        )
    tokens, types = _vocabulary(backend, content, kind)
    metadata |= {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
    }
    if scores is not None:
        lowest = min(scores.values(), default=0.0) - 1.0
        known = [scores.get(token.replace(" ", "▁"), lowest) for token in tokens]
        metadata["tokenizer.ggml.scores"] = np.array(known, np.float32)
    if isinstance(model.get("unk_token"), str):
        metadata["tokenizer.ggml.unknown_token_id"] = backend.token_to_id(model["unk_token"])
    elif model.get("unk_id") is not None:
        metadata["tokenizer.ggml.unknown_token_id"] = model["unk_id"]
    return fit_to_rows(metadata, rows)


def _vocabulary(backend: tokenizers.Tokenizer, content: dict[str, Any], kind: str) -> tuple[list[str], list[int]]:
    """Tokens by id and their types; ids that nobody has are padding."""
    ids = backend.get_vocab(with_added_tokens=True)
    tokens = [f"[PAD{index}]" for index in range(max(ids.values(), default=-1) + 1)]
    types = [UNUSED] * len(tokens)
    for token, index in ids.items():
        tokens[index], types[index] = token, NORMAL
        if kind in ("llama", "gemma4") and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[index] = BYTE
    for token in content["added_tokens"]:
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
        if kind == "llama" and not token["special"]:  # llama.cpp looks for these in the text as it is
            tokens[token["id"]] = token["content"].replace("▁", " ")
    unknown = content["model"].get("unk_token")
    unknown = backend.token_to_id(unknown) if isinstance(unknown, str) else content["model"].get("unk_id")
    if unknown is not None:
        types[unknown] = UNKNOWN
    return tokens, types


def _spelled(merges: list[Any]) -> list[str]:
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def _scores(merges: list[Any]) -> dict[str, float]:
    """Scores that order pairs as the merges do: the first that makes a token says how early."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        scores.setdefault("".join(merge if not isinstance(merge, str) else merge.split(" ", 1)), -1.0 - rank)
    return scores


def _pre_tokenizer_name(backend: tokenizers.Tokenizer, model: dict[str, Any]) -> str:
    """The first of llama.cpp's names under which text is normalized and cut as this tokenizer does it."""

    def cut(normalizer: Any, pre_tokenizer: Any) -> list[Any]:
        normal = [normalizer.normalize_str(text) if normalizer else text for text in _PROBE]
        # Where nothing is merged it does not matter how text is cut.
        return normal + [pre_tokenizer.pre_tokenize_str(text) for text in normal if model["merges"]]

    found = cut(backend.normalizer, backend.pre_tokenizer)
    for pre in PRE_TOKENIZERS:
        # To llama.cpp `default` is another expression; only files from before names existed are read as GPT-2's.
        if (
            pre != "default"
            and bool(model.get("ignore_merges")) == (pre in WHOLE_WORDS)
            and cut(*pre_tokenizer_of(pre)) == found
        ):
            return pre
    raise UserError("GGUF has no name for how this tokenizer cuts text before merging; export the model with --merge")


def _unigram_settings(backend: tokenizers.Tokenizer, content: dict[str, Any]) -> dict[str, Any]:
    first = backend.encode("a", add_special_tokens=False).tokens
    settings: dict[str, Any] = {
        "tokenizer.ggml.add_space_prefix": bool(first) and first[0].startswith("▁"),
        "tokenizer.ggml.remove_extra_whitespaces": "WhitespaceSplit" in json.dumps(content["pre_tokenizer"]),
    }
    normalizer = content["normalizer"] or {}
    for step in normalizer.get("normalizers", [normalizer]):
        if step.get("type") == "Precompiled" and step["precompiled_charsmap"]:
            charsmap = base64.b64decode(step["precompiled_charsmap"])
            settings["tokenizer.ggml.precompiled_charsmap"] = np.frombuffer(charsmap, np.uint8)
    return settings


def _special(tokenizer: Any) -> dict[str, Any]:
    """Ids of the special tokens, whether BOS and EOS are put round a text, and the chat template."""
    metadata: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            metadata[f"tokenizer.ggml.{key}_token_id"] = index
    framed, plain = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    start = framed.index(plain[0]) if plain else len(framed)
    before, behind = framed[:start], framed[start + len(plain) :]
    metadata["tokenizer.ggml.add_bos_token"] = before == [tokenizer.bos_token_id]
    metadata["tokenizer.ggml.add_eos_token"] = behind == [tokenizer.eos_token_id]
    return metadata | template_metadata(tokenizer.chat_template)


def end_of_turn(tokenizer: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of the token that closes an answer in the chat template, where none names it as an end.

    llama.cpp ends an answer there too (llama-vocab.cpp, `special_eog_ids`); by itself it knows some such tokens by
    their texts.

    Args:
      tokenizer: a tokenizer with the chat template.
      metadata: the rest of the metadata.
    """
    named = {metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    missing = sorted(closing_ids(tokenizer) - named)
    return {"tokenizer.ggml.eot_token_id": missing[0]} if missing else {}


def template_metadata(template: str | Mapping[str, str] | None) -> dict[str, Any]:
    """Return a chat template's metadata; several go by their names beside the default, as gguf's own writer has it."""
    named = template if isinstance(template, Mapping) else {"default": template or ""}
    named = {re.sub("[^A-Za-z0-9]", "_", name): text for name, text in named.items()}
    metadata: dict[str, Any] = {TEMPLATE: named["default"]} if named.get("default") else {}
    more = sorted(name for name in named if name != "default")
    if more:
        metadata[f"{TEMPLATE}s"] = more
    return metadata | {f"{TEMPLATE}.{name}": named[name] for name in more}
