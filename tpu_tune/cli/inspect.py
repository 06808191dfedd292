"""`tpu-tune inspect`: a model's modules, and what a LoRA configuration would train."""

from __future__ import annotations

import argparse
import json

from tpu_tune.cli.common import Commands, read_config


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add(
        "inspect",
        run,
        "show a model's modules and what a LoRA configuration would train; reads no weights",
        "tpu-tune inspect model.gguf --config.lora.target_modules=q_proj,v_proj --config.lora.rank=16",
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face id, local directory, or .gguf file")
    parser.add_argument(
        "--config", metavar="FILE", help="config file whose lora.* is used; --config.lora.KEY=VALUE overrides"
    )


def run(options: argparse.Namespace) -> int:
    """Run it; return the exit status."""
    from tpu_tune.inference.inspection import inspect_model
    from tpu_tune.transforms import LoraConfig

    config = read_config(options)
    facts = inspect_model(options.model, LoraConfig(**config.lora))
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(f"{options.model}: {facts['family']}, {facts['parameters']:,} parameters")
    for key in ("hidden_size", "num_layers", "num_encoder_layers", "num_heads", "num_kv_heads", "vocab_size"):
        if key in facts:
            print(f"  {key}: {facts[key]:,}")
    has_experts = any(module["experts"] for module in facts["modules"])
    print(f"modules (N is the layer{', E the expert' if has_experts else ''}; shapes are in x out):")
    for module in facts["modules"]:
        layers = f"x{module['layers']}" if module["layers"] else ""
        layers += f"x{module['experts']}" if module["experts"] else ""
        note = f"uses the weight of {module['tied_to']}" if module["tied_to"] else module["role"]
        shape = " x ".join(map(str, module["shape"])) + (" + bias" if module["bias"] else "")
        print(f"  {module['name']:<44} {shape:<20} {layers:<5} {note}")
    if facts["left_aside"]:
        print("left aside, and passed on unchanged by a merged export:")
    for part, size in facts["left_aside"].items():
        print(f"  {part}: {size['tensors']:,} tensors, {size['parameters']:,} parameters")
    lora = facts["lora"]
    print("this LoRA configuration would train:")
    for target in lora["targets"]:
        print(f"  {target['name']}  rank {target['rank']}, {target['layers']} x, {target['trainable']:,} parameters")
    if lora["experts"]:
        print(f"  {lora['experts']}")
    share = 100 * lora["trainable"] / lora["all"]
    print(f"trainable params: {lora['trainable']:,} || all params: {lora['all']:,} || trainable%: {share:.4f}")
    return 0
