"""`tokenizer.json` from a SentencePiece model; tests/hub/test_transformers.py compares the ids."""

from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.hub.tokenizer_json import build_tokenizer_json
from tests.conftest import GOLDEN


def test_a_piece_without_a_score(tmp_path):
    """Its score is 0, in SentencePiece and in `tokenizer.json`."""
    intact = (GOLDEN / "prepare" / "spm.model").read_bytes()
    place = intact.index("▁and".encode()) + len("▁and".encode())
    assert intact[place] == 2 << 3 | 5  # the tag of the score
    (tmp_path / "m").write_bytes(intact[:place] + bytes([9 << 3 | 5]) + intact[place + 1 :])
    tokenizer = Tokenizer(tmp_path / "m")
    assert build_tokenizer_json(tokenizer)["model"]["vocab"][tokenizer.piece_to_id["▁and"]] == ("▁and", 0.0)
