"""The texts of an answer's tokens, one by one, are the answer's text."""

from pathlib import Path

import numpy as np
import pytest
from chat_models import CHATML, save

from batchinfer.text.token_texts import TokenTexts
from batchinfer.text.tokenizer import Tokenizer


@pytest.mark.parametrize("sentence_piece", [False, True])
def test_texts_of_tokens_make_the_text(tmp_path: Path, sentence_piece: bool) -> None:
    tokenizer = Tokenizer.load(save(tmp_path / "model", CHATML, sentence_piece))
    texts = TokenTexts(tokenizer)
    (ids,) = tokenizer.encode_plain(["system user"])
    behind = tokenizer.encode_plain(["system user assistant model"])[0][len(ids) :]
    for _ in range(2):  # once found, once remembered
        assert "".join(texts.of(np.array(behind, np.int32))) == " assistant model"


def test_control_tokens_have_their_text_and_pieces_of_characters_none(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save(tmp_path / "model", CHATML))
    texts = TokenTexts(tokenizer)
    end = tokenizer.added_tokens["<|im_end|>"]
    assert texts.of(np.array([end, end], np.int32)) == ["<|im_end|>"] * 2
    pieces = tokenizer.encode_plain(["😀"])[0]
    assert len(pieces) > 1 and set(texts.of(np.array(pieces, np.int32))) == {"\ufffd"}
