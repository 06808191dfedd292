"""Training speed on a GPU at a real model's shapes, against torch + PEFT: QLoRA, LoRA and a full step.

    python benchmarks/gpu.py                                               # LLaMA-7B's shapes, all three methods
    python benchmarks/gpu.py --method qlora --tokens 4096 --rows 2
    python benchmarks/gpu.py --method full --layers 8 --json
    JAX_PLATFORMS=cpu python benchmarks/gpu.py --model tiny --tokens 64    # tries the script itself

Weights are random (seeded), so that nothing is downloaded: neither speed nor memory depends on them. Both sides train
on one batch of random tokens, without padding: bfloat16 computation, each layer's input kept and the rest computed
again, AdamW with float32 adapters and state; rank 16 on every linear layer; nf4 with double quantization (theirs by
bitsandbytes); float32 weights in the full step (theirs under autocast). Theirs attends through torch's
scaled_dot_product_attention and takes fused AdamW, as a careful user would. A side is left out where torch, peft or (of
QLoRA) bitsandbytes is not installed: pip install ".[cuda13]" torch peft bitsandbytes.

Each side lives in a process of its own and is asked in turn for some steps, after warm-up ones that compile; both are
on the card at one time, so jax takes memory as it needs it. Model FLOPs are `tpu_tune.planning.flops`' (what the
mathematics asks for, causal attention, nothing twice), MFU is model FLOPs a second over the card's dense bfloat16 peak.
Memory is the allocators' own peak: ours since the process began, making the weights included; theirs since the model
stood.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from sides import Side, serve

HERE = pathlib.Path(__file__).resolve()
METHODS = ("qlora", "lora", "full")
RANK, ALPHA, LEARNING_RATE, SEED, WIDTH = 16, 32.0, 1e-4, 0, 0.02
# A full step holds sixteen bytes a parameter: 108 GB for 7B, and both sides stand on the card at one time.
FULL_LAYERS = 8
TINY = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


# --- what both sides share ------------------------------------------------------------------------------------------
def model_config(options: argparse.Namespace, method: str) -> dict[str, Any]:
    """Return the Hugging Face config of a preset, at the depth that is asked for."""
    from tpu_tune.planning.presets import PRESETS

    found = dict(TINY if options.model == "tiny" else PRESETS[options.model])
    deepest = min(FULL_LAYERS, found["num_hidden_layers"]) if method == "full" else found["num_hidden_layers"]
    return {**found, "num_hidden_layers": options.layers or deepest}


def run_config(options: argparse.Namespace, method: str) -> Any:
    """Return our configuration of the step that is timed."""
    from tpu_tune import config as configuration

    return configuration.from_dict(
        {
            "method": "full" if method == "full" else "lora",
            "model": {"dtype": "bfloat16", "remat": "full", "attention": options.attention},
            "quantize": {"format": "nf4" if method == "qlora" else "none", "double_quant": True},
            "lora": {"rank": RANK, "alpha": ALPHA, "target_modules": "all-linear"},
            "data": {"max_length": options.tokens},
            "train": {
                "per_device_train_batch_size": options.rows,
                "learning_rate": LEARNING_RATE,
                "lr_scheduler_type": "constant",
            },
            "mesh": {"data": 1, "fsdp": 1},
        }
    )


def token_ids(options: argparse.Namespace, vocabulary: int) -> Any:
    """Return (rows, tokens + 1) random ids."""
    import numpy as np

    return np.random.default_rng(SEED).integers(3, vocabulary, (options.rows, options.tokens + 1))


def turns(step: Callable[[], Any], first: dict[str, Any], warm: int) -> Iterator[dict[str, Any]]:
    """Yield `first` and the first step's seconds once the step is warm, then a timing for each number of steps."""
    begun = time.monotonic()
    step()
    first["first_step_seconds"] = time.monotonic() - begun
    for _ in range(warm):
        step()
    number = yield first
    while True:
        begun = time.monotonic()
        losses = [step() for _ in range(number)]  # each waits for its loss
        number = yield {"seconds": (time.monotonic() - begun) / number, "losses": losses}


