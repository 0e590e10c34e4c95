"""GPU targets: devices of a GPU that this machine lacks, for which programs can be compiled.

The extra `plan` brings NVIDIA's compiler as jax uses it: the CUDA plugin of jax's own version,
`ptxas`, and the small runtime library whose absence the plugin would report in four lines on stderr
in every process. It brings none of the large libraries, so nothing can run.

jax loads its plugins once, at its first use of a device. The plugin then looks for those libraries.
If they are missing it prints a traceback on stderr and is not loaded.
`JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1` (or `JAX_PLATFORMS=cpu`), set before that first use, skips this
check. `prepare` sets it where the machine has no NVIDIA device.
"""

import dataclasses
import os
from collections.abc import Callable
from importlib import util
from typing import Any

from jaxtrain import hardware, messages
from jaxtrain.errors import UserError

SKIP_CHECK = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"
DEVICE_FILES = ("/dev/nvidiactl", "/dev/dxg")
"""One of them is there if the machine, or its Windows host, has an NVIDIA card and a driver."""
WHEELS = (
    "jax-cuda12-plugin",
    "jax-cuda12-pjrt",
    "nvidia-cuda-nvcc-cu12",
    "nvidia-cuda-runtime-cu12",
)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What all cards of one compute capability share (CUDA programming guide, technical
    specifications per compute capability)."""

    threads_per_core: int
    shared_per_core: int
    "bytes"
    shared_per_block: int
    "bytes, if a kernel asks for more than the usual 48 KiB"
    fpus_per_core: int


ARCHITECTURES = {
    (7, 0): Architecture(2048, 98304, 98304, 64),
    (7, 5): Architecture(1024, 65536, 65536, 64),
    (8, 0): Architecture(2048, 167936, 166912, 64),
    (8, 6): Architecture(1536, 102400, 101376, 128),
    (8, 9): Architecture(1536, 102400, 101376, 128),
    (9, 0): Architecture(2048, 233472, 232448, 128),
    (10, 0): Architecture(2048, 233472, 232448, 128),
    (12, 0): Architecture(1536, 102400, 101376, 128),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A card as the compiler sees it."""

    card: str
    """Its name in `hardware.CARDS`."""
    cores: int
    """Streaming multiprocessors."""
    clock: float
    """GHz, boost."""
    memory: int
    """Bytes."""
    bandwidth: float
    """Of the memory, bytes a second."""
    l2: int
    """Bytes."""

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability (major, minor)."""
        found = hardware.compute_capability(self.card)
        assert found is not None, self.card
        return found


KIB, MIB, GIB = 2**10, 2**20, 2**30

# V100, A100, RTX A6000, H100, H200 and B200 are as in XLA's own tree
# (xla/backends/gpu/target_config/specs), where memory is what CUDA reports; the others are from
# NVIDIA's data sheets, where it is what is sold, of which the driver keeps 1 to 8%.
TARGETS = {
    "v100": Target("V100 SXM", 80, 1.53, 16935682048, 898.048e9, 6 * MIB),
    "v100_32gb": Target("V100 SXM", 80, 1.53, 32 * GIB, 898.048e9, 6 * MIB),
    "titan_rtx": Target("TITAN RTX", 72, 1.77, 24 * GIB, 672e9, 6 * MIB),
    "rtx_2080_ti": Target("RTX 2080 Ti", 68, 1.545, 11 * GIB, 616e9, 5632 * KIB),
    "t4": Target("T4", 40, 1.59, 16 * GIB, 320e9, 4 * MIB),
    "rtx_3090": Target("RTX 3090", 82, 1.695, 24 * GIB, 936e9, 6 * MIB),
    "a10": Target("A10", 72, 1.695, 24 * GIB, 600e9, 6 * MIB),
    "rtx_a6000": Target("RTX A6000", 84, 1.8, 51041271808, 768.096e9, 6 * MIB),
    "a100": Target("A100", 108, 1.41, 85100068864, 2039.04e9, 40 * MIB),
    "a100_40gb": Target("A100", 108, 1.41, 42331013120, 1555.2e9, 40 * MIB),
    "l4": Target("L4", 58, 2.04, 24 * GIB, 300e9, 48 * MIB),
    "l40s": Target("L40S", 142, 2.52, 48 * GIB, 864e9, 96 * MIB),
    "rtx_4090": Target("RTX 4090", 128, 2.52, 24 * GIB, 1008e9, 72 * MIB),
    "rtx_5090": Target("RTX 5090", 170, 2.407, 32 * GIB, 1792e9, 96 * MIB),
    "h100": Target("H100 SXM", 132, 1.98, 84942979072, 3352.32e9, 50 * MIB),
    "h100_pcie": Target("H100 PCIe", 114, 1.755, 84942979072, 2039.04e9, 50 * MIB),
    "h200": Target("H200 SXM", 132, 1.98, 151397597184, 4800e9, 50 * MIB),
    "b200": Target("B200", 148, 1.965, 191514411008, 7672.32e9, 132644864),
}
"""By the name that a user writes."""


def find(card: str) -> Target:
    """The target of this name.

    >>> find("titan_rtx").capability
    (7, 5)

    `UserError` with the nearest name if there is none.
    """
    if card not in TARGETS:
        near = messages.did_you_mean(card, TARGETS)
        raise UserError(
            f"card {card!r}: not known to the compiler; known: {', '.join(TARGETS)}{near}"
        )
    return TARGETS[card]


def text(target: Target) -> str:
    """The target as the compiler reads it: an XLA GpuTargetConfigProto in text form.

    >>> "core_count: 132" in text(find("h100")), "major: 9" in text(find("h100"))
    (True, True)
    """
    major, minor = target.capability
    shape = ARCHITECTURES[target.capability]
    # From Hopper on some instructions belong to one architecture only ("sm_90a"), and fast matrix
    # products are among them.
    extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": shape.threads_per_core,
        "shared_memory_per_block": 48 * KIB,
        "shared_memory_per_core": shape.shared_per_core,
        "shared_memory_per_block_optin": shape.shared_per_block,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "core_count": target.cores,
        "fpus_per_core": shape.fpus_per_core,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": round(target.bandwidth),
        "l2_cache_size": target.l2,
        "clock_rate_ghz": target.clock,
        "device_memory_size": target.memory,
    }
    info = " ".join(f"{name}: {value}" for name, value in fields.items())
    capability = (
        f"cuda_compute_capability {{ major: {major} minor: {minor} feature_extension:"
        f" {extension} }}"
    )
    versions = (
        "dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 9 patch: 0 }"
    )
    return (
        f'gpu_device_info {{ {info} {capability} }} platform_name: "CUDA" {versions}'
        f' device_description_str: "NVIDIA {target.card}"'
    )


def unavailable_reason() -> str | None:
    """Why nothing can be compiled for GPUs here, or None if it can."""
    # not above: this file is imported in every process, and needs it in few
    from importlib import metadata

    versions = {}
    for wheel in ("jax", *WHEELS):
        try:
            versions[wheel] = metadata.version(wheel)
        except metadata.PackageNotFoundError:
            return f"{wheel} is not installed; pip install 'jaxtrain[plan]'"
    for wheel in WHEELS[:2]:
        if versions[wheel] != versions["jax"]:
            return (
                f"{wheel} is {versions[wheel]} but jax is {versions['jax']}; pip install"
                f" '{wheel}=={versions['jax']}'"
            )
    return None


def prepare(exists: Callable[[str], bool] = os.path.exists) -> None:
    """Keeps jax silent about the libraries that the extra `plan` doesn't bring; call it before
    jax's first use of a device.

    Where there is an NVIDIA device nothing is changed: there the check is worth having.
    """
    if util.find_spec("jax_cuda12_plugin") is not None and not any(
        exists(file) for file in DEVICE_FILES
    ):
        os.environ.setdefault(SKIP_CHECK, "1")


def devices(card: str, count: int, *, hosts: int = 1) -> list[Any]:
    """Devices to compile for: `count` cards in `hosts` hosts, in order of hosts. Nothing runs on
    them.

    `UserError` if the card is not known, the cards do not divide among the hosts, or
    `unavailable_reason` has one.
    """
    target = find(card)
    if count < 1 or hosts < 1 or count % hosts:
        raise UserError(
            f"{count} {card} in {hosts} hosts: every host has the same number of cards; choose a"
            f" multiple of {max(hosts, 1)}"
        )
    reason = unavailable_reason()
    if reason is not None:
        raise UserError(f"compiling for {card}: {reason}")
    prepare()
    # here, so that the variable above is set before jax looks at it
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(
            platform="cuda", target_config=text(target), topology=f"1x{hosts}x{count // hosts}"
        )
    except NotImplementedError as error:
        raise UserError(
            f"compiling for {card}: jax began without its CUDA plugin; set {SKIP_CHECK}=1 in the"
            " environment"
        ) from error
    return list(found.devices)
