"""Typed configurations: `ModelConfig`, `RTDConfig`, `TrainConfig`.

Unknown keys, wrong types and impossible values raise `ConfigError`.

`ModelConfig` and `RTDConfig` use the field names of the published JSON files. Every field of `TrainConfig` is
a flag of `python -m DeBERTa.train`. What else is known of a flag (group, help, unit, limit, rules) stands in
its field's metadata.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from DeBERTa.errors import ConfigError, UsageError
from DeBERTa.files import read_file

T = TypeVar("T")
C = TypeVar("C", bound="Config")
ACTIVATIONS = ("gelu", "relu", "silu", "tanh")
POSITION_TERMS = ("c2p", "p2c")
LOG_LEVELS = ("debug", "info", "warning", "error")
LARGEST = 2**31 - 1  # larger numbers are mistakes, which overflow elsewhere
# Keys of a transformers config that do not change what a model here computes.
HUB_KEYS = (
    *("model_type", "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype"),
    *("output_attentions", "output_hidden_states", "return_dict", "use_cache", "_name_or_path"),
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "gradient_checkpointing"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "padding_idx", "tie_word_embeddings", "legacy"),
    *("pooler_dropout", "pooler_hidden_act", "pooler_hidden_size"),
    *("chunk_size_feed_forward", "is_encoder_decoder"),
)


@dataclass(frozen=True)
class Bounds:
    """The interval in which a number must lie.

    The interval is closed, except at an end that is excluded.
    """

    minimum: float
    maximum: float = LARGEST
    is_minimum_excluded: bool = False
    is_maximum_excluded: bool = False

    def __contains__(self, value: float) -> bool:
        """Return whether `value` lies in the interval; NaN does not."""
        is_above = value > self.minimum or (value == self.minimum and not self.is_minimum_excluded)
        is_below = value < self.maximum or (value == self.maximum and not self.is_maximum_excluded)
        return is_above and is_below

    def __str__(self) -> str:
        """Return the interval in words, as it follows "must be" in a message."""
        text = f"{'above' if self.is_minimum_excluded else 'at least'} {self.minimum}"
        return f"{text} and {'below' if self.is_maximum_excluded else 'at most'} {self.maximum}"


Limit = Bounds | tuple[str, ...] | None  # of the values of a field: numbers, or choices
FROM_ONE, FROM_ZERO = Bounds(1), Bounds(0)
PROCESSES = Bounds(0, 1024)  # of one machine
# For figures in float32, with room for their products.
POSITIVE, NOT_NEGATIVE = Bounds(0.0, 1e30, is_minimum_excluded=True), Bounds(0.0, 1e30)
PROPORTION, PROPORTION_BELOW_ONE = Bounds(0.0, 1.0), Bounds(0.0, 1.0, is_maximum_excluded=True)


class Rule(enum.Flag):
    """Properties of a flag that can be combined."""

    REQUIRED = enum.auto()
    RESUME = enum.auto()  # a resumed run may have another value
    NODE = enum.auto()  # each node may have its own value
    HIDDEN = enum.auto()  # a published name that works, but is not listed by --help


REQUIRED, RESUME, NODE, HIDDEN = Rule
INPUT = REQUIRED | RESUME | NODE  # a path, compared by the content that is read from it


def _flag(
    default: T,
    help: str,
    limit: Limit = None,
    unit: str = "",
    rules: Rule = Rule(0),  # noqa: B008 (a constant)
    group: str = "",  # of this flag and those that follow
    task: str = "",  # the only --task_name that uses it
) -> T:
    text = f"{task}: {help}" if task else help
    facts = {"help": text, "limit": limit, "unit": unit, "rules": rules, "group": group, "task": task}
    return field(default=default, metadata=facts)


def _limited(default: T, limit: Limit) -> T:
    return field(default=default, metadata={"limit": limit})


def find_experiments() -> Path:
    """Return the directory with the model configs and the sample.

    It is part of the installed package, or of the checkout.
    """
    package = Path(__file__).resolve().parent
    installed = package / "experiments"  # setup.py maps it there
    return installed if installed.is_dir() else package.parent / "experiments"


def read_json(path: str | Path) -> dict[str, Any]:
    """Read the JSON object in `path`.

    Raises `ConfigError` when the file is missing or not a JSON object.
    """
    if Path(path).is_dir():
        raise ConfigError(f"{path}: a directory; give the JSON file in it, such as config.json")
    try:
        values = json.loads(read_file(path), object_pairs_hook=_refuse_repeated_keys)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a readable JSON file ({getattr(error, 'strerror', error)})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; raise `ValueError` for a repeated key.

    The parser would keep the last of several values.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return values


def convert_hub_config(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a model config without keys of transformers, `pos_att_type` as text.

    Raises `ConfigError` for the config of another kind of model.
    """
    kind = values.get("model_type") or "deberta"
    if kind not in ("deberta", "deberta-v2"):
        raise ConfigError(
            f"{where}: model_type is {json.dumps(kind)}, not deberta or deberta-v2; give such a config"
        )
    values = {name: value for name, value in values.items() if name not in HUB_KEYS}
    if "pos_att_type" in values:
        terms = values["pos_att_type"] or "none"
        is_list = isinstance(terms, list) and all(isinstance(term, str) for term in terms)
        values["pos_att_type"] = "|".join(terms) if is_list else terms
    return values


