"""The launcher: errors of wrong set-ups, and what a run leaves after a failure or a signal."""

import http.server
import json
import os
import select
import shutil
import signal
import socket
import socketserver
import threading
import time
from contextlib import ExitStack, closing, suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from DeBERTa import RTDConfig, RTDModel
from DeBERTa.data.token_store import get_store_path, open_store, write_store
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.errors import ConfigError
from DeBERTa.files import get_state
from DeBERTa.training.launch import find_job
from DeBERTa.training.worker import Failure
from tests.commands import (
    ENDLESS,
    PATIENCE,
    Command,
    find_free_port,
    get_cluster,
    is_port_free,
    make_two_process_flags,
    read_metrics_log,
    start_nodes,
    watch_checkpoints,
)
from tests.processes import is_running, list_children
from tests.runs import ForkedRun
from tests.training.batches import train_config


@pytest.fixture
def flags(prepared, tmp_path) -> dict:
    return make_two_process_flags(tmp_path, prepared)


@pytest.fixture
def endless(flags) -> dict:
    return flags | ENDLESS


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"WORLD_SIZE": "2", "RANK": "2"}, ("RANK is 2", "WORLD_SIZE 2", "from 0 to 1")),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, ("RANK is -1",)),
        ({"RANK": "1"}, ("RANK is 1", "WORLD_SIZE 1", "or unset WORLD_SIZE and RANK")),
        ({"LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}, ("RANK is not a number", "torchrun", "unset")),
        ({"WORLD_SIZE": "two"}, ("WORLD_SIZE", "'two'")),
        ({"WORLD_SIZE": "0"}, ("WORLD_SIZE is 0",)),
        ({"WORLD_SIZE": "2", "RANK": "first"}, ("RANK", "'first'")),
        ({"WORLD_SIZE": "2", "RANK": "0"}, ("MASTER_ADDR is not set",)),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "node0"}, ("MASTER_PORT is not set",)),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "x"}, ("MASTER_PORT", "'x'")),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "70000"}, ("MASTER_PORT is 70000",)),
    ],
)
def test_variables_that_cannot_work(monkeypatch, environment, named):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as error:
        find_job(train_config())
    for words in named:
        assert words in str(error.value)


def test_one_process_is_not_launched_and_workers_launch_nothing(monkeypatch):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert find_job(train_config(nproc_per_node=1)) is None
    assert find_job(train_config(nproc_per_node=3)).processes == 3
    for name, value in get_cluster(29500).items():
        monkeypatch.setenv(name, value)
    assert (find_job(train_config()).nodes, find_job(train_config()).port) == (2, 29500)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "torchrun's")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert find_job(train_config()) is None


def test_port_in_use_and_unknown_host(flags):
    with closing(socket.socket()) as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        taken = other.getsockname()[1]
        error = Command(flags, **get_cluster(taken)).finish_with_error()
        assert str(taken) in error
        assert "in use" in error
        assert "MASTER_PORT" in error
    error = Command(
        flags, **get_cluster(29500, node=1) | {"MASTER_ADDR": "no-such-host.invalid"}
    ).finish_with_error()
    assert "MASTER_ADDR no-such-host.invalid" in error


def test_nodes_that_do_not_register(flags):
    flags |= {"dist_timeout": 2}
    port = find_free_port()
    alone = Command(flags, **get_cluster(port))
    error = alone.finish_with_error()
    assert "RANK 1" in error
    assert "--dist_timeout 2 s" in error
    error = Command(flags, **get_cluster(port, node=1)).finish_with_error()
    assert f"MASTER_PORT {port}" in error
    assert "--dist_timeout 2 s" in error
    assert is_port_free(port)


def test_two_nodes_of_rank_0(flags):
    """On one host, which has the port once: the second one fails at once, and the first one keeps waiting."""
    port = find_free_port()
    first = ForkedRun(flags, **get_cluster(port))
    while is_port_free(port):
        assert is_running(first.pid)
    status, output = ForkedRun(
        flags | {"output_dir": f"{flags['output_dir']}-1"}, **get_cluster(port)
    ).finish()
    _, error = output.splitlines()  # after where it waits
    assert status == 1
    assert error.startswith(f"error: port {port} of this node is in use, by another command with RANK 0 or")
    assert is_running(first.pid)
    first.process.kill()
    first.finish()


