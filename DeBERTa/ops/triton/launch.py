"""Launch options of the kernels by compute capability and head size.

They are tile, warps and stages. Tiles of 64 rows have been measured on an H100 (9.0). Where they would
spill registers, tiles are of 32 rows: for heads of 128, and on 8.x, whose matmuls keep their operands in
registers.
"""

from typing import NamedTuple

SEQUENCES = 4  # per program of the kernel that sums table gradients
HEAD_SIZES = (32, 64, 128)
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0))
HOPPER = (9, 0)
# Capabilities, head sizes and precisions for which a GPU has shown that the kernels are right, and faster
# than sdpa. In float32 they spill registers.
MEASURED = {(HOPPER, 64, "bf16")}


class Launch(NamedTuple):
    """Launch options of one kernel."""

    num_warps: int
    num_stages: int


class LaunchTable(NamedTuple):
    """The tile, and the launch options of each kernel."""

    tile: int
    forward: Launch
    key_gradient: Launch = Launch(4, 1)
    query_gradient: Launch = Launch(4, 1)
    table_gradient: Launch = Launch(4, 1)


def get_launch_table(capability: tuple[int, int], head_size: int) -> LaunchTable:
    """Return the launch options for one compute capability and head size."""
    if capability == HOPPER and head_size <= 64:
        return LaunchTable(64, Launch(4, 2))
    return LaunchTable(32, Launch(4, 1))
