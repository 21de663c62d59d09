"""What accelerators are capable of, by their makers' data sheets."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator, as one of `jax.devices()` sees it.

    Args:
      kinds: `device_kind`s of such devices.
      flops: peak bfloat16 floating point operations a second, without sparsity.
      memory: bytes.
      memory_speed: bytes a second from and to that memory.
      link_speed: bytes a second that it receives from its neighbours, all links together.
      neighbours: how many chips such links join; None: as many as a job has.
      network_speed: bytes a second that it receives from others.
      source: of the numbers.
    """

    kinds: tuple[str, ...]
    flops: float
    memory: float
    memory_speed: float
    link_speed: float
    source: str
    neighbours: int | None = None
    network_speed: float = 0.0

    def speed_between(self, first_to_last: int) -> float:
        """Bytes a second received in a group of chips that spans so many places in a row."""
        if self.neighbours is None or first_to_last <= self.neighbours:
            return self.link_speed
        return self.network_speed


_CLOUD = "docs.cloud.google.com/tpu/docs/"
# Links: data sheets add up both directions, which is twice what a chip receives. The network of the
# GPUs is that of NVIDIA's own DGX: an adapter of 200 Gb/s for each A100, of 400 for the others.
CHIPS: dict[str, Chip] = {
    "a100_40gb": Chip(
        kinds=("NVIDIA A100-SXM4-40GB",),
        flops=312e12, memory=40e9, memory_speed=1.555e12, link_speed=300e9,
        neighbours=8, network_speed=25e9, source="nvidia.com/en-us/data-center/a100",
    ),
    "a100": Chip(
        kinds=("NVIDIA A100-SXM4-80GB",),
        flops=312e12, memory=80e9, memory_speed=2.039e12, link_speed=300e9,
        neighbours=8, network_speed=25e9, source="nvidia.com/en-us/data-center/a100",
    ),
    "h100": Chip(
        kinds=("NVIDIA H100 80GB HBM3",),
        flops=989.4e12, memory=80e9, memory_speed=3.35e12, link_speed=450e9,
        neighbours=8, network_speed=50e9, source="nvidia.com/en-us/data-center/h100",
    ),
    "h200": Chip(
        kinds=("NVIDIA H200",),
        flops=989.4e12, memory=141e9, memory_speed=4.8e12, link_speed=450e9,
        neighbours=8, network_speed=50e9, source="nvidia.com/en-us/data-center/h200",
    ),
    "b200": Chip(
        kinds=("NVIDIA B200",),
        flops=2250e12, memory=180e9, memory_speed=8e12, link_speed=900e9,
        neighbours=8, network_speed=50e9, source="nvidia.com/en-us/data-center/dgx-b200",
    ),
    "v4": Chip(
        kinds=("TPU v4",),
        flops=275e12, memory=32 * 2**30, memory_speed=1.2e12, link_speed=300e9,
        source=_CLOUD + "v4",
    ),
    "v5e": Chip(
        kinds=("TPU v5 lite", "TPU v5e"),
        flops=197e12, memory=16e9, memory_speed=819e9, link_speed=200e9, source=_CLOUD + "v5e",
    ),
    "v5p": Chip(
        kinds=("TPU v5", "TPU v5p"),
        flops=459e12, memory=95e9, memory_speed=2.765e12, link_speed=600e9, source=_CLOUD + "v5p",
    ),
    "v6e": Chip(
        kinds=("TPU v6 lite", "TPU v6e"),
        flops=918e12, memory=32e9, memory_speed=1.638e12, link_speed=400e9, source=_CLOUD + "v6e",
    ),
}  # fmt: skip


def chip_of(device: jax.Device) -> Chip | None:
    """The chip that a device is; None for a CPU, and for what the table does not know."""
    return next((chip for chip in CHIPS.values() if device.device_kind in chip.kinds), None)