# --- ours -------------------------------------------------------------------------------------------------------------
def random_model(options: argparse.Namespace, method: str) -> Any:
    """Return a `PreparedModel` with random weights, made and quantized on the device one layer at a time."""
    import jax
    import jax.numpy as jnp

    from tpu_tune.checkpoints.methods import METHODS
    from tpu_tune.models import architecture
    from tpu_tune.training.prepare_model import PreparedModel, put, storage_dtype
    from tpu_tune.transforms import QuantizeConfig, quantize_weight, quantized_paths, sharding

    config, arch = run_config(options, method), architecture(model_config(options, method))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    quantization, dtype = QuantizeConfig(**config.quantize), storage_dtype(config)
    quantized, specs = quantized_paths(arch.modules(), quantization), arch.leaves()
    norms = {module.weight for module in arch.modules() if module.kind == "norm"}

    def one(key: Any, path: str, shape: tuple[int, ...]) -> Any:
        values = jnp.ones(shape, dtype) if path in norms else (WIDTH * jax.random.normal(key, shape)).astype(dtype)
        return quantize_weight(values, quantization) if path in quantized else values

    params = {}
    for number, (path, shape) in enumerate(sorted(arch.leaf_shapes().items())):
        key = jax.random.fold_in(jax.random.key(SEED), number)
        if specs[path].stacked:
            keys = jax.random.split(key, shape[0])
            leaf = jax.jit(lambda keys, p=path, s=shape: jax.lax.map(lambda k: one(k, p, s[1:]), keys))(keys)
        else:
            leaf = jax.jit(lambda key, p=path, s=shape: one(key, p, s))(key)
        params[path] = jax.tree.map(put, leaf, sharding.leaf_sharding(path, leaf, specs[path], mesh))
    found = sharding.shardings(params, specs, mesh)
    how, _ = METHODS[config.method](config, arch, ())
    trainable, frozen = how.split(params, how.init(params, jax.random.key(SEED)))
    trained = sharding.shardings(trainable, how.leaves(specs), mesh)
    trainable = {path: put(leaf, trained[path]) for path, leaf in trainable.items()}
    return PreparedModel(None, arch, mesh, how, trainable, frozen, found)


def ours(options: argparse.Namespace, method: str) -> Iterator[dict[str, Any]]:
    """Our side: yields its facts, then a timing for each number of steps."""
    import jax
    import numpy as np

    from tpu_tune.planning import device_of
    from tpu_tune.planning.flops import step_work
    from tpu_tune.training.prepare_steps import prepare_steps

    config, model = run_config(options, method), random_model(options, method)
    steps = prepare_steps(config, model, 1_000_000)
    ids = token_ids(options, model.architecture.vocab_size).astype(np.int32)
    places = np.broadcast_to(np.arange(options.tokens, dtype=np.int32), (options.rows, options.tokens))
    whole = {"input_ids": ids[:, :-1], "targets": ids[:, 1:], "positions": places, "segment_ids": np.ones_like(places)}
    batch = steps.put_batch({name: part[None] for name, part in whole.items()}, 1)
    state, device = steps.initial_state, jax.devices()[0]
    adapters = model.num_trainable if method != "full" else 0
    work = step_work(model.architecture, config, options.rows, options.tokens, 0, adapters)
    card = device_of(device.device_kind, 1)
    first = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "parameters": model.num_parameters,
        "trainable": model.num_trainable,
        "layers": model.architecture.num_layers,
        "flops": work.model,
        "flops_formula": work.formula,
        "peak_flops": 1e12 * options.peak_tflops or (card.flops if card else None),
    }

    def step() -> float:
        nonlocal state
        state, metrics = steps.train(state, model.frozen, batch)
        return float(metrics["loss"])

    timings = turns(step, first, options.warm)
    found = next(timings)
    while True:
        number = yield {**found, "memory": (device.memory_stats() or {}).get("peak_bytes_in_use")}
        found = timings.send(number)


# --- theirs -----------------------------------------------------------------------------------------------------------
def theirs(options: argparse.Namespace, method: str) -> Iterator[dict[str, Any]]:
    """torch + PEFT: yields its facts, then a timing for each number of steps."""
    import peft
    import torch
    import transformers

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    torch.manual_seed(SEED)
    config = transformers.AutoConfig.for_model(**model_config(options, method))
    torch.set_default_dtype(torch.float32 if method == "full" else torch.bfloat16)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    if method == "qlora":
        versions["bitsandbytes"] = quantize_with_bitsandbytes(model, device)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    if method != "full":
        model.enable_input_require_grads()
        lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora)  # adapters are float32; autocast multiplies them in bfloat16
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=on_gpu)
    ids = torch.as_tensor(token_ids(options, config.vocab_size), device=device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        del logits
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    timings = turns(step, {**versions, "trainable": sum(parameter.numel() for parameter in trained)}, options.warm)
    found = next(timings)
    while True:
        number = yield {**found, "memory": torch.cuda.max_memory_allocated() if on_gpu else None}
        found = timings.send(number)


def quantize_with_bitsandbytes(model: Any, device: Any) -> str:
    """Replace a model's linear layers but the head by bitsandbytes' 4-bit ones, in place; return its version."""
    import bitsandbytes
    import torch

    chosen = [(name, each) for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)]
    for name, linear in chosen:
        if name == "lm_head":
            continue
        options = {"compute_dtype": torch.bfloat16, "compress_statistics": True, "quant_type": "nf4"}
        packed = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, device="meta", **options
        )
        packed.weight = bitsandbytes.nn.Params4bit(
            linear.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=packed
        )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed.to(device))  # which quantizes it
    model.is_loaded_in_4bit = True  # by which PEFT knows
    return bitsandbytes.__version__


