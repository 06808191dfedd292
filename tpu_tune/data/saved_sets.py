"""Directories that Hugging Face's `datasets` wrote, and clones of a hub repository: which of their files hold rows.

Beside the rows lie notes (`state.json`, `dataset_dict.json`, `dataset_info.json`, `dataset_infos.json`, the README) and
caches of `map` and `shuffle` (`cache-*.arrow`), which are rows of the same set once more, or of numbers. So the files
are those that the directory's own index names, never those that lie there.
"""

from __future__ import annotations

import functools
import glob
import logging
import os
import re
from collections.abc import Iterable
from typing import Any

from tpu_tune.checkpoints import json_text, storage
from tpu_tune.errors import UserError

logger = logging.getLogger(__name__)

TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("val", "valid", "validation", "dev", "eval", "evaluation", "test")  # the first kind present is taken
NOTES = ("dataset_dict.json", "dataset_infos.json", "dataset_info.json", "state.json")
_README_BYTES = 2**22
_INDEX = "_data_files"  # of state.json


def splits_of(directory: str | os.PathLike) -> dict[str, list[str]] | None:
    """The files of each split of a directory, local or in a bucket, by its own index.

    Returns:
      Split -> paths, in their order. A set saved without splits is `{"": paths}`; None: the directory has no index.

    Raises:
      UserError: the index is not what `datasets` writes, or names files that are not there.
    """
    directory = os.fspath(directory)
    names = storage.list_names(directory)
    if "dataset_dict.json" in names:
        file = os.path.join(directory, "dataset_dict.json")
        splits = _read(file).get("splits")
        if not isinstance(splits, list) or not splits or not all(map(_is_name, splits)):
            raise UserError(f"{file}: is no index of `datasets`: it has no list of splits; save the set again")
        return {split: _saved(os.path.join(directory, split)) for split in splits}
    if "state.json" in names and _INDEX in _read(os.path.join(directory, "state.json"), strict=False):
        return {"": _saved(directory)}
    if "dataset_info.json" in names and (splits := _prepared(directory, names)):
        return splits
    return _declared(directory) if "README.md" in names else None


def choose_splits(directory: str, splits: Iterable[str]) -> tuple[str, str | None]:
    """Return the split to train on and the one to evaluate on, if any; those left out are said aloud, once.

    Raises:
      UserError: there are only evaluation splits.
    """
    names = list(splits)
    train = next((name for name in names if name in TRAIN_NAMES), None)
    train = train or next((name for name in names if kind_of(name) not in EVAL_NAMES), None)
    if train is None:
        raise UserError(
            f"{directory}: holds only evaluation splits ({', '.join(names)}); name the files or the directory of one"
        )
    ending = train[len(kind_of(train)) :]  # of `train_sft` the sister is `test_sft`
    held_out = next((kind + end for kind in EVAL_NAMES for end in (ending, "") if kind + end in names), None)
    others = [name for name in names if name not in (train, held_out)]
    if others:
        _say_once(f"{directory}: the split '{train}' is trained on; left out: {', '.join(others)}")
    return train, held_out


def kind_of(name: str) -> str:
    """What a split or a file is named after: `train-00000-of-00001.parquet` -> `train`."""
    return re.split(r"[-_.]", name.lower())[0]


@functools.lru_cache(maxsize=256)
def _say_once(text: str) -> None:
    logger.warning("%s", text)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and os.path.basename(value) == value and value not in ("", ".", "..")


def _read(file: str, strict: bool = True) -> dict[str, Any]:
    """Read an index; not `strict`, it is {} where it is something else."""
    try:
        value = json_text.loads(storage.read_bytes(file))
    except (OSError, ValueError) as error:
        if not strict:
            return {}
        reason = getattr(error, "strerror", None) or getattr(error, "msg", None) or error
        raise UserError(f"{file}: cannot be read ({reason}); save the set again") from error
    if isinstance(value, dict):
        return value
    if not strict:
        return {}
    raise UserError(f"{file}: is no index of `datasets`; save the set again")


