"""Typed configurations: `ModelConfig`, `RTDConfig`, `TrainConfig`.

Unknown keys, wrong types and impossible values raise `ConfigError`.

`ModelConfig` and `RTDConfig` use the field names of the published JSON files. Every field of `TrainConfig` is
a flag of `python -m DeBERTa.train`. What else is known of a flag (group, help, unit, bounds, choices, rules)
stands in its field's metadata.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from DeBERTa.errors import ConfigError

T = TypeVar("T")
ACTIVATIONS = ("gelu", "relu", "silu", "tanh")
POSITION_TERMS = ("c2p", "p2c")
SHARING = ("gdes", "es", "nes")
ATTENTION = ("auto", "eager", "sdpa", "triton")
SCHEDULES = ("linear", "cosine", "wsd", "constant")
LOG_LEVELS = ("debug", "info", "warning", "error")


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
    maximum: float = math.inf
    excludes_minimum: bool = False
    excludes_maximum: bool = False

    def __contains__(self, value: float) -> bool:
        """Return whether `value` is finite and lies in the interval."""
        is_excluded = (self.excludes_minimum and value == self.minimum) or (
            self.excludes_maximum and value == self.maximum
        )
        return math.isfinite(value) and self.minimum <= value <= self.maximum and not is_excluded

    def __str__(self) -> str:
        """Return the interval in words, as it follows "must be" in a message."""
        text = f"{'above' if self.excludes_minimum else 'at least'} {self.minimum}"
        if self.maximum < math.inf:
            return f"{text} and {'below' if self.excludes_maximum else 'at most'} {self.maximum}"
        return f"finite and {text}" if isinstance(self.minimum, float) else text


FROM_ONE, FROM_ZERO = Bounds(1), Bounds(0)
POSITIVE, NOT_NEGATIVE = Bounds(0.0, excludes_minimum=True), Bounds(0.0)
PROPORTION, PROPORTION_BELOW_ONE = Bounds(0.0, 1.0), Bounds(0.0, 1.0, excludes_maximum=True)


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
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def convert_hub_config(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a model config without the keys of transformers, with `pos_att_type` as text.

    Raises `ConfigError` for the config of another kind of model.
    """
    kind = values.get("model_type", "deberta")
    if kind not in ("deberta", "deberta-v2"):
        raise ConfigError(f"{where}: model_type is {kind!r}, not deberta or deberta-v2; give such a config")
    values = {name: value for name, value in values.items() if name not in HUB_KEYS}
    if "pos_att_type" in values:
        terms = values["pos_att_type"] or "none"
        is_list = isinstance(terms, list) and all(isinstance(term, str) for term in terms)
        values["pos_att_type"] = "|".join(terms) if is_list else terms
    return values


def _check_keys(values: dict[str, Any], cls: type, where: str) -> None:
    """Raise `ConfigError` for unknown keys and for missing fields of `cls`.

    Only fields without a default must be given.
    """
    fields = dataclasses.fields(cls)
    known = [f.name for f in fields]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(
            f"{where}: unknown key {', '.join(map(repr, unknown))}; known keys: {', '.join(known)}"
        )
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(missing)}")


def _check_types(values: dict[str, Any], cls: type, where: str) -> None:
    """Raise `ConfigError` unless the values have the annotated types.

    An int is valid for a float field, but a bool is valid for a bool field only.
    """
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        hint = hints[name]
        allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if type(value) not in allowed and not (type(value) is int and float in allowed):
            wanted = " or ".join("null" if t is type(None) else t.__name__ for t in allowed)
            raise ConfigError(f"{where}: {name} must be {wanted}, not {value!r}")


def _check_metadata(config: ModelConfig | TrainConfig, prefix: str) -> None:
    """Raise `ConfigError` for values outside their fields' bounds or choices."""
    for item in dataclasses.fields(config):
        value, bounds = getattr(config, item.name), item.metadata.get("bounds")
        choices = item.metadata.get("choices", ())
        options = f"one of {', '.join(choices)}" if choices else bounds
        is_wrong = (bounds is not None and value not in bounds) or (choices and value not in choices)
        _refuse(is_wrong, f"{prefix}{item.name} must be {options}, not {value!r}")