@dataclass(frozen=True)
class Config:
    """Base of all configurations: built from JSON, with values that are checked."""

    _dashes = ""  # before a field's name in a message
    _error = ConfigError  # of `validate`

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any], where: str = "config") -> C:
        """Build from values by field name.

        Raises `ConfigError` for an unknown, missing or wrong value. An int is valid for a float field, but a
        bool is valid for a bool field only.
        """
        fields = {item.name: item for item in dataclasses.fields(cls)}
        if unknown := sorted(values.keys() - fields.keys()):
            names = ", ".join(map(repr, unknown))
            raise ConfigError(f"{where}: unknown key {names}; known keys: {', '.join(fields)}")
        required = [name for name, item in fields.items() if item.default is dataclasses.MISSING]
        if missing := [name for name in required if name not in values]:
            raise ConfigError(f"{where}: missing {', '.join(missing)}")
        hints = typing.get_type_hints(cls)
        for name, value in values.items():
            allowed = typing.get_args(hints[name]) or (hints[name],)
            if type(value) not in allowed and not (type(value) is int and float in allowed):
                wanted = " or ".join("null" if t is type(None) else t.__name__ for t in allowed)
                raise ConfigError(f"{where}: {name} must be {wanted}, not {json.dumps(value)}")
        config = cls(**values)
        config.validate(f"{where}: ")
        return config

    @classmethod
    def from_json(cls: type[C], path: str | Path) -> C:
        """Build from a JSON file."""
        return cls.from_dict(read_json(path), str(path))

    def to_dict(self) -> dict[str, Any]:
        """Return all values by field name, of nested configs too."""
        return dataclasses.asdict(self)

    def validate(self, prefix: str = "") -> None:
        """Raise `ConfigError` for values that cannot work.

        The message starts with `prefix`. For flags it is a `UsageError`.
        """
        for item in dataclasses.fields(self):
            value, limit = getattr(self, item.name), item.metadata.get("limit")
            if not value and REQUIRED in item.metadata.get("rules", Rule(0)):
                advice = "give it, or a --preset without --data_dir"
                raise self._error(f"{prefix}--{item.name} is required: {item.metadata['help']}; {advice}")
            if limit and value not in limit:
                wanted = limit if isinstance(limit, Bounds) else f"one of {', '.join(limit)}"
                raise self._error(f"{prefix}{self._dashes}{item.name} must be {wanted}, not {value!r}")
        for problem in self.find_problems():
            raise self._error(prefix + problem)

    def find_problems(self) -> Iterator[str]:
        """Yield a message for each combination of values that cannot work."""
        yield from ()