class SendsFirst(socketserver.StreamRequestHandler):
    """As a mail server or an ssh server does."""

    def handle(self) -> None:
        self.wfile.write(b"220 ready\r\n")
        self.rfile.read()


class SendsNothing(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.rfile.read()


def test_a_port_of_another_program(flags):
    """What node 1 finds at MASTER_PORT listens, but is not the launcher of node 0."""
    flags |= {"dist_timeout": 3}
    kinds = (http.server.BaseHTTPRequestHandler, SendsFirst, SendsNothing)
    with ExitStack() as stack:
        servers = [
            stack.enter_context(socketserver.ThreadingTCPServer(("127.0.0.1", 0), kind)) for kind in kinds
        ]
        for server in servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ports = [server.server_address[1] for server in servers] + [store.port]
        runs = [
            ForkedRun(flags | {"output_dir": f"{flags['output_dir']}-{port}"}, **get_cluster(port, node=1))
            for port in ports
        ]
        for port, node in zip(ports, runs, strict=True):
            node.process.join(PATIENCE)
            status, output = node.finish()
            _, error = output.splitlines()  # after where it waits
            assert status == 1
            assert error.startswith(
                f"error: the server at MASTER_ADDR 127.0.0.1, MASTER_PORT {port} is not the"
            )


def test_two_nodes_of_one_rank(flags):
    port = find_free_port()
    runs = start_nodes(flags, port, ranks=(0, 1, 1), nodes=3)
    for run in runs:
        assert "two nodes have RANK 1" in run.finish_with_error()
    assert is_port_free(port)


def test_nodes_with_different_world_sizes(flags):
    port = find_free_port()
    runs = [Command(flags, **get_cluster(port, nodes=2))]
    runs.append(
        Command(flags | {"output_dir": f"{flags['output_dir']}-1"}, **get_cluster(port, nodes=3, node=1))
    )
    for run in runs:
        assert "WORLD_SIZE is" in run.finish_with_error()


def test_a_latecomer_does_not_end_the_run(endless):
    """Started with another WORLD_SIZE, or with a RANK that is taken, while the others train."""
    port = find_free_port()
    runs = start_nodes(endless | {"nproc_per_node": 1}, port)
    runs[0].wait_for(watch_checkpoints(runs[0]))
    for number, (nodes, rank) in enumerate(((3, 2), (3, 1), (2, 1))):
        late = endless | {"output_dir": f"{endless['output_dir']}-late-{number}"}
        status, output = ForkedRun(late, **get_cluster(port, nodes, rank)).finish()
        _, error = output.splitlines()  # after where it waits
        assert status == 1
        assert error.startswith("error: ")
        assert ("two nodes have RANK 1" if rank == 1 else "WORLD_SIZE is") in error
    before = runs[0].printed.read_text()
    runs[0].wait_for(lambda: len(runs[0].printed.read_text()) > len(before))
    runs[0].process.send_signal(signal.SIGTERM)
    assert [node.finish() for node in runs] == [143, 143]


def test_settings_that_differ_are_named_by_both_nodes(flags, tmp_path, prepared):
    port = find_free_port()
    other = tmp_path / "other"
    other.mkdir()
    (other / "train.txt").write_text(
        "".join((prepared / "train.txt").read_text().splitlines(keepends=True)[:-1])
    )
    change = {"learning_rate": 0.5, "data_dir": other, "workers": 1}
    for run in start_nodes(flags | {"nproc_per_node": 1}, port, {}, change):
        error = run.finish_with_error()
        for name in ("learning_rate (0.001 and 0.5)", "train_sha256", "train_lines (600 and 599)"):
            assert name in error
        assert "data_dir" not in error
        assert "workers" not in error
    assert is_port_free(port)


def test_token_ids_that_differ_are_named(flags, tmp_path, prepared):
    """The recorded hash of the text is the same: what is compared is what is trained on."""
    port = find_free_port()
    other = shutil.copytree(prepared, tmp_path / "other")
    for split in ("train", "valid"):
        text = other / f"{split}.txt"
        with write_store(get_store_path(text)) as writer:
            store = open_store(prepared / f"{split}.txt", Tokenizer(prepared / "spm.model"), 62).files[0]
            vars(writer.meta).update(vars(store.meta), lines=0, num_tokens=0, text=get_state(text.stat()))
            writer.append(store.tokens[::-1], store.offsets[1:])
            writer.commit()
    for run in start_nodes(flags | {"nproc_per_node": 1}, port, {}, {"data_dir": other}):
        error = run.finish_with_error()
        assert "train_ids_sha256" in error
        assert "valid_ids_sha256" in error
        assert "train_sha256" not in error


def test_validation_texts_that_differ_are_named(flags, tmp_path, prepared):
    """Also where nothing is trained: all ranks evaluate."""
    other = tmp_path / "other"
    shutil.copytree(prepared, other)
    with (other / "valid.txt").open("a") as text:
        text.write("one more line\n")
    for change in ({}, {"do_train": False, "do_eval": True}):
        for run in start_nodes(
            flags | {"nproc_per_node": 1} | change, find_free_port(), {}, {"data_dir": other}
        ):
            assert "valid_sha256" in run.finish_with_error()


def test_an_error_on_one_node_is_reported_on_both(flags):
    port = find_free_port()
    for run in start_nodes(flags | {"nproc_per_node": 1}, port, {}, {"vocab_path": "no.model"}):
        assert "node 1 (" in run.finish_with_error()
        assert "no.model" in run.finish_with_error()
        assert not run.find_workers()


def test_batch_smaller_than_the_processes(flags):
    error = Command(flags | {"train_batch_size": 6, "accumulative_update": 6}).finish_with_error(status=2)
    assert "--train_batch_size 6" in error
    assert "at least 12" in error


def test_a_run_of_two_processes(flags):
    """Rank 0 writes to the console; both have logs; the run directory is that of one process."""
    run = Command(flags)
    assert run.finish() == 0, run.printed.read_text()
    printed = run.printed.read_text()
    for text in (
        "2 processes",
        "2 processes on 1 node",
        "8 sequences",
        "4 per rank",
        "step 6/6",
        "final models",
    ):
        assert text in printed
    assert printed.count("step 6/6") == 1
    logs = {path.name: path.read_text() for path in (run.run_dir / "logs").glob("*.log")}
    assert logs.keys() == {"rank-0000.log", "rank-0001.log", "node-0000.log"}
    assert "step 6/6" in logs["rank-0000.log"]
    kinds = [line["kind"] for line in read_metrics_log(run.run_dir)]
    assert (kinds.count("train"), kinds.count("valid")) == (5, 3)
    assert json.loads((run.run_dir / "checkpoints" / "best.json").read_text())["step"] in (2, 4, 6)
    assert (run.run_dir / "generator" / "model.safetensors").exists()


def list_listeners(processes: list[int]) -> set[str]:
    """Return the addresses on which processes listen, in hexadecimal as the kernel has them."""
    sockets = set()
    for process in processes:
        for file in Path(f"/proc/{process}/fd").iterdir():
            with suppress(FileNotFoundError):
                sockets.add(str(file.readlink()))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].split(":")[0])
    return found


