"""Train the arms of the ablations at equal compute.

    python experiments/ablations/run.py                                 # all runs that are not there yet
    python experiments/ablations/run.py --arms mlm gdes --seeds 4 5     # more seeds of two arms
    python experiments/ablations/table.py                               # tables; with --png, plots

Each finished run is appended to `results.jsonl`. Stop it at any time, also with SIGKILL: the same command
resumes the run that was training from its last checkpoint; Ctrl-C and SIGTERM save one. Compute is counted in
FLOPs of matmuls, forward and backward, by torch.utils.flop_counter. The steps are those of gdes; every other
arm trains the number of steps that has the same FLOPs.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from DeBERTa.command import run_command
from DeBERTa.config import ModelConfig, RTDConfig, read_json
from DeBERTa.data.batch import Batch
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.files import append_line
from DeBERTa.flags import FlagParser
from DeBERTa.hub.weights import read_weights
from DeBERTa.model.pretraining import MaskedLanguageModel, RTDModel
from DeBERTa.processes import RunInterrupted
from DeBERTa.report.read import read_lines, read_run
from experiments.ablations.table import read_results

ROOT = Path(__file__).resolve().parent.parent.parent
# What each arm changes. Those of RTD name the sharing; those of MLM train the discriminator's architecture.
ARMS: dict[str, dict[str, Any]] = {
    "gdes": {"embedding_sharing": "gdes"},
    "es": {"embedding_sharing": "es"},
    "nes": {"embedding_sharing": "nes"},
    "mlm": {},  # c2p and p2c, absolute positions in the enhanced mask decoder
    "mlm-c2p": {"pos_att_type": "c2p"},
    "mlm-p2c": {"pos_att_type": "p2c"},
    "mlm-absolute": {"relative_attention": False, "pos_att_type": "none", "position_biased_input": True},
    "mlm-without-emd": {"position_biased_input": True},  # absolute positions in the input instead
}
LENGTH, BATCH = 128, 16
MASKED = 0.15
FLAGS = {
    "learning_rate": 1.5e-3, "adam_beta2": 0.98, "warmup": 0.05, "train_batch_size": BATCH, "max_ngram": 1,
    "max_seq_length": LENGTH, "log_interval": 100, "keep_last": 1, "workers": 0,
}  # fmt: skip
PRESETS = {"RTD": "deberta-v3-tiny", "MLM": "deberta-tiny"}  # for the text and its vocabulary
EVALUATIONS = 8  # during a run
CURVE = {"step", "loss", "generator_loss", "discriminator_loss", "discriminator_auc"}
WORDS = "deberta.embeddings.word_embeddings.weight"


def main() -> int:
    """Run the command and return its exit status."""
    try:
        return run_command(train_all)
    except subprocess.CalledProcessError as failed:  # the command has logged its error
        return failed.returncode


def train_all() -> None:
    """Train the runs that are not among the results yet."""
    flags = parse_arguments()
    base = read_json(flags.model_config)
    RTDConfig.from_dict(base, str(flags.model_config))
    reference = count_flops(build_config("gdes", base)) * flags.steps
    prepare_text()
    flags.results.parent.mkdir(parents=True, exist_ok=True)
    for seed in flags.seeds:
        for arm in flags.arms:
            config = build_config(arm, base)
            key = {"arm": arm, "seed": seed, "flops": reference, "model_sha256": hash_values(config)}
            if has_result(flags.results, key):
                continue
            result = key | train(arm, seed, config, reference, flags.work)
            if not has_result(flags.results, key):  # another process may have finished the same run
                append_line(flags.results, json.dumps(result))


def has_result(path: Path, key: dict[str, Any]) -> bool:
    """Return whether a run is among the results."""
    return path.exists() and any(key.items() <= result.items() for result in read_results(path))


def parse_arguments() -> argparse.Namespace:
    """Return the flags."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default, results = (Path(__file__).with_name(name) for name in ("model.json", "results.jsonl"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="N")
    parser.add_argument(
        "--steps", type=int, default=6000, metavar="N", help="of the arm gdes (default: 6000)"
    )
    parser.add_argument("--model_config", type=Path, default=default, help="RTD model config")
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--work", type=Path, default=ROOT / "output" / "ablations", help="run directories")
    flags = parser.parse_args()
    if flags.steps < 1:
        parser.error(f"--steps must be at least 1, not {flags.steps}")
    return flags


def build_config(arm: str, base: dict) -> dict:
    """Return the model config of an arm."""
    change = ARMS[arm]
    if is_rtd(arm):
        return base | change
    return base["discriminator"] | change


def is_rtd(arm: str) -> bool:
    """Return whether an arm trains by replaced token detection."""
    return "embedding_sharing" in ARMS[arm]