@dataclass(frozen=True)
class ModelConfig(Config):
    """The configuration of one encoder with its head.

    Sizes are in units: hidden width, heads, layers, table rows.
    """

    vocab_size: int = field(metadata={"limit": FROM_ONE})
    hidden_size: int = field(metadata={"limit": FROM_ONE})
    num_hidden_layers: int = field(metadata={"limit": Bounds(1, 1000)})
    num_attention_heads: int = field(metadata={"limit": FROM_ONE})
    intermediate_size: int = field(metadata={"limit": FROM_ONE})
    attention_head_size: int = _limited(0, FROM_ZERO)  # 0: hidden_size / num_attention_heads
    embedding_size: int = _limited(0, FROM_ZERO)  # 0: hidden_size
    max_position_embeddings: int = _limited(512, FROM_ONE)
    type_vocab_size: int = _limited(0, FROM_ZERO)
    position_biased_input: bool = True
    relative_attention: bool = False
    pos_att_type: str = "none"  # "c2p", "p2c", "p2c|c2p" or "none"
    position_buckets: int = _limited(-1, Bounds(-1))  # < 1: a table row for every distance
    max_relative_positions: int = _limited(-1, Bounds(-1))  # < 1: max_position_embeddings
    share_att_key: bool = False
    norm_rel_ebd: str = _limited("none", ("none", "layer_norm"))
    conv_kernel_size: int = _limited(0, FROM_ZERO)
    conv_act: str = _limited("tanh", ACTIVATIONS)
    hidden_act: str = _limited("gelu", ACTIVATIONS)
    hidden_dropout_prob: float = _limited(0.1, PROPORTION_BELOW_ONE)
    attention_probs_dropout_prob: float = _limited(0.1, PROPORTION_BELOW_ONE)
    initializer_range: float = _limited(0.02, POSITIVE)
    layer_norm_eps: float = _limited(1e-7, POSITIVE)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "model config") -> ModelConfig:
        """Build from published field names, and resolve `attention_head_size`.

        Keys that transformers adds are dropped. Raises `ConfigError` for an unknown, missing or wrong value.
        """
        if "generator" in values:
            raise ConfigError(f"{where}: the model config of an RTD model; give --task_name RTD")
        config = super().from_dict(convert_hub_config(values, where), where)
        return dataclasses.replace(config, attention_head_size=config.head_size)

    def find_problems(self) -> Iterator[str]:
        """Yield a message for each combination of values that cannot work."""
        heads, kernel = self.num_attention_heads, self.conv_kernel_size
        if not self.attention_head_size and self.hidden_size % heads:
            yield (
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {heads}; "
                "set attention_head_size"
            )
        if set(self._named_terms) - {*POSITION_TERMS, "none", ""}:
            yield f"pos_att_type {self.pos_att_type!r} may name only c2p and p2c, or be none"
        if kernel and kernel % 2 == 0:
            yield f"conv_kernel_size must be odd to keep the length, not {kernel}"
        if kernel and self.num_hidden_layers < 2:
            yield "conv_kernel_size needs at least 2 layers: the convolution follows the first"
        if self.relative_attention and self.position_buckets == 1:
            yield "position_buckets must be at least 2, or below 1 for none"

    @property
    def models(self) -> tuple[ModelConfig, ...]:
        """Return the configs of all models that training has, as `RTDConfig.models` does."""
        return (self,)

    @property
    def _named_terms(self) -> list[str]:
        return [term.strip() for term in self.pos_att_type.lower().split("|")]

    @property
    def position_terms(self) -> tuple[str, ...]:
        """Return the position terms in use, of "c2p" and "p2c".

        The tuple is empty for attention without relative positions.
        """
        named = self._named_terms if self.relative_attention else ()
        return tuple(term for term in POSITION_TERMS if term in named)

    @property
    def head_size(self) -> int:
        """Return the width of one attention head."""
        return self.attention_head_size or self.hidden_size // self.num_attention_heads

    def describe_unusual_heads(self) -> str:
        """Return a warning, empty if the heads together are as wide as the model."""
        width = self.num_attention_heads * self.head_size
        text = (
            f"attention_head_size {self.head_size} makes {self.num_attention_heads} heads {width} wide, but "
            f"hidden_size is {self.hidden_size}; omit attention_head_size for heads that are as wide together"
        )
        return text if width != self.hidden_size else ""

    @property
    def embedding_width(self) -> int:
        """Return the width of the embedding tables."""
        return self.embedding_size or self.hidden_size

    @property
    def max_distance(self) -> int:
        """Return the exclusive upper bound of relative distances.

        Longer distances are clamped to one less. It is `max_relative_positions`, or
        `max_position_embeddings` where that is below 1.
        """
        has_own = self.max_relative_positions >= 1
        return self.max_relative_positions if has_own else self.max_position_embeddings

    @property
    def position_span(self) -> int:
        """Return half the number of rows of the relative-position table."""
        return self.position_buckets if self.position_buckets > 0 else self.max_distance


