"""The model card: README.md of a repository on the Hugging Face hub, from what a run directory has recorded.

The front matter is what the hub reads (base model, library, tags, results); the body says what the model is, what it
was trained on and how, how it was judged, and how to load it, in code that runs as it stands.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict

from tpu_tune import config as configuration
from tpu_tune.checkpoints.prompts import CHAT, in_words, taught_as
from tpu_tune.config import source_paths
from tpu_tune.errors import counted
from tpu_tune.inference.public_names import Base, base_name, hub_id, private_directories, scrubbed
from tpu_tune.transforms import group_size
from tpu_tune.transforms.starts import STARTS

_SHOWN_EVALUATIONS = 20
# Told elsewhere in the card, or nobody's business.
_NOT_SHOWN = (
    "output_dir", "method", "model.path", "data.train", "data.eval", "data.cache_dir", "data.num_workers",
    "train.report_to", "train.sample_prompts",
)  # fmt: skip
# The table of evaluations: a column's title, the key in metrics.jsonl, the form.
_COLUMNS = (
    ("epoch", "epoch", ".2f"), ("eval_loss", "eval_loss", ".4f"), ("perplexity", "eval_perplexity", ".2f"),
    ("token accuracy", "eval_token_accuracy", ".1%"), ("accuracy", "eval_accuracy", ".1%"), ("F1", "eval_f1", ".4f"),
    ("mean squared error", "eval_mse", ".4g"),
)  # fmt: skip
_OF_TOKENS = ("epoch", "eval_loss", "eval_perplexity", "eval_token_accuracy")
# What `load(quantize=...)` takes.
_LOADED_AS_TRAINED = {
    "quantize.group_size": 64, "quantize.double_quant": True, "quantize.include": ["all-linear"],
    "quantize.exclude": [], "quantize.symmetric": False, "quantize.calibration": 0,
}  # fmt: skip


@dataclass(frozen=True)
class CardFacts:
    """What a model card is made of.

    Attributes:
      repo: NAMESPACE/NAME.
      form: adapter | merged | gguf, what the repository holds.
      config: the run's configuration.
      run: the run directory.
      base: the model that it began with.
      metrics: the rows of metrics.jsonl.
      summary: the content of summary.json, {} where there is none: `data`, `trainable_parameters`.
      license: keys of the front matter, {} where nothing is known.
      encoder_decoder: whether the model is one.
      multimodal: whether it is the text part of a multimodal model, whose class is another one in transformers.
      added_tokens: whether the vocabulary was grown.
      own_tokenizer: whether a tokenizer stands beside the result: it is not the base's, or has another template.
      has_curves: whether curves.png lies beside the card.
      step: of the checkpoint that the weights are of; None for what the run ended with.
      gguf_file: its name, where that is the form.
      revision: the branch, "" for the main one.
      difference: figures of `export_merged`, {} where nothing was merged.
    """

    repo: str
    form: str
    config: ConfigDict
    run: str
    base: Base
    metrics: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any] = field(default_factory=dict)
    license: Mapping[str, str] = field(default_factory=dict)
    encoder_decoder: bool = False
    multimodal: bool = False
    added_tokens: bool = False
    own_tokenizer: bool = False
    has_curves: bool = False
    step: int | None = None
    gguf_file: str = ""
    revision: str = ""
    difference: Mapping[str, float] = field(default_factory=dict)


def model_card(facts: CardFacts) -> str:
    """Return the card as text, front matter included; it names no directory of the user's."""
    parts = [
        f"# {facts.repo.rpartition('/')[2]}",
        _what(facts),
        *(["![training and evaluation loss](curves.png)"] if facts.has_curves else []),
        "## How to load it\n\n" + "\n\n".join(_snippets(facts)),
        "## Data\n\n" + _data(facts),
        "## Training\n\n" + _training(facts),
        "## Evaluation\n\n" + _evaluation(facts),
    ]
    return f"---\n{_front_matter(facts)}\n---\n\n" + "\n\n".join(parts) + "\n"


def judged(
    config: ConfigDict, metrics: Sequence[Mapping[str, Any]], step: int | None = None
) -> Mapping[str, Any] | None:
    """Return the evaluation row of a checkpoint, or of the weights that a finished run left; None without any.

    The latter is the best's or the last.
    """
    rows = _evaluations(metrics)
    if step is not None:
        return next((row for row in reversed(rows) if row["step"] == step), None)
    if not rows:
        return None
    return min(rows, key=lambda row: row["eval_loss"]) if config.train.load_best_model_at_end else rows[-1]


