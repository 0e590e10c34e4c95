"""Collectives: read out of hand-written HLO of every form, and out of programs that the CPU's
compiler made."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxtrain.plan import collectives

HEADER = (
    "HloModule jit_f, is_scheduled=true, num_partitions=8\n\n%add (a: f32[], b: f32[]) -> f32[] {\n"
    "  %a = f32[] parameter(0)\n}\n\n"
)


def program(*lines: str, before: str = "") -> str:
    """A module whose entry computation has these lines."""
    body = "\n".join(
        f"  {line}"
        for line in ("%x = f32[16,4]{1,0} parameter(0)", "%h = bf16[32]{0} parameter(1)", *lines)
    )
    return (
        f"{HEADER}{before}ENTRY %main.1_spmd (x: f32[16,4], h: bf16[32]) -> f32[16,4]"
        f" {{\n{body}\n}}\n"
    )


def only(text: str, **options: int) -> collectives.Collective:
    (found,) = collectives.read(text, **options)
    return found


@pytest.mark.parametrize(
    ("line", "whole", "wire"),
    [
        (
            "%r = f32[16,4]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add",
            256,
            256.0,
        ),
        (
            "%r = f32[16,4]{1,0} all-reduce(f32[16,4]{1,0} %x), replica_groups={}, to_apply=%add",
            256,
            2 * 7 / 8 * 256,
        ),
        (
            "%r = f32[64,4]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}",
            1024,
            768.0,
        ),
        (
            (
                "%r = f32[4,4]{1,0} reduce-scatter(%x), replica_groups=[2,4]<=[8], dimensions={0},"
                " to_apply=%add"
            ),
            256,
            192.0,
        ),
        (
            "%r = f32[16,4]{1,0} all-to-all(%x), replica_groups=[1,8]<=[8], dimensions={0}",
            256,
            224.0,
        ),
        (
            "%r = f32[16,4]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}",
            256,
            256.0,
        ),
        ("%r = bf16[64]{0} all-gather(%h), replica_groups=[4,2]<=[8], dimensions={0}", 128, 64.0),
    ],
)
def test_bytes_of_each_kind(line: str, whole: int, wire: float) -> None:
    found = only(program(line))
    assert (found.bytes, found.wire_bytes) == (whole, wire)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("replica_groups={{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("replica_groups={}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("replica_groups=[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['data'=8,'b'=1] {'data'}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        (
            "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}",
            ((0, 1, 2, 3), (4, 5, 6, 7)),
        ),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}", ((3, 2), (1, 0))),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=8] {'a':(4)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("replica_groups=mesh['a'=8] {'a':(1)2,'a':(4)2}", ((0, 1, 4, 5), (2, 3, 6, 7))),
    ],
)
def test_groups_in_every_form(groups: str, expected: tuple[tuple[int, ...], ...]) -> None:
    line = (
        f"%r = f32[16,4]{{1,0}} all-reduce(%x), channel_id=1, {groups}, use_global_device_ids=true,"
        " to_apply=%add"
    )
    assert only(program(line)).groups == expected


def test_an_asynchronous_pair_counts_once() -> None:
    start = (
        "%s = (f32[16,4]{1,0}, f32[128,4]{1,0}) all-gather-start(%x), replica_groups=[1,8]<=[8],"
        " dimensions={0}"
    )
    found = only(program(start, "%d = f32[128,4]{1,0} all-gather-done(%s)"))
    assert (found.bytes, found.count) == (128 * 4 * 4, 1)


def test_arrays_that_go_together_add_up() -> None:
    line = (
        "%s = ((f32[16,4]{1,0}, /*index=1*/bf16[32]{0}), (f32[2,4]{1,0}, bf16[4]{0}))"
        " reduce-scatter-start(%x, /*index=1*/%h), replica_groups=[1,8]<=[8], to_apply=%add"
    )
    found = only(program(line))
    assert (found.bytes, found.dtypes) == (256 + 64, ("bf16", "f32"))


WRAPPED = """%wrapped (p: f32[16,4]) -> f32[2,4] {
  %p = f32[16,4]{1,0} parameter(0)
  ROOT %s = f32[2,4]{1,0} reduce-scatter(%p), replica_groups=[1,8]<=[8], \
dimensions={0}, to_apply=%add
}

"""


def test_a_wrapped_asynchronous_operation_counts_once() -> None:
    start = "%s = ((f32[16,4]{1,0}), f32[2,4]{1,0}) async-start(%x), calls=%wrapped"
    done = "%d = f32[2,4]{1,0} async-done(%s), calls=%wrapped"
    assert only(program(start, before=WRAPPED)).wire_bytes == 224.0
    # The end of a pair names the computation again.
    assert only(program(start, done, before=WRAPPED)).wire_bytes == 224.0


LOOP = """%inner (p: (f32[4])) -> (f32[4]) {
  %p = (f32[4]{0}) parameter(0)
  %g = f32[4]{0} get-tuple-element(%p), index=0
  %r = f32[4]{0} all-reduce(%g), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %t = (f32[4]{0}) tuple(%r)
}