def test_one_node_listens_on_loopback_and_no_stranger_ends_it_well(endless):
    """Another user of the machine writes a failure of status 0, with escape codes, to the store."""
    run = Command(endless, GLOO_SOCKET_IFNAME="eth0")
    run.wait_for(watch_checkpoints(run))
    workers = list(run.find_workers().values())
    assert list_listeners([run.process.pid, *workers]) == {"0100007F"}
    environment = Path(f"/proc/{workers[0]}/environ").read_text().split("\0")
    (port,) = [int(line.split("=")[1]) for line in environment if line.startswith("MASTER_PORT=")]
    store = dist.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=PATIENCE))
    failure = Failure("all\x1b[31m is\nwell").to_json().replace('"exit_status": 1', '"exit_status": 0')
    store.set("attempt-0/failure", failure)
    assert "another node reported a failure that cannot be read" in run.finish_with_error()
    assert "\x1b" not in run.printed.read_text()
    assert not run.find_workers()


@pytest.mark.parametrize("mode", ["zero2", "fsdp"])
def test_sharded_training_saves_full_checkpoints_and_models(flags, mode):
    full = Command(flags)
    assert full.finish() == 0, full.printed.read_text()
    sharded = Command(flags | {"sharding": mode, "output_dir": f"{flags['output_dir']}-{mode}"})
    assert sharded.finish() == 0, sharded.printed.read_text()
    for name in ("checkpoints/step-00000006", "generator", "discriminator"):
        found, expected = (load_file(run.run_dir / name / "model.safetensors") for run in (sharded, full))
        assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
    for found, expected in zip(
        read_metrics_log(sharded.run_dir), read_metrics_log(full.run_dir), strict=True
    ):
        assert found["generator_loss"] == pytest.approx(expected["generator_loss"], rel=1e-4)
        assert found["discriminator_loss"] == pytest.approx(expected["discriminator_loss"], rel=1e-4)
    shutil.rmtree(sharded.run_dir / "checkpoints" / "step-00000006")
    alone = Command(flags | {"nproc_per_node": 1, "output_dir": sharded.run_dir})
    assert alone.finish() == 0, alone.printed.read_text()
    assert "resuming from step 4" in alone.printed.read_text()


