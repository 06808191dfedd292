"""A plan's figures as text: the table, the verdict and the suggestions that `tpu-tune plan` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpu_tune.planning.devices import Device

_LABELS = {
    "frozen": "frozen weights",
    "trainable": "trainable weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "batch": "batch",
    "padding": "padding of the above",
    "scratch": "activations",  # and what else is held within a step only
}


def table(figures: Mapping[str, Any]) -> str:
    """Return the table that `tpu-tune plan` prints; GB are 1e9 bytes."""
    step, run, model = figures["step"], figures["run"], figures["model"]
    axes = ", ".join(f"{axis}={size}" for axis, size in figures["mesh"].items() if size > 1)
    count = figures["num_devices"]
    lines = [
        f"{model['path']} ({model['family']}) on {figures['device']}: {count} device{'s' if count > 1 else ''}"
        + (f" ({axes})" if axes else ""),
        f"trainable params: {model['trainable']:,} || all params: {model['parameters']:,} || "
        f"trainable%: {100 * model['trainable'] / model['parameters']:.4f}",
        "",
        f"{'bytes per device':<24}{'GB':>10}",
    ]
    for name, size in figures["breakdown"].items():
        if name != "padding" or size >= 5e6:
            lines.append(f"  {_LABELS[name]:<22}{_gb(size):>10}")
    peak = figures["peak_bytes_per_device"]
    lines += [
        f"  {'peak':<22}{_gb(peak) if peak is not None else 'too large':>10}",
        f"  {'capacity':<22}{_gb(figures['capacity_bytes_per_device']):>10}   {figures['capacity_note']}",
    ]
    if figures["evaluation_peak_bytes_per_device"]:
        lines.append(f"  {'peak in evaluation':<22}{_gb(figures['evaluation_peak_bytes_per_device']):>10}")
    if figures["host_bytes_per_device"]:
        lines.append(f"  {'in host memory':<22}{_gb(figures['host_bytes_per_device']):>10}")
    lines += [verdict(figures), f"compiler: {figures['compiler']}", ""]
    lines += _work(step, run)
    lines += ["", *_rules(figures["rules_of_thumb"])]
    lines += ["", *[f"note: {note}" for note in figures["notes"]]] if figures["notes"] else []
    return "\n".join(lines)


def advice(suggestion: Mapping[str, Any], device: Device) -> str:
    """Return what `tpu-tune plan --suggest` prints of the result of `suggest`."""
    if suggestion["overrides"] is None:
        head = f"no settings that were tried fit {device.name} ({suggestion['compiles']} compilations)"
        if not suggestion["devices"]:
            return f"{head}; by an estimate no device of the catalogue is large enough either; lower data.max_length"
        confirmed = f"; the compiler confirms {suggestion['compiled_device']}" if suggestion["compiled_device"] else ""
        devices = ", ".join(suggestion["devices"])
        return f"{head}; by an estimate these devices are large enough, the smallest first: {devices}{confirmed}"
    figures = suggestion["figures"]
    lines = [
        table(figures),
        "",
        f"largest batch that fits ({suggestion['compiles']} compilations): {_batch(figures)}",
        f"  {override_flags(suggestion['overrides']) or 'the configuration as it is'}",
    ]
    for other in suggestion["alternatives"]:
        lines += [
            f"faster, with less recomputation in the backward pass: {_batch(other['figures'])}",
            f"  {override_flags(other['overrides'])}",
        ]
    return "\n".join(lines)


def override_flags(overrides: Mapping[str, Any]) -> str:
    """Return config overrides as the command line takes them: `--config.KEY=VALUE ...`."""
    return " ".join(f"--config.{key}={value}" for key, value in overrides.items())


def _batch(figures: Mapping[str, Any]) -> str:
    rows = figures["step"]["micro_batch_rows"]
    return f"{rows:,} rows at a time on {figures['num_devices']} device{'s' if figures['num_devices'] > 1 else ''}"


def verdict(figures: Mapping[str, Any]) -> str:
    """Return in one line whether the job fits."""
    peak, capacity = figures["peak_bytes_per_device"], figures["capacity_bytes_per_device"]
    if peak is None:
        return f"DOES NOT FIT: it needs more than the {_gb(capacity)} GB of a device"
    if figures["fits"]:
        return f"fits: {_gb(peak)} of {_gb(capacity)} GB, {100 * peak / capacity:.0f}%; {_gb(capacity - peak)} GB free"
    if peak <= capacity:
        return f"DOES NOT FIT: training would, with {_gb(peak)} of {_gb(capacity)} GB, but evaluation does not"
    return f"DOES NOT FIT: it needs {_gb(peak)} GB of {_gb(capacity)} GB"


def _work(step: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    lines = [
        f"a step: {step['rows']:,} rows, {step['tokens']:,} tokens, {step['flops']:.3g} FLOPs "
        f"({step['hardware_flops']:.3g} with recomputed layers and masked scores)",
        f"  FLOPs = {step['flops_formula']}",
        f"  roofline {_time(step['roofline_seconds'])} (bound by {step['bound_by']}); "
        f"estimate {_time(step['seconds_estimate'])} (not measured), at {step['roofline_share']:.0%} of the roofline",
    ]
    if run["rows"] is not None:
        lines.append(f"the run: {run['arithmetic']} (rows: {run['rows_are']})")
    elif run["total_steps"] is not None:
        lines.append(f"the run: {run['total_steps']:,} steps (train.max_steps)")
    else:
        lines.append("the run: the number of rows is not known; give --rows N for the run's steps and hours")
    if run["hours_estimate"] is not None:
        lines.append(f"  estimate {run['hours_estimate']:.2g} hours, without compilation and evaluation")
    return lines


def _rules(rules: Mapping[str, Any]) -> list[str]:
    low, high = rules["guide_full_fine_tuning_6b_7b_gb"]
    return [
        "rules of thumb for this model, for any method and device:",
        f"  inference in 16 bits, 1.2 x the weights: {_gigabytes(rules['inference_16_bit_gb'])} GB",
        "  full fine-tuning, 16 bytes per parameter: "
        f"{_gigabytes(rules['full_fine_tuning_16_bytes_a_parameter_gb'])} GB "
        f"(the guide: {low}-{high} GB for 6B and 7B models, with activations and overhead)",
        f"  full fine-tuning with 16-bit weights and gradients: {_gigabytes(rules['full_fine_tuning_16_bit_gb'])} GB",
    ]


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}" if size >= 5e6 else f"{size / 1e9:.5f}"


def _gigabytes(count: float) -> str:
    return f"{count:.1f}" if count >= 1 else f"{count:.2g}"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.2g} ms"
