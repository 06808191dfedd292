"""A tokenizer from a GGUF file's metadata, built with the `tokenizers` library alone.

transformers' own GGUF loader needs torch. Three kinds are known: byte-level BPE (`gpt2`), whose way of cutting text
before merging is named by `tokenizer.ggml.pre`, SentencePiece BPE (`llama`), whose merges follow from its scores, and
SentencePiece Unigram (`t5`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers, processors

from tpu_tune.checkpoints.tokenizer_errors import check_tokenizer, tokenizer_errors
from tpu_tune.errors import UserError
from tpu_tune.models.values import FLAG, TEXT, Kind, check, listing, shown, whole

# tokenizer.ggml.token_type (llama.cpp's llama_token_type)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# o200k_base of tiktoken: contractions belong to the word before them.
_WORD_END = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD_START = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_WORD_START}*{_WORD_END}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_WORD_START}+{_WORD_END}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2, _DIGITS = "gpt2", "digits"  # ByteLevel's own expression, and the same after cutting out each digit
# tokenizer.ggml.pre -> how text is cut; an absent one means GPT-2's
PRE_TOKENIZERS = (
    dict.fromkeys(("default", "gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "trillion"), _GPT2)
    | dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS)
    | dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "smaug-bpe", "dbrx"), _LLAMA3)
    | dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), _QWEN2)
    | {"tekken": _TEKKEN}
    | dict.fromkeys(("gpt-4o", "llama4"), _GPT4O)
)
# Words that are tokens as a whole are taken without merging (llama.cpp: ignore_merges).
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")
# Kinds that put BOS before a text where the file does not say (llama.cpp: add_bos).
_BOS_FIRST = (*WHOLE_WORDS, "llama", "gemma4")
# T5's sentinels, which transformers adds behind the SentencePiece vocabulary, the last one first; converters that do
# not find them in added_tokens.json leave padding there.
_SENTINELS = 100
# Text is composed (Unicode NFC) first: Qwen's and GPT-NeoX's tokenizers.
_COMPOSED = ("qwen2", "deepseek-r1-qwen", "olmo", "mpt", "stablelm2")

_TEMPLATES = "tokenizer.chat_templates"

_TOKEN = whole(-1, 2**32)  # what is no token of the vocabulary stands for none
_WHOLE_NUMBERS = Kind("an array of whole numbers", lambda value: _is_array(value, "iu"))
# Metadata under `tokenizer.`
_KINDS = {
    **dict.fromkeys(("ggml.model", "ggml.pre", "chat_template"), TEXT),
    **dict.fromkeys(("ggml.tokens", "ggml.merges"), listing(TEXT)),
    **dict.fromkeys(("ggml.token_type", "ggml.precompiled_charsmap"), _WHOLE_NUMBERS),
    "ggml.scores": Kind("an array of finite numbers", lambda value: _is_array(value, "fiu")),
    "chat_templates": listing(TEXT),
    **{f"ggml.{name}_token_id": _TOKEN for name in ("bos", "eos", "unknown", "padding")},
    **dict.fromkeys(
        ("ggml.add_bos_token", "ggml.add_eos_token", "ggml.add_space_prefix", "ggml.remove_extra_whitespaces"), FLAG
    ),
}


def _is_array(value: Any, kinds: str) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in kinds and bool(np.isfinite(value).all())


def build_tokenizer(path: str, metadata: dict[str, Any]) -> Any:
    """Build a `transformers.PreTrainedTokenizerFast` from a GGUF file's metadata, chat template included.

    Args:
      path: the file, for messages.
      metadata: its metadata, as `open_gguf_file` reads it.

    Raises:
      UserError: there is no tokenizer in the file, its kind or pre-tokenizer is unknown, or its parts are of a wrong
        type or do not fit one another.
    """
    _check(path, metadata)
    with tokenizer_errors(f"{path}: its tokenizer cannot be built"):
        return check_tokenizer(path, _build(path, metadata))


def _check(path: str, metadata: dict[str, Any]) -> None:
    """Hold what a file says of its tokenizer against kinds, and its lists against each other's lengths."""
    check(metadata, {f"tokenizer.{key}": kind for key, kind in _KINDS.items()}, path)
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    for key in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
        if key in metadata and len(metadata[key]) != len(tokens):
            raise UserError(f"{path}: '{key}' has {len(metadata[key])} entries for {len(tokens)} tokens")
    merges = metadata.get("tokenizer.ggml.merges", ())
    wrong = next((merge for merge in merges if " " not in merge[1:-1]), None)
    if wrong is not None:
        raise UserError(f"{path}: 'tokenizer.ggml.merges' has {shown(wrong)}, which is not two pieces with a space")


