"""Time, memory and share of the peak of one training step, against its peers.

    python -m benchmarks.training_step [--device cuda] [--cases rtd-xsmall ...] [--json results.json]

Every measurement is a process of its own, in turns; the median step of each process after two warm-up steps,
and the median of these over the rounds. Dropout is on. Time is taken when the device has finished. Memory is
the process's high-water mark on a CPU, and `torch.cuda.max_memory_allocated` on a GPU.

- ours: as the training command runs it. On a CPU, with the environment that `mlm.sh` and `rtd.sh` set.
- composed, RTD: generator and discriminator are `DebertaV2Model` of `transformers`; the enhanced mask decoder
  is two more passes of the last layer over all positions, the head reads masked positions only, samples come
  from softmax and `multinomial`, the GDES table is summed each step; AdamW (fused with bfloat16), autocast.
- composed, MLM: `BertForMaskedLM` and `DebertaV2ForMaskedLM` with logits at all positions, as the library's
  example script.
- eager: our plain PyTorch model, whose attention gathers scores by slot as the published code does, without
  kernels and compiler. It leaves out work that the published code does: the decoder reads masked positions.

FLOPs: of RTD by the formula (`DeBERTa/model/flops.py`), of MLM counted; without what is recomputed. Their
share is of the rate of large matmuls in the same precision on a CPU (the median of all processes of the
case), and of the vendor's dense bfloat16 peak on a GPU (MFU).
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.about import build_environment, describe_machine
from DeBERTa import MaskedLanguageModel, ModelConfig, RTDConfig, RTDModel, TrainConfig
from DeBERTa.config import read_json
from DeBERTa.data.batch import Batch
from DeBERTa.memory import keep_freed_memory
from DeBERTa.model.flops import count_flops_per_token
from DeBERTa.training.execution import set_execution
from DeBERTa.training.steps import MaskedLMStep, ReplacedTokenStep

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "experiments" / "language_model"
# Model config, sequences on a CPU and on a GPU, length.
CASES = {
    "rtd-xsmall": ("rtd_xsmall_continue.json", 4, 256, 512),
    "rtd-base": ("rtd_base.json", 1, 128, 512),
    "rtd-large": ("rtd_large.json", 1, 32, 512),
    "mlm-bert-base": ("bert_base.json", 2, 64, 512),
    "mlm-deberta-base": ("deberta_base.json", 2, 64, 512),
}
PEERS = ("ours", "composed", "eager")
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, from the vendor's data sheets


class Case(NamedTuple):
    """What one process measures.

    who: one of PEERS. flags: of the training command, for ours.
    """

    config: str
    sequences: int
    length: int = 512
    who: str = "ours"
    precision: str = "bf16"
    device: str = "cpu"
    flags: dict[str, object] = {}  # noqa: RUF012  never written to
    steps: int = 3


def make_batch(size: int, length: int, seed: int, vocabulary: int) -> Batch:
    """Random tokens, exactly 15 % of each line masked."""
    generator = torch.Generator().manual_seed(seed)
    mask_id = vocabulary - 100
    ids = torch.randint(4, mask_id, (size, length), generator=generator)
    labels = torch.zeros_like(ids)
    for row in range(size):
        masked = torch.randperm(length - 2, generator=generator)[: int(0.15 * length)] + 1
        labels[row, masked] = ids[row, masked]
        ids[row, masked] = mask_id
    return Batch.from_tensors(
        ids, torch.ones_like(ids), labels, torch.rand(ids.shape, generator=generator).double()
    )


def build_ours(config_name: str, precision: str, device: str = "cpu", **flags: object):
    """Return our training step, as `python -m DeBERTa.train` runs it with `flags`."""
    if device == "cpu":
        keep_freed_memory()
    values = read_json(CONFIGS / config_name)
    rtd = "generator" in values
    config = TrainConfig(task_name="RTD" if rtd else "MLM", **flags)
    place = torch.device(device)
    model = (
        RTDModel(RTDConfig.from_dict(values)) if rtd else MaskedLanguageModel(ModelConfig.from_dict(values))
    )
    model = model.to(place)
    set_execution(model, config, place)
    step = (ReplacedTokenStep if rtd else MaskedLMStep)(model, config, precision, place, 1000)
    step.set_learning_rate(1)
    return step


class ComposedRTD:
    """One RTD step composed from `transformers`, for comparison."""

    def __init__(self, values: dict, precision: str, device: str = "cpu") -> None:
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")
        self.generator, self.discriminator = (
            self._encoder(values[name]) for name in ("generator", "discriminator")
        )
        width, rows = values["generator"]["hidden_size"], values["generator"]["vocab_size"]
        self.positions = torch.nn.Embedding(512, width)
        self.head = torch.nn.Sequential(
            torch.nn.Linear(width, width), torch.nn.GELU(), torch.nn.LayerNorm(width, 1e-7)
        )
        self.bias = torch.nn.Parameter(torch.zeros(rows))
        self.residual = torch.nn.Parameter(torch.zeros(rows, width))
        self.detect = torch.nn.Sequential(
            torch.nn.LayerNorm(width, 1e-7), torch.nn.Linear(width, width), torch.nn.GELU()
        )
        self.classify = torch.nn.Linear(width, 1)
        generator = [self.generator, self.positions, self.head]
        discriminator = [p for n, p in self.discriminator.named_parameters() if "word_embeddings" not in n]
        groups = (
            [*(p for module in generator for p in module.parameters()), self.bias],
            [*discriminator, self.residual, *self.detect.parameters(), *self.classify.parameters()],
        )
        self.groups = groups
        self.optimizers = [
            torch.optim.AdamW(group, lr=1e-6, eps=1e-6, weight_decay=0.01, fused=precision == "bf16")
            for group in groups
        ]

    @staticmethod
    def _encoder(values: dict):
        from transformers import DebertaV2Config, DebertaV2Model

        config = {k: v for k, v in values.items() if k != "attention_head_size"}
        return DebertaV2Model(
            DebertaV2Config(**config | {"pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 0})
        )

    def __call__(self, batch: Batch) -> None:
        masked = batch.labels > 0
        table = self.generator.embeddings.word_embeddings.weight
        with self.autocast:
            states = self.generator(
                batch.input_ids, batch.input_mask, output_hidden_states=True
            ).hidden_states[-2]
            encoder = self.generator.encoder
            attention_mask = encoder.get_attention_mask(batch.input_mask)
            positions = {
                "rel_embeddings": encoder.get_rel_embedding(),
                "relative_pos": encoder.get_rel_pos(states),
            }
            queries = states + self.positions.weight[: states.size(1)]
            for _ in range(2):
                out = encoder.layer[-1](states, attention_mask, query_states=queries, **positions)
                queries = out[0] if isinstance(out, tuple) else out
            logits = F.linear(self.head(queries[masked]), table, self.bias)
            loss = F.cross_entropy(logits.float(), batch.labels[masked])
        samples = torch.multinomial(torch.softmax(logits.detach().float(), -1), 1).squeeze(1)
        self._update(loss, 0)
        corrupted = batch.input_ids.masked_scatter(masked, samples)
        with self.autocast:
            words = F.embedding(corrupted, table.detach() + self.residual)
            states = self.discriminator(
                inputs_embeds=words, attention_mask=batch.input_mask
            ).last_hidden_state
            logits = self.classify(self.detect(states + states[:, :1])).squeeze(-1)
            replaced = (masked & (corrupted != batch.labels)).float()
            loss = 10 * F.binary_cross_entropy_with_logits(logits.float(), replaced)
        self._update(loss, 1)

    def _update(self, loss: torch.Tensor, which: int) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.groups[which], 1.0)
        self.optimizers[which].step()
        self.optimizers[which].zero_grad()


class LibraryMLM:
    """`BertForMaskedLM` or `DebertaV2ForMaskedLM`.

    It is trained as the library's example script does.
    """

    def __init__(self, values: dict, precision: str, device: str = "cpu") -> None:
        from transformers import BertConfig, BertForMaskedLM, DebertaV2Config, DebertaV2ForMaskedLM

        self.autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")
        if values["relative_attention"]:
            config = {k: v for k, v in values.items() if k != "attention_head_size"}
            self.model = DebertaV2ForMaskedLM(DebertaV2Config(**config | {"pos_att_type": ["p2c", "c2p"]}))
        else:
            names = (
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "vocab_size",
            )
            self.model = BertForMaskedLM(BertConfig(**{name: values[name] for name in names}))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=precision == "bf16")

    def __call__(self, batch: Batch) -> None:
        labels = batch.labels.masked_fill(batch.labels == 0, -100)
        with self.autocast:
            loss = self.model(input_ids=batch.input_ids, attention_mask=batch.input_mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def build_composed(config_name: str, precision: str, device: str = "cpu"):
    """Return the peer's training step."""
    values = read_json(CONFIGS / config_name)
    with torch.device(device):
        peer = (ComposedRTD if "generator" in values else LibraryMLM)(values, precision, device)
    for model in vars(peer).values():
        if isinstance(model, torch.nn.Module):
            model.train()
    return peer


