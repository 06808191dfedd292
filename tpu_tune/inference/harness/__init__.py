"""A model class for lm-evaluation-harness, so that every task of the harness runs on a run directory or any model here.

    pip install -e ".[lm-eval]"
    python -m tpu_tune.inference.harness --model tpu_tune --model_args pretrained=output/quickstart --tasks hellaswag

is `lm_eval` with this class registered: the harness (0.4) finds models in its own list or by a decorator alone, so its
program is started from here. From Python, importing this module registers the class for `lm_eval.simple_evaluate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tpu_tune.checkpoints.template_limits import template_errors
from tpu_tune.checkpoints.tokenizers import encode_text
from tpu_tune.errors import UserError
from tpu_tune.inference import scoring
from tpu_tune.inference.generation import Sampling, generate_ids
from tpu_tune.inference.run_model import load_any

try:
    import lm_eval.models  # noqa: F401 - fills the harness's list, which a name of ours alone would leave empty
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise UserError(f'lm-evaluation-harness is not installed ({error}); pip install "tpu_tune[lm-eval]"') from None

_NEW_TOKENS = 256  # the harness's own default
_ROWS = 16  # prompts that are answered together


@register_model("tpu_tune")
class TpuTuneLM(LM):
    """A model or a run directory, as the harness sees it.

    Args:
      pretrained: run directory, Hugging Face id, local directory or .gguf file.
      adapter: a PEFT adapter directory.
      dtype: float32 | bfloat16 | float16; by default the run's own, float32 of a model.
      quantize: none | int8 | int4 | nf4 | mxfp4; by default as the run stored its base.
      step: a checkpoint of the run: its step, last or best; by default what the run ended with.
      batch_size: rows that go through the model together; "auto" or 1, the harness's default, leave it to us.
      max_batch_size, device: taken and not used: jax finds its device itself.
    """

    def __init__(
        self,
        pretrained: str,
        adapter: str | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        step: int | str | None = None,
    ):
        super().__init__()
        self._model = load_any(pretrained, dtype, quantize, adapter, step=step)
        self.tokenizer = self._model.tokenizer
        rows = int(batch_size) if str(batch_size).isdigit() else 0
        self._batch_tokens = rows * scoring.max_length(self._model) if rows > 1 else scoring.BATCH_TOKENS
        self._rows = rows if rows > 1 else _ROWS

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether greedy decoding writes it) of each (context, continuation)."""
        pairs = [request.args for request in requests]
        scores = scoring.score_continuations(self._model, pairs, self._batch_tokens)
        results = [
            (float(value), bool(is_greedy))
            for value, is_greedy in zip(scores.log_likelihood, scores.is_greedy, strict=True)
        ]
        return self._remembered("loglikelihood", requests, results)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, in windows where it is longer than the model."""
        rows, counts = [], []
        for request in requests:
            windows = scoring.rolling_rows(self._model, encode_text(self.tokenizer, request.args[0]))
            rows += windows
            counts.append(len(windows))
        values = iter(scoring.score(self._model, rows, batch_tokens=self._batch_tokens).log_likelihood)
        results = [float(sum(next(values) for _ in range(count))) for count in counts]
        return self._remembered("loglikelihood_rolling", requests, results)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return an answer to each context, up to one of its stop strings."""
        results = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        for members in groups.values():
            settings = requests[members[0]].args[1]
            sampling, stops = _sampling(settings), _stops(settings)
            room = scoring.max_length(self._model) - sampling.max_new_tokens
            if room < 1:
                raise UserError(
                    f"{sampling.max_new_tokens} new tokens leave no room for a context: this model has "
                    f"{scoring.max_length(self._model)} positions"
                )
            prompts = {number: self._model.encode_prompt(requests[number].args[0])[-room:] for number in members}
            order = sorted(members, key=lambda number: -len(prompts[number]))
            for start in range(0, len(order), self._rows):
                numbers = order[start : start + self._rows]
                for number, answer in zip(numbers, self._answers([prompts[n] for n in numbers], sampling), strict=True):
                    for stop in stops:
                        answer = answer.split(stop)[0]
                    results[number] = answer
        return self._remembered("generate_until", requests, results)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a chat as the tokenizer's template writes it."""
        with template_errors(
            self.tokenizer.chat_template or "", lambda reason: UserError(f"the chat template refuses a task ({reason})")
        ):
            return self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self._model.chat_template_kwargs,
            )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template's text, for the harness's records."""
        return self.tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """What the harness's cache tells tokenizers apart by."""
        return self._model.source.path.replace("/", "__")

    def _answers(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[str]:
        model = self._model
        answers = generate_ids(model.architecture, model.params, prompts, sampling, model.ends, model.dtype)
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]

    def _remembered(self, what: str, requests: Sequence[Instance], results: list) -> list:
        """Hand results to the harness's cache (`--use_cache`)."""
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial(what, request.args, result)
        return results


def _sampling(settings: dict[str, Any]) -> Sampling:
    """The harness's generation settings as ours: greedy unless `do_sample` or a temperature says otherwise."""
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    length = next((int(settings[name]) for name in names if settings.get(name) is not None), _NEW_TOKENS)
    temperature = float(settings.get("temperature") or 0.0)
    if settings.get("do_sample") is False:
        temperature = 0.0
    elif settings.get("do_sample") and settings.get("temperature") is None:
        temperature = 1.0
    return Sampling(length, temperature, int(settings.get("top_k") or 0), float(settings.get("top_p") or 1.0))


def _stops(settings: dict[str, Any]) -> list[str]:
    stops = settings.get("until") or []
    return [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop]
