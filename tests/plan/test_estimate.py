"""The schedule played through: by hand on written programs, and against hand counts on compiled ones."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mmfm_jax.plan import hlo
from mmfm_jax.plan.chips import CHIPS
from mmfm_jax.plan.estimate import VECTOR_OPERATIONS, estimate, kernel_kind
from mmfm_jax.plan.links import HOP_SECONDS, Network

CHIP = CHIPS["v5e"]
PAIR = Network([SimpleNamespace(platform="tpu", coords=(x, 0, 0)) for x in range(2)], CHIP)
GATHER = 4e6 / CHIP.link_bandwidth + HOP_SECONDS  # half of f32[2000000] over one link

OVERLAPPED = """%start (p: f32[1000000]) -> (f32[1000000], f32[2000000]) {{
  %p.1 = f32[1000000]{{0}} parameter(0)
  %gather.1 = f32[2000000]{{0}} all-gather(%p.1), replica_groups=[1,2]<=[2], frontend_attributes={{chain_id="4"}}
  ROOT %begun = (f32[1000000]{{0}}, f32[2000000]{{0}}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}}

%work (p: f32[1000000]) -> f32[1000000] {{
  %p.2 = f32[1000000]{{0}} parameter(0)
  %gather.2 = f32[2000000]{{0}} all-gather(%p.2), replica_groups=[1,2]<=[2], frontend_attributes={{chain_id="4"}}
  ROOT %n = f32[1000000]{{0}} negate(%p.2)
}}

%done (p: f32[1000000]) -> f32[2000000] {{
  %p.3 = f32[1000000]{{0}} parameter(0)
  %gather.3 = f32[2000000]{{0}} all-gather(%p.3), replica_groups=[1,2]<=[2], frontend_attributes={{chain_id="4"}}
  ROOT %ended = f32[2000000]{{0}} custom-call(%gather.3), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (p: f32[1000000]) -> f32[2000000] {{
  %p = f32[1000000]{{0}} parameter(0)
  %a = (f32[1000000]{{0}}, f32[2000000]{{0}}) fusion(%p), kind=kCustom, calls=%start
  %b = f32[1000000]{{0}} fusion(%p), kind=kLoop, calls=%work, backend_config={{"estimated_cycles":"{cycles}"}}
  ROOT %c = f32[2000000]{{0}} fusion(%p), kind=kCustom, calls=%done
}}
"""


@pytest.mark.parametrize("share", [0.25, 3.0])
def test_a_collective_costs_what_the_work_between_its_start_and_its_end_leaves(share):
    cycles = round(share * GATHER * CHIP.clock)
    found = estimate(hlo.parse(OVERLAPPED.format(cycles=cycles)), CHIP, PAIR)
    assert found.collective_bytes == {"all-gather": {"ici": 4e6}}  # once, though three fusions name it
    assert found.by_category["other fusions"] == pytest.approx(share * GATHER, rel=1e-6)
    assert found.by_category["collectives exposed"] == pytest.approx(max(1 - share, 0) * GATHER, abs=1e-9)
    assert found.seconds == pytest.approx(max(share, 1) * GATHER, rel=1e-6)


def test_a_copy_into_vmem_is_hidden_by_what_runs_meanwhile():
    text = """ENTRY %main (p: f32[1000000]) -> f32[1000000] {
  %p = f32[1000000]{0} parameter(0)
  %s = (f32[1000000]{0:S(1)}, f32[1000000]{0}, u32[]{:S(2)}) copy-start(%p)
  %w = f32[8]{0} negate(%p), backend_config={"estimated_cycles":"1500"}
  ROOT %d = f32[1000000]{0:S(1)} copy-done(%s)
}"""
    found = estimate(hlo.parse(text), CHIP, PAIR)
    assert found.seconds == pytest.approx(4e6 / CHIP.hbm_bandwidth)
    assert found.by_category["copies"] == pytest.approx(4e6 / CHIP.hbm_bandwidth - 1e-6)


def test_an_operation_without_cycles_takes_the_longer_of_its_flops_and_its_bytes():
    text = """ENTRY %main (a: bf16[{m},{k}], b: bf16[{k},{n}]) -> bf16[{m},{n}] {{
  %a = bf16[{m},{k}]{{1,0}} parameter(0)
  %b = bf16[{k},{n}]{{1,0}} parameter(1)
  ROOT %c = bf16[{m},{n}]{{1,0}} dot(%a, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}"""
    large = estimate(hlo.parse(text.format(m=4096, k=4096, n=4096)), CHIP, PAIR)
    assert large.seconds == pytest.approx(2 * 4096**3 / CHIP.peak_flops)
    thin = estimate(hlo.parse(text.format(m=1, k=4096, n=4096)), CHIP, PAIR)
    assert thin.seconds == pytest.approx(2 * (4096**2 + 2 * 4096) / CHIP.hbm_bandwidth)


@pytest.mark.parametrize(
    "name, kind, matmuls",
    [("splash_mha_fwd_residuals", "forward", 2), ("splash_mha_dq", "dq", 3), ("splash_mha_dkv", "dkv", 4)],
)
def test_an_attention_kernel_costs_its_products(name, kind, matmuls):
    text = f"""ENTRY %main (m: s8[1,2,2], q: bf16[2,4,512,64]) -> bf16[2,4,512,64] {{
  %m = s8[1,2,2]{{2,1,0}} parameter(0)
  %q = bf16[2,4,512,64]{{3,2,1,0}} parameter(1)
  %k = bf16[2,4,256,64]{{3,2,1,0}} parameter(2)
  ROOT %{name}.1 = bf16[2,4,512,64]{{3,2,1,0}} custom-call(%m, %q, %k, %k), custom_call_target="tpu_custom_call"
}}"""
    found = estimate(hlo.parse(text), CHIP, PAIR)
    flops = matmuls * 2 * 512 * 256 * 64 * 2 * 4
    assert kernel_kind(name) == kind and found.flops == flops
    # a head of 64 fills half of a matrix unit of 128; 4 vector units of 8 x 128 lanes at 1.5 GHz
    vectors = VECTOR_OPERATIONS[kind] * 512 * 256 * 2 * 4 / (4 * 8 * 128 * 1.5e9)
    assert found.seconds == pytest.approx(flops / (CHIP.peak_flops * 0.5) + vectors)


def test_a_fused_backward_kernel_costs_five_products_by_the_dq_it_makes_for_each_tile_of_keys():
    text = """ENTRY %main (q: bf16[2,4,512,64], k: bf16[2,4,256,64]) -> bf16[2,4,256,64] {
  %q = bf16[2,4,512,64]{3,2,1,0} parameter(0)
  %k = bf16[2,4,256,64]{3,2,1,0} parameter(1)
  %splash_mha_dkv.1 = (bf16[2,1,4,512,64]{4,3,2,1,0}, bf16[2,4,256,64]{3,2,1,0}, bf16[2,4,256,64]{3,2,1,0}) \
custom-call(%q, %k, %k, %q), custom_call_target="tpu_custom_call"
  ROOT %dk = bf16[2,4,256,64]{3,2,1,0} get-tuple-element(%splash_mha_dkv.1), index=1
}"""
    assert estimate(hlo.parse(text), CHIP, PAIR).flops == 5 * 2 * 512 * 256 * 64 * 2 * 4


def test_of_the_branches_of_a_condition_the_longest_counts():
    text = """%short (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %s = f32[8]{0} negate(%x), backend_config={"estimated_cycles":"1500"}
}

%long (y: f32[8]) -> f32[8] {
  %y = f32[8]{0} parameter(0)
  ROOT %l = f32[8]{0} negate(%y), backend_config={"estimated_cycles":"4500"}
}

ENTRY %main (p: pred[], v: f32[8]) -> f32[8] {
  %p = pred[] parameter(0)
  %v = f32[8]{0} parameter(1)
  ROOT %c = f32[8]{0} conditional(%p, %v, %v), true_computation=%short, false_computation=%long
}"""
    found = estimate(hlo.parse(text), CHIP, PAIR)
    assert found.seconds == pytest.approx(3e-6) and [item.name for item in found.items.values()] == ["l"]


# ---------------------------------------------------------------- compiled programs


def stack_of(layers: int, width: int, mesh, axis: str):
    """`layers` products of one width in a scan, weights and batch split over the mesh: what FSDP does."""

    def run(x, weights):
        def layer(x, weight):
            return jnp.tanh(x @ weight), None

        return jax.lax.scan(layer, x, weights)[0]

    split = NamedSharding(mesh, PartitionSpec(axis))
    of_weights = NamedSharding(mesh, PartitionSpec(None, axis))
    return jax.jit(run, in_shardings=(split, of_weights), out_shardings=split)


@pytest.mark.parametrize("topology, devices", [("v5e:2x2", 4), ("v5e:4x4", 16)])
def test_a_scanned_stack_of_products_is_what_it_is_by_hand(make_pod, mesh_over, topology, devices):
    layers, width, rows = 6, 1024, 512 * devices
    of = make_pod(topology)
    mesh = mesh_over(of, "x")
    x = jax.ShapeDtypeStruct((rows, width), jnp.bfloat16)
    weights = jax.ShapeDtypeStruct((layers, width, width), jnp.bfloat16)
    text = stack_of(layers, width, mesh, "x").lower(x, weights).compile().as_text() or ""
    found = estimate(hlo.parse(text), of.chip, Network(mesh.devices.flat, of.chip))

    assert found.flops == layers * 2 * (rows // devices) * width * width
    received = sum(by_link["ici"] for by_link in found.collective_bytes.values())
    by_hand = layers * 2 * width * width * (devices - 1) / devices
    # Gathered whole or passed round in pieces, the compiler may send a piece or a layer more than is needed.
    assert by_hand <= received <= 1.2 * by_hand
    floor = found.flops / of.chip.peak_flops
    assert floor <= found.seconds < 20 * floor + 2 * found.collective_seconds


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_a_large_product_comes_near_the_published_peak_and_never_over_it(make_pod, mesh_over, topology):
    size, of = 8192, make_pod(topology)
    mesh = mesh_over(of, "x")
    whole = NamedSharding(mesh, PartitionSpec())
    shape = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
    compiled = jax.jit(jnp.matmul, in_shardings=(whole, whole), out_shardings=whole).lower(shape, shape).compile()
    found = estimate(hlo.parse(compiled.as_text() or ""), of.chip, Network(mesh.devices.flat, of.chip))
    assert found.flops == 2 * size**3
    assert 0.65 < found.flops / found.seconds / (of.chip.peak_flops / of.chip.devices) <= 1


def test_the_program_of_every_device_is_counted_once(make_pod):
    assert np.array([len(make_pod(name).devices) for name in ("v5p:2x2x1", "v5e:2x2")]).tolist() == [4, 4]
    assert make_pod("v4:2x2x1").chips == make_pod("tpu7x:2x2x1").chips == 4