def _refuse(is_wrong: object, message: str) -> None:
    if is_wrong:
        raise ConfigError(message)


def _limited(default: T, bounds: Bounds | None = None, choices: tuple[str, ...] = ()) -> T:
    return field(default=default, metadata={"bounds": bounds, "choices": choices})


@dataclass(frozen=True)
class ModelConfig:
    """The configuration of one encoder with its head.

    Sizes are in units: hidden width, heads, layers, table rows.
    """

    vocab_size: int = field(metadata={"bounds": FROM_ONE})
    hidden_size: int = field(metadata={"bounds": FROM_ONE})
    num_hidden_layers: int = field(metadata={"bounds": FROM_ONE})
    num_attention_heads: int = field(metadata={"bounds": FROM_ONE})
    intermediate_size: int = field(metadata={"bounds": FROM_ONE})
    attention_head_size: int = _limited(0, FROM_ZERO)  # 0: hidden_size / num_attention_heads
    embedding_size: int = _limited(0, FROM_ZERO)  # 0: hidden_size
    max_position_embeddings: int = _limited(512, FROM_ONE)
    type_vocab_size: int = _limited(0, FROM_ZERO)
    position_biased_input: bool = True
    relative_attention: bool = False
    pos_att_type: str = "none"  # "c2p", "p2c", "p2c|c2p" or "none"
    position_buckets: int = -1  # < 1: a table row for every distance
    max_relative_positions: int = -1  # < 1: max_position_embeddings
    share_att_key: bool = False
    norm_rel_ebd: str = _limited("none", choices=("none", "layer_norm"))
    conv_kernel_size: int = _limited(0, FROM_ZERO)
    conv_act: str = _limited("tanh", choices=ACTIVATIONS)
    hidden_act: str = _limited("gelu", choices=ACTIVATIONS)
    hidden_dropout_prob: float = _limited(0.1, PROPORTION_BELOW_ONE)
    attention_probs_dropout_prob: float = _limited(0.1, PROPORTION_BELOW_ONE)
    initializer_range: float = _limited(0.02, POSITIVE)
    layer_norm_eps: float = _limited(1e-7, POSITIVE)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "model config") -> ModelConfig:
        """Build from published field names, and resolve `attention_head_size`.

        Keys that transformers adds are dropped. Raises `ConfigError` for an unknown, missing or wrong value.
        """
        _refuse("generator" in values, f"{where}: the model config of an RTD model; give --task_name RTD")
        values = convert_hub_config(values, where)
        _check_keys(values, cls, where)
        _check_types(values, cls, where)
        config = cls(**values)
        config._validate(where)
        return dataclasses.replace(config, attention_head_size=config.head_size)

    @classmethod
    def from_json(cls, path: str | Path) -> ModelConfig:
        """Build from a JSON file with published field names."""
        return cls.from_dict(read_json(path), where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Return all values by field name."""
        return dataclasses.asdict(self)

    def _validate(self, where: str) -> None:
        _check_metadata(self, f"{where}: ")
        heads, kernel = self.num_attention_heads, self.conv_kernel_size
        terms = {term.strip() for term in self.pos_att_type.lower().split("|")}
        _refuse(
            not self.attention_head_size and self.hidden_size % heads,
            f"{where}: hidden_size {self.hidden_size} is not a multiple of num_attention_heads {heads}; "
            "set attention_head_size",
        )
        _refuse(
            terms - {*POSITION_TERMS, "none", ""},
            f"{where}: pos_att_type {self.pos_att_type!r} may name only c2p and p2c, or be none",
        )
        _refuse(
            kernel and kernel % 2 == 0,
            f"{where}: conv_kernel_size must be odd to keep the length, not {kernel}",
        )
        _refuse(
            kernel and self.num_hidden_layers < 2,
            f"{where}: conv_kernel_size needs at least 2 layers: the convolution follows the first",
        )
        _refuse(
            self.relative_attention and self.position_buckets == 1,
            f"{where}: position_buckets must be at least 2, or below 1 for none",
        )

    @property
    def models(self) -> tuple[ModelConfig, ...]:
        """Return the configs of all models that training has, as `RTDConfig.models` does."""
        return (self,)

    @property
    def position_terms(self) -> tuple[str, ...]:
        """Return the position terms in use, of "c2p" and "p2c".

        The tuple is empty for attention without relative positions.
        """
        if not self.relative_attention:
            return ()
        named = [term.strip() for term in self.pos_att_type.lower().split("|")]
        return tuple(term for term in POSITION_TERMS if term in named)

    @property
    def head_size(self) -> int:
        """Return the width of one attention head."""
        return self.attention_head_size or self.hidden_size // self.num_attention_heads

    def describe_unusual_heads(self) -> str:
        """Return a warning if the heads together are not as wide as the model, else an empty string."""
        heads, width = self.num_attention_heads, self.num_attention_heads * self.head_size
        if width == self.hidden_size:
            return ""
        return (
            f"attention_head_size {self.head_size} makes {heads} heads {width} wide, but hidden_size is "
            f"{self.hidden_size}; omit attention_head_size for heads of hidden_size / num_attention_heads"
        )

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
class RTDConfig:
    """Generator, discriminator, and their embedding sharing.

    Source: DeBERTaV3, section 3.3.
    """

    generator: ModelConfig
    discriminator: ModelConfig
    embedding_sharing: str = _limited("gdes", choices=SHARING)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "RTD config") -> RTDConfig:
        """Build from the published layout.

        Raises `ConfigError` for a wrong value, and when the tables cannot be shared.
        """
        _refuse("hidden_size" in values, f"{where}: the model config of an MLM model; give --task_name MLM")
        for name in ("generator", "discriminator"):
            if name in values and not isinstance(values[name], dict):
                raise ConfigError(f"{where}: {name} must be a model config, not {values[name]!r}")
        _check_keys(values, cls, where)
        sharing = values.get("embedding_sharing", "gdes")
        if not isinstance(sharing, str) or sharing.lower() not in SHARING:
            options = ", ".join(SHARING)
            raise ConfigError(f"{where}: embedding_sharing must be one of {options}, not {sharing!r}")
        config = cls(
            generator=ModelConfig.from_dict(values["generator"], f"{where}: generator"),
            discriminator=ModelConfig.from_dict(values["discriminator"], f"{where}: discriminator"),
            embedding_sharing=sharing.lower(),
        )
        config._validate(where)
        return config

    @classmethod
    def from_json(cls, path: str | Path) -> RTDConfig:
        """Build from a JSON file in the published layout."""
        return cls.from_dict(read_json(path), where=str(path))

    @property
    def models(self) -> tuple[ModelConfig, ...]:
        """Return the configs of generator and discriminator."""
        return self.generator, self.discriminator

    def to_dict(self) -> dict[str, Any]:
        """Return all values by field name, with the two models as nested dicts."""
        return dataclasses.asdict(self)

    def _validate(self, where: str) -> None:
        tables = ("embedding_width", "max_position_embeddings") if self.embedding_sharing != "nes" else ()
        for name in ("vocab_size", *tables):
            ours, theirs = getattr(self.generator, name), getattr(self.discriminator, name)
            if ours != theirs:
                raise ConfigError(
                    f"{where}: {name} differs between generator ({ours}) and discriminator ({theirs}), "
                    f"which {self.embedding_sharing} does not allow"
                )


class Rule(enum.Flag):
    """Properties of a flag that can be combined."""

    NONE = 0
    REQUIRED = enum.auto()
    RESUME = enum.auto()  # a resumed run may have another value
    NODE = enum.auto()  # each node may have its own value
    HIDDEN = enum.auto()  # a published name that works, but is not listed by --help


REQUIRED, RESUME, NODE, HIDDEN = Rule.REQUIRED, Rule.RESUME, Rule.NODE, Rule.HIDDEN


def _flag(
    default: T,
    help: str,
    unit: str = "",
    bounds: Bounds | None = None,
    rules: Rule = Rule.NONE,
    choices: tuple[str, ...] = (),
    group: str = "",  # of this flag and those that follow
) -> T:
    facts = {"help": help, "unit": unit, "bounds": bounds, "rules": rules, "choices": choices, "group": group}
    return field(default=default, metadata=facts)


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one run, with one flag of the same name per field."""

    task_name: str = _flag(
        "MLM", "masked language modeling or replaced token detection", choices=("MLM", "RTD"), group="task"
    )
    do_train: bool = _flag(False, "train", rules=RESUME)
    do_eval: bool = _flag(False, "evaluate on valid.txt, and on test.txt if there is one", rules=RESUME)

    model_config: str = _flag(  # compared by content
        "",
        "JSON model config (experiments/language_model has some), or the config.json of a run",
        rules=REQUIRED | RESUME | NODE,
        group="model",
    )
    vocab_size: int = _flag(  # compared by content, with the model config
        0, "size of the word table; 0: by the model config, or the vocabulary", "rows", FROM_ZERO, RESUME
    )
    init_model: str = _flag(
        "",
        "MLM: start from these weights: a .bin or .safetensors file, the directory of a model or a run, or "
        "hf:OWNER/NAME[@REVISION]",
        rules=NODE,
    )
    init_generator: str = _flag(
        "",
        "RTD: start the generator from these weights, as --init_model; from-discriminator: the first layers, "
        "tables and LM head of the other file",
        rules=NODE,
    )
    init_discriminator: str = _flag(
        "", "RTD: start the discriminator from these weights, as --init_model", rules=NODE
    )
    fresh_head: bool = _flag(
        False, "start a head or position table new that the file of --init_* does not have"
    )
    resize_vocab: str = _flag(
        "",
        "the vocabulary of the weights of --init_*, if it is not --vocab_path (a file, a directory with "
        "spm.model, or hf:OWNER/NAME): rows of common pieces are kept, others start at a mean",
        rules=NODE,
    )

    data_dir: str = _flag(  # compared by content
        "",
        "directory with train.txt and valid.txt (and test.txt), as prepare_data.py writes them",
        rules=REQUIRED | RESUME | NODE,
        group="data",
    )
    replay: str = _flag(  # compared by content
        "",
        "directory with train.txt and valid.txt of what the model was trained on before, to mix in and to "
        "watch for forgetting",
        rules=RESUME | NODE,
    )
    replay_share: float = _flag(  # a fraction whose denominator is at most 10,000, neither 0 nor 1
        0.2, "proportion of --replay in the training sequences", "", Bounds(0.0001, 0.9999)
    )
    vocab_path: str = _flag("", "SentencePiece model of the data", rules=REQUIRED | RESUME | NODE)
    vocab_type: str = _flag("spm", "kind of vocabulary", rules=HIDDEN, choices=("spm",))
    max_seq_length: int = _flag(512, "sequence length, [CLS] and [SEP] included", "tokens", Bounds(3))
    max_ngram: int = _flag(1, "MLM: longest masked span; 1: single tokens", "words", FROM_ONE)
    train_batch_size: int = _flag(256, "batch size over all ranks", "sequences per optimizer step", FROM_ONE)
    accumulative_update: int = _flag(
        1, "micro-batches of a rank, to need less memory", "micro-batches per optimizer step", FROM_ONE
    )
    eval_batch_size: int = _flag(32, "batch size of the evaluation", "sequences", FROM_ONE, RESUME)
    workers: int = _flag(2, "data workers; 0: none", "processes per rank", FROM_ZERO, RESUME | NODE)
    seed: int = _flag(
        42, "seed of weights, data order, masks, dropout and sampling", "", Bounds(0, 2**63 - 1)
    )

    num_training_steps: int = _flag(
        0, "length of the run; 0: by --num_train_epochs", "optimizer steps", FROM_ZERO, group="optimization"
    )
    num_train_epochs: float = _flag(
        1.0, "passes over the data, when --num_training_steps is not given", "epochs", NOT_NEGATIVE, RESUME
    )
    learning_rate: float = _flag(1e-4, "peak learning rate", "", POSITIVE)
    discriminator_learning_rate: float = _flag(
        0.0, "RTD: the discriminator's peak learning rate; 0: --learning_rate", "", NOT_NEGATIVE
    )
    warmup: float = _flag(
        10000.0, "linear warm-up", "optimizer steps if >= 1, else proportion of all steps", NOT_NEGATIVE
    )
    lr_schedule: str = _flag(
        "linear",
        "after warm-up; linear, cosine: decay to the last step; wsd: decay over the last tenth of all steps",
        choices=SCHEDULES,
    )
    lr_schedule_ends: float = _flag(0.0, "final learning rate", "proportion of the peak", PROPORTION)
    weight_decay: float = _flag(0.01, "AdamW weight decay (not of biases and LayerNorm)", "", NOT_NEGATIVE)
    adam_beta1: float = _flag(0.9, "AdamW beta1", "", PROPORTION_BELOW_ONE)
    adam_beta2: float = _flag(0.999, "AdamW beta2", "", PROPORTION_BELOW_ONE)
    epsilon: float = _flag(1e-6, "AdamW epsilon", "", NOT_NEGATIVE)
    max_grad_norm: float = _flag(1.0, "clip the gradient to this norm; 0: no clipping", "", NOT_NEGATIVE)
    max_skipped_steps: int = _flag(
        20, "stop after as many consecutive skipped updates", "optimizer steps", FROM_ONE, RESUME
    )
    skip_spikes: bool = _flag(
        False, "skip updates whose loss is above 6 standard deviations of the losses of the last 128 steps"
    )
    rtd_lambda: float = _flag(10.0, "RTD: weight of the discriminator's loss", "", NOT_NEGATIVE)
    decoupled_training: bool = _flag(True, "RTD: step on the generator's loss, then on the other (not es)")

    precision: str = _flag(
        "auto",
        "auto: bf16 where the hardware has it, fp16 with loss scaling on older GPUs, else fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
        group="computation",
    )
    # The resolved precision is compared on resume in place of this flag.
    fp16: bool | None = _flag(None, "--precision auto, or fp32 if False", rules=HIDDEN | RESUME)
    kernels: str = _flag(  # compared on resume: auto and off draw different dropout masks
        "auto",
        "auto: faster implementations of DeBERTa/ops where they exist; off: plain PyTorch, --attention eager",
        choices=("auto", "off"),
    )
    attention: str = _flag(
        "auto",
        "auto: the fastest for the device; eager: plain operations; sdpa: PyTorch's fused attention; "
        "triton: kernels for CUDA GPUs",
        choices=ATTENTION,
    )
    gradient_checkpointing: bool = _flag(
        False, "recompute layers in the backward pass: less memory, a third more time", rules=RESUME
    )
    deterministic: bool = _flag(False, "on a GPU: the same bits in every run, at some cost in speed")
    tf32: bool = _flag(True, "on a GPU: multiply float32 matrices in TF32")
    compile: bool | None = _flag(  # compared on resume as resolved
        None,
        "torch.compile the encoder's layers, and on a GPU the LM head's passes over logits; by default on "
        "GPUs where the package triton is installed; on CPUs this needs a C++ compiler",
    )

    nproc_per_node: int = _flag(
        0, "ranks on this node; 0: one per GPU, or one", "processes", FROM_ZERO, RESUME | NODE, group="ranks"
    )
    sharding: str = _flag(
        "none",
        "none: every rank holds the model (DDP); zero2: gradients and optimizer state are sharded; fsdp: and "
        "parameters",
        rules=RESUME,
        choices=("none", "zero2", "fsdp"),
    )
    max_restarts: int = _flag(0, "restarts of all ranks after one was lost", "restarts", FROM_ZERO, RESUME)
    dist_timeout: int = _flag(600, "limit of waiting for other nodes and ranks", "seconds", FROM_ONE, RESUME)

    output_dir: str = _flag(
        "", "run directory; empty: output/TAG", rules=RESUME | NODE, group="run directory"
    )
    tag: str = _flag("run", "name of this run", rules=RESUME)
    dump_interval: int = _flag(
        10000, "interval of checkpoints and evaluations", "optimizer steps", FROM_ONE, RESUME
    )
    keep_last: int = _flag(
        3, "newest checkpoints to keep, besides the best by validation loss", "checkpoints", FROM_ONE, RESUME
    )
    fresh: bool = _flag(False, "start over; an earlier run is moved to OUTPUT_DIR.old-1, ...", rules=RESUME)
    dry_run: bool = _flag(
        False, "take a few steps, report what the run needs (memory, time, disk), and stop", rules=RESUME
    )
    log_interval: int = _flag(100, "interval of metrics.jsonl", "optimizer steps", FROM_ONE, RESUME)
    log_level: str = _flag("info", "least severe console messages", rules=RESUME | NODE, choices=LOG_LEVELS)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "settings") -> TrainConfig:
        """Build from flag names.

        Raises `ConfigError` for unknown names and wrong types. Values are checked by `validate`.
        """
        _check_keys(values, cls, where)
        _check_types(values, cls, where)
        return cls(**values)

    def validate(self) -> None:
        """Raise `ConfigError` for values that cannot work, naming the flag."""
        for item in dataclasses.fields(self):
            is_missing = REQUIRED in item.metadata["rules"] and not getattr(self, item.name)
            advice = "give it, or a --preset without --data_dir"
            _refuse(is_missing, f"--{item.name} is required: {item.metadata['help']}; {advice}")
        _check_metadata(self, "--")
        batch, parts = self.train_batch_size, self.accumulative_update
        rtd_weights = (self.init_generator, self.init_discriminator)
        _refuse(not (self.do_train or self.do_eval), "nothing to do: give --do_train, --do_eval, or both")
        _refuse(self.fresh and not self.do_train, "--fresh starts training over: give --do_train too")
        _refuse(self.dry_run and not self.do_train, "--dry_run tries training: give --do_train, too")
        _refuse(
            batch % parts, f"--train_batch_size {batch} is not a multiple of --accumulative_update {parts}"
        )
        _refuse(
            not (self.num_training_steps or self.num_train_epochs),
            "--num_train_epochs must be above 0 when --num_training_steps is not given",
        )
        _refuse(
            self.lr_schedule == "constant" and self.lr_schedule_ends,
            "--lr_schedule_ends: --lr_schedule constant ends at the peak; give one of the two",
        )
        _refuse(
            self.fp16 is not None and self.precision not in ("auto", "fp16" if self.fp16 else "fp32"),
            f"--fp16 {self.fp16} contradicts --precision {self.precision}: give one of them",
        )
        _refuse(
            self.kernels == "off" and self.attention in ("sdpa", "triton"),
            f"--attention {self.attention}: --kernels off has plain attention only; give one of the two",
        )
        _refuse(
            self.task_name == "MLM" and any(rtd_weights),
            "--init_generator and --init_discriminator belong to --task_name RTD: MLM takes --init_model",
        )
        _refuse(
            self.task_name == "RTD" and self.init_model,
            "--init_model belongs to MLM: RTD takes --init_generator and --init_discriminator",
        )
        _refuse(
            any(rtd_weights) and not all(rtd_weights),
            "--init_generator and --init_discriminator belong together: give both or neither",
        )
        _refuse(
            (self.fresh_head or self.resize_vocab) and not (self.init_model or any(rtd_weights)),
            "--fresh_head and --resize_vocab are for the weights of --init_*: give them, too",
        )

    @property
    def run_dir(self) -> Path:
        """Return the directory of this run's checkpoints, metrics and models."""
        return Path(self.output_dir) if self.output_dir else Path("output") / self.tag

    def to_dict(self) -> dict[str, Any]:
        """Return all values by flag name."""
        return dataclasses.asdict(self)


def find_flags(rule: Rule) -> frozenset[str]:
    """Return the names of the flags for which `rule` holds."""
    return frozenset(item.name for item in dataclasses.fields(TrainConfig) if rule in item.metadata["rules"])


FREE_TO_CHANGE = find_flags(RESUME)
FREE_PER_NODE = find_flags(NODE)