def _front_matter(facts: CardFacts) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    config, row, dataset = facts.config, judged(facts.config, facts.metrics, facts.step), _hub_data(facts)
    results = []
    if row:
        where = _names(config.data.eval or config.data.train)
        values = (
            ("loss", "loss", row["eval_loss"]), ("perplexity", "perplexity", row.get("eval_perplexity")),
            ("accuracy", "token accuracy", row.get("eval_token_accuracy")),
            ("accuracy", "accuracy", row.get("eval_accuracy")), ("f1", "F1 (macro)", row.get("eval_f1")),
            ("mse", "mean squared error", row.get("eval_mse")),
        )  # fmt: skip
        task = _pipeline(config)
        for kind, name, value in values:
            if _finite(value):
                results.append(
                    EvalResult(
                        task_type=task,
                        task_name=task.replace("-", " ").title(),
                        dataset_type=dataset or where,
                        dataset_name=where if config.data.eval else f"held-out rows of {where}",
                        metric_type=kind,
                        metric_name=name,
                        metric_value=round(value, 6),
                    )
                )
    method = "full-fine-tuning" if config.method == "full" else "qlora" if config.quantize.format != "none" else "lora"
    data = ModelCardData(
        base_model=facts.base.hub_id or None,
        base_model_relation=("adapter" if facts.form == "adapter" else "finetune") if facts.base.hub_id else None,
        library_name={"adapter": "peft", "merged": "transformers", "gguf": None}[facts.form],
        pipeline_tag=None if facts.encoder_decoder else _pipeline(config),
        tags=["tpu_tune", "jax", *(["lora"] if method == "qlora" else []), method]
        + (["gguf", "llama.cpp"] if facts.form == "gguf" else []),
        datasets=[dataset] if dataset else None,
        metrics=[result.metric_type for result in results if result.metric_type != "loss"] or None,
        model_name=facts.repo.rpartition("/")[2] if results else None,
        eval_results=results or None,
        **facts.license,
    )
    return data.to_yaml()


def _pipeline(config: ConfigDict) -> str:
    return "text-generation" if config.head.name == "lm" else "text-classification"


def _what(facts: CardFacts) -> str:
    config, base = facts.config, facts.base
    called = f"[{base.hub_id}](https://huggingface.co/{base.hub_id})" if base.hub_id == base.name else f"`{base.name}`"
    if base.hub_id and base.hub_id != base.name:
        called += f" (a local model, whose config.json says that it is {base.hub_id})"
    elif base.kind == "gguf":
        called += " (a GGUF file)"
    made = f"fine-tuned with tpu_tune (JAX): {_method(config)}."
    if facts.form == "adapter":
        text = f"A PEFT adapter for {called}, {made}"
        if not base.hub_id:
            text += " The base is needed to use it, and is not part of this repository."
        return text
    form = "one GGUF file" if facts.form == "gguf" else "a whole model"
    text = f"{called} as {form}, {made}"
    if config.method != "lora":
        return text
    text += " The adapter is merged into the weights."
    if facts.difference:
        text += (
            f" Against the model as it was trained, logits differ by at most "
            f"{facts.difference['relative_logit_difference']:.2%} of the largest on one probe text, and the likeliest "
            f"token is the same in {facts.difference['same_first_guesses']:.1%} of places."
        )
    return text


def _method(config: ConfigDict) -> str:
    if config.method != "lora":
        return "every weight was trained"
    stored = config.quantize.format
    text = f"{'LoRA' if stored == 'none' else 'QLoRA'} of rank {config.lora.rank}, alpha {config.lora.alpha:g}"
    if stored != "none":
        twice = ", double quantized" if config.quantize.double_quant and stored in ("int4", "nf4") else ""
        fitted = ", rounded by activations (GPTQ)" if config.quantize.calibration else ""
        text += f", over weights stored as {stored} (groups of {group_size(config.quantize)}{twice}{fitted})"
    return text


def _data(facts: CardFacts) -> str:
    config, counts = facts.config, facts.summary.get("data") or {}
    dataset = _hub_data(facts)
    name = f"[{dataset}](https://huggingface.co/datasets/{dataset})" if dataset else f"`{_names(config.data.train)}`"
    lines = [f"- trained on: {name}{_counted(counts.get('train'))}"]
    configured = "" if config.data.format == "auto" else config.data.format
    row_format = (counts.get("train") or {}).get("format") or configured
    if row_format:
        lines.append(f"- row format: {row_format}")
    if config.data.eval:
        lines.append(f"- evaluated on: `{_names(config.data.eval)}`{_counted(counts.get('eval'))}")
    elif config.data.eval_ratio > 0 or config.data.eval_dataset_size:
        share = (
            f"{config.data.eval_dataset_size:,}"
            if config.data.eval_dataset_size
            else f"{100 * config.data.eval_ratio:.3g}%"
        )
        lines.append(f"- evaluated on: {share} of the rows, held out{_counted(counts.get('eval'))}")
    return "\n".join(lines)


