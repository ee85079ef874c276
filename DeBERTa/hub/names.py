"""Names of weights in files of other code, converted to the names of a model here.

| in the file                                                    | here                                    |
| -------------------------------------------------------------- | --------------------------------------- |
| `module.x` (saved under DDP)                                   | `x`                                     |
| `bert.embeddings.x`, `embeddings.x`, the same with `encoder.`  | `deberta.embeddings.x`, ...             |
| `cls.predictions.{transform.x,bias}` (MLM head, transformers)  | `lm_predictions.lm_head.{x,bias}`       |
| `cls.predictions.decoder.{weight,bias}` (tied)                 | omitted                                 |
| `self.in_proj.weight`, `q_bias`, `v_bias` (DeBERTa v1)         | `self.{query,key,value}_proj.x`         |
| `self.{pos_proj,pos_q_proj}.x` (DeBERTa v1)                    | `self.{pos_key_proj,pos_query_proj}.x`  |
| `generator.x`, `discriminator.x` (checkpoint of an RTD run)    | `x`                                     |

Shapes: H heads, D head size, h hidden.
"""

import re
from pathlib import Path

import torch

from DeBERTa.errors import ConfigError
from DeBERTa.hub.weights import StateDict

WORD = "deberta.embeddings.word_embeddings"
POSITION = "deberta.embeddings.position_embeddings"
LM_HEAD = "lm_predictions.lm_head."
DECODER = "cls.predictions.decoder."
RENAMED = (
    (r"^module\.", ""),
    (r"^bert\.", "deberta."),
    (r"^(?=(embeddings|encoder)\.)", "deberta."),
    (r"^cls\.predictions\.transform\.", LM_HEAD),
    (r"^cls\.predictions\.bias$", f"{LM_HEAD}bias"),
    (r"\.self\.pos_proj\.", ".self.pos_key_proj."),
    (r"\.self\.pos_q_proj\.", ".self.pos_query_proj."),
)


def convert_names(state: StateDict, num_heads: int, role: str, path: str | Path) -> StateDict:
    """Return the tensors under the names of a model.

    Args:
        state: the tensors of a file; it may be emptied.
        num_heads: attention heads, by which DeBERTa v1 orders its joint projection.
        role: the model of an RTD checkpoint to select: "generator" or "discriminator"; "model" selects none.
        path: the file, for messages.
    """
    state = _select_role(state, role, path)
    converted = {}
    for name, tensor in state.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if name in converted:
            raise ConfigError(f"{path} has two tensors for {name}: it is unclear which is meant; remove one")
        converted[name] = tensor
    for name in [name for name in converted if name.endswith(".in_proj.weight")]:
        _split_joint_projection(converted, name.removesuffix("in_proj.weight"), num_heads)
    return _remove_tied_decoder(converted, path)


def _select_role(state: StateDict, role: str, path: str | Path) -> StateDict:
    """Return one of the two models in a checkpoint of an RTD run, with full tables.

    The discriminator's tables are those of the checkpoint's own generator plus the residual (GDES), or
    these tables themselves (ES).
    """
    names = {name.partition(".")[0] for name in state}
    if names != {"generator", "discriminator"}:
        return state
    if role == "model":
        raise ConfigError(f"{path} holds a generator and a discriminator: --init_model takes one model")
    prefix = f"{role}."
    selected = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    if role == "discriminator":
        for table in (WORD, POSITION):
            base, residual = state.get(f"generator.{table}.weight"), selected.pop(f"{table}._weight", None)
            if base is not None and f"{table}.weight" not in selected:
                selected[f"{table}.weight"] = base if residual is None else base + residual
    return selected


def _split_joint_projection(state: StateDict, prefix: str, num_heads: int) -> None:
    """Replace DeBERTa v1's joint projection by three.

    Its rows are [H, 3, D]: query, key and value of each head. Its keys have no bias, which shifts all scores
    of a query alike.
    """
    joint = state.pop(f"{prefix}in_proj.weight")
    query_bias = state.pop(f"{prefix}q_bias", None)
    value_bias = state.pop(f"{prefix}v_bias", None)
    if joint.dim() != 2 or joint.size(0) % (3 * num_heads):
        state[f"{prefix}in_proj.weight"] = joint  # reported as not part of the model
        return
    rows = joint.unflatten(0, (num_heads, 3, -1))
    zeros = joint.new_zeros(joint.size(0) // 3)
    biases = (query_bias, zeros, value_bias)
    for index, (name, bias) in enumerate(zip(("query", "key", "value"), biases, strict=True)):
        state[f"{prefix}{name}_proj.weight"] = rows[:, index].flatten(0, 1)
        if bias is not None:
            state[f"{prefix}{name}_proj.bias"] = bias
    if f"{prefix}pos_key_proj.weight" in state:
        state.setdefault(f"{prefix}pos_key_proj.bias", zeros)


def _remove_tied_decoder(state: StateDict, path: str | Path) -> StateDict:
    """Omit the matrix of a transformers MLM head, which is the word table.

    Raises `ConfigError` if the head has a matrix of its own, which the models here do not have.
    """
    matrix, bias = state.pop(f"{DECODER}weight", None), state.pop(f"{DECODER}bias", None)
    table = state.get(f"{WORD}.weight")
    if matrix is not None and table is not None and not torch.equal(matrix, table):
        raise ConfigError(
            f"{path} does not fit: its LM head has a matrix of its own ({DECODER}weight), but here the head "
            "uses the word table; remove the head, and give --fresh_head"
        )
    if bias is not None:
        state.setdefault(f"{LM_HEAD}bias", bias)
    return state


def count_layers(state: StateDict) -> int:
    """Return the number of encoder layers, from the largest index."""
    found = (re.match(r"deberta\.encoder\.layer\.(\d+)\.", name) for name in state)
    return max((int(match[1]) + 1 for match in found if match), default=0)
