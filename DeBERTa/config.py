"""Typed configurations: `ModelConfig`, `RTDConfig`, `TrainConfig`. Strict: an unknown or impossible value raises.

`ModelConfig` and `RTDConfig` use the field names of the published JSON files. Every field of `TrainConfig` is a flag of
`python -m DeBERTa.train`, with its help text and unit in the field's metadata.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import ujson

from DeBERTa.errors import ConfigError

ACTIVATIONS = ("gelu", "relu", "silu", "tanh")
POSITION_TERMS = ("c2p", "p2c")


def _check_keys(values: dict, cls: type, where: str) -> None:
    known = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(
            f"{where}: unknown key {', '.join(map(repr, unknown))}; known keys: {', '.join(known)}"
        )


def _check_type(name: str, value: object, annotation: object, where: str) -> None:
    """Raise unless `value` fits the field's annotation; an int may stand for a float, a bool for nothing but a bool."""
    allowed = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if type(value) in allowed or (type(value) is int and float in allowed):
        return
    wanted = " or ".join("null" if t is type(None) else t.__name__ for t in allowed)
    raise ConfigError(f"{where}: {name} must be {wanted}, not {value!r}")


def read_json(path: str | Path) -> dict:
    """The JSON object in `path`. Raises `ConfigError` naming the file when it is missing or not a JSON object."""
    try:
        values = ujson.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


