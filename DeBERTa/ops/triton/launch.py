"""Launch options of the kernels by compute capability: tile, warps and stages.

Measured on an H100 (9.0). On 8.x, whose matmuls keep their operands in registers, tiles of 64 rows spill with
4 warps. Tiles of 32 compile for 8.x and have not been run.
"""

from typing import NamedTuple

SEQUENCES = 4  # per program of the kernel that sums table gradients
HEAD_SIZES = (32, 64, 128)


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


AMPERE = LaunchTable(32, Launch(4, 1))
HOPPER = LaunchTable(64, Launch(4, 2))
LAUNCH_TABLES = {(8, 0): AMPERE, (8, 6): AMPERE, (8, 9): AMPERE, (9, 0): HOPPER}
