"""From a run to a repository on the Hugging Face hub: its adapter, its merged model or a GGUF file, with a model card.

`prepared` gathers what would be uploaded, `upload` makes one commit of it. The files of a run go up from where they
lie; only a merged model is written, into a temporary directory that is removed whatever happens. So a push that fails
or is stopped leaves the run as it was, and the repository at its last commit. The token goes into the client and
nowhere else.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ml_collections import ConfigDict

from tpu_tune.checkpoints import json_text, storage
from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.checkpoints.tower_adapters import names_a_tower
from tpu_tune.checkpoints.vocabulary import RECORD
from tpu_tune.errors import UserError
from tpu_tune.inference import export
from tpu_tune.inference.card import CardFacts, model_card
from tpu_tune.inference.public_names import base_of, is_hub_id, scrubbed_json
from tpu_tune.inference.run_result import Step, find_step, result_of
from tpu_tune.models import WRAPPERS

_SECRET = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}")  # a token has 34 letters and digits
_TOKENS_AT = "https://huggingface.co/settings/tokens"


@dataclass(frozen=True)
class PushRequest:
    """What to push, and how.

    Attributes:
      repo: NAMESPACE/NAME; a NAME alone is the token's owner's.
      form: adapter | merged | gguf; a run that trained every weight has no adapter, so its model is meant.
      merge_base: original | dequantized.
      dtype: a merged model's dtype, "" for the original's.
      gguf_type: one of `gguf_mixtures.FORMATS`.
      revision: branch, "" for the main one.
      license: identifier for the card, "" for the base's own where that is known.
      base_model: hub id of the base, "" to go by the configuration.
      card_only: renew the card and the picture, and leave the weights.
      step: a checkpoint's (see `run_result.find_step`); None for what the run ended with.
    """

    repo: str
    form: str = "adapter"
    merge_base: str = "original"
    dtype: str = ""
    gguf_type: str = "f16"
    revision: str = ""
    license: str = ""
    base_model: str = ""
    card_only: bool = False
    step: Step = None


@dataclass(frozen=True)
class File:
    """One file of a repository: `name` in it, and where its bytes are, a path or the bytes themselves."""

    name: str
    content: str | bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else os.path.getsize(self.content)


def check(run: str, request: PushRequest) -> tuple[ConfigDict, PushRequest]:
    """Check a request against a run; return its configuration and the completed request.

    Raises:
      UserError: no run directory, a run with neither result nor checkpoint, a bad name, or a request that does not
        fit the run.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    directory = RunDirectory(run)
    config = directory.config()
    request = replace(request, step=find_step(directory, config, request.step))
    try:
        validate_repo_id(request.repo)
    except HFValidationError:
        raise UserError(
            f"--repo is '{request.repo}'; it must be NAMESPACE/NAME, of letters, digits, '-', '_' and '.', "
            "as in me/my-model"
        ) from None
    if request.base_model and not is_hub_id(request.base_model):
        raise UserError(f"--base-model is '{request.base_model}'; it must be a hub id, NAMESPACE/NAME")
    if request.license and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", request.license):
        raise UserError(
            f"--license is '{request.license}'; it must be an identifier such as apache-2.0, mit, llama3.1 or other "
            "(https://huggingface.co/docs/hub/repositories-licenses)"
        )
    if config.method != "lora" and request.form == "adapter":
        request = replace(request, form="merged")
    if request.dtype and config.method != "lora":
        raise UserError(f"--dtype: {run} trained every weight, and its model is pushed as it is")
    return config, request


def find_token() -> str:
    """Return the user's token, from $HF_TOKEN or from `hf auth login`.

    Raises:
      UserError: there is none.
    """
    from huggingface_hub import get_token

    with one_line_errors("the token cannot be had"):
        token = get_token()
    if not token:
        raise UserError(
            f"no Hugging Face token: make one with write access at {_TOKENS_AT}, then set HF_TOKEN or run "
            "`hf auth login`"
        )
    return token


@contextlib.contextmanager
def prepared(run: str, request: PushRequest) -> Iterator[tuple[list[File], dict[str, Any]]]:
    """Yield the files to upload, the card first, and figures of the merge; what was written for it is gone afterwards.

    Args:
      run: the run's directory; not changed.
      request: what to push, and how.

    Raises:
      UserError: as `check` and the exports raise it.
    """
    config, request = check(run, request)
    base = base_of(config, run, request.base_model)
    directory = RunDirectory(run)
    result = result_of(directory, config, request.step)
    curves = directory.file("curves.png")
    beside = [File("curves.png", storage.read_bytes(curves))] if storage.exists(curves) else []
    facts = CardFacts(
        request.repo,
        request.form,
        config,
        run,
        base,
        directory.metrics(),
        directory.summary(),
        license={"license": request.license} if request.license else base.license,
        encoder_decoder=_is_encoder_decoder(result),
        multimodal=_is_multimodal(result),
        added_tokens=storage.exists(os.path.join(result, RECORD)),
        own_tokenizer=storage.exists(os.path.join(result, "tokenizer_config.json")),
        has_curves=bool(beside),
        revision=request.revision,
        step=request.step,
        gguf_file=f"{request.repo.rpartition('/')[2]}-{request.gguf_type}.gguf" if request.form == "gguf" else "",
    )
    with contextlib.ExitStack() as stack:
        weights: list[File] = []
        figures: dict[str, Any] = {}
        if not request.card_only:
            if request.form == "gguf" or (request.form == "merged" and config.method == "lora"):
                written = os.path.join(stack.enter_context(_aside(run)), facts.gguf_file or "model")
                if request.form == "gguf":
                    figures = export.export_gguf(run, written, request.merge_base, request.gguf_type, request.step)
                    weights = [File(facts.gguf_file, written)]
                else:
                    figures = export.export_merged(run, written, request.merge_base, request.dtype, request.step)
                    weights = _files(written, base)
            else:
                weights = _files(storage.local_copy(result), base)
        merged = {} if config.method != "lora" and request.form == "merged" else figures
        card = masked(model_card(replace(facts, difference=merged)))
        yield [File("README.md", card.encode()), *beside, *weights], figures


