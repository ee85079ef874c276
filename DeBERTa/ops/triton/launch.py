"""How the kernels are launched per compute capability: warps and stages, measured on an H100, bounded elsewhere.

A stage more needs more shared memory: 105 KB for the forward kernel with two, where compute capabilities 8.6
and 8.9 have 99 KB per program.
"""

from typing import NamedTuple

TILE = 64  # rows of a tile: 128 spills registers, 32 wastes the tensor cores
SEQUENCES = 4  # whose table gradients one program sums


class Launch(NamedTuple):
    """Launch options of one kernel."""

    num_warps: int
    num_stages: int


class LaunchTable(NamedTuple):
    """Launch options of all kernels of a compute capability."""

    forward: Launch
    key_gradient: Launch
    query_gradient: Launch
    table_gradient: Launch


_SMALL = LaunchTable(Launch(4, 1), Launch(4, 1), Launch(4, 1), Launch(4, 1))
_LARGE = _SMALL._replace(forward=Launch(4, 2))
LAUNCH_TABLES = {(8, 0): _LARGE, (8, 6): _SMALL, (8, 9): _SMALL, (9, 0): _LARGE}
HEAD_SIZES = (32, 64, 128)


def find_launch_table(capability: tuple[int, int]) -> LaunchTable | None:
    """Return the launch table of a compute capability, None where the kernels have not been compiled for it."""
    return LAUNCH_TABLES.get(capability)
