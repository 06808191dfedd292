"""The models of a server: a base and its adapters, each by its name, over weights that stand in memory once."""

from __future__ import annotations

import os
from collections.abc import Sequence

from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.errors import UserError
from tpu_tune.inference.generation import check_writes
from tpu_tune.inference.model import Model
from tpu_tune.inference.run_model import load_any
from tpu_tune.inference.run_result import Step


def load_models(
    path: str,
    adapters: Sequence[str] = (),
    dtype: str | None = None,
    quantize: str | None = None,
    step: Step = None,
    name: str | None = None,
) -> dict[str, Model]:
    """Return the models by name, the base first: what `path` names, and it with each of the adapters.

    Args:
      path: run directory, Hugging Face id, model directory or .gguf file. A LoRA run gives two models: its base, and
        itself under the directory's name.
      adapters: `NAME=DIR`, or `DIR` whose own name is taken.
      dtype, quantize, step: see `load_any`.
      name: of what `path` names; by default its own, without directories and `.gguf`, a Hugging Face id as it is.

    Raises:
      UserError: nothing usable there, two models of one name, or a model that cannot be served.
    """
    run = RunDirectory(path)
    config = run.config() if run.exists() else None
    own = name or (path if _is_id(path) else _name(path))
    if config is not None and config.method == "lora":
        models = {_name(config.model.path): load_any(path, dtype, quantize, before=True)}
        named = [(own, None), *map(_named, adapters)]
    else:
        models = {own: load_any(path, dtype, quantize, step=step)}
        named = [*map(_named, adapters)]
    base = next(iter(models.values()))
    for its_name, adapter in named:
        if its_name in models:
            raise UserError(f"two models are called '{its_name}'; give one another name (--adapter NAME=DIR, --name)")
        its_step = step if adapter is None else None
        models[its_name] = load_any(path, dtype, quantize, adapter, step=its_step, over=base)
    for model in models.values():
        check_writes(model.architecture)
        if model.architecture.encoder:
            raise UserError(
                f"{path} is an encoder-decoder ({model.architecture.family}), which serve cannot run; "
                "tpu-tune generate answers prompts with it"
            )
        model.tokenizer  # noqa: B018 - what is wrong with it is said now
    return models


def _named(adapter: str) -> tuple[str, str]:
    """Return name and directory of `NAME=DIR` or `DIR`."""
    name, equals, path = adapter.partition("=")
    if not equals or "/" in name:
        return _name(adapter), adapter
    if not name or not path:
        raise UserError(f"--adapter {adapter}: give NAME=DIR")
    return name, path


def _name(path: str) -> str:
    """Return a path's last part; of a run's `adapter/` and `model/` the run's."""
    parts = [part for part in os.fspath(path).rstrip("/").split("/") if part not in ("", ".")]
    if len(parts) > 1 and parts[-1] in ("adapter", "model"):
        parts.pop()
    return (parts[-1] if parts else "model").removesuffix(".gguf")


def _is_id(path: str) -> bool:
    return path.count("/") == 1 and not os.path.exists(path) and not path.startswith((".", "/", "~"))