def _saved(directory: str) -> list[str]:
    """The files of one set, as `Dataset.save_to_disk` names them in state.json."""
    file = os.path.join(directory, "state.json")
    state = _read(file)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(
            f"{file}: an old version of `datasets` keeps an order of rows beside them; save it with a new one"
        )
    entries = state.get(_INDEX)
    names = [entry.get("filename") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    if not names or len(names) < len(entries) or not all(map(_is_name, names)):
        raise UserError(f"{file}: is no index of `datasets`: it names no files; save the set again")
    return _present(file, [os.path.join(directory, name) for name in names])


def _present(index: str, paths: list[str]) -> list[str]:
    missing = next((path for path in paths if not storage.exists(path)), None)
    if missing:
        raise UserError(f"{index}: names {os.path.basename(missing)}, which is not there; save or fetch the set again")
    return paths


def _prepared(directory: str, names: list[str]) -> dict[str, list[str]]:
    """The files of a builder's directory (the cache of `load_dataset`): NAME-SPLIT.arrow, or in numbered shards."""
    splits = _read(os.path.join(directory, "dataset_info.json"), strict=False).get("splits")
    found = {}
    for split in splits if isinstance(splits, dict) else ():
        pattern = re.compile(rf".*-{re.escape(split)}(-\d+-of-\d+)?\.(arrow|parquet)")
        files = [name for name in names if pattern.fullmatch(name) and not name.startswith("cache-")]
        if files:
            found[split] = [os.path.join(directory, name) for name in files]
    return found


def _declared(directory: str) -> dict[str, list[str]] | None:
    """The files that a hub repository's README declares: `configs` of its metadata."""
    file = os.path.join(directory, "README.md")
    configs = _metadata(file).get("configs")
    if not configs:
        return None
    if not isinstance(configs, list) or not all(isinstance(config, dict) for config in configs):
        raise UserError(f"{file}: its metadata's `configs` is no list of configurations; mend it or remove it")
    named = [config for config in configs if config.get("data_files")]
    if not named:
        return None
    default = [config for config in named if config.get("default") or config.get("config_name") == "default"]
    if len(named) > 1 and not default:
        several = ", ".join(str(config.get("config_name")) for config in named)
        raise UserError(f"{directory}: holds several data sets ({several}); name the files or the directory of one")
    config = (default or named)[0]
    entries = config["data_files"]
    if isinstance(entries, dict):
        entries = [{"split": split, "path": path} for split, path in entries.items()]
    entries = entries if isinstance(entries, list) else [entries]
    found: dict[str, list[str]] = {}
    for entry in entries:
        split, patterns = (
            (entry.get("split", "train"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        )
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            base = config.get("data_dir") or ""
            files = _matches(file, directory, os.path.join(str(base), str(pattern)) if base else pattern)
            held = found.setdefault(str(split), [])
            held += [path for path in files if path not in held]
    return found


def _metadata(file: str) -> dict[str, Any]:
    """The YAML between the first two lines of dashes; {} where there is none."""
    import yaml

    try:
        text = storage.read_bytes(file)[:_README_BYTES].decode("utf-8", "replace")
    except OSError:
        return {}
    block = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", text.replace("\r\n", "\n"), re.DOTALL)
    if not block:
        return {}
    try:
        value = yaml.safe_load(block[1])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: its metadata is no YAML ({' '.join(str(error).split())[:120]})") from error
    return value if isinstance(value, dict) else {}


def _matches(readme: str, directory: str, pattern: Any) -> list[str]:
    if not isinstance(pattern, str) or "://" in pattern or os.path.isabs(pattern) or ".." in pattern.split("/"):
        raise UserError(f"{readme}: its metadata names {pattern!r}, which is no file of this directory")
    if storage.is_remote(directory):
        fs = storage.filesystem(directory)
        found = sorted(fs.unstrip_protocol(name) for name in fs.glob(os.path.join(directory, pattern)))
    else:
        found = sorted(glob.glob(os.path.join(glob.escape(directory), pattern), recursive=True))
        found = [path for path in found if os.path.isfile(path)]
    if not found:
        raise UserError(
            f"{readme}: its metadata names {pattern}, which is not there; fetch the set again (git lfs pull)"
        )
    return found
