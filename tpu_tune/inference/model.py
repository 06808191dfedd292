"""`load(path)`: a model for notebooks and scripts: callable on token ids, with its tokenizer and its tree."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tpu_tune.checkpoints import peft
from tpu_tune.checkpoints.adapter_base import base_of_adapter
from tpu_tune.checkpoints.chat_template import with_template_of
from tpu_tune.checkpoints.heads import pad_token
from tpu_tune.checkpoints.params import load_params, open_architecture
from tpu_tune.checkpoints.prompts import CHAT, in_words, recorded
from tpu_tune.checkpoints.source import open_source
from tpu_tune.checkpoints.tokenizers import encode_text, with_bos
from tpu_tune.checkpoints.vocabulary import with_tokens_of
from tpu_tune.checkpoints.weight_source import WeightSource
from tpu_tune.errors import UserError
from tpu_tune.inference.generation import Sampling, check_writes, encode_prompt, end_tokens, generate
from tpu_tune.models import Architecture, Decoder, Execution, check_length, encode, label_names
from tpu_tune.tensors import FORMATS
from tpu_tune.transforms import LoraConfig, QuantizeConfig, Targets, find_targets

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model.

    Attributes:
      architecture: the model's family and sizes.
      params: path -> leaf; adapters stand in it as `LoraTensor` leaves.
      dtype: the activations' dtype.
      source: the opened model that the weights were read from.
      targets: the modules that the adapter changes, or None.
      always_bos: plain prompts begin with BOS even where the tokenizer adds none (`data.add_bos_token=always`).
      chat_template_kwargs: variables of the chat template (`data.chat_template_kwargs`).
      taught: how the rows that it was trained on asked (`checkpoints.prompts`); "" where that is not known.
    """

    architecture: Architecture
    params: dict[str, Any]
    dtype: Any
    source: WeightSource
    targets: Targets | None = None
    always_bos: bool = False
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    taught: str = ""

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer, chat template included; it is loaded when it is first asked for.

        Raises:
          UserError: the model has none, or none that can be read.
        """
        return self.source.load_tokenizer()

    def __call__(self, input_ids: Any, decoder_input_ids: Any = None) -> Float[Array, "B T V"]:
        """Return the next token's logits (float32) at every position of `input_ids` (B, T).

        Of a classifier or a reward model, (B, labels): its logits at each row's last token that is not padding
        (`pad_token_id`), as transformers gives them; pad on the right.

        Args:
          input_ids: token ids; of an encoder-decoder, the encoder's.
          decoder_input_ids: for an encoder-decoder, its answer so far, from its start token on, (B, T).

        Raises:
          UserError: ids that are not (batch, time), or `decoder_input_ids` where there is no encoder, or none where
            there is.
        """
        if (decoder_input_ids is None) != (self.architecture.encoder is None):
            needs = "needs decoder_input_ids too" if self.architecture.encoder else "takes no decoder_input_ids"
            raise UserError(f"this {self.architecture.family} model {needs}")
        inputs = {"input_ids": input_ids, "decoder_input_ids": decoder_input_ids}
        arrays = {name: jnp.asarray(np.asarray(ids), jnp.int32) for name, ids in inputs.items() if ids is not None}
        for name, ids in arrays.items():
            if ids.ndim != 2:
                raise UserError(f"{name} has shape {ids.shape}; give (batch, time)")
        check_length(self.architecture, list(arrays.values())[-1].shape[1])
        found = logits(self.architecture, self.dtype, self.params, *arrays.values())
        return found if not self.architecture.num_labels else found[jnp.arange(len(found)), self._last(input_ids)]

    def _last(self, input_ids: Any) -> Int[np.ndarray, "B"]:
        """Return the place of each row's last token that is not padding."""
        ids = np.asarray(input_ids)
        return np.max(np.where(ids == pad_token(self.source), 0, np.arange(ids.shape[1])), axis=1)

    @property
    def labels(self) -> list[str]:
        """The labels' names of a classifier or a reward model, in order."""
        return label_names(self.source.config)

    def classify(self, texts: Sequence[str | Sequence[Mapping[str, Any]]]) -> list[dict[str, float]]:
        """Return label -> probability of each text, by its `problem_type`; of a regression or a reward the number.

        Args:
          texts: plain texts, or chats as lists of messages, read as in training: a plain text as the tokenizer encodes
            it, a chat through the chat template. They go through the model one by one.

        Raises:
          UserError: the model is no classifier, or a text is empty or longer than the model has positions for.
        """
        if not self.architecture.num_labels:
            raise UserError("this is a language model, which has no labels; load a classifier, or a run of one")
        kind = self.source.config.get("problem_type")
        found = []
        for text in texts:
            chat = not isinstance(text, str)
            ids = (
                self.tokenizer.apply_chat_template(list(text), tokenize=False, **self.chat_template_kwargs)
                if chat
                else text
            )
            ids = (
                encode_text(self.tokenizer, ids)
                if not chat
                else self.tokenizer(ids, add_special_tokens=False).input_ids
            )
            if not ids:
                raise UserError("a text to classify is empty")
            scores = self(np.asarray([ids]))[0]
            if kind == "multi_label_classification":
                scores = jax.nn.sigmoid(scores)
            elif kind != "regression" and len(scores) > 1:
                scores = jax.nn.softmax(scores)
            found.append(dict(zip(self.labels, map(float, scores), strict=True)))
        return found

    def generate(self, prompts: Sequence[str], sampling: Sampling | None = None, chat: bool | None = None) -> list[str]:
        """Return one answer a prompt.

        Args:
          prompts: the user's words, or with `chat=False` plain text to go on with.
          sampling: length, temperature, top-k, top-p, seed; greedy by default.
          chat: put each prompt into the tokenizer's chat template, or not; by default ask as the rows of its training
            did, where they are known, else through the template.
        """
        check_writes(self.architecture)  # before anything is said of its chat template
        encoded = [self.encode_prompt(prompt, chat) for prompt in prompts]
        return generate(
            self.architecture, self.params, self.tokenizer, self.dtype, encoded, sampling or Sampling(), self.ends
        )

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """The ids that end an answer (see `end_tokens`)."""
        return end_tokens(self.tokenizer, self.source)

    def encode_prompt(self, text: str, chat: bool | None = False) -> list[int]:
        """Return the ids of a prompt (`chat`) or of plain text to go on from, as in training; None: see `generate`.

        What an encoder reads is no turn of a chat; it ends in EOS.
        """
        if chat is None:
            chat, text = self.taught in ("", CHAT), in_words(self.taught, text)
        if chat and self.architecture.encoder is None:
            return encode_prompt(self.tokenizer, text, True, self.chat_template_kwargs)
        ids = encode_text(self.tokenizer, with_bos(self.tokenizer, text) if self.always_bos else text)
        end = self.tokenizer.eos_token_id
        return ids if self.architecture.encoder is None or end is None or ids[-1:] == [end] else [*ids, end]