def _counted(counts: Mapping[str, Any] | None) -> str:
    """Words for one set's counts, with a comma in front; "" where they were not recorded."""
    words = {"used_examples": "examples", "used_tokens": "tokens", "used_target_tokens": "of them targets"}
    phrases = [f"{counts[key]:,} {word}" for key, word in words.items() if isinstance((counts or {}).get(key), int)]
    return "".join(f", {one}" for one in phrases)


def _training(facts: CardFacts) -> str:
    default = dict(configuration.flatten(configuration.default()))
    private = private_directories(facts.config, facts.run)
    changed = []
    for key, value in configuration.flatten(facts.config):
        if key not in _NOT_SHOWN and value != default.get(key):
            plain = scrubbed(value, private, key)
            text = plain if isinstance(plain, str) and "\n" not in plain else json.dumps(plain, ensure_ascii=False)
            changed.append(f"{key}={text if len(text) <= 200 else text[:200] + '...'}")
    rows = [row for row in facts.metrics if "loss" in row]
    lines = []
    if facts.step is not None:
        total = facts.summary.get("total_steps")
        of = f" of {total:,}" if total else ""
        lines.append(f"These are the weights of the checkpoint of step {facts.step:,}{of}.")
        rows = [row for row in rows if row["step"] <= facts.step]
    if rows:
        took = [counted(rows[-1]["step"], "step")]
        if _finite(rows[-1].get("epoch")):
            took.append(f"{rows[-1]['epoch']:.2f} epochs")
        if isinstance(rows[-1].get("num_tokens"), int):
            took.append(counted(rows[-1]["num_tokens"], "token") + " seen")
        if _finite(rows[-1]["loss"]):
            took.append(f"last training loss {rows[-1]['loss']:.4f}")
        lines.append(", ".join(took) + ".")
    trained = facts.summary.get("trainable_parameters")
    if isinstance(trained, int):
        lines.append(f"{trained:,} parameters were trained.")
    lines.append(f"The configuration, where it differs from tpu_tune's defaults:\n\n```\nmethod={facts.config.method}")
    return "\n\n".join(lines) + "".join(f"\n{line}" for line in changed) + "\n```"


def _evaluation(facts: CardFacts) -> str:
    rows, kept = _evaluations(facts.metrics), judged(facts.config, facts.metrics, facts.step)
    if not rows:
        return "None was made while training."
    shown = rows
    if len(rows) > _SHOWN_EVALUATIONS:
        indices = {round(i * (len(rows) - 1) / (_SHOWN_EVALUATIONS - 1)) for i in range(_SHOWN_EVALUATIONS)}
        shown = [row for index, row in enumerate(rows) if index in indices or row is kept]
    columns = [
        (name, key, form)
        for name, key, form in _COLUMNS
        if any(key in row for row in rows) or (facts.config.head.name == "lm" and key in _OF_TOKENS)
    ]
    lines = [f"| {' | '.join(['step', *(name for name, _, _ in columns)])} |", "|---" * (len(columns) + 1) + "|"]
    for row in shown:
        cells = [f"{row['step']}", *(_cell(row.get(key), form) for _, key, form in columns)]
        bold = "**" if row is kept else ""
        lines.append("| " + " | ".join(f"{bold}{cell}{bold}" if cell else "" for cell in cells) + " |")
    said = "The weights here are those of the bold row, judged as they were trained."
    if kept is None:
        said = f"The weights here are those of step {facts.step}, at which no evaluation was made."
    said += f" {len(shown)} of {len(rows)} evaluations are shown." if len(shown) < len(rows) else ""
    return "\n".join(lines) + f"\n\n{said}"