# --- the comparison ---------------------------------------------------------------------------------------------------
def side(name: str, method: str, arguments: list[str]) -> Side:
    """Start a side of one method."""
    # Both sides stand on one card: jax is not to take three quarters of it beforehand.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TOKENIZERS_PARALLELISM": "false"}
    for unwanted in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "JAX_COMPILATION_CACHE_DIR", "JAX_DEFAULT_MATMUL_PRECISION"):
        environment.pop(unwanted, None)
    return Side([sys.executable, str(HERE), *arguments, "--method", method, "--side", name], environment)


def missing(method: str) -> list[str]:
    """Return what torch's side lacks here."""
    wanted = ["torch", "transformers", "peft", *(["bitsandbytes"] if method == "qlora" else [])]
    return [name for name in wanted if importlib.util.find_spec(name) is None]


def compare(method: str, options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """Run both sides of one method in turn and return all that was measured."""
    we = side("ours", method, arguments)
    lacking = ["by --alone"] if options.alone else missing(method)
    say(f"{method}: ours is ready; theirs " + (f"is left out ({', '.join(lacking)})" if lacking else "starts"))
    sides = {"ours": we, **({} if lacking else {"theirs": side("theirs", method, arguments)})}
    timings: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    try:
        for _ in range(options.rounds):
            for name, each in sides.items():
                timings[name].append(each.ask(options.steps))
    finally:
        for each in sides.values():
            each.close()
    tokens, facts = options.rows * options.tokens, we.first
    result = {"method": method, "rows": options.rows, "tokens": options.tokens, "lacking": lacking, "facts": facts}
    for name, found in timings.items():
        seconds = statistics.median(each["seconds"] for each in found)
        result[name] = {
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": facts["flops"] / seconds / facts["peak_flops"] if facts["peak_flops"] else None,
            "peak_memory_bytes": found[-1]["memory"],
            "first_step_seconds": sides[name].first["first_step_seconds"],
            "trainable": sides[name].first["trainable"],
            "losses": [loss for each in found for loss in each["losses"]],
        }
    if not lacking:
        result["theirs"]["versions"] = {k: v for k, v in sides["theirs"].first.items() if isinstance(v, str)}
        pairs = zip(timings["ours"], timings["theirs"], strict=True)
        ratios = [theirs["seconds"] / ours["seconds"] for ours, theirs in pairs]
        result["ratio"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return result


def say(line: str) -> None:
    """Tell how it goes, apart from the results."""
    print(line, file=sys.stderr, flush=True)


def report(results: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Return the results as Markdown, for benchmarks/RESULTS.md."""
    facts = results[0]["facts"]
    versions = {"jax": facts["jax"]} | results[0].get("theirs", {}).get("versions", {})
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {facts['device']}, {options.model}'s shapes, "
        f"{options.rows} x {options.tokens} tokens a step; "
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
        "",
        "| method | layers | parameters | side | tokens/s | MFU | peak memory, GB | step, s | ours / theirs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for side in ("ours", "theirs"):
            if side not in result:
                continue
            found, ratio = result[side], result.get("ratio")
            memory, mfu = found["peak_memory_bytes"], found["mfu"]
            cells = [
                result["method"],
                str(result["facts"]["layers"]),
                f"{result['facts']['parameters'] / 1e9:.2f}e9",
                side,
                f"{found['tokens_per_second']:,.0f}",
                f"{mfu:.1%}" if mfu else "",
                f"{memory / 1e9:.2f}" if memory else "",
                f"{found['step_seconds']:.3f}",
                f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio and side == "ours" else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        *[f"{r['method']}: {r['facts']['flops']:.4g} FLOPs a step = {r['facts']['flops_formula']}" for r in results],
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-7b", help="a preset of tpu-tune plan, or tiny (default llama-7b)")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS), help="default: all three")
    parser.add_argument(
        "--layers", type=int, default=0, help=f"depth (default: the model's; {FULL_LAYERS} of them under full)"
    )
    parser.add_argument("--tokens", type=int, default=2048, help="a row (default 2048)")
    parser.add_argument("--rows", type=int, default=1, help="a step (default 1)")
    parser.add_argument("--steps", type=int, default=5, help="a turn (default 5)")
    parser.add_argument("--warm", type=int, default=3, help="steps before the first turn, after the one that compiles")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each side gets (default 3)")
    parser.add_argument("--attention", default="auto", help="our model.attention (default auto)")
    parser.add_argument(
        "--peak-tflops", type=float, default=0.0, help="the card's dense bfloat16 peak, where plan's catalogue lacks it"
    )
    parser.add_argument("--alone", action="store_true", help="without torch's side")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side:
        serve({"ours": ours, "theirs": theirs}[options.side](options, options.method[0]))
        return 0
    shared = [
        f"--{name.replace('_', '-')}={getattr(options, name)}"
        for name in ("model", "layers", "tokens", "rows", "warm", "attention", "peak_tflops")
    ]
    results = [compare(method, options, shared) for method in options.method]
    print(json.dumps({"results": results}) if options.json else report(results, options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