@dataclass(frozen=True)
class RTDConfig(Config):
    """Generator, discriminator, and their embedding sharing.

    Source: DeBERTaV3, sections 3.2 and 3.3.
    """

    generator: ModelConfig
    discriminator: ModelConfig
    embedding_sharing: str = _limited("gdes", ("gdes", "es", "nes"))

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "RTD config") -> RTDConfig:
        """Build from the published layout.

        Raises `ConfigError` for a wrong value, and when the tables cannot be shared.
        """
        if "hidden_size" in values:
            raise ConfigError(f"{where}: the model config of an MLM model; give --task_name MLM")
        read = dict(values)
        for name, value in values.items():
            if name in ("generator", "discriminator") and isinstance(value, dict):
                read[name] = ModelConfig.from_dict(value, f"{where}: {name}")
            if name == "embedding_sharing" and isinstance(value, str):
                read[name] = value.lower()
        return super().from_dict(read, where)

    @property
    def models(self) -> tuple[ModelConfig, ...]:
        """Return the configs of generator and discriminator."""
        return self.generator, self.discriminator

    def find_problems(self) -> Iterator[str]:
        """Yield a message for each size that the models must share, but do not."""
        tables = ("embedding_width", "max_position_embeddings") if self.embedding_sharing != "nes" else ()
        for name in ("vocab_size", *tables):
            ours, theirs = getattr(self.generator, name), getattr(self.discriminator, name)
            if ours != theirs:
                yield (
                    f"{name} differs between generator ({ours}) and discriminator ({theirs}), "
                    f"which {self.embedding_sharing} does not allow"
                )