def test_a_killed_data_worker_is_one_error(endless):
    run = Command(endless | {"workers": 1})
    run.wait_for(watch_checkpoints(run))
    os.kill(list_children(run.find_workers()[1])[0], signal.SIGKILL)
    assert "a data worker died" in run.finish_with_error()
    assert not run.find_workers()


def test_a_killed_process_ends_the_run_on_both_nodes(endless):
    port = find_free_port()
    runs = start_nodes(endless | {"nproc_per_node": 1}, port)
    runs[0].wait_for(watch_checkpoints(runs[0]))
    os.kill(runs[1].find_workers()[1], signal.SIGKILL)
    for run in runs:
        error = run.finish_with_error()
        assert "rank 1" in error
        assert "SIGKILL" in error
        assert "rank-0001.log" in error
        assert not run.find_workers()
    assert is_port_free(port)


def test_a_stopped_process_ends_the_run(endless):
    """It receives no signal but SIGKILL; all processes end within `--dist_timeout` seconds."""
    run = Command(endless | {"dist_timeout": 30})
    run.wait_for(watch_checkpoints(run))
    os.kill(run.find_workers()[1], signal.SIGSTOP)
    stopped = time.monotonic()
    error = run.finish_with_error()
    assert time.monotonic() - stopped < 30
    assert "rank 0" in error
    assert "--dist_timeout 30 s" in error
    assert not run.find_workers()


def test_processes_end_with_a_killed_launcher(endless):
    run = Command(endless)
    run.wait_for(watch_checkpoints(run))
    workers = run.find_workers()
    assert workers.keys() == {0, 1}
    pidfds = [os.pidfd_open(pid) for pid in workers.values()]
    run.process.kill()
    for pidfd in pidfds:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(PATIENCE * 1000)
        os.close(pidfd)


def test_processes_end_with_a_launcher_killed_at_once(endless):
    """Before they have a handler for its end: they compare their parent with the one that started them."""
    run = Command(endless)
    run.wait_for(lambda: run.find_workers().keys() == {0, 1})
    workers = run.find_workers().values()
    run.process.kill()
    deadline = time.monotonic() + PATIENCE
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline


def test_a_signal_while_nodes_register(flags):
    """SIGUSR1 does nothing yet; SIGTERM ends the command, which still waits for the other node."""
    port = find_free_port()
    run = Command(flags, **get_cluster(port))
    run.wait_for(lambda: not is_port_free(port))
    for number in (signal.SIGUSR1, signal.SIGTERM):
        run.process.send_signal(number)
    assert run.finish() == 143
    (line,) = run.read_lines()
    assert line == f"node 0 of 2, with node 0 at 127.0.0.1:{port}: waiting up to 20 s for the other nodes"
    assert is_port_free(port)


