"""The QLoRA step of each family, two layers of it, compiles for a v3-8 and an H100; Llama's for several hosts.

Where weights are sharded, the TPU's compiler says what it gathers: codes of four bits, never a dequantized weight.
"""

from __future__ import annotations

import pytest
from compile_skips import needs_cuda, needs_libtpu
from test_compiled_families import COMPILED, RANK, job, wide

from tpu_tune.models import architecture

LAYERS, TOKENS = 2, 128  # no matrix of `wide` has 128 rows or columns
SLICES = {
    "v4-32": {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 2},
    "v5e-64": {"data": 2, "fsdp": 8, "tensor": 2, "sequence": 2},
}
HOSTS = {"v4-32": 4, "v5e-64": 16}


def small(case, device, **mesh):
    """Return what `program.py` compiles: a row for each part of the mesh that has its own."""
    found = job(case, LAYERS)
    config = {**found["config"], "mesh": {"data": 1, "fsdp": 1, **mesh}, "data": {"max_length": TOKENS}}
    rows = config["mesh"]["data"] * config["mesh"]["fsdp"]
    return {**found, "device": device, "config": config, "rows": rows, "tokens": TOKENS, "encoder_tokens": TOKENS}


@pytest.fixture(scope="module")
def compiled(compile_steps, request):
    """Function from a device to what was found of each family that is to run on it, all compiled in one go."""
    here = [
        item.callspec.params
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    wanted = [(each["device"], each["case"]) for each in here if "case" in each]
    kept: dict[str, dict] = {}

    def found(device):
        if device not in kept:
            cases = list(dict.fromkeys(case for name, case in wanted if name == device))
            mesh = {"fsdp": 8} if device == "v3-8" else {}
            kept[device] = dict(
                zip(cases, compile_steps(*(small(case, device, **mesh) for case in cases)), strict=True)
            )
        return kept[device]

    return found


def gathered_matrices(found, case, tensor=1):
    """Return the gathered floats that are shaped like a quantized matrix, whole or cut by `tensor`.

    Routers are not quantized, and what is as narrow as an adapter is told from none.
    """
    shapes = {
        module.shape
        for module in architecture(wide(case, LAYERS)).modules()
        if module.layers and module.kind == "linear" and not (module.is_delicate or module.is_router)
    }
    shapes = {shape for shape in shapes if RANK not in shape}
    shapes |= {cut for i, o in shapes for cut in ((i // tensor, o), (i, o // tensor))}
    shapes |= {(o, i) for i, o in shapes}
    kinds = [
        (kind, tuple(map(int, sizes.rstrip("]").split(","))))
        for kind, sizes in (text.split("[") for text in found["gathered"])
    ]
    return [
        f"{kind}{list(size)}"
        for kind, size in kinds
        if kind[0] in "bf" and size[-2:] in shapes and size[:-2] in ((), (1,))
    ]


@needs_libtpu
@pytest.mark.parametrize("device", ["v3-8"])
@pytest.mark.parametrize("case", COMPILED)
def test_every_family_compiles_for_eight_devices_of_a_v3(case, device, compiled):
    found = compiled(device)[case]
    assert found["devices"] == 8
    assert any(text.startswith("u8[") for text in found["gathered"])  # the weights are sharded, and gathered as codes
    assert not gathered_matrices(found, case), "weights are gathered after they are dequantized"
    # Weights, adapters and AdamW's two moments are shared out; what stays whole is small, and arrays are padded.
    assert found["arguments"] < (found["frozen"] + 3 * found["trained"]) / 3


@needs_cuda
@pytest.mark.parametrize("device", ["h100"])
@pytest.mark.parametrize("case", COMPILED)
def test_every_family_compiles_for_an_h100(case, device, compiled):
    found = compiled(device)[case]
    assert found["devices"] == 1
    held = found["frozen"] + 3 * found["trained"]  # the codes, embedding and head; adapters in float32, and two moments
    assert held <= found["arguments"] <= held + 64 * 1024  # and the batch


@needs_libtpu
@pytest.mark.parametrize("device", SLICES)
def test_a_step_over_several_hosts_compiles(device, compile_steps):
    mesh = SLICES[device]
    (found,) = compile_steps(small("llama2", device, **mesh))
    size = mesh["data"] * mesh["fsdp"] * mesh["tensor"] * mesh["sequence"]
    assert (found["devices"], found["hosts"]) == (size, HOSTS[device])
    assert any(text.startswith("u8[") for text in found["gathered"])
    assert not gathered_matrices(found, "llama2", mesh["tensor"])
