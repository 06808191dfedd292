"""A step's time from compiled text, against products and bandwidth-bound operations whose time is known by hand."""

from __future__ import annotations

import pathlib

import pytest

from tpu_tune.planning import program_time, step_time, tpu_time
from tpu_tune.planning.cards import CARDS
from tpu_tune.planning.devices import find_device
from tpu_tune.planning.gpu_time import product_seconds

V5E = find_device("v5e-1")
GOLDENS = pathlib.Path(__file__).parent / "goldens"

# As libtpu 0.0.42 writes them, with what is not read left out: a loop of 32 turns around one product of
# (2048 x 4096) x (4096 x 11008), whose cycles are the compiler's, beside which the next weight is fetched; an addition
# over 403 MB that runs once; a mask; a Pallas kernel; and a gather over eight chips.
TPU = (GOLDENS / "step_v5e.hlo").read_text()
GATHER = """ENTRY %main (p.1: bf16[512,4096]) -> bf16[4096,4096] {
  %p.1 = bf16[512,4096]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[4096,4096]{1,0} all-gather(%p.1), replica_groups=[1,8]<=[8], dimensions={0}
}
"""


def taken(text, device, dump=""):
    """Return the costs by the operation's name."""
    found, how = tpu_time.estimate(text, device, dump)
    return {cost.name: cost for cost in found}, how


def test_a_tpus_products_take_the_compilers_cycles_and_other_operations_the_bandwidth():
    costs, how = taken(TPU, V5E)
    assert costs["fusion.1"].seconds == pytest.approx(32 * 1482000 / 1.5e9)  # 988 us each; the peak allows 939
    assert 2 * 2048 * 4096 * 11008 / V5E.flops < costs["fusion.1"].seconds / 32
    assert (costs["fusion.1"].kind, costs["fusion.1"].runs, costs["fusion.1"].evidence) == ("products", 32, "estimate")
    assert costs["fusion.2"].seconds == pytest.approx(2 * 4 * 4096 * 12288 / (0.9 * 819e9))  # 403 MB
    assert (costs["fusion.2"].kind, costs["copy.1"].kind) == ("elementwise", "copies")
    assert costs["fusion.3"].kind == "dropout"
    assert how == "by the compiler, kernels at a stored share of the peak"


def test_a_kernel_without_bundles_takes_a_stored_share_of_the_peak_and_with_them_what_they_take(tmp_path):
    costs, _ = taken(TPU, V5E)
    kernel = costs["kernel.1"]
    ideal = 2 * 2048 * 4096 * 11008 / V5E.flops
    assert kernel.kind == "products" and kernel.evidence == "share"
    assert kernel.seconds == pytest.approx(ideal / tpu_time.PRODUCT_SHARE[2048])
    wide = find_device("v6e-1")  # its larger matrix units wait for the decoding, for longer where tokens are fewer
    assert 0.7 < ideal * V5E.flops / wide.flops / taken(TPU, wide)[0]["kernel.1"].seconds < 0.85
    short = taken(TPU.replace("2048,", "512,"), wide)[0]["kernel.1"].seconds
    assert 0.25 * ideal * V5E.flops / wide.flops / short < 0.5
    (tmp_path / "17-kernel.1-01-final_bundles.txt").write_text(
        "".join(f"  {n:#x}   : {{ %1 = vadd }}\n" for n in range(1500))
    )
    costs, how = taken(TPU, V5E, str(tmp_path))
    assert costs["kernel.1"].seconds == pytest.approx(1e-6) and costs["kernel.1"].evidence == "bundles"
    assert how == "by the compiler with its kernels' bundles"
    line = next(line for line in TPU.splitlines() if "%kernel.1 =" in line)
    again = line.replace("kernel.1", "kernel.2")  # the same kernel, which the compiler does not dump once more
    costs, _ = taken(TPU.replace(line, f"{line}\n{again}"), V5E, str(tmp_path))
    assert costs["kernel.2"].seconds == costs["kernel.1"].seconds and costs["kernel.2"].evidence == "bundles"


def test_a_gather_takes_the_links_bandwidth_unless_compute_hides_it():
    (gather,) = tpu_time.estimate(GATHER, find_device("v5e-8"))[0]
    sent = 4096 * 4096 * 2 * 7 / 8
    assert gather.kind == "collectives"
    assert gather.seconds == pytest.approx(sent / (2 * tpu_time.LINK["TPU v5 lite"]))


