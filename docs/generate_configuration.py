"""Write docs/configuration.md from the fields of the configurations.

To be run as `python docs/generate_configuration.py`.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from DeBERTa.config import HIDDEN, NODE, REQUIRED, RESUME, ModelConfig, RTDConfig, TrainConfig

ROOT = Path(__file__).resolve().parent.parent
INTRODUCTION = """\
# Configuration

Generated from `DeBERTa/config.py` by `python docs/generate_configuration.py`; a test compares the two.

## Flags of a run

`./mlm.sh NAME`, `./rtd.sh NAME` and `python -m DeBERTa.train` take these flags. Those given override
those of `--preset NAME` or `--config FILE` (the `config.json` of a run), and these the defaults below.
`True` and `False` are the values of a switch; the flag alone means `True`. "May change": whether a
resumed run may have another value; `--num_training_steps` may grow. "Per node": whether nodes may have
different values. Paths may change and differ, but not what is read from them.
"""
MODEL = """
## Model config

A JSON object, for RTD one with the objects `generator` and `discriminator` and the text
`embedding_sharing`. Unknown keys are refused; those of transformers that change nothing here are
ignored.
"""
# What the published names of a model config mean.
MODEL_HELP = {
    "vocab_size": "rows of the word table; new models get others where the vocabulary does not fit: "
    "the banner says so",
    "hidden_size": "width of the encoder",
    "num_hidden_layers": "layers",
    "num_attention_heads": "attention heads per layer",
    "intermediate_size": "width of the feed-forward networks",
    "attention_head_size": "width of one head; 0: `hidden_size / num_attention_heads`",
    "embedding_size": "width of the embedding tables; 0: `hidden_size`",
    "max_position_embeddings": "rows of the position table, the longest sequence",
    "type_vocab_size": "rows of the token type table; 0: no such table",
    "position_biased_input": "add absolute positions to the input (BERT); otherwise before the last layer "
    "(enhanced mask decoder)",
    "relative_attention": "disentangled attention over relative positions; otherwise plain attention",
    "pos_att_type": "terms of the relative positions: `c2p`, `p2c`, `p2c\\|c2p` or `none`",
    "position_buckets": "rows for distances on a logarithmic scale; below 1: a row per distance",
    "max_relative_positions": "distances are clamped to one less; below 1: `max_position_embeddings`",
    "share_att_key": "positions use the content's query and key projections",
    "norm_rel_ebd": "normalization of the relative-position table",
    "conv_kernel_size": "odd width of a convolution added to the first layer's output; 0: none",
    "conv_act": "activation of that convolution",
    "hidden_act": "activation of the feed-forward networks and heads",
    "hidden_dropout_prob": "dropout of hidden states",
    "attention_probs_dropout_prob": "dropout of attention probabilities",
    "initializer_range": "standard deviation of fresh weights",
    "layer_norm_eps": "epsilon of LayerNorm",
}
SHARING_HELP = (
    "how the discriminator's embeddings follow the generator's: `gdes`: a residual is added to them and no "
    "gradient returns; `es`: one table, trained by both losses; `nes`: two tables"
)


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def format_default(value: Any) -> str:
    """Return the default of a field, "none" for an empty one."""
    if value is dataclasses.MISSING:
        return "required"
    return "none" if value in ("", None) else f"`{value}`"


def describe_values(field: dataclasses.Field) -> str:
    """Return the type and the permitted values of a field."""
    limit = field.metadata.get("limit")
    if isinstance(limit, tuple):
        return ", ".join(f"`{choice}`" for choice in limit)
    kind = {"str": "text", "bool": "switch", "bool | None": "switch", "int": "int", "float": "float"}
    return f"{kind[str(field.type)]}{f', {limit}' if limit else ''}"


def describe_flags() -> str:
    """Return the flags in their groups."""
    header = ["flag", "meaning", "values", "default", "may change", "per node"]
    text, rows = "", []
    for field in dataclasses.fields(TrainConfig):
        facts = field.metadata
        if facts["group"]:
            text += format_table(header, rows) if rows else ""
            text += f"\n### {facts['group'].capitalize()}\n\n"
            rows = []
        if HIDDEN in facts["rules"]:
            continue
        meaning = facts["help"] + (f" ({facts['unit']})" if facts["unit"] else "")
        default = "required" if REQUIRED in facts["rules"] else format_default(field.default)
        marks = ["yes" if rule in facts["rules"] else "" for rule in (RESUME, NODE)]
        rows.append([f"`--{field.name}`", meaning, describe_values(field), default, *marks])
    return text + format_table(header, rows)


def describe_model() -> str:
    """Return the fields of a model config."""
    fields = [(field, MODEL_HELP[field.name]) for field in dataclasses.fields(ModelConfig)]
    fields += [(f, SHARING_HELP) for f in dataclasses.fields(RTDConfig) if f.name == "embedding_sharing"]
    rows = [
        [f"`{field.name}`", meaning, describe_values(field), format_default(field.default)]
        for field, meaning in fields
    ]
    return format_table(["field", "meaning", "values", "default"], rows)


def generate() -> str:
    """Return the page."""
    return f"{INTRODUCTION}{describe_flags()}{MODEL}\n{describe_model()}"


if __name__ == "__main__":
    (ROOT / "docs" / "configuration.md").write_text(generate(), encoding="utf-8")