def measure_matmul_rate(precision: str) -> float:
    """Return FLOP/s of large matmuls on the CPU over two seconds.

    Single ones vary by a factor of three.
    """
    size = 3072
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    a @ b
    matmuls, started = 0, time.perf_counter()
    while time.perf_counter() - started < 2:
        a @ b
        matmuls += 1
    return 2 * size**3 * matmuls / (time.perf_counter() - started)


def count_flops(config_name: str, precision: str, batch: Batch) -> int:
    """Count the FLOPs of matmuls in one step of plain PyTorch on a CPU.

    Recomputed logits are not counted.
    """
    step = build_ours(config_name, precision, kernels="off")
    with FlopCounterMode(display=False) as counter:
        step(batch)
    head = read_head_config(config_name)
    return counter.get_total_flops() - 2 * batch.masked_tokens * head["vocab_size"] * head["hidden_size"]


def read_head_config(config_name: str) -> dict:
    """Return the model config of the LM head's model."""
    values = read_json(CONFIGS / config_name)
    return values.get("generator", values)


def synchronize(device: str) -> None:
    """Wait until `device` has finished."""
    if device == "cuda":
        torch.cuda.synchronize()


def time_steps(case: Case, limit: float = 60) -> list[float]:
    """Return seconds of each step, two warm-up steps included.

    No new step starts after `limit` seconds.
    """
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True  # for all
    started = time.perf_counter()
    if case.who == "composed":
        step = build_composed(case.config, case.precision, case.device)
    else:
        flags = {"kernels": "off", "compile": False} if case.who == "eager" else case.flags
        step = build_ours(case.config, case.precision, case.device, **flags)
    vocabulary = read_head_config(case.config)["vocab_size"]
    seconds: list[float] = []
    for number in range(case.steps + 2):
        if number > 2 and time.perf_counter() - started > limit:
            break
        batch = make_batch(case.sequences, case.length, number, vocabulary)
        if case.who == "composed":
            batch = batch.to(torch.device(case.device))
        synchronize(case.device)
        begin = time.perf_counter()
        step(batch)
        synchronize(case.device)
        seconds.append(time.perf_counter() - begin)
    return seconds