def test_a_gather_that_fusions_carry_on_counts_once_and_hides_behind_a_loop():
    """As libtpu writes it: each fusion has the whole gather in its text, the middle ones beside a product."""
    gathers, products, loop = TPU.partition("ENTRY ")[0], 32 * 1482000 / 1.5e9, "%start), condition=%cond, body=%body"
    flags = "(bf16[4096,4096]{1,0}, bf16[512,4096]{1,0}, u32[]{:S(2)})"
    text = f"""{gathers}
%gathering (p.5: bf16[512,4096]) -> bf16[4096,4096] {{
  %p.5 = bf16[512,4096]{{1,0}} parameter(0)
  ROOT %all-gather.5 = bf16[4096,4096]{{1,0}} all-gather(%p.5), replica_groups=[1,8]<=[8], dimensions={{0}}
}}

ENTRY %main (p.1: bf16[512,4096], p.2: bf16[2048,4096]) -> bf16[4096,4096] {{
  %p.1 = bf16[512,4096]{{1,0}} parameter(0)
  %p.2 = bf16[2048,4096]{{1,0}} parameter(1)
  %start = (s32[], bf16[2048,4096]{{1,0}}, bf16[32,4096,11008]{{2,1,0}}, bf16[4096,11008]{{1,0}}) tuple(%p.2)
  %async-collective-start = {flags} fusion(%p.1), kind=kCustom, calls=%gathering
  %fusion.7 = {flags} fusion(%p.1), kind=kCustom, calls=%gathering
  %while.1 = (s32[], bf16[2048,4096]{{1,0}}, bf16[32,4096,11008]{{2,1,0}}, bf16[4096,11008]{{1,0}}) while({loop}
  ROOT %async-collective-done = bf16[4096,4096]{{1,0}} fusion(%p.1), kind=kCustom, calls=%gathering
}}
"""
    found = program_time.summary(*tpu_time.estimate(text, find_device("v5e-8")))["kinds"]
    assert found["products"] == pytest.approx(products) and "collectives" not in found
    alone = text.replace(next(line for line in text.splitlines() if loop in line), "")
    found = program_time.summary(*tpu_time.estimate(alone, find_device("v5e-8")))["kinds"]
    once = 4096 * 4096 * 2 * 7 / 8 / 90e9
    assert 0.5 * once < found["collectives"] <= once  # less what the fusions beside it hide


def test_arrays_fill_whole_tiles():
    """Nine heads of 64 numbers: copying them moves 16 of 128."""
    array = "bf16[8,2048,9,64]{3,2,1,0:T(8,128)(2,1)}"
    text = f"""ENTRY %main (p.1: {array}) -> {array} {{
  %p.1 = {array} parameter(0)
  ROOT %copy.1 = {array} copy(%p.1)
}}
"""
    (copy,) = tpu_time.estimate(text, V5E)[0]
    assert copy.seconds == pytest.approx(2 * 2 * 8 * 2048 * 16 * 128 / (0.9 * 819e9))


def test_where_the_time_goes_adds_up():
    found = step_time.of_program(TPU, V5E)
    assert sum(found["kinds"].values()) == pytest.approx(found["seconds"])
    assert list(found["kinds"]) == [kind for kind in program_time.KINDS if kind in found["kinds"]]
    rates = step_time.rates(found, 2048, 1e12, V5E)
    assert rates["tokens_per_second"] == pytest.approx(2048 / found["seconds"])
    assert rates["mfu"] == pytest.approx(1e12 / found["seconds"] / 197e12)


def test_text_that_cannot_be_read_gives_no_time_and_no_error():
    assert step_time.of_program("", V5E) is None
    assert step_time.of_program("ENTRY %main () -> f32[] {\n  ROOT %w = f32[] while(%x)\n}\n", V5E) is None


def test_without_a_compiler_a_step_takes_its_work_at_a_stated_share():
    found = step_time.by_work(0.4, "computing")
    assert found == {"seconds": pytest.approx(1.0), "kinds": {}, "how": "by FLOPs at 40% of the device's peak"}


CUDA = (GOLDENS / "step_cuda.hlo").read_text()


def test_a_gpus_kernels_take_the_tensor_cores_or_the_bandwidth():
    h100 = find_device("h100")
    found = step_time.of_program(CUDA, h100)
    ideal = 2 * 2048 * 4096 * 11008 / h100.flops
    assert 0.6 < ideal / found["kinds"]["products"] < 0.7  # cuBLAS sustains 0.7 of the peak, in whole waves
    assert found["kinds"]["elementwise"] == pytest.approx(2 * 4 * 8192 * 12288 / (0.9 * 3352e9), rel=0.01)
    assert found["kinds"]["unpacking"] == pytest.approx((2048 * 4096 + 2 * 4096 * 4096) / (0.9 * 3352e9), rel=0.15)
    assert found["how"].startswith("by the compiler, each kernel by the roofline")


def test_a_product_with_too_few_tiles_leaves_processors_idle():
    card = CARDS["h100"]
    few, many = product_seconds(card, 1, 128, 256, 4096), product_seconds(card, 1, 128 * 12, 256 * 11, 4096)
    assert 132 * few > 1.3 * many  # 132 tiles of this size run beside each other
