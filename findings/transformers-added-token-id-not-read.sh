#!/usr/bin/env bash
# tokenizer_config.json may name tokens that tokenizer.json lacks, each under its id (`added_tokens_decoder`). transformers
# 5.23.0 adds such a token, and does not read the id: it gets the next free one. With the token under 50 in a vocabulary
# of 12, it is encoded as 12, a row of the embedding that was trained for something else, and nothing is said.
# Guess written down before: the id is followed, or the file is refused.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models

Path("model").mkdir()
words = {letter: number for number, letter in enumerate("abcdefghijkl")}
Tokenizer(models.WordLevel(words, unk_token="a")).save("model/tokenizer.json")
token = {"content": "<turn>", "special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
config = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {"50": token}}
Path("model/tokenizer_config.json").write_text(json.dumps(config))
found = transformers.AutoTokenizer.from_pretrained("model").convert_tokens_to_ids("<turn>")
print(f"transformers {transformers.__version__}: the file says 50, the token is {found}")
assert found == 12, "changed"
PYTHON