def test_a_restart_resumes_from_the_last_checkpoint(flags):
    """On nodes with one and two processes, and with `--fresh`, which is for the first attempt."""
    flags |= {"max_restarts": 1, "num_training_steps": 200, "dump_interval": 20, "log_interval": 20}
    port = find_free_port()
    runs = start_nodes(flags | {"fresh": True}, port, {"nproc_per_node": 1}, {"nproc_per_node": 2})
    runs[0].wait_for(watch_checkpoints(runs[0]))
    workers = runs[1].find_workers()
    assert workers.keys() == {1, 2}
    os.kill(workers[2], signal.SIGKILL)
    for run in runs:
        assert run.finish() == 0, run.printed.read_text()
        assert "rank 2: killed by SIGKILL" in run.printed.read_text()
        assert "restart 1 of 1" in run.printed.read_text()
    assert "resuming from step" in runs[0].printed.read_text()
    assert (runs[0].run_dir / "checkpoints" / "step-00000200").exists()


def test_fresh_and_a_restart_before_the_run_is_opened(flags, tmp_path):
    """The restart starts over, too: the finished run of before is not resumed."""
    finished = Command(flags | {"num_training_steps": 4, "dump_interval": 2})
    assert finished.finish() == 0, finished.printed.read_text()
    before = {path.name for path in (finished.run_dir / "checkpoints").iterdir()}
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import os, signal\n"
        "if (os.environ.get('LOCAL_RANK'), os.environ.get('TORCHELASTIC_RESTART_COUNT')) == ('1', '0'):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    again = flags | {"num_training_steps": 4, "dump_interval": 2, "fresh": True, "max_restarts": 1}
    path = os.pathsep.join(filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")]))
    run = Command(again, PYTHONPATH=path)
    assert run.finish() == 0, run.printed.read_text()
    printed = run.printed.read_text()
    assert "restart 1 of 1" in printed
    assert "resuming from" not in printed
    moved = run.run_dir.with_name(f"{run.run_dir.name}.old-1")
    assert {path.name for path in (moved / "checkpoints").iterdir()} == before


def test_one_process_is_not_restarted(flags):
    run = Command(flags | {"nproc_per_node": 1, "num_training_steps": 2, "max_restarts": 3})
    assert run.finish() == 0, run.printed.read_text()
    assert "--max_restarts is for several ranks" in run.printed.read_text()


@pytest.mark.parametrize("differing", ["init_discriminator", "resize_vocab"])
def test_nodes_that_start_from_other_weights(flags, tmp_path, differing):
    """The same path on two nodes, with other content: an error, no mixture. So with --resize_vocab."""
    config = RTDConfig.from_json(flags["model_config"])
    port, runs = find_free_port(), []
    for node in range(2):
        torch.manual_seed(node if differing == "init_discriminator" else 0)
        model = RTDModel(config)
        folder = tmp_path / f"node-{node}"
        folder.mkdir()
        for name, part in (
            ("generator", model.generator.state_dict()),
            ("discriminator", model.merge_discriminator()),
        ):
            save_file(part, folder / f"{name}.safetensors")
        weights = {f"init_{name}": folder / f"{name}.safetensors" for name in ("generator", "discriminator")}
        vocabulary = folder / "spm.model"  # of the same pieces; an empty message of settings changes bytes
        vocabulary.write_bytes(flags["vocab_path"].read_bytes() + bytes([0x12, 0x00]) * node)
        if differing == "resize_vocab":
            weights["resize_vocab"] = vocabulary
        given = flags | weights | {"nproc_per_node": 1, "output_dir": tmp_path / f"run-{node}"}
        runs.append(Command(given, **get_cluster(port, node=node)))
    for run in runs:
        error = run.finish_with_error()
        assert f"ranks 0 and 1 differ in {differing}_sha256 (" in error


def test_under_torchrun_nothing_is_launched(flags):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "DeBERTa.train"]
    run = Command({k: v for k, v in flags.items() if k != "nproc_per_node"}, *torchrun)
    assert run.finish() == 0, run.printed.read_text()
    assert "2 processes" in run.printed.read_text()
    assert (run.run_dir / "logs" / "rank-0001.log").exists()
    assert not (run.run_dir / "logs" / "node-0000.log").exists()


def test_an_error_under_torchrun_is_in_its_report(flags):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "DeBERTa.train"]
    run = Command(
        {k: v for k, v in flags.items() if k != "nproc_per_node"} | {"vocab_path": "no.model"}, *torchrun
    )
    assert run.finish() == 1
    assert "VocabularyError" in run.printed.read_text()
    assert "no.model" in run.printed.read_text()
