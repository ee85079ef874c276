"""Time, memory and share of the GEMM roofline of one training step, against `transformers`.

    python benchmarks/training_step.py --json results.json [--cases rtd-xsmall mlm-bert-base ...] [--rounds 3]

Every measurement is a process of its own (peak memory is its high-water mark), ours and theirs in turns; the
median step of each process after two warm-up steps, and the median of these over the rounds. Dropout is on.
The peers:

- RTD: generator and discriminator are `DebertaV2Model`; the enhanced mask decoder is two more passes of the
  last layer over all positions, the head reads masked positions only, samples come from softmax and
  `multinomial`, the GDES table is summed each step; AdamW (fused with bfloat16), autocast for bfloat16.
- MLM: `BertForMaskedLM` and `DebertaV2ForMaskedLM` with logits at all positions, as the library's example
  script.

Ours runs with the environment that `mlm.sh` and `rtd.sh` set. FLOPs are those of all matmuls of the plain
model, without what is recomputed. The roofline is these FLOPs at the rate of large matmuls in the same
precision, the median of all processes of the case.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.about import about, scripts_environment  # noqa: E402
from DeBERTa import MaskedLanguageModel, ModelConfig, RTDConfig, RTDModel, TrainConfig  # noqa: E402
from DeBERTa.config import read_json  # noqa: E402
from DeBERTa.data.batch import Batch  # noqa: E402
from DeBERTa.training.execution import set_execution  # noqa: E402
from DeBERTa.training.memory import keep_freed_memory  # noqa: E402
from DeBERTa.training.steps import MaskedLMStep, ReplacedTokenStep  # noqa: E402

CASES = {
    "rtd-xsmall": ("rtd_xsmall_continue.json", 4, 512),
    "rtd-base": ("rtd_base.json", 1, 512),
    "mlm-bert-base": ("bert_base.json", 2, 512),
    "mlm-deberta-base": ("deberta_base.json", 2, 512),
}
MASK_ID = 128000


def make_batch(size: int, length: int, seed: int, vocabulary: int = MASK_ID + 100) -> Batch:
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


def ours(config_name: str, precision: str, device: str = "cpu", **flags: object):
    """Our training step, as `python -m DeBERTa.train` runs it with `flags`."""
    if device == "cpu":
        keep_freed_memory()
    values = read_json(ROOT / "experiments" / "language_model" / config_name)
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
    """`BertForMaskedLM` or `DebertaV2ForMaskedLM`, trained as the library's example script does."""

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


def theirs(config_name: str, precision: str, device: str = "cpu"):
    values = read_json(ROOT / "experiments" / "language_model" / config_name)
    with torch.device(device):
        peer = (ComposedRTD if "generator" in values else LibraryMLM)(values, precision, device)
    for model in vars(peer).values():
        if isinstance(model, torch.nn.Module):
            model.train()
    return peer


def product_rate(precision: str) -> float:
    """FLOP/s of large matrix products over two seconds: single ones vary by a factor of three."""
    size = 3072
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    a @ b
    products, started = 0, time.perf_counter()
    while time.perf_counter() - started < 2:
        a @ b
        products += 1
    return 2 * size**3 * products / (time.perf_counter() - started)


def count_flops(config_name: str, precision: str, batch: Batch) -> int:
    """Count the FLOPs of matmuls in one step of plain PyTorch, without recomputed logits."""
    step = ours(config_name, precision, kernels="off")
    with FlopCounterMode(display=False) as counter:
        step(batch)
    values = read_json(ROOT / "experiments" / "language_model" / config_name)
    head = values.get("generator", values)
    return counter.get_total_flops() - 2 * batch.masked_tokens * head["vocab_size"] * head["hidden_size"]


def measure(case: str, who: str, precision: str, steps: int) -> dict:
    """In this process: seconds a step, peak memory, FLOPs (ours), rate of products."""
    config_name, size, length = CASES[case]
    torch.manual_seed(0)
    step = (ours if who == "ours" else theirs)(config_name, precision)
    seconds = []
    for number in range(steps + 2):
        batch = make_batch(size, length, number)
        started = time.perf_counter()
        step(batch)
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result = {"seconds": statistics.median(seconds[2:]), "all_seconds": seconds, "peak_gb": peak}
    if who == "ours":
        result["flops"] = count_flops(config_name, precision, batch)
    result["product_rate"] = product_rate(precision)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind, in turns")
    parser.add_argument("--steps", type=int, default=3, help="steps measured in each process")
    parser.add_argument("--one", nargs=3, metavar=("CASE", "WHO", "PRECISION"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one, arguments.steps)))
        return

    table = {}
    columns = f"{'s/step':>9}{'tokens/s':>10}{'peak GB':>9}{'GFLOP':>8}{'roofline':>9}"
    print(f"{'case':<18}{'precision':<10}{'':<8}{columns}")
    for case in arguments.cases:
        runs: dict[tuple[str, str], list[dict]] = {}
        for _ in range(arguments.rounds):
            for precision in arguments.precisions:
                for who in ("ours", "theirs"):
                    command = [
                        sys.executable,
                        __file__,
                        "--steps",
                        str(arguments.steps),
                        "--one",
                        case,
                        who,
                        precision,
                    ]
                    env = scripts_environment() if who == "ours" else None
                    output = subprocess.run(
                        command, check=True, capture_output=True, text=True, env=env
                    ).stdout
                    runs.setdefault((precision, who), []).append(json.loads(output))
        _, size, length = CASES[case]
        for (precision, who), results in runs.items():
            flops = runs[precision, "ours"][0]["flops"]
            seconds = statistics.median(result["seconds"] for result in results)
            rate = statistics.median(
                r["product_rate"] for who in ("ours", "theirs") for r in runs[precision, who]
            )
            row = {
                "seconds": seconds,
                "spread": [min(r["seconds"] for r in results), max(r["seconds"] for r in results)],
                "tokens_per_second": size * length / seconds,
                "peak_gb": statistics.median(result["peak_gb"] for result in results),
                "flops": flops,
                "product_rate": rate,
                "share_of_floor": flops / rate / seconds,
            }
            table.setdefault(case, {}).setdefault(precision, {})[who] = row
            print(
                f"{case:<18}{precision:<10}{who:<8}{seconds:>9.2f}{row['tokens_per_second']:>10.0f}"
                f"{row['peak_gb']:>9.2f}{flops / 1e9:>8.0f}{row['share_of_floor']:>9.0%}",
                flush=True,
            )
        for ratio, (a, b) in {
            "fp32 over bf16": ("fp32", "bf16"),
            "fp32 over fp32": ("fp32", "fp32"),
            "bf16 over bf16": ("bf16", "bf16"),
        }.items():  # fmt: skip
            if {a, b} <= set(table[case]):
                them, us = table[case][a]["theirs"], table[case][b]["ours"]
                figures = {"time": them["seconds"] / us["seconds"], "memory": us["peak_gb"] / them["peak_gb"]}
                table[case].setdefault("ratios", {})[ratio] = figures
                print(
                    f"{'':<18}theirs {ratio} ours: "
                    f"{figures['time']:.2f} times, memory {figures['memory']:.0%}"
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(about() | {"cases": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