def _build(path: str, metadata: dict[str, Any]) -> Any:
    """The tokenizer of metadata whose types are right."""
    from transformers import PreTrainedTokenizerFast

    kind = metadata.get("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece, "gemma4": _sentencepiece, "t5": _unigram}
    if kind not in builders or "tokenizer.ggml.tokens" not in metadata:
        raise UserError(f"{path}: its tokenizer is {kind!r}, which is not known (known: {', '.join(builders)})")
    tokens, types = _vocabulary(metadata)
    backend = builders[kind](path, metadata, tokens, types)
    strip = _swallowing(metadata)
    backend.add_special_tokens(_added(tokens, types, (UNKNOWN, CONTROL), special=True, strip=strip))
    backend.add_tokens(_added(tokens, types, (USER_DEFINED,), special=False))

    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and 0 <= index < len(tokens):
            special[f"{name}_token"] = tokens[index]
    first = metadata.get("tokenizer.ggml.pre") if kind == "gpt2" else kind
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", first in _BOS_FIRST)
    add_eos = metadata.get("tokenizer.ggml.add_eos_token", kind == "t5")
    bos, eos = special.get("bos_token") if add_bos else None, special.get("eos_token") if add_eos else None
    if bos or eos:
        backend.post_processor = _frame(bos, eos, backend)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=int(metadata.get(f"{metadata.get('general.architecture')}.context_length", 1 << 30)),
        **special,
    )
    tokenizer.chat_template = _template(metadata)
    return tokenizer


def _template(metadata: dict[str, Any]) -> str | dict[str, str] | None:
    """The chat template, or name -> text where the file has several."""
    default = metadata.get("tokenizer.chat_template")
    named = {name: metadata.get(f"tokenizer.chat_template.{name}") for name in metadata.get(_TEMPLATES, ())}
    named = {name: text for name, text in named.items() if text}
    return ({"default": default} if default else {}) | named if named else default


def _vocabulary(metadata: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Tokens and their types, less the ones that converters put behind the vocabulary to fill the embedding."""
    tokens = list(metadata["tokenizer.ggml.tokens"])
    types = metadata.get("tokenizer.ggml.token_type")
    types = [NORMAL] * len(tokens) if types is None else [int(kind) for kind in types]
    if metadata["tokenizer.ggml.model"] == "t5":
        padding = next((index for index, token in enumerate(tokens) if token == f"[PAD{index}]"), len(tokens))
        if len(tokens) - padding >= _SENTINELS:
            for number in range(_SENTINELS):
                index = padding + _SENTINELS - 1 - number
                tokens[index], types[index] = f"<extra_id_{number}>", CONTROL
    while tokens and types[len(tokens) - 1] in (UNUSED, USER_DEFINED) and re.fullmatch(r"\[PAD-?\d+\]", tokens[-1]):
        tokens.pop()
    return tokens, types[: len(tokens)]


def _added(
    tokens: list[str], types: list[int], kinds: Sequence[int], special: bool, strip: Callable[[str], bool] | None = None
) -> list[tokenizers.AddedToken]:
    return [
        tokenizers.AddedToken(token, special=special, normalized=False, rstrip=bool(strip and strip(token)))
        for token, kind in zip(tokens, types, strict=True)
        if kind in kinds
    ]


def _swallowing(metadata: dict[str, Any]) -> Callable[[str], bool] | None:
    """Which special tokens swallow the blanks behind them: Phi 3's, but for three, as llama.cpp has it built in."""
    if metadata.get("general.architecture") != "phi3" or metadata["tokenizer.ggml.model"] != "llama":
        return None
    return lambda token: token not in ("<unk>", "<s>", "<|endoftext|>")


def _byte_level(path: str, metadata: dict[str, Any], tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    """GPT-2's kind: text is cut, each piece's bytes are spelled as printable characters and merged."""
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UserError(f"{path}: its pre-tokenizer {pre!r} is not known (known: {known})")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", ())]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=pre in WHOLE_WORDS,
        )
    )
    backend.normalizer, backend.pre_tokenizer = pre_tokenizer_of(pre)
    backend.decoder = decoders.ByteLevel()
    return backend


