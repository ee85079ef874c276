"""Nodes that come while a run is under way."""

import signal

from tests.training.test_launch import (  # noqa: F401
    Command,
    cluster,
    endless,
    flags,
    free_port,
    saved_something,
    start_nodes,
)


def test_a_latecomer_does_not_end_the_run(endless):  # noqa: F811
    """Started with another WORLD_SIZE, or with a RANK that is taken, while the others train."""
    port = free_port()
    runs = start_nodes(endless | {"nproc_per_node": 1}, port)
    runs[0].wait_for(saved_something(runs[0]))
    for number, (nodes, rank) in enumerate(((3, 2), (3, 1), (2, 1))):
        late = Command(endless | {"output_dir": f"{endless['output_dir']}-late-{number}"}, **cluster(port, nodes, rank))
        assert ("two nodes have RANK 1" if rank == 1 else "WORLD_SIZE is") in late.error()
    before = runs[0].printed.read_text()
    runs[0].wait_for(lambda: len(runs[0].printed.read_text()) > len(before))
    runs[0].process.send_signal(signal.SIGTERM)
    assert [run.finish() for run in runs] == [143, 143]
