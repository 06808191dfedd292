"""A TPU kernel's time by its bundles, against products and copies whose time is known by hand."""

from __future__ import annotations

import lzma
import pathlib

import pytest

from tpu_tune.planning import bundles
from tpu_tune.planning.devices import find_device

CORE = bundles.core_of(find_device("v5e-1"))


def run(tmp_path, lines, core=CORE, share=1.0):
    """Write bundles as libtpu numbers them, and execute them."""
    path = tmp_path / "1-kernel.1-01-final_bundles.txt"
    path.write_text(
        "= control target key start\n= control target key end\n\n"
        + "".join(f"  {number:#x}   : {line}\n" for number, line in enumerate(lines))
    )
    assert bundles.dumped(tmp_path) == {"kernel.1": str(path)}
    return bundles.run_bundles(str(path), core, share)


def loop(turns, body, delay=4):
    """Bundles that run `body` so many times: a counter in s1, the comparison in p0, and the branch's delay slots."""
    return [
        " { %s10_s1 = smov 0 /* copy for cssa */ }",
        f"LB: > {{ %s11_s1 = sadd.s32 1, %s12_s1  ;;  {body[0]} }} /* Start region 1 */",
        *[f" > {{ {part} }}" for part in body[1:]],
        f" > {{ %p13_p0 = scmp.ge.s32.totalorder %s11_s1, {turns} }}",
        " > { %20 = sbr.rel (!%p13_p0) target = $region1 }",
        *[" > { %21 = vadd }"] * delay,
    ]


def test_a_product_runs_at_the_matrix_units_peak(tmp_path):
    """(1024 x 512) x (512 x 512) in bfloat16, 16 rows and a 128 x 128 tile of weights each time, on four units."""
    products = [f"%{n} = vmatmul.mubr.bf16.gmra.mxu{n} %v1" for n in range(4)]
    rows = 1024 * (512 // 128) * (512 // 128)  # rows that pass a tile
    timing = run(
        tmp_path,
        loop(rows // 16 // 4, [" ;; ".join(p.replace("gmra", "vlgmr") for p in products)] + ["%9 = vadd"] * 10),
    )
    needed = 2 * 1024 * 512 * 512 / find_device("v5e-1").flops
    assert timing.mxu_seconds == pytest.approx(needed, rel=0.02)
    assert timing.seconds == pytest.approx(timing.mxu_seconds, rel=0.1) and timing.guessed == 0


def test_a_bundle_takes_a_cycle_and_a_loop_its_turns(tmp_path):
    timing = run(tmp_path, loop(100, ["%1 = vadd"] * 3))
    assert timing.bundles == 1 + 100 * (3 + 1 + 1 + 4)
    assert timing.seconds == pytest.approx(timing.bundles / 1.5e9)


def test_a_copy_takes_what_the_bandwidth_says(tmp_path):
    """64 MiB from HBM, waited for: at 90% of 819 GB/s."""
    size = 64 * 2**20
    copy = f"%30 = dma.hbm_to_vmem [thread:$0]  %s1_s2, {size // 32}, %s3_s4, [#allocation2]"
    wait = f"%31 = dma.done.wait [#allocation2], {size // 32}"
    timing = run(tmp_path, [f" {{ {copy} }}", " { %1 = vadd }", f" {{ {wait} }}"])
    assert timing.hbm_bytes == size
    assert timing.seconds == pytest.approx(size / (0.9 * 819e9), rel=0.01)
    assert timing.dma_wait == pytest.approx(timing.seconds, rel=0.01)


def test_a_region_under_a_known_predicate_runs_where_it_holds_and_of_unknown_ones_a_share(tmp_path):
    """The branch leaves the region out; its condition is first a number, then what was loaded from memory."""
    region = [" { %1 = vadd }"] * 50
    skip = " { %20 = sbr.rel (%p1_p0) target = $region7 }"
    for value, expected in ((1, 9), (0, 59)):  # without the region's 50
        known = [f" {{ %s1_s3 = smov {value} }}", " { %p1_p0 = scmp.eq.s32.totalorder %s1_s3, 1 }", skip]
        lines = [
            *known,
            *[" { %1 = vadd }"] * 4,
            *region[4:],
            *[" { %1 = vadd }"] * 4,
            " { %2 = vadd } /* Start region 7 */",
        ]
        timing = run(tmp_path, [*lines, " { %2 = vadd }"])
        bundles.run_bundles.cache_clear()
        assert (timing.bundles, timing.guessed) == (expected, 0)
    data = [
        " { %p1_p0 = scmp.eq.s32.totalorder %s9_s9, 1 }",
        skip,
        *[" { %1 = vadd }"] * 4,
        *region,
        " { %2 = vadd } /* Start region 7 */",
    ]
    whole = run(tmp_path, data, share=1.0)
    none = run(tmp_path, data, share=0.0)
    assert (whole.bundles, none.bundles, whole.guessed, none.guessed) == (57, 7, 1, 1)


def test_a_division_by_a_number_is_known_where_the_compiler_makes_a_product_of_it(tmp_path):
    """6 / 2 as the upper half of 6 x 2^31, which is 3: the region behind is left out."""
    lines = [
        " { %s1_s3 = smov 2147483648 }",
        " { %s2_s4 = smulhi.u32 6, %s1_s3 }",
        " { %p1_p0 = scmp.eq.s32.totalorder %s2_s4, 3 }",
        " { %20 = sbr.rel (%p1_p0) target = $region7 }",
        *[" { %1 = vadd }"] * 30,
        " { %2 = vadd } /* Start region 7 */",
    ]
    timing = run(tmp_path, lines)
    assert (timing.bundles, timing.guessed) == (9, 0)


def test_a_v3_copies_in_larger_granules(tmp_path):
    v3 = bundles.core_of(find_device("v3-8"))
    lines = [" { %30 = dma.hbm_to_vmem [thread:$0]  %s1_s2, 64, %s3_s4, [#allocation2] }"]
    assert run(tmp_path, lines, v3).hbm_bytes == 65536


def test_a_real_kernel_multiplies_as_long_as_the_peak_says(tmp_path):
    """libtpu 0.0.42's bundles of (2048 x 4096) x nf4 (4096 x 11008) on a v5e, less most of their vector instructions.

    The kernel of November 2026 decoded and multiplied in turn: it took 1,806 us, of which the MXU worked 939.
    """
    packed = pathlib.Path(__file__).parent / "goldens" / "product_v5e_bundles.txt.xz"
    path = tmp_path / "bundles.txt"
    path.write_bytes(lzma.decompress(packed.read_bytes()))
    timing = bundles.run_bundles(str(path), CORE)
    assert timing.mxu_seconds == pytest.approx(2 * 2048 * 4096 * 11008 / find_device("v5e-1").flops, rel=0.005)
    assert timing.seconds == pytest.approx(1805.5e-6, rel=1e-3) and timing.guessed == 0
