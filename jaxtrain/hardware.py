"""Hardware: what the cards can do at best, by the name under which jax knows them.

Figures are peaks of dense products in TFLOP/s, float32 accumulation, no sparsity, boost clock. They
come from NVIDIA's data sheets and architecture papers (Volta, Turing, GA100, GA102, AD102, Hopper,
Blackwell); where a sheet gives the sparse figure only, it is halved. None was measured here. No
card reaches its peak: a bare bf16 product gets to about 80% of it on an H100 or H200 and 87% on an
A100 (stas00/ml-engineering, compute/accelerator), which is the ceiling for model FLOP utilisation
(MFU). Laptop cards, and cards held below their usual power, are slower than their name says.
"""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU model; peaks in TFLOP/s, None where it has no such units."""

    name: str
    pattern: str
    """Found (`re.search`) in the lower-case device kind."""
    capability: tuple[int, int]
    """CUDA compute capability (developer.nvidia.com/cuda-gpus): what the compiler builds for, and
    what decides the precision."""
    fp32: float
    tf32: float | None
    fp16: float
    bf16: float | None
    fp8: float | None = None


# The first match wins, so the narrower pattern stands before the wider one.
CARDS = (
    Card("B200", r"\bg?b200\b", (10, 0), 75.0, 1125.0, 2250.0, 2250.0, 4500.0),
    Card("H200 NVL", r"h200 nvl", (9, 0), 60.0, 417.5, 835.5, 835.5, 1671.0),
    Card("H200 SXM", r"\bg?h200\b", (9, 0), 66.9, 494.7, 989.4, 989.4, 1978.9),
    Card("H100 NVL", r"h100 nvl", (9, 0), 60.0, 417.5, 835.5, 835.5, 1671.0),
    Card("H100 PCIe", r"h100 pcie", (9, 0), 51.2, 378.0, 756.0, 756.0, 1513.0),
    Card("H100 SXM", r"\b[gh]?h[18]00\b", (9, 0), 66.9, 494.7, 989.4, 989.4, 1978.9),
    Card("A100", r"\ba[18]00\b", (8, 0), 19.5, 156.0, 312.0, 312.0),
    Card("A30", r"\ba30\b", (8, 0), 10.3, 82.0, 165.0, 165.0),
    Card("A40", r"\ba40\b", (8, 6), 37.4, 74.8, 149.7, 149.7),
    Card("A10G", r"\ba10g\b", (8, 6), 35.0, 35.0, 70.0, 70.0),
    Card("A10", r"\ba10\b", (8, 6), 31.2, 62.5, 125.0, 125.0),
    Card("L40S", r"\bl40s\b", (8, 9), 91.6, 183.0, 362.0, 362.0, 733.0),
    Card("L40", r"\bl40\b", (8, 9), 90.5, 90.5, 181.0, 181.0, 362.0),
    Card("L4", r"\bl4\b", (8, 9), 30.3, 60.0, 121.0, 121.0, 242.0),
    Card("RTX 6000 Ada", r"rtx 6000 ada", (8, 9), 91.1, 182.1, 364.2, 364.2, 728.5),
    Card("RTX A6000", r"rtx a6000", (8, 6), 38.7, 77.4, 154.8, 154.8),
    Card("RTX 5090", r"rtx 5090(?! d)\b(?!.*laptop)", (12, 0), 104.8, 104.8, 209.5, 209.5, 419.0),
    Card("RTX 4090", r"rtx 4090(?! d)\b(?!.*laptop)", (8, 9), 82.6, 82.6, 165.2, 165.2, 330.3),
    Card("RTX 3090", r"rtx 3090(?! ti)\b", (8, 6), 35.6, 35.6, 71.0, 71.0),
    Card("RTX 2080 Ti", r"rtx 2080 ti\b", (7, 5), 13.4, None, 53.8, None),
    Card("TITAN RTX", r"titan rtx", (7, 5), 16.3, None, 130.5, None),
    Card("Quadro RTX 8000", r"quadro rtx [68]000", (7, 5), 16.3, None, 130.5, None),
    Card("T4", r"\bt4\b", (7, 5), 8.1, None, 65.0, None),
    Card("V100 PCIe", r"v100-pcie", (7, 0), 14.0, None, 112.0, None),
    Card("V100 SXM", r"\bv100\b", (7, 0), 15.7, None, 125.0, None),
)


def find_card(device_kind: str) -> Card | None:
    """The card of a device kind as `jax.devices()[0].device_kind` words it, or None if it is
    not in `CARDS`.

    >>> (
    ...     find_card("NVIDIA H100 80GB HBM3").name,
    ...     find_card("NVIDIA H100 PCIe").name,
    ...     find_card("cpu"),
    ... )
    ('H100 SXM', 'H100 PCIe', None)
    """
    return next((card for card in CARDS if re.search(card.pattern, device_kind.lower())), None)


def compute_capability(card: str) -> tuple[int, int] | None:
    """The compute capability (major, minor) of a card, by its name in `CARDS` or its device
    kind, or None if it is not there.

    >>> (
    ...     compute_capability("TITAN RTX"),
    ...     compute_capability("NVIDIA A100-SXM4-80GB"),
    ...     compute_capability("cpu"),
    ... )
    ((7, 5), (8, 0), None)
    """
    found = next((known for known in CARDS if known.name == card), None) or find_card(card)
    return None if found is None else found.capability


def peak_flops(device_kind: str, precision: str) -> float | None:
    """Peak FLOP/s of one device, or None where it isn't known or the card has no units for it; then
    no MFU is shown.

    >>> peak_flops("NVIDIA H200", "bf16"), peak_flops("Tesla T4", "bf16"), peak_flops("cpu", "fp32")
    (989400000000000.0, None, None)

    `fp32` means what jax does with float32 by default: TF32 where the card has it, or MFU would
    exceed 1 on an A100.
    """
    card = find_card(device_kind)
    if card is None:
        return None
    peaks = {
        "fp32": card.tf32 or card.fp32,
        "tf32": card.tf32,
        "bf16": card.bf16,
        "fp16": card.fp16,
        "fp8": card.fp8,
    }
    teraflops = peaks[precision]
    return None if teraflops is None else teraflops * 1e12
