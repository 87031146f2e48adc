"""Who talks to whom, and for how long, by hand."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mmfm_jax.config.training import MeshConfig
from mmfm_jax.parallel.mesh import make_mesh
from mmfm_jax.plan import hlo
from mmfm_jax.plan.chips import CHIPS
from mmfm_jax.plan.estimate import estimate
from mmfm_jax.plan.links import HOP_SECONDS, NETWORK_SECONDS, Network, groups, pairs

CHIP = CHIPS["v5e"]
LINK = CHIP.link_bandwidth


def devices(shape, slices=1):
    return [
        SimpleNamespace(platform="tpu", slice_index=index, coords=tuple(place))
        for index in range(slices)
        for place in np.ndindex(*shape)
    ]


def instruction(text: str):
    module = hlo.parse(
        "ENTRY %main (p: f32[1000]) -> f32[1000] {\n  %p = f32[1000]{0} parameter(0)\n  %i = " + text + "\n}"
    )
    main = module.computations["main"]
    return main, main.by_name["i"]


@pytest.mark.parametrize(
    "written, by_hand",
    [
        ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("{}", [[0, 1, 2, 3]]),
    ],
)
def test_groups_are_read_however_they_are_written(written, by_hand):
    _, gather = instruction(f"f32[2000]{{0}} all-gather(%p), replica_groups={written}, dimensions={{0}}")
    assert groups(gather, 4).tolist() == by_hand


def test_pairs_of_a_permutation():
    _, permute = instruction("f32[1000]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}")
    assert pairs(permute).tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    "text, kind, received",
    [
        ("f32[4000]{0} all-gather(%p), replica_groups=[1,4]<=[4], dimensions={0}", "all-gather", 12000),
        ("f32[1000]{0} all-reduce(%p), replica_groups=[1,4]<=[4], to_apply=%add", "all-reduce", 2 * 3000),
        ("f32[250]{0} reduce-scatter(%p), replica_groups=[1,4]<=[4], to_apply=%add", "reduce-scatter", 3000),
        ("f32[1000]{0} all-to-all(%p), replica_groups=[1,4]<=[4]", "all-to-all", 3000),
        ("(f32[1000]{0}, f32[4000]{0}) all-gather-start(%p), replica_groups=[1,4]<=[4]", "all-gather", 12000),
    ],
)
def test_a_device_receives_all_but_its_own_share(text, kind, received):
    transfer = Network(devices((4, 1, 1)), CHIP).transfer(*instruction(text))
    assert transfer.kind == kind and transfer.bytes == {"ici": received}


def test_a_reduction_of_which_each_device_keeps_a_shard_is_a_reduce_scatter():
    text = "f32[1000]{0} all-reduce(%p), replica_groups=[1,4]<=[4], to_apply=%add"
    transfer = Network(devices((4, 1, 1)), CHIP).transfer(*instruction(text), scattered=True)
    assert (transfer.kind, transfer.bytes) == ("reduce-scatter", {"ici": 3000})


def test_a_closed_ring_has_both_ways_and_a_line_has_one():
    gather = "f32[16000]{0} all-gather(%p), replica_groups=[1,16]<=[16], dimensions={0}"
    ring, line = devices((16, 1, 1)), devices((4, 4, 1))
    assert Network(ring, CHIP).transfer(*instruction(gather)).seconds["ici"] == pytest.approx(
        60000 / (2 * LINK) + 8 * HOP_SECONDS
    )
    assert Network(line, CHIP).transfer(*instruction(gather)).seconds["ici"] == pytest.approx(
        60000 / (2 * LINK) + 6 * HOP_SECONDS  # two axes that do not close
    )


def test_between_slices_each_device_sends_its_own_shard():
    text = "f32[1000]{0} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add"
    transfer = Network(devices((4, 1, 1), slices=2), CHIP).transfer(*instruction(text))
    assert transfer.bytes == {"ici": 2 * 3000, "dcn": 2 * 1000 * 1 / 2}
    assert transfer.seconds["dcn"] == pytest.approx(1000 / CHIP.dcn_bandwidth + 2 * NETWORK_SECONDS)


@pytest.mark.parametrize(
    "kind, of, entering",
    [
        ("ALL_REDUCE", "all-reduce", 4000),
        ("ALL_GATHER", "all-gather", 4000),
        ("ONE_TO_ONE", "collective-permute", 4000),
    ],
)
def test_what_libtpu_sends_between_two_slices_is_the_collective_that_it_does(kind, of, entering):
    text = (
        "(f32[1000]{0}, u32[], token[]) send(%p), channel_id=1, is_host_transfer=true, frontend_attributes="
        f'{{_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_transfer_type="{kind}"}}'
    )
    transfer = Network(devices((4, 1, 1), slices=2), CHIP).transfer(*instruction(text))
    assert (transfer.kind, transfer.bytes) == (of, {"dcn": entering})
    assert transfer.seconds["dcn"] == pytest.approx(entering / CHIP.dcn_bandwidth + NETWORK_SECONDS)


def test_a_sum_over_two_slices_crosses_the_network_once_for_each_shard(make_pod):
    """Compiled by libtpu: each chip sends its share of a slice's sum and waits for that of the other slice."""
    of = make_pod("v5e:2x2", 2)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4), of.devices)
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((("data", "fsdp"),), ()))
    x = jax.ShapeDtypeStruct((8, 1024, 1024), jnp.float32, sharding=split)
    with jax.set_mesh(mesh):
        text = jax.jit(lambda x: x.sum(axis=0), out_shardings=whole).lower(x).compile().as_text() or ""
    found = estimate(hlo.parse(text), of.chip, Network(mesh.devices.flat, of.chip))
    across = sum(by_link.get("dcn", 0) for by_link in found.collective_bytes.values())
    assert across == 4 * 1024 * 1024 / 4
    assert found.by_category["collectives exposed"] >= across / of.chip.dcn_bandwidth


def test_a_message_of_many_hops_takes_the_links_on_its_way():
    near = "f32[1000]{0} collective-permute(%p), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"
    far = "f32[1000]{0} collective-permute(%p), source_target_pairs={{0,3},{3,0}}"
    network = Network(devices((4, 1, 1)), CHIP)
    assert network.transfer(*instruction(far)).seconds["ici"] > network.transfer(*instruction(near)).seconds["ici"]
    assert network.transfer(*instruction(far)).seconds["ici"] == pytest.approx(4000 * 3 / (2 * LINK) + 3 * HOP_SECONDS)
