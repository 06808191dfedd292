"""Writes tests/goldens: what torch transformers computes, and torch's file formats.

The figures are the logits of the tiny models and of SmolLM2, and SmolLM2's scores of multiple-choice questions.

Run where torch is installed, after a change to `tiny_models.py`:

    PYTHONPATH=launch python tests/make_goldens.py [path of SmolLM2's .gguf]
"""

from __future__ import annotations

import io
import json
import lzma
import pathlib
import sys
import tempfile

import fetch
import helpers_torch_files
import numpy as np
import tiny_models

SMOLLM2_TEXT_IDS = [
    1,
    504,
    3575,
    282,
    4649,
    314,
    7042,
    30,
    657,
    314,
    260,
    2240,
    8194,
    282,
    260,
    1429,
]  # any sixteen ids
SMOLLM2_VOCABULARY = np.arange(0, 49152, 246)  # 200 of the ids


GOLDEN_TOKENS = 5  # the last ones, which have seen all the others


def tiny():
    """Return case/config, case/input_ids and case/logits (of the last tokens) of every tiny model."""
    arrays = {}
    for case, config in tiny_models.CONFIGS.items():
        with tempfile.TemporaryDirectory() as directory:
            model = tiny_models.torch_model(tiny_models.write(directory, config))
        ids = tiny_models.input_ids(case)
        arrays[f"{case}/config"] = np.array(json.dumps(config, sort_keys=True))
        arrays[f"{case}/input_ids"] = ids
        arrays[f"{case}/logits"] = tiny_models.torch_logits_of(case, model)[:, -GOLDEN_TOKENS:]
    return arrays


def torch_smollm2(path):
    """Return SmolLM2 as a torch LlamaForCausalLM over the file's dequantized weights."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tpu_tune.checkpoints.source import open_source

    source = open_source(str(path))
    config = LlamaConfig(**{key: value for key, value in source.config.items() if key != "model_type"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    state = {name: torch.from_numpy(np.array(source.read(name), np.float32)) for name in source.shapes}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers were left on the meta device
    return model.eval()


def smollm2(path):
    """Return the logits of the last four places at 200 ids, and the largest of all."""
    ids = np.array([SMOLLM2_TEXT_IDS])
    logits = tiny_models.torch_logits(torch_smollm2(path), ids)[0]
    return {
        "input_ids": ids,
        "logits": logits[-4:, SMOLLM2_VOCABULARY],
        "largest": np.abs(logits).max(),
        "best": logits.argmax(-1),
    }


def torch_multiple_choice(model, tokenizer, questions):
    """Return (each question's log-likelihoods, accuracies) by torch: one text at a time, without padding or batches.

    The context's and the text's tokens are parted at the context's length; lengths are those of lm-evaluation-harness.
    """
    import torch

    scores, right = [], {"acc": 0, "acc_norm": 0, "acc_bytes": 0}
    for question in questions:
        context = f"{question.primer}\n\n{question.stem}" if question.primer else question.stem
        start, found = len(tokenizer(context)["input_ids"]), []
        for choice in question.choices:
            ids = torch.tensor([tokenizer(f"{context} {choice}")["input_ids"]])
            with torch.no_grad():
                logs = torch.log_softmax(model(ids).logits[0, start - 1 : -1].double(), dim=-1)
            found.append(float(logs.gather(1, ids[0, start:, None]).sum()))
        scores.append(found)
        lengths = {
            "acc": 1,
            "acc_norm": [len(c) for c in question.choices],
            "acc_bytes": [len(c.encode()) for c in question.choices],
        }
        for name, length in lengths.items():
            right[name] += int(np.argmax(np.array(found) / length)) == question.answer
    return scores, {name: count / len(questions) for name, count in right.items()}


def eval_smollm2(path, questions):
    """Return SmolLM2's log-likelihoods of the first four of the 100 HellaSwag questions, and the accuracies."""
    from tpu_tune.checkpoints.source import open_source
    from tpu_tune.training.tasks.questions import read_questions
    from tpu_tune.training.tasks.task_rows import read_task_rows

    asked = read_questions(read_task_rows(questions, limit=4))
    scores, figures = torch_multiple_choice(torch_smollm2(path), open_source(str(path)).load_tokenizer(), asked)
    return {"log_likelihoods": [[round(value, 4) for value in row] for row in scores], "figures": figures}


def torch_files(folder):
    """Write one state dict as torch.save does, and as it did before 1.6."""
    import torch

    for name, new in (("zip", True), ("legacy", False)):
        path = folder / f"pytorch_model_{name}.bin"
        torch.save(helpers_torch_files.golden_state(), path, _use_new_zipfile_serialization=new)


if __name__ == "__main__":
    folder = pathlib.Path(tiny_models.GOLDENS)
    folder.mkdir(exist_ok=True)
    packed = io.BytesIO()  # in one piece: many small arrays, and names
    np.savez(packed, **tiny())
    (folder / "tiny_models.npz.xz").write_bytes(lzma.compress(packed.getvalue(), preset=9 | lzma.PRESET_EXTREME))
    torch_files(folder)
    if len(sys.argv) > 1:
        np.savez_compressed(folder / "smollm2.npz", **smollm2(sys.argv[1]))
        hellaswag = str(fetch.fetch("questions:hellaswag") / "cases.jsonl")
        (folder / "eval_smollm2.json").write_text(json.dumps(eval_smollm2(sys.argv[1], hellaswag), indent=1) + "\n")