def pre_tokenizer_of(pre: str) -> tuple[normalizers.Normalizer | None, pre_tokenizers.PreTokenizer]:
    """Return how text is normalized and cut under a name of `PRE_TOKENIZERS`."""
    cut = PRE_TOKENIZERS[pre]
    if cut in (_GPT2, _DIGITS):
        digits = [pre_tokenizers.Digits(individual_digits=True)] if cut == _DIGITS else []
        steps = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    else:
        split = pre_tokenizers.Split(tokenizers.Regex(cut), behavior="isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    return normalizers.NFC() if pre in _COMPOSED else None, (
        pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    )


def _sentencepiece(path: str, metadata: dict[str, Any], tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    """Llama 2's kind: spaces become ▁, the best-scored pair merges first, unknown characters become bytes."""
    # llama.cpp's converter spells user-defined runs of ▁ as the spaces they stand for (Gemma); texts have ▁ by then.
    for index, token in enumerate(tokens):
        if types[index] == USER_DEFINED and not token.strip(" "):
            tokens[index] = token.replace(" ", "▁")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if "tokenizer.ggml.merges" in metadata:
        merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    elif "tokenizer.ggml.scores" in metadata:
        merges = _merges_from_scores(vocabulary, metadata["tokenizer.ggml.scores"].tolist(), types)
    else:
        raise UserError(f"{path}: its tokenizer has neither scores nor merges")
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=vocabulary, merges=merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=BYTE in types
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(steps)
    strip = [decoders.Strip(content=" ", left=1, right=0)] * prefix
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _unigram(path: str, metadata: dict[str, Any], tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    """T5's kind: blanks are dropped but for one, and the likeliest way to cut the text is taken.

    Source: transformers, models/t5/tokenization_t5.py.
    """
    if "tokenizer.ggml.scores" not in metadata:
        raise UserError(f"{path}: its tokenizer has no scores")
    scores = metadata["tokenizer.ggml.scores"].tolist()[: len(tokens)]
    special = (UNKNOWN, CONTROL)
    pieces = [
        (token, 0.0 if kind in special else score) for token, kind, score in zip(tokens, types, scores, strict=True)
    ]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 2)
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=unknown, byte_fallback=BYTE in types))
    if "tokenizer.ggml.precompiled_charsmap" in metadata:
        backend.normalizer = normalizers.Precompiled(
            np.asarray(metadata["tokenizer.ggml.precompiled_charsmap"]).astype(np.uint8).tobytes()
        )
    prefix = "always" if metadata.get("tokenizer.ggml.add_space_prefix", True) else "never"
    words = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=prefix)
    dropping = metadata.get("tokenizer.ggml.remove_extra_whitespaces", True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words]) if dropping else words
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme=prefix)
    return backend


def _merges_from_scores(vocabulary: dict[str, int], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best score first, as transformers' converter orders them.

    Source: transformers, convert_slow_tokenizer.py, `generate_merges`.
    """
    merges = []
    for piece, index in vocabulary.items():
        if types[index] not in (NORMAL, USER_DEFINED, UNUSED):
            continue
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        # SentencePiece gives user-defined pieces no score; converters write one that puts them last.
        score = 0.0 if types[index] == USER_DEFINED else scores[index]
        merges += [(score, len(left), len(right), left, right) for left, right in pairs]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in merges]


def _frame(bos: str | None, eos: str | None, backend: tokenizers.Tokenizer) -> processors.TemplateProcessing:
    """A post-processor that puts BOS before and EOS behind each text, each where it is not None."""
    single = [bos] * bool(bos) + ["$A"] + [eos] * bool(eos)
    second = [bos] * bool(bos) + ["$B"] + [eos] * bool(eos)
    ids = [(token, backend.token_to_id(token)) for token in {bos, eos} - {None}]
    return processors.TemplateProcessing(
        single=single, pair=single + [f"{part}:1" for part in second], special_tokens=ids
    )
