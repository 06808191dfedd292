"""What a pushed run may say in public: hub ids as they are; of a local path its last part, never the directories above.

A path in a configuration says how a user has arranged a disk, and often who the user is. `push` publishes, so that
every name it writes, into the card or into a JSON file beside the weights, goes through here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict

from tpu_tune.checkpoints import json_text, storage
from tpu_tune.checkpoints.gguf_file import open_gguf_file
from tpu_tune.config import source_paths
from tpu_tune.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PATH = re.compile(r"~[\w.-]*/|\.{0,2}/|\.{0,2}\\|[A-Za-z]:[\\/]|[a-z][a-z0-9+.-]*://")
_FILE = (".gguf", ".json", ".jsonl", ".csv", ".parquet", ".gz", ".txt", ".arrow")
_PATH_KEYS = (
    "output_dir",
    "model.path",
    "model.adapter",
    "data.train",
    "data.eval",
    "data.cache_dir",
    "data.chat_template",
)
_JSON_PATHS = (
    "_name_or_path", "name_or_path", "base_model_name_or_path", "special_tokens_map_file", "tokenizer_file",
    "vocab_file", "merges_file",
)  # fmt: skip
_LICENSE = ("license", "license_name", "license_link")
_LARGEST_JSON = 1 << 20  # beyond it a file is a vocabulary, which holds no paths


@dataclass(frozen=True)
class Base:
    """The model that a run began with.

    Attributes:
      name: its public name: its hub id, or the name of a file or directory.
      hub_id: on the Hugging Face hub, "" where that is not known.
      kind: hub | directory | gguf.
      license: the keys of a model card that state its license: license, license_name, license_link; {} if unknown.
    """

    name: str
    hub_id: str = ""
    kind: str = "directory"
    license: Mapping[str, str] = field(default_factory=dict)


def base_of(config: ConfigDict, run: str, hub: str = "") -> Base:
    """Return what can be said of the model that a run began with. Nothing is fetched.

    Args:
      config: the run's configuration.
      run: the run directory.
      hub: the base's hub id, where the user gives it.
    """
    path = config.model.path
    name, hub_name = base_name(path), hub_id(path, run, config.output_dir)
    where = next(
        (one for one in (path, os.path.join(_started_in(run, config.output_dir), path)) if os.path.exists(one)), path
    )
    if path.endswith(".gguf"):
        return Base(hub or name, hub, "gguf", _license_of_gguf(where))
    if hub_name:
        license = {} if hub not in ("", hub_name) else _license_of_directory(where) or _license_in_cache(hub_name)
        return Base(hub or hub_name, hub or hub_name, "hub", license)
    stated = _json(os.path.join(where, "config.json")).get("_name_or_path", "")
    stated = hub or (hub_id(stated, run, config.output_dir) if isinstance(stated, str) else "")
    return Base(hub or name, stated, "hub" if hub else "directory", _license_of_directory(where))


def hub_id(path: str, run: str = "", output_dir: str = "") -> str:
    """Return the hub id that a path is, or whose copy in Hugging Face's cache it is; "" for what is local.

    Args:
      path: the path in the configuration.
      run: the run directory, and
      output_dir: its name when it was trained: together they tell where a relative path began.
    """
    cached = re.search(r"(?:models|datasets)--([^/\\]+)--([^/\\]+)[/\\]snapshots(?:[/\\]|$)", path)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    local = path.lower().endswith(_FILE) or any(
        os.path.exists(os.path.join(start, path)) for start in ("", _started_in(run, output_dir))
    )
    return path if _HUB_ID.fullmatch(path) and not local else ""


def is_hub_id(text: str) -> bool:
    """Whether text has the form NAMESPACE/NAME."""
    return bool(_HUB_ID.fullmatch(text))


def base_name(path: str) -> str:
    """Return the last part of a path, also of one from Windows or in a bucket; a hub's name from its cache."""
    last = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
    if last in (".", ".."):
        last = os.path.basename(os.path.abspath(path))
    return (hub_id(path) if "snapshots" in path else "") or last