def _snippets(facts: CardFacts) -> list[str]:
    if facts.form == "gguf":
        return _gguf_snippets(facts)
    kind = "AutoModelForImageTextToText" if facts.multimodal else "AutoModelForCausalLM"
    kind = "AutoModelForSeq2SeqLM" if facts.encoder_decoder else kind
    kind = "AutoModelForSequenceClassification" if facts.config.head.name != "lm" else kind
    revision = f", revision={facts.revision!r}" if facts.revision else ""
    use = _torch_use(facts)
    fetched = f"snapshot_download({facts.repo!r}{revision})"
    if facts.form == "merged":
        plain = f"import tpu_tune\nfrom huggingface_hub import snapshot_download\n\nmodel = tpu_tune.load({fetched})"
        torch = (
            f"from transformers import {kind}, AutoTokenizer\n\n"
            f"tokenizer = AutoTokenizer.from_pretrained({facts.repo!r}{revision})\n"
            f"model = {kind}.from_pretrained({facts.repo!r}{revision})\n{use}"
        )
        return [_code("With transformers:", torch), _code("With tpu_tune:", f"{plain}\n{_use(facts)}")]
    base = facts.base.hub_id or facts.base.name
    note = "" if facts.base.hub_id else "  # write here where the base is"
    load = f"base = {base!r}{note}\nadapter = {fetched}\n"
    quantize = facts.config.quantize.format
    own_base = facts.config.lora.init_lora_weights in STARTS  # its quantized base is not the model's
    if (
        quantize == "none"
        or own_base
        or any(configuration.config_get(facts.config, key) != value for key, value in _LOADED_AS_TRAINED.items())
    ):
        quantize = ""
    plain = (
        "import tpu_tune\nfrom huggingface_hub import snapshot_download\n\n"
        f"{load}model = tpu_tune.load(base, adapter=adapter{f', quantize={quantize!r}' if quantize else ''})\n"
        f"{_use(facts)}"
    )
    caption = "With transformers and PEFT:"
    if facts.base.kind == "gguf" and not facts.base.hub_id:
        caption = "With transformers and PEFT, which need the base as a Hugging Face model:"
    words = "adapter" if facts.own_tokenizer else "base"
    grown = "model.resize_token_embeddings(max(len(tokenizer), model.get_input_embeddings().num_embeddings))\n"
    torch = (
        "from huggingface_hub import snapshot_download\nfrom peft import PeftModel\n"
        f"from transformers import {kind}, AutoTokenizer\n\n{load}"
        f"tokenizer = AutoTokenizer.from_pretrained({words})\n"
        f"model = {kind}.from_pretrained(base{_label_count(facts)})\n"
        f"{grown if facts.added_tokens else ''}model = PeftModel.from_pretrained(model, adapter)\n{use}"
    )
    return [_code(caption, torch), _code("With tpu_tune, as it was trained:" if quantize else "With tpu_tune:", plain)]


def _gguf_snippets(facts: CardFacts) -> list[str]:
    revision = f", revision={facts.revision!r}" if facts.revision else ""
    branch = f" --revision {facts.revision}" if facts.revision else ""
    shell = (
        f"hf download {facts.repo} {facts.gguf_file}{branch} --local-dir .\n"
        f'llama-cli -m {facts.gguf_file} -p "What is AI?"'
    )
    plain = (
        "import tpu_tune\nfrom huggingface_hub import hf_hub_download\n\n"
        f"model = tpu_tune.load(hf_hub_download({facts.repo!r}, {facts.gguf_file!r}{revision}))\n{_use(facts)}"
    )
    return [_code("With llama.cpp:", shell, "bash"), _code("With tpu_tune:", plain)]


def _label_count(facts: CardFacts) -> str:
    """Arguments that give transformers' base the head that an adapter trains; labels' names are in the card alone."""
    head = facts.config.head
    if head.name == "lm":
        return ""
    names = dict(enumerate(head.labels)) if head.name == "classification" else {0: "reward"}
    return f", num_labels={len(names)}, id2label={names!r}"


def _use(facts: CardFacts) -> str:
    if facts.config.head.name != "lm":
        return "print(model.classify(['What is AI?'])[0])"
    return f"print(model.generate([{_asked(facts)!r}]{'' if _is_chat(facts) else ', chat=False'})[0])"


def _torch_use(facts: CardFacts) -> str:
    if facts.config.head.name != "lm":
        chat = f"inputs = tokenizer({_asked(facts)!r}, return_tensors='pt')"
        return f"{chat}\nprint(model(**inputs).logits[0], model.config.id2label)"
    if _is_chat(facts):
        inputs = (
            "chat = [{'role': 'user', 'content': 'What is AI?'}]\n"
            "inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, "
            "return_tensors='pt')"
        )
    else:
        inputs = f"inputs = tokenizer({_asked(facts)!r}, return_tensors='pt')"
    return f"{inputs}\nprint(tokenizer.decode(model.generate(**inputs, max_new_tokens=128)[0]))"


def _is_chat(facts: CardFacts) -> bool:
    return _taught(facts) == CHAT and not facts.encoder_decoder


def _asked(facts: CardFacts) -> str:
    return in_words(_taught(facts), "What is AI?")


def _taught(facts: CardFacts) -> str:
    counts = (facts.summary.get("data") or {}).get("train")
    return taught_as(counts or {"format": facts.config.data.format})


def _code(caption: str, text: str, language: str = "python") -> str:
    return f"{caption}\n\n```{language}\n{text}\n```"


def _hub_data(facts: CardFacts) -> str:
    train = source_paths(facts.config.data.train)
    return hub_id(train[0], facts.run, facts.config.output_dir) if len(train) == 1 else ""


def _names(sources: Any) -> str:
    """The public names of data.train or data.eval."""
    return ", ".join(map(base_name, source_paths(sources)))


def _evaluations(metrics: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in metrics if _finite(row.get("eval_loss")) and "step" in row]


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _cell(value: Any, form: str) -> str:
    return format(value, form) if _finite(value) else ""