%outer (p: (f32[4])) -> (f32[4]) {
  %p = (f32[4]{0}) parameter(0)
  ROOT %w = (f32[4]{0}) while(%p), condition=%always, body=%inner, \
backend_config={"known_trip_count":{"n":"3"}}
}

"""


def test_loops_multiply() -> None:
    line = (
        "%w = (f32[4]{0}) while(%t), condition=%always, body=%outer,"
        ' backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"step":"1"}}'
    )
    found = only(program(line, before=LOOP))
    assert (found.count, found.wire_bytes) == (15, 15 * 2 * 7 / 8 * 16)


def test_a_loop_of_unknown_length_is_refused_or_told() -> None:
    text = program("%w = (f32[4]{0}) while(%t), condition=%always, body=%inner", before=LOOP)
    with pytest.raises(
        ValueError,
        match=(
            r"^HLO text: loop w sends data but has no known number of trips; say it by"
            r" unknown_trips=$"
        ),
    ):
        collectives.read(text)
    assert only(text, unknown_trips=7).count == 7


BRANCHES = """%small (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %r = f32[4]{0} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add
}

%large (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %r = f32[32]{0} all-gather(%p), replica_groups=[1,8]<=[8], dimensions={0}
}

"""


@pytest.mark.parametrize(
    "which",
    ["branch_computations={%small, %large}", "true_computation=%large, false_computation=%small"],
)
def test_of_two_branches_the_larger_counts(which: str) -> None:
    found = only(program(f"%c = f32[4]{{0}} conditional(%k, %x, %x), {which}", before=BRANCHES))
    assert (found.kind, found.wire_bytes) == ("all-gather", 112.0)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("f8e4m3fn", 4), ("s4", 2), ("pred", 4), ("f16", 8), ("s64", 32), ("c64", 32), ("u32", 16)],
)
def test_sizes_of_numbers(dtype: str, size: int) -> None:
    text = program(
        f"%y = {dtype}[4]{{0}} parameter(2)",
        f"%r = {dtype}[4]{{0}} collective-permute(%y), source_target_pairs={{{{0,1}}}}",
    )
    assert only(text).bytes == size


def test_a_type_or_text_that_is_not_known() -> None:
    text = program(
        "%y = q[4]{0} parameter(2)", "%r = q[4]{0} all-reduce(%y), replica_groups={}, to_apply=%add"
    )
    with pytest.raises(ValueError, match=r"^HLO text: type 'q' is not known$"):
        collectives.read(text)
    with pytest.raises(
        ValueError,
        match=r"^HLO text: no ENTRY computation; give the whole of compiled.as_text\(\)$",
    ):
        collectives.read("")


def test_hosts() -> None:
    line = "%r = f32[16,4]{{1,0}} all-reduce(%x), replica_groups={groups}, to_apply=%add"
    assert not only(program(line.format(groups="[2,4]<=[8]"))).crosses_hosts(4)
    assert only(program(line.format(groups="[4,2]<=[2,4]T(1,0)"))).crosses_hosts(4)


GRID = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def compiled(
    function, *specs: PartitionSpec, out: PartitionSpec, shape: tuple[int, ...] = (16, 32)
) -> list[collectives.Collective]:
    """The collectives of a function of arrays that lie so on a mesh of 2 x 4 CPU devices."""
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(GRID, spec))
        for spec in specs
    ]
    return collectives.read(
        jax.jit(function, out_shardings=NamedSharding(GRID, out))
        .lower(*arguments)
        .compile()
        .as_text()
    )


def test_programs_of_the_cpu_compiler() -> None:
    whole = 16 * 32 * 4
    (gather,) = compiled(lambda x: x + 1, PartitionSpec("fsdp"), out=PartitionSpec())
    assert (gather.kind, gather.group_size, gather.wire_bytes) == ("all-gather", 4, 3 / 4 * whole)
    (reduce,) = compiled(lambda x: x.sum(0), PartitionSpec("data"), out=PartitionSpec())
    assert (reduce.kind, reduce.groups, reduce.wire_bytes) == (
        "all-reduce",
        ((0, 4), (1, 5), (2, 6), (3, 7)),
        32 * 4,
    )
    swap = compiled(lambda x: x + 1, PartitionSpec("fsdp"), out=PartitionSpec(None, "fsdp"))
    assert (
        collectives.wire_bytes(swap)
        == collectives.wire_bytes(swap, "all-to-all")
        == 3 / 4 * whole / 4
    )


def test_a_scanned_program_of_the_cpu_compiler() -> None:
    @functools.partial(
        jax.shard_map,
        mesh=GRID,
        in_specs=PartitionSpec(("data", "fsdp")),
        out_specs=PartitionSpec(("data", "fsdp")),
    )
    def ring(x):
        def hop(carry, _):
            return (
                jax.lax.ppermute(carry, "fsdp", [(index, (index + 1) % 4) for index in range(4)]),
                None,
            )

        return jax.lax.scan(hop, x, None, length=6)[0]

    found = compiled(ring, PartitionSpec(("data", "fsdp")), out=PartitionSpec(("data", "fsdp")))
    assert [each.kind for each in found] == ["collective-permute"]
    assert collectives.wire_bytes(found) == 6 * 2 * 32 * 4
