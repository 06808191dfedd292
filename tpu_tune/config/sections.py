"""Every key of the configuration: its type, default, meaning and bounds, one dataclass a section.

Keys keep Hugging Face's names where Hugging Face has one, and PEFT's in `lora` but for `rank` (r) and `alpha`.
`Literal` lists the choices. Numbers are float32's, and whole numbers below 2^31, unless a line says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tpu_tune.config.engine import key

Pattern = str | Sequence[str]  # a list of names or ends of names, a regular expression, or "all-linear"
TokenIndices = Sequence[int] | Mapping[str, Sequence[int]]  # of the input embedding, or by module
Sources = str | Sequence[str | Mapping[str, Any]]  # a path, or several: paths, or {path, name, weight or count}
Dtype = Literal["bfloat16", "float16", "float32"]
Attention = Literal["auto", "reference", "blockwise", "splash", "cudnn", "pallas"]
RowFormat = Literal[
    "auto",
    "text",
    "input-output",
    "prompt-generation",
    "prompt-completion",
    "alpaca",
    "sharegpt",
    "messages",
    "preference",
    "prompt-completion-label",
    "kto-tag",
    "auto-as-chat",
    "input-output-as-chat",
    "prompt-generation-as-chat",
    "prompt-completion-as-chat",
    "alpaca-as-chat",
    "preference-as-chat",
    "prompt-completion-label-as-chat",
    "kto-tag-as-chat",
]
Strategy = Literal["no", "steps", "epoch"]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
SEED = {"at_least": -1, "at_most": 2**32 - 1}


@dataclass(frozen=True)
class Model:
    """The model to start from, and how it computes."""

    path: str = key("", "Hugging Face id, a local directory, or a .gguf file")
    dtype: Dtype = key("bfloat16", "of activations; float16 brings dynamic loss scaling")
    param_dtype: Literal["auto", Dtype] = key("auto", "of base weights: float32 under full, else model.dtype")
    attention: Attention = key("auto", "splash: TPU v4 and later; cudnn, pallas: GPUs of compute capability 8.0")
    # xla dequantizes whole matrices, pieces parts of them, pallas (TPUs) inside the matmul; auto on a v3: pieces.
    quantized_matmul: Literal["auto", "xla", "pieces", "pallas"] = key("auto", "how quantized weights are multiplied")
    # full keeps each layer's input, offload keeps it on the host, dots what linear layers, splash and strips give,
    # none all; auto: `tpu-tune train` takes the fastest that fits the device and records it, else full.
    remat: Literal["auto", "none", "full", "dots", "offload"] = key("auto", "what the backward pass computes again")
    # Where remat=auto chooses, and with remat=full, 0 is as many as fit.
    token_chunk_size: int = key(0, "a device's tokens in a layer at a time; 0: all to 8,192, then 4,096", at_least=0)
    adapter: str = key("", "start from this PEFT adapter directory instead of a fresh one")
    add_special_tokens: Sequence[str] = key([], 'e.g. ["<|im_start|>"]; new rows are the mean of the old ones')
    train_added_tokens: bool = key(False, "train their rows under method=lora too; full trains every row anyway")


@dataclass(frozen=True)
class QuantizeConfig:
    """Storage of the frozen base weights, under method=lora."""

    format: Literal["none", "int8", "int4", "nf4", "mxfp4"] = key("none", "number format of the weights")
    group_size: int = key(64, "rows of the input dimension that share one scale (mxfp4: always 32)", above=0)
    double_quant: bool = key(True, "store the scales themselves in 8 bits (nf4 and int4)")
    symmetric: bool = key(False, "int4 with 15 levels instead of 16: as runs from before had it")
    calibration: int = key(0, "rows of data.train by whose activations weights are rounded (GPTQ); 0: none", at_least=0)
    include: Pattern = key(["all-linear"], "names to quantize, matched like lora.target_modules")
    exclude: Pattern = key([], "names to leave alone; head and embeddings are only taken when included by name")


@dataclass(frozen=True)
class LoraConfig:
    """Adapters: what PEFT calls LoraConfig."""

    rank: int = key(8, "PEFT's r", above=0)
    alpha: float = key(16.0, "PEFT's lora_alpha; the update is scaled by alpha / rank", at_least=0)
    dropout: float = key(0.0, "on the adapter's input only", at_least=0, below=1)
    target_modules: Pattern = key("all-linear", 'names or ends of names, a regex, "all-linear", or "": PEFT\'s default')
    exclude_modules: Pattern = key([], "list or regex, taken out of target_modules")
    bias: Literal["none", "all", "lora_only"] = key("none", "which biases are trained")
    modules_to_save: Sequence[str] = key([], "modules trained in full and saved with the adapter")
    trainable_token_indices: TokenIndices = key([], "token ids, or {module: ids}, whose rows are trained", at_least=0)
    layers_to_transform: Sequence[int] = key([], "layer indices; empty means every layer", at_least=0)
    layers_pattern: str = key("", "name of the layer list, where PEFT's general pattern does not find the index")
    rank_pattern: Mapping[str, int] = key({}, "name or regex -> rank, overrides rank", above=0)
    alpha_pattern: Mapping[str, float] = key({}, "name or regex -> alpha, overrides alpha", at_least=0)
    use_rslora: bool = key(False, "scale by alpha / sqrt(rank)")
    use_dora: bool = key(False, "weight-decomposed LoRA")
    # pissa, olora: from the weight's largest parts, which leave the base; loftq: from what quantizing it has lost.
    init_lora_weights: Literal["true", "gaussian", "pissa", "olora", "loftq"] = key(
        "true", "of A: Kaiming uniform, or normal, and B is zero; or both from the weight"
    )


@dataclass(frozen=True)
class Data:
    """The rows, and how they become tokens."""

    # .jsonl, .json, .csv, .parquet, .arrow (also tokenized), a directory of them (local or gs://), or a hub id.
    # Or a list of them, e.g. ["a.jsonl", {"path": "b.jsonl", "count": 500}], with weights or counts an epoch.
    train: Sources = key("", "file, directory or hub id of the rows")
    mix_strategy: Literal["concat", "interleave_under", "interleave_over", "interleave_once"] = key(
        "concat", "of a list: all rows or counts; by weights until one source was shown whole, or until all were"
    )
    eval: Sources = key("", "the same; empty: a seeded split of data.train that is never trained on")
    # The number holds out rows of data.train also where the data brings evaluation rows of its own.
    eval_dataset_size: int = key(0, "the number of rows instead of the share; 0: by eval_ratio", at_least=0)
    max_train_samples: int = key(0, "train on the first so many of the rows only; 0: all", at_least=0)
    max_eval_samples: int = key(0, "evaluate on the first so many of the rows only; 0: all", at_least=0)
    eval_ratio: float = key(0.05, "share of the rows taken for that split; 0: no evaluation", at_least=0, below=1)
    format: RowFormat = key("auto", "of the rows; auto: by each one's keys; auto-as-chat: pairs as turns of a chat")
    columns: Mapping[str, str] = key({}, 'the file\'s key -> the format\'s key, e.g. {"question": "input"}')
    chat_template: str = key("", "Jinja text or file; empty: the tokenizer's own")
    chat_template_kwargs: Mapping[str, Any] = key({}, 'e.g. {"enable_thinking": False}; a row\'s own come first')
    response_markers: Sequence[str] = key([], "text rows: loss only after one of these, up to an instruction marker")
    instruction_markers: Sequence[str] = key([], "strings that end a response")
    add_bos_token: Literal["auto", "always"] = key("auto", "before a pair: as the tokenizer does it, or as QLoRA")
    max_length: int = key(2048, "tokens a row; of an encoder-decoder, of the input and of the output each", above=0)
    packing: bool = key(True, "several documents a row, each attending to itself; an encoder-decoder has one a row")
    train_on_source: bool = key(False, "loss on the prompt too")
    source_max_len: int = key(0, "truncate prompts (on the right) to this; 0: only max_length", at_least=0)
    target_max_len: int = key(0, "truncate answers to this; 0: only max_length", at_least=0)
    skip_bad_rows: bool = key(False, "go on at rows that cannot be read, and count them")
    data_seed: int = key(42, "order of the rows; -1 draws one and records it", **SEED)
    num_workers: int = key(0, "processes that tokenize; 0: one a core", at_least=0)
    cache_dir: str = key("", "tokenized data; empty: $TPU_TUNE_CACHE or ~/.cache/tpu_tune")


@dataclass(frozen=True)
class Objective:
    """What is minimised."""

    # Of answers to judge: pairs of a chosen and a rejected one (kto: single ones with a label).
    name: str = key("sft", "sft: cross-entropy of the marked tokens; dpo, orpo, simpo, cpo, kto: of answers to judge")
    loss_type: str | Sequence[str] = key("", "dpo, cpo, kto: TRL's names, for dpo also a list; empty: the usual one")
    loss_weights: Sequence[float] = key([], "dpo: weights of a list of loss types; empty: 1 each")
    beta: float = key(0.1, "how strongly answers are held apart, or near the reference; simpo wants 2 to 10", above=0)
    label_smoothing: float = key(0.0, "share of pairs that may be the wrong way round", at_least=0, below=0.5)
    sft_weight: float = key(0.0, "dpo: weight of the chosen answers' cross-entropy beside it (RPO)", at_least=0)
    simpo_gamma: float = key(0.5, "simpo: margin that the chosen answer's reward should have", at_least=0)
    cpo_alpha: float = key(1.0, "cpo: weight of the chosen answers' cross-entropy", at_least=0)
    desirable_weight: float = key(1.0, "kto: weight of desirable answers", at_least=0)
    undesirable_weight: float = key(1.0, "kto: weight of undesirable answers", at_least=0)
    reference: str = key("", "dpo, kto: a model or adapter directory; empty: the model as training starts")
    # -1: under method=full config.json's, where it says output_router_logits; else 0.
    router_aux_loss_coef: float = key(-1.0, "weight of the experts' load-balancing loss; -1: auto", at_least=0, also=-1)


@dataclass(frozen=True)
class Head:
    """What stands on the last hidden states."""

    name: Literal["lm", "classification", "reward"] = key("lm", "next tokens, or a text's class, or its reward")
    num_labels: int = key(0, "outputs of a classification; 0: as the labels, the model or the rows have", at_least=0)
    labels: Sequence[str] = key([], "the classes' names in order; empty: the model's own, or those in the rows")
    problem_type: Literal["auto", ProblemType] = key("auto", "as in Hugging Face; auto: by the rows' labels")
    center_rewards_coefficient: float = key(0.0, "TRL's: pulls a pair's summed rewards to zero (0.01)", at_least=0)


@dataclass(frozen=True)
class Train:
    """The training itself: length, optimizer, and what is logged, evaluated and saved when."""

    num_train_epochs: float = key(3.0, "passes over the data", at_least=0)
    max_steps: int = key(-1, "updates; overrides num_train_epochs when positive", at_least=-1)
    max_hours: float = key(
        0.0, "save and stop so many hours after the start; started again, it goes on; 0: no limit", at_least=0
    )
    per_device_train_batch_size: int = key(8, "rows a device and micro-batch", above=0)
    per_device_eval_batch_size: int = key(8, "rows a device and evaluation batch", above=0)
    gradient_accumulation_steps: int = key(1, "micro-batches an update", above=0)
    learning_rate: float = key(5e-5, "its highest value; the schedule does the rest", at_least=0)
    lr_scheduler_type: str = key("linear", "Hugging Face's names: constant, cosine, reduce_lr_on_plateau, ...")
    lr_scheduler_kwargs: Mapping[str, Any] = key({}, 'e.g. {"min_lr_rate": 0.1} for cosine_with_min_lr')
    warmup_steps: int = key(0, "updates in which the learning rate rises; 0: by warmup_ratio", at_least=0)
    warmup_ratio: float = key(0.0, "the same, as a share of all updates", at_least=0, at_most=1)
    optim: str = key("adamw", "or adamw_8bit, adafactor, sgd, lion, muon, schedule_free_adamw; HF's spellings too")
    adam_beta1: float = key(0.9, "decay of the gradient's mean", at_least=0, below=1)
    adam_beta2: float = key(0.999, "decay of its square's mean", at_least=0, below=1)
    adam_epsilon: float = key(1e-8, "added to the divisor", above=0)
    weight_decay: float = key(0.0, "not on biases and norm weights", at_least=0)
    loraplus_lr_ratio: float = key(0.0, "LoRA+: lora_B learns so much faster (16 is usual); 0: as fast", at_least=0)
    loraplus_lr_embedding: float = key(1e-6, "LoRA+: the rate of adapters of embeddings, as in PEFT", at_least=0)
    neftune_noise_alpha: float = key(0.0, "noise on training's embeddings (5 to 15 are usual); 0: none", at_least=0)
    max_grad_norm: float = key(1.0, "global norm, after accumulation; 0 turns clipping off", at_least=0)
    optim_offload: bool = key(False, "optimizer state waits in host memory and comes layer by layer; slower")
    loss_chunk_size: int = key(0, "a device's tokens with logits at a time; 0: 256 MiB, at most 1,024", at_least=0)
    max_nonfinite_steps: int = key(10, "end after so many updates in a row with a non-finite loss or gradient", above=0)
    # The three numbers of steps may be a share of the run, below 1, rounded up to a step as the Trainer does.
    logging_steps: int | float = key(10, "updates between rows of metrics.jsonl", above=0)
    logging_first_step: bool = key(True, "a row for the first update too")
    eval_strategy: Strategy = key("steps", "when to evaluate")
    eval_steps: int | float = key(100, "updates between evaluations", above=0)
    save_strategy: Strategy = key("steps", "when to save a checkpoint")
    save_steps: int | float = key(100, "updates between checkpoints", above=0)
    save_total_limit: int = key(2, "checkpoints to keep; 0: all", at_least=0)
    load_best_model_at_end: bool = key(False, "end with the weights of the smallest eval_loss, saved at once")
    early_stopping_patience: int = key(0, "evaluations without improvement; 0: never stop early", at_least=0)
    early_stopping_threshold: float = key(0.0, "improvements up to this do not count for the patience", at_least=0)
    sample_prompts: Sequence[str] = key([], "the report shows the model's answers to these before and after training")
    report_to: Sequence[str] = key([], "tensorboard, wandb; metrics.jsonl is always written")


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis; one may be -1: the rest of the devices."""

    data: int = key(1, "the batch is split, weights are copied", above=0, also=-1)
    fsdp: int = key(-1, "the batch is split, and so are the weights", above=0, also=-1)
    tensor: int = key(1, "each matrix is split", above=0, also=-1)
    sequence: int = key(1, "the tokens of each row are split", above=0, also=-1)


@dataclass(frozen=True)
class Config:
    """All of it."""

    output_dir: str = key("output", "the run directory, may be gs://: config.json, metrics.jsonl, checkpoints/...")
    method: str = key("lora", "full: train every weight; lora: adapters beside frozen ones")
    seed: int = key(42, "adapters' initial values and dropout; -1 draws one and records it", **SEED)
    model: Model = Model()
    quantize: QuantizeConfig = QuantizeConfig()
    lora: LoraConfig = LoraConfig()
    data: Data = Data()
    objective: Objective = Objective()
    head: Head = Head()
    train: Train = Train()
    mesh: Mesh = Mesh()