@dataclass(frozen=True)
class TrainConfig(Config):
    """The settings of one run, with one flag of the same name per field."""

    _dashes = "--"
    _error = UsageError

    task_name: str = _flag(
        "MLM", "masked language modeling or replaced token detection", ("MLM", "RTD"), group="task"
    )
    do_train: bool = _flag(False, "train", rules=RESUME)
    do_eval: bool = _flag(False, "evaluate on valid.txt, and on test.txt if there is one", rules=RESUME)

    model_config: str = _flag(
        "",
        "JSON file (experiments/language_model has some), or the config.json of a run",
        rules=INPUT,
        group="model",
    )
    # Compared by content, with the model config.
    vocab_size: int = _flag(0, "word table; 0: by config and vocabulary", FROM_ZERO, "rows", RESUME)
    init_model: str = _flag(
        "",
        "initial weights: file, model or run directory, or hf:OWNER/NAME[@REVISION]",
        rules=NODE,
        task="MLM",
    )
    init_generator: str = _flag(
        "",
        "as --init_model; from-discriminator: first layers, tables, LM head of that file",
        rules=NODE,
        task="RTD",
    )
    init_discriminator: str = _flag("", "initial weights, as --init_model", rules=NODE, task="RTD")
    fresh_head: bool = _flag(False, "start heads and position tables new that the file of --init_* lacks")
    resize_vocab: str = _flag(
        "",
        "the vocabulary of --init_*, if it is another (as --init_model): pieces of both keep their rows",
        rules=NODE,
    )

    data_dir: str = _flag(
        "", "directory with train.txt, valid.txt (and test.txt) of prepare_data.py", rules=INPUT, group="data"
    )
    replay: str = _flag(  # compared by content
        "",
        "as --data_dir: text of earlier training, to mix in and to watch for forgetting",
        rules=RESUME | NODE,
    )
    # A fraction whose denominator is at most 10,000, neither 0 nor 1.
    replay_share: float = _flag(0.2, "proportion of --replay in training sequences", Bounds(0.0001, 0.9999))
    vocab_path: str = _flag("", "SentencePiece model of the data", rules=INPUT)
    vocab_type: str = _flag("spm", "kind of vocabulary", ("spm",), rules=HIDDEN)
    max_seq_length: int = _flag(512, "sequence length with [CLS] and [SEP]", Bounds(3), "tokens")
    max_ngram: int = _flag(1, "longest masked span, in words; 1: single tokens", FROM_ONE, task="MLM")
    train_batch_size: int = _flag(256, "batch size over all ranks", FROM_ONE, "sequences per optimizer step")
    accumulative_update: int = _flag(1, "micro-batches per step of a rank, to need less memory", FROM_ONE)
    eval_batch_size: int = _flag(32, "batch size of the evaluation", FROM_ONE, "sequences", RESUME)
    workers: int = _flag(2, "data workers; 0: none", PROCESSES, "processes per rank", RESUME | NODE)
    seed: int = _flag(42, "seed of weights, data order, masks, dropout and sampling", Bounds(0, 2**63 - 1))

    num_training_steps: int = _flag(
        0, "length of the run; 0: by --num_train_epochs", FROM_ZERO, "steps", group="optimization"
    )
    num_train_epochs: float = _flag(
        1.0, "length of the run, without --num_training_steps", Bounds(0.0), "epochs", RESUME
    )
    learning_rate: float = _flag(1e-4, "peak learning rate", POSITIVE)
    discriminator_learning_rate: float = _flag(
        0.0, "the discriminator's peak learning rate; 0: --learning_rate", NOT_NEGATIVE, task="RTD"
    )
    warmup: float = _flag(10000.0, "linear warm-up", Bounds(0.0), "steps if >= 1, else proportion of all")
    lr_schedule: str = _flag(
        "linear",
        "after warm-up; linear, cosine: decay to the last step; wsd: decay over the last tenth of all steps",
        ("linear", "cosine", "wsd", "constant"),
    )
    lr_schedule_ends: float = _flag(0.0, "final learning rate", PROPORTION, "proportion of the peak")
    weight_decay: float = _flag(0.01, "AdamW weight decay (not of biases and LayerNorm)", NOT_NEGATIVE)
    adam_beta1: float = _flag(0.9, "AdamW beta1", PROPORTION_BELOW_ONE)
    adam_beta2: float = _flag(0.999, "AdamW beta2", PROPORTION_BELOW_ONE)
    epsilon: float = _flag(1e-6, "AdamW epsilon", POSITIVE)
    max_grad_norm: float = _flag(1.0, "clip the gradient to this norm; 0: no clipping", NOT_NEGATIVE)
    max_skipped_steps: int = _flag(20, "stop after as many skipped updates in a row", FROM_ONE, rules=RESUME)
    skip_spikes: bool = _flag(
        False, "skip updates whose loss is 6 standard deviations above the mean of the last 128 steps"
    )
    rtd_lambda: float = _flag(10.0, "weight of the discriminator's loss", NOT_NEGATIVE, task="RTD")
    decoupled_training: bool = _flag(
        True, "step on the generator's loss, then on the other (not es)", task="RTD"
    )

    precision: str = _flag(
        "auto",
        "auto: bf16 where the hardware has it, fp16 with loss scaling on older GPUs, else fp32",
        ("auto", "fp32", "bf16", "fp16"),
        group="computation",
    )
    # The resolved precision is compared on resume in place of this flag.
    fp16: bool | None = _flag(None, "--precision auto, or fp32 if False", rules=HIDDEN | RESUME)
    kernels: str = _flag(  # compared on resume: auto and off draw different dropout masks
        "auto", "auto: the fastest of DeBERTa/ops; off: plain PyTorch, --attention eager", ("auto", "off")
    )
    attention: str = _flag(
        "auto",
        "auto: the fastest here; eager: plain; sdpa: PyTorch's fused attention; triton: kernels for GPUs",
        ("auto", "eager", "sdpa", "triton"),
    )
    gradient_checkpointing: bool = _flag(False, "recompute layers: less memory, a third slower", rules=RESUME)
    deterministic: bool = _flag(False, "on a GPU: the same bits in every run, at some cost in speed")
    tf32: bool = _flag(True, "on a GPU: multiply float32 matrices in TF32")
    compile: bool | None = _flag(  # compared on resume as resolved
        None,
        "compile layers, and on a GPU the LM head; default: on GPUs with Triton and a C compiler; on CPUs "
        "it needs a C++ compiler",
    )

    nproc_per_node: int = _flag(
        0, "ranks on this node; 0: one per GPU, or one", PROCESSES, "processes", RESUME | NODE, group="ranks"
    )
    sharding: str = _flag(
        "none",
        "none: a full model per rank (DDP); zero2: shard gradients and optimizer state; fsdp: and parameters",
        ("none", "zero2", "fsdp"),
        rules=RESUME,
    )
    max_restarts: int = _flag(
        0, "restarts of several ranks after one was lost", FROM_ZERO, "restarts", RESUME
    )
    dist_timeout: int = _flag(600, "limit of waiting for other nodes and ranks", FROM_ONE, "seconds", RESUME)

    output_dir: str = _flag("", "path; empty: output/TAG", rules=RESUME | NODE, group="run directory")
    tag: str = _flag("run", "name of this run", rules=RESUME)
    dump_interval: int = _flag(10000, "interval of checkpoints and evaluations", FROM_ONE, "steps", RESUME)
    keep_last: int = _flag(3, "newest checkpoints to keep, besides the best", FROM_ONE, "checkpoints", RESUME)
    fresh: bool = _flag(False, "start over; an earlier run is moved to OUTPUT_DIR.old-1, ...", rules=RESUME)
    dry_run: bool = _flag(
        False, "take a few steps, report memory, time and disk needed, and stop", rules=RESUME
    )
    log_interval: int = _flag(100, "interval of metrics.jsonl", FROM_ONE, "steps", RESUME)
    log_level: str = _flag("info", "least severe console messages", LOG_LEVELS, rules=RESUME | NODE)

    def find_problems(self) -> Iterator[str]:
        """Yield a message for each combination of flags that cannot work."""
        batch, parts = self.train_batch_size, self.accumulative_update
        if not (self.do_train or self.do_eval):
            yield "nothing to do: give --do_train, --do_eval, or both"
        if self.fresh and not self.do_train:
            yield "--fresh starts training over: give --do_train too"
        if self.dry_run and not self.do_train:
            yield "--dry_run tries training: give --do_train, too"
        if batch % parts:
            yield f"--train_batch_size {batch} is not a multiple of --accumulative_update {parts}"
        if self.do_train and batch < (least := parts * self.nproc_per_node):
            ranks = f"--nproc_per_node {self.nproc_per_node}"
            yield f"--train_batch_size {batch} is too small for {ranks}: give at least {least}"
        if not (self.num_training_steps or self.num_train_epochs):
            yield "--num_train_epochs must be above 0 when --num_training_steps is not given"
        if self.lr_schedule == "constant" and self.lr_schedule_ends:
            yield "--lr_schedule_ends: --lr_schedule constant ends at the peak; give one of the two"
        if self.fp16 is not None and self.precision not in ("auto", "fp16" if self.fp16 else "fp32"):
            yield f"--fp16 {self.fp16} contradicts --precision {self.precision}: give one of them"
        if self.kernels == "off" and self.attention in ("sdpa", "triton"):
            yield f"--attention {self.attention}: --kernels off has plain attention only; give one of the two"
        yield from self._find_wrong_weights()
        yield from self._find_unused()

    def _find_wrong_weights(self) -> Iterator[str]:
        pair = (self.init_generator, self.init_discriminator)
        if self.task_name == "MLM" and any(pair):
            yield "--init_generator and --init_discriminator are for --task_name RTD: MLM takes --init_model"
        if self.task_name == "RTD" and self.init_model:
            yield "--init_model belongs to MLM: RTD takes --init_generator and --init_discriminator"
        if any(pair) and not all(pair):
            yield "--init_generator and --init_discriminator belong together: give both or neither"
        if (self.fresh_head or self.resize_vocab) and not (self.init_model or any(pair)):
            yield "--fresh_head and --resize_vocab are for the weights of --init_*: give them, too"

    def _find_unused(self) -> Iterator[str]:
        """Yield a message for flags that would be ignored."""
        for item in dataclasses.fields(self):
            is_given, task = getattr(self, item.name) != item.default, item.metadata["task"]
            if is_given and task not in ("", self.task_name):
                yield f"--{item.name} is for --task_name {task}: omit it, or give that task"
            if is_given and item.name == "replay_share" and not self.replay:
                yield "--replay_share is for the text of --replay: give --replay, too"

    @property
    def run_dir(self) -> Path:
        """Return the directory of this run's checkpoints, metrics and models."""
        return Path(self.output_dir or f"output/{self.tag}")


def find_flags(rule: Rule) -> frozenset[str]:
    """Return the names of the flags for which `rule` holds."""
    return frozenset(item.name for item in dataclasses.fields(TrainConfig) if rule in item.metadata["rules"])


FREE_TO_CHANGE = find_flags(RESUME)
FREE_PER_NODE = find_flags(NODE)
