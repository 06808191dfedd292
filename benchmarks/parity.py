"""How far every family's logits and LoRA gradients are from torch's, on tiny random models, as a Markdown table.

    python benchmarks/parity.py [MODEL_TYPE ...]       # needs torch and peft: pip install -e ".[parity]"

The measure is max|ours - torch| / max|torch| in float32 with products at the highest precision; gradients are those of
every LoRA matrix of one step, against torch + PEFT in float64. The models are those of tests/tiny_models.py: every
variant of a family, two to four layers wide enough that windows, caps and rotary scalings show.
"""

from __future__ import annotations

import os
import pathlib
import sys
import tempfile
import warnings

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "launch")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

NAMES = {
    "llama": "Llama 1, 2, 3.x", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3",
    "gpt_neox": "GPT-NeoX (Pythia, RedPajama)", "gptj": "GPT-J", "gpt2": "GPT-2", "opt": "OPT", "gemma": "Gemma 1",
    "gemma2": "Gemma 2", "gemma3_text": "Gemma 3 (text)",
    "gemma4_text": "Gemma 4 (text)", "gemma4_unified_text": "Gemma 4, unified (text)",
    "phi": "Phi-1.5, Phi-2", "phi3": "Phi-3, Phi-4-mini",
    "smollm3": "SmolLM3", "olmo2": "OLMo 2", "olmo3": "OLMo 3", "granite": "Granite 3",
    "granitemoehybrid": "Granite 4 (dense)", "glm": "GLM-4 (2024)", "glm4": "GLM-4 (2025)",
    "ministral3": "Ministral 3 (text)", "cohere": "Command R, Aya", "cohere2": "Command R7B", "seed_oss": "Seed-OSS",
    "exaone4": "EXAONE 4", "nanochat": "nanochat", "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2-MoE", "qwen3_moe": "Qwen3-MoE", "olmoe": "OLMoE", "granitemoe": "Granite-MoE",
    "granitemoeshared": "Granite-MoE, shared", "glm4_moe": "GLM-4.5", "gpt_oss": "gpt-oss",
    "qwen3_5_text": "Qwen3.5 (text)", "qwen3_5_moe_text": "Qwen3.5-MoE (text)", "qwen3_next": "Qwen3-Next",
    "t5": "T5, FLAN-T5",
}  # fmt: skip


def logits(case: str) -> float:
    """Return how far a case's logits are from torch's."""
    import tiny_models

    arch, params = tiny_models.load(tiny_models.CONFIGS[case])
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_models.torch_model(tiny_models.write(folder, tiny_models.CONFIGS[case]))
    return tiny_models.difference(tiny_models.logits_of(case, arch, params), tiny_models.torch_logits_of(case, model))


def gradients(case: str) -> float:
    """Return how far a case's LoRA gradients are from torch and PEFT's, the furthest matrix."""
    import test_families
    import tiny_models

    with tempfile.TemporaryDirectory() as folder:
        _, ours, _, theirs = test_families.loss_and_gradients(case, pathlib.Path(folder))
    return max(tiny_models.difference(ours[name], grad) for name, grad in theirs.items())


def main() -> None:
    """Print the table."""
    import tiny_models

    warnings.filterwarnings("ignore")
    print("| family | `model_type` | variants | logits | LoRA gradients |")
    print("|---|---|---|---|---|")
    for family, name in NAMES.items():
        if sys.argv[1:] and family not in sys.argv[1:]:
            continue
        cases = [case for case, config in tiny_models.CONFIGS.items() if config["model_type"] == family]
        shown = next(case for case in cases if case in tiny_models.FAMILY_CASES)
        furthest = max(logits(case) for case in cases)
        print(f"| {name} | `{family}` | {len(cases)} | {furthest:.1e} | {gradients(shown):.1e} |", flush=True)


if __name__ == "__main__":
    main()
