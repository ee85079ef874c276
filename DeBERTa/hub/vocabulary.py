"""Weights for another vocabulary.

Rows of pieces that both vocabularies have are copied. The row of another piece is the mean of the rows of the
old pieces that it consists of. Shapes: V rows, E embedding width.
"""

from pathlib import Path

import torch
from torch.nn import functional as F

from DeBERTa.data.tokenizer import WORD_MARK, Tokenizer
from DeBERTa.errors import ConfigError
from DeBERTa.hub.names import LM_HEAD, WORD
from DeBERTa.hub.weights import StateDict

TABLES = (f"{WORD}.weight", f"{WORD}._weight")
BIAS = f"{LM_HEAD}bias"


class VocabularyMap:
    """The old rows that every row of a new table is the mean of.

    Attributes:
        num_shared: pieces that both vocabularies have.
    """

    def __init__(self, old: Tokenizer, new: Tokenizer, num_rows: int) -> None:
        """Map the pieces of `new`; the rows from there to `num_rows` belong to no piece."""
        self.old, self.num_rows = old, num_rows
        self.num_shared = sum(piece in old.piece_to_id for piece in new.pieces)
        rows = [torch.tensor(split_piece(piece, old)) for piece in new.pieces]
        self.ids = torch.cat(rows)
        self.offsets = torch.tensor([0, *map(len, rows[:-1])]).cumsum(0)

    def convert(self, state: StateDict, path: str | Path) -> StateDict:
        """Return the tensors with tables and bias of the LM head for the new vocabulary.

        Rows that belong to no piece are 0, with the lowest bias. Raises `ConfigError` if a table has fewer
        rows than the old vocabulary has pieces.
        """
        converted = dict(state)
        for name in [name for name in state if name in (*TABLES, BIAS)]:
            table_VE = state[name].unsqueeze(-1) if name == BIAS else state[name]
            if table_VE.dim() != 2 or len(table_VE) < len(self.old):
                raise ConfigError(
                    f"{path} does not fit the vocabulary {self.old.path} of --resize_vocab, which has "
                    f"{len(self.old)} tokens: {name} has shape {list(table_VE.shape)}; "
                    "give the vocabulary of these weights"
                )
            filler = float(table_VE.min()) if name == BIAS else 0.0
            means = F.embedding_bag(self.ids, table_VE.float(), self.offsets, mode="mean")
            table_VE = F.pad(means, (0, 0, 0, self.num_rows - len(means)), value=filler)
            converted[name] = table_VE.squeeze(-1) if name == BIAS else table_VE
        return converted


def split_piece(piece: str, old: Tokenizer) -> list[int]:
    """Return the ids of the old pieces that a piece consists of.

    It is one id if the old vocabulary has the piece.
    """
    if piece in old.piece_to_id:
        return [old.piece_to_id[piece]]
    text = piece.replace(WORD_MARK, " ")
    if piece.startswith(WORD_MARK):
        (ids,) = old.encode_lines([text.strip()])
    else:
        ids = old.encode_inside(text)
    return ids or [old.unk_id]