def load(
    path: str,
    dtype: str = "float32",
    quantize: str | None = None,
    adapter: str | None = None,
    over: Model | None = None,
) -> Model:
    """Load a model for use.

    Args:
      path: Hugging Face id, local directory, or .gguf file.
      dtype: the dtype of activations and unquantized weights: float32, bfloat16 or float16.
      quantize: int8, int4, nf4 or mxfp4 for the linear layers (groups of 64, mxfp4 of 32; double quantization at
        four bits).
      adapter: a PEFT adapter directory; special tokens that its run added are added here too, and the chat template
        beside it is used.
      over: a model without an adapter, whose weights are used where the same ones are read, so that they stand in
        memory once.

    Raises:
      UserError: nothing usable at `path`, an unknown dtype or format, an adapter that does not fit.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is '{dtype}'; it must be one of {', '.join(DTYPES)}")
    if quantize not in (None, "none", *FORMATS):
        raise UserError(f"quantize is '{quantize}'; it must be one of {', '.join(FORMATS)}")
    source = open_source(path)
    if adapter:
        source = base_of_adapter(with_template_of(with_tokens_of(source, adapter), adapter), adapter)
    return load_source(source, dtype, QuantizeConfig(quantize or "none"), adapter, over=over)


def load_source(
    source: WeightSource,
    dtype: str,
    quantization: QuantizeConfig,
    adapter: str | None = None,
    read_adapter: Callable[[str, Architecture], tuple[LoraConfig, dict[str, Any]]] | None = None,
    over: Model | None = None,
) -> Model:
    """Load an opened model: see `load`; `quantization` says in full what is quantized and how.

    `read_adapter` reads an adapter that the source is made for; by default `peft.read_adapter`.
    """
    arch = open_architecture(source)
    # The adapter first: what is wrong with it is reported before the weights are read.
    read_adapter = read_adapter or functools.partial(peft.read_adapter, over_its_base=source.base_of == adapter)
    spec, trained = read_adapter(adapter, arch) if adapter else (None, None)
    place = functools.partial(_placed, over.params) if over else None
    params = load_params(source, arch, jnp.dtype(dtype), quantization, place)
    targets = None
    if spec is not None:
        targets = find_targets(arch.modules(), spec, arch.default_targets)
        params = targets.combine(*targets.split(params, trained))
    taught = "" if adapter else recorded(source.config)  # an adapter may have been taught in another form than its base
    return Model(arch, params, jnp.dtype(dtype), source, targets, taught=taught)


def _placed(there: Mapping[str, Any], path: str, leaf: Any) -> Any:
    """Return a leaf on the device: the one that is there already, where it is the same."""
    old = there.get(path)
    if jax.tree.structure(old) == jax.tree.structure(leaf) and all(
        one.dtype == other.dtype and np.array_equal(one, other)
        for one, other in zip(jax.tree.leaves(old), jax.tree.leaves(leaf), strict=True)
    ):
        return old
    return jax.tree.map(jnp.asarray, leaf)


@functools.partial(jax.jit, static_argnums=(0, 1))
def logits(
    arch: Architecture, dtype: Any, params: dict[str, Any], ids: Int[Array, "B S"], decoder_ids: Array | None = None
) -> Float[Array, "B T V"]:
    """Return float32 logits of `ids`, or of `decoder_ids` where `ids` is for an encoder; `dtype`: of activations."""
    encoder_output = None
    if arch.encoder:
        encoder_output, ids = encode(arch, params, Execution(dtype), ids, jnp.ones_like(ids)), decoder_ids
    return Decoder(arch, params, Execution(dtype))(ids, encoder_output=encoder_output)