def private_directories(config: ConfigDict, run: str) -> list[str]:
    """Return the directories that must not be told, the longest first."""
    paths = [run, *(path for key in _PATH_KEYS for path in source_paths(_get(config, key) or ""))]
    directories = {os.path.expanduser("~"), os.getcwd()}
    for path in paths:
        if len(path) < 4096 and not _is_template(path) and "://" not in path:
            directories.add(os.path.dirname(os.path.abspath(os.path.expanduser(path))))
    return sorted((path for path in directories if len(path) > 1), key=len, reverse=True)


def scrubbed(value: Any, private: Sequence[str], key: str = "") -> Any:
    """Return a value of a configuration without the directories in it.

    Args:
      value: text, a number, or lists and dicts of them.
      private: the result of `private_directories`.
      key: the value's own; one that holds a path is cut to the path's last part whatever it looks like.
    """
    if isinstance(value, Mapping):
        return {scrubbed(name, private): scrubbed(one, private, key) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrubbed(one, private, key) for one in value]
    if not isinstance(value, str):
        return value
    if not _is_template(value) and (_PATH.match(value) or key in _PATH_KEYS):
        return base_name(value)
    for directory in private:
        value = value.replace(directory + os.sep, "").replace(directory, "...")
    return value


def scrubbed_json(file: str, base: Base) -> bytes | None:
    """Return a JSON file's content with the paths in it replaced by public names; None where it may stay as it is.

    Args:
      file: a path such as that of adapter_config.json, config.json, tokenizer_config.json.
      base: the base model, whose public name `base_model_name_or_path` becomes.
    """
    if not file.endswith(".json") or os.path.getsize(file) > _LARGEST_JSON:
        return None
    values = _json(file)
    changed = {
        key: hub_id(values[key]) or base_name(values[key])
        for key in _JSON_PATHS
        if isinstance(values.get(key), str) and values[key]
    }
    if "base_model_name_or_path" in changed:
        changed["base_model_name_or_path"] = base.hub_id or base.name
    if all(values[key] == value for key, value in changed.items()):
        return None
    return (json.dumps({**values, **changed}, indent=2, ensure_ascii=False) + "\n").encode()


def _started_in(run: str, output_dir: str) -> str:
    """Return the directory in which a run was started, as far as its own path tells."""
    if storage.is_remote(run):
        return os.getcwd()
    run, recorded = os.path.abspath(run), os.path.normpath(output_dir) if output_dir else ""
    known = recorded and not os.path.isabs(recorded) and run.endswith(os.sep + recorded)
    return run[: -len(recorded)] if known else os.getcwd()


def _get(config: ConfigDict, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def _is_template(text: str) -> bool:
    return "{" in text or "\n" in text


def _json(file: str) -> dict[str, Any]:
    try:
        with open(file, "rb") as stream:
            values = json_text.loads(stream.read())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _license_of_gguf(path: str) -> dict[str, str]:
    try:
        metadata = open_gguf_file(path).metadata
    except UserError:
        return {}
    keys = {
        "license": "general.license",
        "license_name": "general.license.name",
        "license_link": "general.license.link",
    }
    return _checked({name: metadata.get(key) for name, key in keys.items()})


def _license_of_directory(directory: str) -> dict[str, str]:
    license = _license_of_card(os.path.join(directory, "README.md"))
    return license or _checked({"license": _json(os.path.join(directory, "config.json")).get("license")})


def _license_in_cache(hub: str) -> dict[str, str]:
    from huggingface_hub import try_to_load_from_cache

    card = try_to_load_from_cache(hub, "README.md")
    return _license_of_card(card) if isinstance(card, str) else {}


def _license_of_card(file: str) -> dict[str, str]:
    from huggingface_hub import ModelCard

    try:
        with open(file, encoding="utf-8") as stream:
            text = stream.read()
        data = ModelCard(text, ignore_metadata_errors=True).data if text.startswith("---") else {}
    except Exception:  # a card that cannot be read says nothing; it is not this user's
        return {}
    return _checked({key: data.get(key) for key in _LICENSE})


def _checked(license: Mapping[str, Any]) -> dict[str, str]:
    """Keep what is plain text; a link without a name of the license, or a name without one, says nothing."""
    kept = {key: value for key, value in license.items() if isinstance(value, str) and value and not _PATH.match(value)}
    link = license.get("license_link")
    if isinstance(link, str) and link.startswith("https://"):
        kept["license_link"] = link
    return kept if "license" in kept else {}