def _aside(run: str) -> tempfile.TemporaryDirectory:
    """A directory for a merged model: in $TMPDIR if that is set, else beside the run, where models have room."""
    beside = tempfile.gettempdir() if storage.is_remote(run) else os.path.dirname(os.path.abspath(run))
    place = os.environ.get("TMPDIR") or beside
    try:
        return tempfile.TemporaryDirectory(prefix="tpu-tune-push-", dir=place)
    except OSError as error:
        raise UserError(
            f"{place} cannot be written ({error.strerror}); set TMPDIR to a directory with room for the model"
        ) from None


def open_repo(token: str, request: PushRequest, private: bool = False) -> PushRequest:
    """Make the repository and the branch if they do not exist; return the request with the repository's full name.

    Raises:
      UserError: the hub cannot be reached or refuses, or a repository that should be private is public.
    """
    from huggingface_hub import HfApi

    with one_line_errors(f"{request.repo} cannot be made", token, request.repo):
        api = HfApi(token=token)
        url = api.create_repo(request.repo, private=private or None, exist_ok=True)
        if private and api.model_info(url.repo_id).private is False:
            raise UserError(
                f"{url.repo_id} is there already and is public; choose another --repo, or leave --private out"
            )
        if request.revision:
            api.create_branch(url.repo_id, branch=request.revision, exist_ok=True)
    return replace(request, repo=url.repo_id)


def upload(token: str, request: PushRequest, files: Sequence[File], message: str) -> str:
    """Upload files as one commit on top of what the repository holds; return the commit's address.

    Raises:
      UserError: the hub cannot be reached, or refuses; the repository is then as it was.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    with one_line_errors(f"the upload to {request.repo} failed, and the repository is as it was", token, request.repo):
        operations = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.content) for file in files]
        commit = HfApi(token=token).create_commit(
            request.repo, operations, commit_message=masked(message, token), revision=request.revision or None
        )
    return str(commit.commit_url)


def masked(text: str, token: str = "") -> str:
    """Return text without the token, and without anything that looks like one."""
    return _SECRET.sub("***", text.replace(token, "***") if token else text)


@contextlib.contextmanager
def one_line_errors(what: str, token: str = "", repo: str = "") -> Iterator[None]:
    """Turn whatever the client raises into one line without the token.

    Raises:
      UserError: in its place.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the client's and its HTTP library's many errors
        reason = masked(_reason(error, repo), token)
    else:
        return
    # Outside of `except`, so that no traceback leads back to the client's message.
    raise UserError(f"{what}: {reason}")


def _reason(error: Exception, repo: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = getattr(error, "server_message", None) or next(iter(str(error).strip().splitlines()), "")
    said = " ".join(said.split())[:200] or type(error).__name__
    if status == 401:
        return f"the hub does not accept the token (401); make a new one with write access at {_TOKENS_AT}"
    if status == 403:
        return (
            f"the token may not write to {repo} (403: {said}); give it write access at {_TOKENS_AT}, or "
            "choose a --repo of your own"
        )
    if status is not None:
        return f"the hub answered {status}: {said}"
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set; unset it to push"
    return f"{type(error).__name__}: {said}; check the network and push again"


def _files(directory: str, base: Any) -> list[File]:
    """The files of a directory, sorted; JSON that would tell a local path is replaced by bytes that do not."""
    files = []
    for folder, folders, names in os.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = os.path.join(folder, name)
            inside = os.path.relpath(path, directory).replace(os.sep, "/")
            if not name.startswith(".") and inside != "README.md":  # the card takes its place
                files.append(File(inside, scrubbed_json(path, base) or path))
    return files


def _is_encoder_decoder(result: str) -> bool:
    return _settings(result, "adapter_config.json").get("task_type") == "SEQ_2_SEQ_LM" or (
        _settings(result, "config.json").get("model_type") == "t5"
    )


def _is_multimodal(result: str) -> bool:
    targets = _settings(result, "adapter_config.json").get("target_modules") or ""
    return names_a_tower(targets) or _settings(result, "config.json").get("model_type") in WRAPPERS


def _settings(result: str, name: str) -> dict[str, Any]:
    """A JSON file of a result; empty where there is none that can be read."""
    try:
        content = json_text.loads(storage.read_bytes(os.path.join(result, name)))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