def hash_values(values: dict) -> str:
    """Return the SHA-256 of a config."""
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def count_flops(config: dict) -> int:
    """Return the FLOPs of the matmuls of a training step."""
    torch.manual_seed(0)
    model: RTDModel | MaskedLanguageModel
    if "generator" in config:
        model, vocabulary = RTDModel(RTDConfig.from_dict(config)), config["generator"]["vocab_size"]
    else:
        model, vocabulary = MaskedLanguageModel(ModelConfig.from_dict(config)), config["vocab_size"]
    ids = torch.randint(4, vocabulary, (BATCH, LENGTH))
    labels = ids * (torch.arange(LENGTH) < round(MASKED * LENGTH))
    batch = Batch.from_tensors(
        ids, torch.ones_like(ids) > 0, labels, torch.rand(ids.shape, dtype=torch.float64)
    )
    with FlopCounterMode(display=False) as counter:
        if isinstance(model, RTDModel):
            generated, detected = model(batch)
            (generated.masked.loss.sum() + detected.loss).backward()
        else:
            model.compute_masked_loss(batch, is_sampled=False).loss.sum().backward()
    return counter.get_total_flops()


def prepare_text() -> None:
    """Prepare text and vocabulary, the same for both presets, unless they are there."""
    command = [sys.executable, "prepare_data.py", "--preset", PRESETS["RTD"], "--max_seq_length", str(LENGTH)]
    run_process(command)


def run_process(command: list[Any]) -> None:
    """Run a command to its end.

    A signal that stops this process is passed on, and the command, which may save a checkpoint, ends first.
    Raises `CalledProcessError` if it fails.
    """
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt as stop:
            process.send_signal(stop.exit_status - 128 if isinstance(stop, RunInterrupted) else signal.SIGINT)
            process.wait()
            raise
    if status:
        raise subprocess.CalledProcessError(status, command)


def train(arm: str, seed: int, config: dict, flops: int, work: Path) -> dict[str, Any]:
    """Train a run, or what is missing of it, probe it, and return its results."""
    steps = round(flops / count_flops(config))
    work.mkdir(parents=True, exist_ok=True)
    # Relative, so that the command that is recorded works elsewhere.
    run_dir = Path(os.path.relpath(work / f"{arm}-{steps}-{hash_values(config)[:8]}-seed{seed}", ROOT))
    path = run_dir.with_suffix(".json")
    (ROOT / path).write_text(json.dumps(config))
    flags = FLAGS | {
        "preset": PRESETS["RTD" if is_rtd(arm) else "MLM"], "model_config": path, "output_dir": run_dir,
        "num_training_steps": steps, "dump_interval": -(-steps // EVALUATIONS), "seed": seed,
    }  # fmt: skip
    command = ["-m", "DeBERTa.train", *(f"--{name}={value}" for name, value in flags.items())]
    run_process([sys.executable, *command])
    run_process([sys.executable, "-m", "DeBERTa.probe", run_dir])
    run_dir = ROOT / run_dir
    run = read_run(run_dir)
    evaluations = [row for row in run.rows if row["kind"] == "valid"]
    unused = re.compile("kind|time|elapsed_seconds|text_sha256|probe_.*")
    return {
        "steps": steps,
        "tokens": steps * BATCH * LENGTH,
        "commit": describe_commit(),
        "device": run.environment["device"],
        "wall_seconds": run.rows[-1]["elapsed_seconds"],
        "command": " ".join(["python", *command]),
        "final": {name: value for name, value in evaluations[-1].items() if not unused.fullmatch(name)},
        "probe": read_lines(run_dir / "probe.jsonl")[-1],
        "cosines": measure_cosines(run_dir) if is_rtd(arm) else {},
        "curve": [{name: row[name] for name in row if name in CURVE} for row in evaluations],
    }


def describe_commit() -> str:
    """Return the commit of the checkout, with "+" if files differ from it."""
    revision = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    return subprocess.run(revision, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def measure_cosines(run_dir: Path) -> dict[str, float]:
    """Return mean cosines of word embeddings.

    "between": of the same token in the tables of generator and discriminator; by their names: of different
    tokens in one table.
    """
    tables = {}
    for name in ("generator", "discriminator"):
        tokens = len(Tokenizer(run_dir / name / "spm.model"))
        table = read_weights(run_dir / name / "model.safetensors")[WORDS][:tokens]
        tables[name] = torch.nn.functional.normalize(table.double())
    # The cosines of all pairs add up to the squared norm of the sum; those of a token with itself are 1.
    within = {
        name: (float(table.sum(0).square().sum()) - len(table)) / (len(table) * (len(table) - 1))
        for name, table in tables.items()
    }
    return {"between": float((tables["generator"] * tables["discriminator"]).sum(1).mean()), **within}


if __name__ == "__main__":
    sys.exit(main())
