"""A plan's figures as text: the table, the verdict and the suggestions that `tpu-tune plan` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tpu_tune.errors import counted
from tpu_tune.planning.choice import words

_MOST_NAMES = 6  # devices that a line lists
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
    lines += [verdict(figures), f"compiler: {figures['compiler']}"]
    if figures.get("chosen"):
        lines.append(f"taken for what the configuration leaves open: {words(figures['chosen'])}")
    lines.append("")
    lines += _work(step, run)
    lines += ["", *_rules(figures["rules_of_thumb"])]
    lines += ["", *[f"note: {note}" for note in figures["notes"]]] if figures["notes"] else []
    return "\n".join(lines)


def advice(suggestion: Mapping[str, Any]) -> str:
    """Return what `tpu-tune plan --suggest` prints of what `suggest` found; one recommendation comes last."""
    recommended = suggestion["recommended"]
    lines = _nothing_fits(suggestion) if suggestion["overrides"] is None else _what_fits(suggestion)
    if recommended is None:
        return "\n".join(lines)
    flags = override_flags(recommended["overrides"])
    lines += [
        "",
        f"recommended ({recommended['why']}): {_batch(recommended['figures'])}, {verdict(recommended['figures'])}",
        f"  {flags or 'the configuration as it is'}",
    ]
    if recommended["overrides"].get("method") == "lora":
        lines.append("  LoRA learns at higher rates than full fine-tuning: set train.learning_rate too; 2e-4 is usual")
    return "\n".join(lines)


def _what_fits(suggestion: Mapping[str, Any]) -> list[str]:
    figures = suggestion["figures"]
    lines = [
        table(figures),
        "",
        f"largest batch that fits ({suggestion['compiles']} compilations): {_batch(figures)}",
        f"  {override_flags(suggestion['overrides']) or 'the configuration as it is'}",
    ]
    for other in suggestion["alternatives"]:
        faster = tokens_per_second(other["figures"]) / tokens_per_second(figures) - 1
        lines += [
            f"{_kind(other)}, {faster:+.0%} tokens a second by estimate: {_batch(other['figures'])}",
            f"  {override_flags(other['overrides'])}",
        ]
    return lines


def _kind(other: Mapping[str, Any]) -> str:
    """Return in words how an alternative differs from the largest batch."""
    if "model.remat" in other["overrides"]:
        return "with less recomputation in the backward pass"
    return "with fewer rows at a time"


def _nothing_fits(suggestion: Mapping[str, Any]) -> list[str]:
    lines = [f"nothing that was tried fits {suggestion['device']} as it is ({suggestion['compiles']} compilations)"]
    if suggestion["ways"]:
        lines.append("what would make it smaller, with one row a device at a time:")
    for way in suggestion["ways"]:
        result = "not tried; raise --max-compiles" if way["fits"] is None else verdict(way["figures"])
        lines.append(f"  {way['way']}: {result}")
    devices, confirmed = suggestion["devices"], suggestion["compiled_device"]
    if devices:
        lines.append(
            f"devices that are large enough by an estimate, the smallest first: {', '.join(devices[:_MOST_NAMES])}"
            + (f" and {len(devices) - _MOST_NAMES} more" if len(devices) > _MOST_NAMES else "")
            + (f"; the compiler confirms {confirmed}" if confirmed else "")
        )
    elif suggestion["recommended"] is None:
        lines.append("by an estimate no device of the catalogue is large enough either; lower data.max_length")
    if suggestion["recommended"] is None and (confirmed or devices):
        where = f"{confirmed}, which the compiler confirms" if confirmed else "one of these (ask for it first)"
        lines += ["", f"recommended: another device, {where}, or a smaller model"]
    return lines


def comparison(plans: Sequence[Mapping[str, Any]]) -> str:
    """Return one table of the same job on several devices.

    Args:
      plans: `plan`'s figures for each device, or `device` and `error` where there are none.
    """
    found = [figures for figures in plans if "error" not in figures]
    lines = []
    if found:
        model = found[0]["model"]
        lines += [f"{model['path']} ({model['family']}), trainable params: {model['trainable']:,}", ""]
    lines.append(
        f"{'device':<18}{'fits':<6}{'peak GB':>9}{'of GB':>9}{'rows a step':>13}{'s a step':>10}{'tokens/s':>10}"
        f"{'MFU':>7}{'hours':>9}"
    )
    for figures in plans:
        if "error" in figures:
            lines.append(f"{figures['device']:<18}no plan: {figures['error']}")
            continue
        peak, hours = figures["peak_bytes_per_device"], figures["run"]["hours_estimate"]
        lines.append(
            f"{figures['device']:<18}{'yes' if figures['fits'] else 'no':<6}"
            f"{_gb(peak) if peak is not None else 'more':>9}{_gb(figures['capacity_bytes_per_device']):>9}"
            f"{figures['step']['rows']:>13,}{figures['step']['seconds_estimate']:>10.3g}"
            f"{tokens_per_second(figures):>10,.0f}{figures['step']['time']['mfu']:>7.1%}"
            f"{'-' if hours is None else f'{hours:.2g}':>9}"
        )
    if found:
        hows = "; ".join(dict.fromkeys(figures["step"]["time"]["how"] for figures in found))
        lines += ["", f"peak and capacity of one device; times are estimates, not measured: {hows}"]
    lines += [f"compiler: {name}" for name in dict.fromkeys(figures["compiler"] for figures in found)]
    notes: dict[str, list[str]] = {}
    for figures in found:
        for note in figures["notes"]:
            notes.setdefault(note, []).append(figures["device"])
    lines += [
        f"note: {note}" + ("" if len(names) == len(found) else f" ({', '.join(names)})")
        for note, names in notes.items()
    ]
    return "\n".join(lines)


def best_of(suggestions: Sequence[Mapping[str, Any]]) -> str:
    """Return one recommendation of those for several devices: the fastest, of a job as it is where that fits any."""
    usable = [found for found in suggestions if found["recommended"]]
    if not usable:
        return "recommended: none of these devices"
    best = max(
        usable,
        key=lambda found: (found["overrides"] is not None, tokens_per_second(found["recommended"]["figures"])),
    )
    flags = override_flags(best["recommended"]["overrides"]) or "the configuration as it is"
    return f"recommended of these devices, the fastest by estimate: {best['device']}\n  {flags}"


def tokens_per_second(figures: Mapping[str, Any]) -> float:
    """Return the estimated speed of a plan."""
    return figures["step"]["tokens"] / figures["step"]["seconds_estimate"]


def override_flags(overrides: Mapping[str, Any]) -> str:
    """Return config overrides as the command line takes them: `--config.KEY=VALUE ...`."""
    return " ".join(f"--config.{key}={value}" for key, value in overrides.items())


def _batch(figures: Mapping[str, Any]) -> str:
    rows = figures["step"]["micro_batch_rows"]
    return f"{counted(rows, 'row')} at a time on {counted(figures['num_devices'], 'device')}"


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
        f"a step: {counted(step['rows'], 'row')}, {counted(step['tokens'], 'token')}, {step['flops']:.3g} FLOPs "
        f"({step['hardware_flops']:.3g} with recomputed layers and masked scores)",
        f"  FLOPs = {step['flops_formula']}",
        f"  roofline {_time(step['roofline_seconds'])} (bound by {step['bound_by']})",
        *time_lines(step["time"]),
    ]
    if run["rows"] is not None:
        lines.append(f"the run: {run['arithmetic']} (rows: {run['rows_are']})")
    elif run["total_steps"] is not None:
        lines.append(f"the run: {counted(run['total_steps'], 'step')} (train.max_steps)")
    else:
        lines.append("the run: the number of rows is not known; give --rows N for the run's steps and hours")
    if run["hours_estimate"] is not None:
        lines.append(f"  estimate {run['hours_estimate']:.2g} hours, without compilation and evaluation")
    return lines


def time_lines(time: Mapping[str, Any]) -> list[str]:
    """Return what a plan says of a step's time, and where it goes as far as that is known."""
    seconds = time["seconds"]
    lines = [
        f"  estimate {_time(seconds)} a step, {time['tokens_per_second']:,.0f} tokens a second, MFU {time['mfu']:.1%} "
        f"({time['how']}; not measured)"
    ]
    parts = sorted(time["kinds"].items(), key=lambda part: -part[1])
    if parts:
        lines.append("    " + ", ".join(f"{kind} {_time(spent)} ({spent / seconds:.0%})" for kind, spent in parts))
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
    """Return milliseconds, of long steps seconds."""
    if seconds >= 10:
        return f"{seconds:.1f} s"
    return f"{1000 * seconds:,.0f} ms" if seconds >= 0.01 else f"{1000 * seconds:.2g} ms"
