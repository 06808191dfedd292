"""Writes tests/goldens/preference.json: what TRL's trainers log over 30 steps, and TRL's losses of given numbers.

Run where trl 1.16 and torch are installed:

    PYTHONPATH=. python tests/make_preference_goldens.py
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile
from typing import Any

import helpers_preference as preference
import helpers_training as helpers

from tpu_tune.checkpoints import peft as peft_files

FILE = pathlib.Path(__file__).parent / "goldens" / "preference.json"


def trl_type(kind: str, folder: pathlib.Path) -> list[dict[str, float]]:
    """Measure a loss type of DPO on three steps of four pairs, against another model."""
    path = helpers.write_tiny_llama(folder / "model")
    reference = preference.write_other(path, folder / "reference")
    settings = {"name": "dpo", **preference.TYPES[kind], "learning_rate": 0.0}
    return trl_run("dpo", "full", folder, (settings, 4, 1), 3, reference)


def trl_run(
    name: str, method: str, folder: pathlib.Path, run: Any = None, steps: int = preference.STEPS, reference: Any = None
) -> list[dict[str, float]]:
    """Train with TRL; return the loss and metrics of each step."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaForCausalLM

    torch.set_num_threads(1)
    settings, rows, accumulation = run or preference.RUNS[name]
    path = helpers.write_tiny_llama(folder / "model")
    model = LlamaForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.bos_token, tokenizer.pad_token = None, tokenizer.eos_token
    if method == "lora":
        import peft

        config = preference.settings(path, folder, method)
        ours, _ = helpers.prepare(config, 1)
        initial = preference.initial_adapter(ours.trainable)
        peft_files.write_adapter(str(folder / "initial"), initial, ours.method, ours.architecture, str(path))
        model = peft.PeftModel.from_pretrained(model, str(folder / "initial"), is_trainable=True)
    count = rows * accumulation * steps
    table = preference.single(count) if name == "kto" else preference.texts(count)
    trainer_class, config_class, own = trainer(name, settings)
    arguments = config_class(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        num_train_epochs=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        max_length=preference.WIDTH,
        **{"learning_rate": preference.RATES[method], **own},
    )
    more = {"ref_model": LlamaForCausalLM.from_pretrained(reference, dtype=torch.float32)} if reference else {}
    run = trainer_class(
        model=model, args=arguments, train_dataset=Dataset.from_list(table), processing_class=tokenizer, **more
    )
    run.train()
    logged = [row for row in run.state.log_history if "loss" in row]
    # TRL takes KTO's metrics as means of the micro-batches' means.
    watched = () if name == "kto" else ("rewards/margins", "rewards/accuracies", "logps/chosen")
    names = ("loss", "grad_norm", "kl", "nll_loss", "log_odds_ratio", *watched)
    return [{key: float(row[key]) for key in names if key in row} for row in logged]


def trainer(name: str, settings: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Return TRL's trainer, its configuration, and the settings of it."""
    own = {key: value for key, value in settings.items() if key != "name"}
    if name == "dpo":
        from trl import DPOConfig, DPOTrainer

        return DPOTrainer, DPOConfig, own
    if name == "kto":
        from trl import KTOConfig, KTOTrainer

        return KTOTrainer, KTOConfig, own
    if name == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOTrainer, ORPOConfig, own
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    return CPOTrainer, CPOConfig, own | ({"loss_type": "simpo", "cpo_alpha": 0.0} if name == "simpo" else {})


def main(names: list[str]) -> None:
    """Run what is named, `dpo/lora`; everything without a name."""
    runs = [f"{name}/{method}" for name in preference.RUNS for method in preference.RATES]
    for name in names or [*runs, *(f"type/{kind}" for kind in preference.TYPES)]:
        objective, method = name.split("/")
        with tempfile.TemporaryDirectory() as folder:
            if objective == "type":
                rows = trl_type(method, pathlib.Path(folder))
            else:
                rows = trl_run(objective, method, pathlib.Path(folder))
        print(name, [round(row["loss"], 4) for row in rows])
        keys = rows[0] if objective != "type" else ["loss"]
        found = json.loads(FILE.read_text()) if FILE.exists() else {}
        found[name] = {key: [float(f"{row[key]:.6g}") for row in rows] for key in keys}
        FILE.write_text(json.dumps(found, indent=None).replace('], "', '],\n"') + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