@dataclass(frozen=True)
class ModelConfig:
    """One encoder with its head. Sizes are in units (hidden width, heads, layers, table rows)."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    attention_head_size: int = 0  # 0: hidden_size / num_attention_heads
    embedding_size: int = 0  # 0: hidden_size
    max_position_embeddings: int = 512
    type_vocab_size: int = 0
    position_biased_input: bool = True
    relative_attention: bool = False
    pos_att_type: str = "none"  # "c2p", "p2c", "p2c|c2p" or "none"
    position_buckets: int = -1  # < 1: a table row for every distance
    max_relative_positions: int = -1  # < 1: max_position_embeddings
    share_att_key: bool = False
    norm_rel_ebd: str = "none"  # "layer_norm" or "none"
    conv_kernel_size: int = 0
    conv_act: str = "tanh"
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-7

    @classmethod
    def from_dict(cls, values: dict, where: str = "model config") -> ModelConfig:
        """Build from published field names. Raises `ConfigError` on an unknown, missing or impossible value."""
        _check_keys(values, cls, where)
        hints = typing.get_type_hints(cls)
        for name, value in values.items():
            _check_type(name, value, hints[name], where)
        missing = [
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.name not in values
        ]
        if missing:
            raise ConfigError(f"{where}: missing {', '.join(missing)}")
        config = cls(**values)
        config._validate(where)
        return config

    @classmethod
    def from_json(cls, path: str | Path) -> ModelConfig:
        return cls.from_dict(read_json(path), where=str(path))

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def _validate(self, where: str) -> None:
        positive = (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
        )
        for name in (*positive, "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{where}: {name} must be at least 1, not {getattr(self, name)}")
        for name in ("attention_head_size", "embedding_size", "type_vocab_size", "conv_kernel_size"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{where}: {name} must not be negative, not {getattr(self, name)}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{where}: {name} must lie in [0, 1), not {getattr(self, name)}")
        for name in ("initializer_range", "layer_norm_eps"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{where}: {name} must be positive, not {getattr(self, name)}")
        if not self.attention_head_size and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"{where}: hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; set attention_head_size"
            )
        for name in ("hidden_act", "conv_act"):
            if getattr(self, name) not in ACTIVATIONS:
                raise ConfigError(
                    f"{where}: {name} {getattr(self, name)!r} is not one of {', '.join(ACTIVATIONS)}"
                )
        if self.norm_rel_ebd not in ("none", "layer_norm"):
            raise ConfigError(f"{where}: norm_rel_ebd {self.norm_rel_ebd!r} is not 'none' or 'layer_norm'")
        for term in self.pos_att_type.lower().split("|"):
            if term.strip() not in (*POSITION_TERMS, "none", ""):
                raise ConfigError(
                    f"{where}: pos_att_type {self.pos_att_type!r} may name only c2p and p2c, or be none"
                )
        if self.conv_kernel_size and self.conv_kernel_size % 2 == 0:
            raise ConfigError(
                f"{where}: conv_kernel_size must be odd to keep the length, not {self.conv_kernel_size}"
            )
        if self.conv_kernel_size and self.num_hidden_layers < 2:
            raise ConfigError(
                f"{where}: conv_kernel_size needs at least 2 layers: it stands between the first two"
            )
        if self.relative_attention and self.position_buckets == 1:
            raise ConfigError(f"{where}: position_buckets must be at least 2, or below 1 for none")

    @property
    def position_terms(self) -> tuple[str, ...]:
        """The position terms in use, of "c2p" and "p2c"; empty for plain attention."""
        if not self.relative_attention:
            return ()
        named = [term.strip() for term in self.pos_att_type.lower().split("|")]
        return tuple(term for term in POSITION_TERMS if term in named)

    @property
    def head_size(self) -> int:
        return self.attention_head_size or self.hidden_size // self.num_attention_heads

    @property
    def embedding_width(self) -> int:
        return self.embedding_size or self.hidden_size

    @property
    def max_distance(self) -> int:
        """Distances are clamped to one less than this (`max_relative_positions`)."""
        return (
            self.max_relative_positions if self.max_relative_positions >= 1 else self.max_position_embeddings
        )

    @property
    def position_span(self) -> int:
        """Half the rows of the relative-position table."""
        return self.position_buckets if self.position_buckets > 0 else self.max_distance


SHARING = ("gdes", "es", "nes")


@dataclass(frozen=True)
class RTDConfig:
    """Generator, discriminator, and how they share embeddings: "gdes", "es" or "nes" (DeBERTaV3, section 3.3)."""

    generator: ModelConfig
    discriminator: ModelConfig
    embedding_sharing: str = "gdes"

    @classmethod
    def from_dict(cls, values: dict, where: str = "RTD config") -> RTDConfig:
        """Build from the published layout. Raises `ConfigError` when the two models cannot share their tables."""
        _check_keys(values, cls, where)
        for name in ("generator", "discriminator"):
            if not isinstance(values.get(name), dict):
                raise ConfigError(f"{where}: needs a section {name!r} holding a model config")
        sharing = values.get("embedding_sharing", "gdes")
        if not isinstance(sharing, str) or sharing.lower() not in SHARING:
            raise ConfigError(f"{where}: embedding_sharing {sharing!r} is not one of {', '.join(SHARING)}")
        config = cls(
            generator=ModelConfig.from_dict(values["generator"], f"{where}: generator"),
            discriminator=ModelConfig.from_dict(values["discriminator"], f"{where}: discriminator"),
            embedding_sharing=sharing.lower(),
        )
        config._validate(where)
        return config

    @classmethod
    def from_json(cls, path: str | Path) -> RTDConfig:
        return cls.from_dict(read_json(path), where=str(path))

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def _validate(self, where: str) -> None:
        generator, discriminator = self.generator, self.discriminator
        if generator.vocab_size != discriminator.vocab_size:
            raise ConfigError(
                f"{where}: vocab_size differs between generator ({generator.vocab_size}) and "
                f"discriminator ({discriminator.vocab_size})"
            )
        if self.embedding_sharing == "nes":
            return
        for name in ("embedding_width", "max_position_embeddings"):
            ours, theirs = getattr(generator, name), getattr(discriminator, name)
            if ours != theirs:
                raise ConfigError(
                    f"{where}: {self.embedding_sharing} shares the embedding tables, but {name} differs: "
                    f"generator {ours}, discriminator {theirs}"
                )


def _flag(default: object, help: str, choices: tuple[str, ...] = ()) -> object:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """One run. Each field is a flag of the same name."""

    task_name: str = _flag("MLM", "masked language modelling, or replaced token detection", ("MLM", "RTD"))
    model_config: str = _flag("", "JSON model config (names under experiments/language_model/ need no path)")
    data_dir: str = _flag(
        "", "folder with train.txt and valid.txt (and test.txt), as prepare_data.py writes them"
    )
    vocab_path: str = _flag("", "SentencePiece model the data was prepared with")
    vocab_type: str = _flag("spm", "kind of vocabulary", ("spm",))
    vocab_size: int = _flag(0, "rows of the word embedding table; 0: the model config's number")
    output_dir: str = _flag("", "folder of this run; empty: output/<tag>")
    tag: str = _flag("run", "name of this run")

    do_train: bool = _flag(False, "train")
    do_eval: bool = _flag(False, "evaluate on the validation split, and on the test split if there is one")
    init_model: str = _flag("", "start MLM from these weights (.bin or .safetensors, published names)")
    init_generator: str = _flag("", "start the RTD generator from these weights (.bin or .safetensors)")
    init_discriminator: str = _flag(
        "", "start the RTD discriminator from these weights (.bin or .safetensors)"
    )

    max_seq_length: int = _flag(512, "tokens a sequence, [CLS] and [SEP] included")
    max_ngram: int = _flag(1, "MLM: longest masked span in words; 1: single tokens")
    num_training_steps: int = _flag(0, "optimiser steps; 0: by --num_train_epochs")
    num_train_epochs: float = _flag(
        1.0, "passes over the training data, when --num_training_steps is not given"
    )
    train_batch_size: int = _flag(256, "sequences an optimiser step, over all processes")
    eval_batch_size: int = _flag(32, "sequences an evaluation batch")
    accumulative_update: int = _flag(1, "parts a step's batch is cut into, to need less memory")
    workers: int = _flag(2, "processes that prepare batches; 0: none")
    seed: int = _flag(42, "seed of initialisation, data order, masks, dropout and sampling")

    learning_rate: float = _flag(1e-4, "peak learning rate")
    discriminator_learning_rate: float = _flag(
        0.0, "RTD: the discriminator's peak learning rate; 0: --learning_rate"
    )
    warmup: float = _flag(10000.0, "linear warm-up: steps if >= 1, else a proportion of all steps")
    lr_schedule_ends: float = _flag(0.0, "learning rate at the last step, as a proportion of the peak")
    weight_decay: float = _flag(0.01, "AdamW weight decay (none on biases and LayerNorm)")
    adam_beta1: float = _flag(0.9, "AdamW beta1")
    adam_beta2: float = _flag(0.999, "AdamW beta2")
    epsilon: float = _flag(1e-6, "AdamW epsilon")
    max_grad_norm: float = _flag(1.0, "clip the gradient to this norm; 0: do not clip")

    rtd_lambda: float = _flag(10.0, "RTD: weight of the discriminator's loss")
    decoupled_training: bool = _flag(True, "RTD: update the generator first, then the discriminator (not es)")

    precision: str = _flag(
        "auto",
        "auto: bf16 where the hardware has it, fp16 with loss scaling on older GPUs, else fp32",
        ("auto", "fp32", "bf16", "fp16"),
    )
    fp16: bool | None = _flag(
        None, "published name: True means --precision auto, False means --precision fp32"
    )
    kernels: str = _flag(
        "auto",
        "auto: faster implementations from DeBERTa/ops where they exist; off: plain PyTorch",
        ("auto", "off"),
    )
    attention: str = _flag(
        "auto",
        "auto: the fastest for the device; eager: plain operations; sdpa: PyTorch's fused attention",
        ("auto", "eager", "sdpa"),
    )
    gradient_checkpointing: bool = _flag(
        False,
        "compute each layer again in the backward pass: less memory, about a third more time, the same numbers",
    )
    compile: bool = _flag(False, "torch.compile the encoder's layers; a CPU needs a C++ compiler for it")

    nproc_per_node: int = _flag(0, "processes on this node; 0: one a GPU, or one on a machine without GPUs")
    sharding: str = _flag(
        "none",
        "none: every rank holds the model (DDP); zero2: gradients and optimizer state are sharded; fsdp: parameters too",
        ("none", "zero2", "fsdp"),
    )
    max_restarts: int = _flag(
        0, "times all processes start again from the last checkpoint after one was lost"
    )
    dist_timeout: int = _flag(600, "seconds to wait for other nodes and processes before giving up")

    dump_interval: int = _flag(10000, "steps between checkpoints; each is followed by an evaluation")
    keep_last: int = _flag(
        3,
        "newest checkpoints to keep, besides the best by validation loss (MLM: loss, RTD: discriminator_loss)",
    )
    fresh: bool = _flag(
        False, "start over; what an earlier run left is moved aside to OUTPUT_DIR.old-1, .old-2, ..."
    )
    max_skipped_steps: int = _flag(20, "stop after that many steps in a row whose update was left out")
    skip_spikes: bool = _flag(
        False, "leave out updates whose loss is above 6 standard deviations of the last 128 steps' losses"
    )
    log_interval: int = _flag(100, "steps between lines of metrics.jsonl")
    log_level: str = _flag(
        "info", "least severe console messages to show", ("debug", "info", "warning", "error")
    )

    def validate(self) -> None:
        """Raise `ConfigError` for values that cannot work, naming the flag."""
        for name in ("model_config", "data_dir", "vocab_path"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is required: {self.__dataclass_fields__[name].metadata['help']}")
        if not (self.do_train or self.do_eval):
            raise ConfigError("nothing to do: give --do_train, --do_eval, or both")
        for name in ("train_batch_size", "eval_batch_size", "accumulative_update", "max_ngram"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, not {getattr(self, name)}")
        for name in ("dump_interval", "keep_last", "log_interval", "max_skipped_steps", "dist_timeout"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, not {getattr(self, name)}")
        for name, value in self.to_dict().items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"--{name} must be a finite number, not {value}")
        not_negative = (
            "workers",
            "nproc_per_node",
            "max_restarts",
            "seed",
            "vocab_size",
            "num_training_steps",
            "warmup",
            "weight_decay",
            "max_grad_norm",
        )
        for name in (*not_negative, "epsilon", "rtd_lambda"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name} must not be negative, not {getattr(self, name)}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"--{name} must lie in [0, 1), not {getattr(self, name)}")
        if self.fresh and not self.do_train:
            raise ConfigError("--fresh starts training over: give --do_train too")
        if self.seed >= 2**63:
            raise ConfigError(f"--seed must be below 2^63, not {self.seed}")
        if self.max_seq_length < 3:
            raise ConfigError(
                f"--max_seq_length must be at least 3 ([CLS], a token, [SEP]), not {self.max_seq_length}"
            )
        if self.train_batch_size % self.accumulative_update:
            raise ConfigError(
                f"--train_batch_size {self.train_batch_size} is not a multiple of "
                f"--accumulative_update {self.accumulative_update}"
            )
        if not self.num_training_steps and self.num_train_epochs <= 0:
            raise ConfigError("--num_train_epochs must be positive when --num_training_steps is not given")
        if not 0 <= self.lr_schedule_ends <= 1:
            raise ConfigError(
                f"--lr_schedule_ends is a proportion of the peak, in [0, 1], not {self.lr_schedule_ends}"
            )
        if self.learning_rate <= 0 or self.discriminator_learning_rate < 0:
            raise ConfigError(
                "--learning_rate must be positive and --discriminator_learning_rate not negative"
            )
        if self.fp16 is not None and self.precision not in ("auto", "fp16" if self.fp16 else "fp32"):
            raise ConfigError(
                f"--fp16 {self.fp16} contradicts --precision {self.precision}: give one of them"
            )
        for name in ("init_generator", "init_discriminator"):
            if self.task_name == "MLM" and getattr(self, name):
                raise ConfigError(f"--{name} belongs to --task_name RTD; MLM starts from --init_model")
        if self.task_name == "RTD" and self.init_model:
            raise ConfigError(
                "--init_model belongs to MLM; RTD takes --init_generator and --init_discriminator"
            )

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) if self.output_dir else Path("output") / self.tag

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)