def measure(case: Case) -> dict:
    """Return the speed and the memory of this process.

    Seconds per step, tokens/s, peak memory, FLOPs, and their share of the peak.
    """
    all_seconds = time_steps(case)
    seconds = statistics.median(all_seconds[2:])
    tokens = case.sequences * case.length
    result: dict = {"seconds": seconds, "all_seconds": all_seconds, "tokens_per_second": tokens / seconds}
    values = read_json(CONFIGS / case.config)
    if case.device == "cuda":
        result["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        name = torch.cuda.get_device_name()
        peak = next((value for key, value in PEAK_FLOPS.items() if key in name), None)
    else:
        result["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        peak = result["matmul_rate"] = measure_matmul_rate(case.precision)
    if "generator" in values:
        result["flops"] = tokens * count_flops_per_token(RTDConfig.from_dict(values), case.length)
    else:
        batch = make_batch(1, case.length, 0, values["vocab_size"])
        result["flops"] = case.sequences * count_flops(case.config, case.precision, batch)
    if peak:
        result["share"] = result["flops"] / seconds / peak
    return result


def measure_in_process(case: Case, timeout: float | None = None) -> dict:
    """Return what `measure` returns in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.training_step", "--one", json.dumps(case._asdict())]
    env = build_environment() if case.who == "ours" and case.device == "cpu" else None
    output = subprocess.run(
        command, check=True, capture_output=True, text=True, env=env, cwd=ROOT, timeout=timeout
    ).stdout
    return json.loads(output.splitlines()[-1])


def summarize(results: list[dict], rate: float | None) -> dict:
    """Return medians over the processes of one peer.

    `rate` in FLOP/s replaces the peak of each.
    """
    row = {"spread": [min(r["seconds"] for r in results), max(r["seconds"] for r in results)]}
    for name in ("seconds", "tokens_per_second", "peak_gb", "flops"):
        row[name] = statistics.median(r[name] for r in results)
    if rate is not None:
        row["share"] = row["flops"] / rate / row["seconds"]
    elif "share" in results[0]:
        row["share"] = statistics.median(r["share"] for r in results)
    return row


def compare_peers(
    build_case: Callable[[str, str], Case], precisions: list[str], peers: list[str], rounds: int
) -> dict:
    """Measure a case `rounds` times in turns; return a row per precision and peer."""
    runs: dict[tuple[str, str], list[dict]] = {(p, who): [] for p in precisions for who in peers}
    for _ in range(rounds):
        for (precision, who), results in runs.items():
            results.append(measure_in_process(build_case(precision, who)))
    rows: dict = {}
    for (precision, who), results in runs.items():
        rates = [r["matmul_rate"] for peer in peers for r in runs[precision, peer] if "matmul_rate" in r]
        rows.setdefault(precision, {})[who] = summarize(results, statistics.median(rates) if rates else None)
    return rows


def format_row(row: dict) -> str:
    """Return the columns of one row of the table."""
    share = f"{row['share']:>8.1%}" if "share" in row else f"{'':>8}"
    columns = f"{row['seconds'] * 1e3:>10.1f}{row['tokens_per_second']:>11,.0f}{row['peak_gb']:>9.2f}"
    return f"{columns}{row['flops'] / 1e9:>10,.0f}{share}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=["ours", "composed"])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--sequences", type=int, help="in place of those of the cases")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind, in turns")
    parser.add_argument("--steps", type=int, default=3, help="steps measured in each process")
    parser.add_argument("--one", metavar="CASE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(Case(**json.loads(arguments.one)))))
        return

    table = {}
    columns = f"{'ms/step':>10}{'tokens/s':>11}{'peak GB':>9}{'GFLOP':>10}{'share':>8}"
    print(f"{'case':<18}{'precision':<10}{'':<10}{columns}")
    for name in arguments.cases:
        config, on_cpu, on_gpu, length = CASES[name]
        sequences = arguments.sequences or (on_gpu if arguments.device == "cuda" else on_cpu)

        def build_case(precision: str, who: str, head: tuple = (config, sequences, length)) -> Case:
            return Case(*head, who, precision, arguments.device, steps=arguments.steps)

        table[name] = compare_peers(build_case, arguments.precisions, arguments.peers, arguments.rounds)
        for precision, rows in table[name].items():
            for who, row in rows.items():
                print(f"{name:<18}{precision:<10}{who:<10}{format_row(row)}", flush=True)
            for who in set(rows) - {"ours"} if "ours" in rows else ():
                times = rows[who]["seconds"] / rows["ours"]["seconds"]
                memory = rows["ours"]["peak_gb"] / rows[who]["peak_gb"]
                print(f"{'':<18}{who} over ours: {times:.2f} times, memory {memory:.0%}")
    if arguments.json:
        arguments.json.write_text(json.dumps(describe_machine() | {"cases": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
