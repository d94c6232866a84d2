"""How text is cut into words before pairs are merged, by the name in a GGUF file (tokenizer.ggml.pre).

The names and what they mean are llama.cpp's (src/llama-vocab.cpp of ggml-org/llama.cpp). Where its expressions are
simpler than those in a model's own tokenizer.json, for letters that are not of ASCII, these follow llama.cpp.
"""

from dataclasses import dataclass

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_MARKS}|{_BLANKS}"
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_QWEN35 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BLANKS}"
# A word goes on as long as small letters follow; letters beyond ASCII count as both small and capital.
_CAPITALS, _SMALL = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}*{_SMALL}+%(endings)s|[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}+{_SMALL}*%(endings)s"
    rf"|\p{{N}}%(digits)s| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"
)
# Letters with two cases, without the scripts and the additions of Unicode that the list of DeepSeek leaves out.
_DEEPSEEK_LETTERS = (
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\x{560}-\x{588}\x{10c7}-\x{10ff}\x{1c80}-\x{1c88}\x{2d00}-\x{2d2d}\x{a790}-\x{a7fa}"
    r"\x{ab30}-\x{ab68}\x{10570}-\x{105bc}\x{16e40}-\x{16e7f}\x{1d400}-\x{1d7cb}\x{1df00}-\x{1df1e}]]"
)
_EAST_ASIAN = r"[\x{800}-\x{9fa5}\x{ac00}-\x{d7ff}&&\S]+"
_DEEPSEEK_MARKS = r"[!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3000}-\x{3002}&&\S]"
_ASCII_MARKS = r"[!-/:-@\[-`{-~]"


@dataclass(frozen=True)
class Words:
    """Expressions, each of which cuts what the one before left whole.

    `whole`: a word that is a token is not merged from its letters. `adds_bos`: the beginning of the text is marked even
    if the file does not say so. `composes`: the model's own tokenizer composes letters and their marks first (NFC),
    which llama.cpp leaves out.
    """

    cuts: tuple[str, ...]
    whole: bool = False
    adds_bos: bool = False
    composes: bool = False


_BY_NAMES = {
    ("gpt-2", "phi-2", "olmo", "mpt", "jais", "exaone4", "granite-docling", "trillion", "gigachat", "a.x-4.0",
     "mellum"): Words((_GPT2,)),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"):
        Words((r"\p{N}", _GPT2)),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"):
        Words((_LLAMA3,), whole=True, adds_bos=True),
    ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"): Words((_LLAMA3,)),
    ("qwen2", "deepseek-r1-qwen", "megrez", "kormo"): Words((_QWEN2,), composes=True),
    ("stablelm2", "hunyuan", "solar-open", "grok-2"): Words((_QWEN2,)),
    ("qwen35",): Words((_QWEN35,), composes=True),
    ("bailingmoe", "bailingmoe2", "llada-moe"): Words((_QWEN2.replace(r"\s*[\r\n]+", r"\s*[\r\n]"),)),
    ("seed-coder",): Words((_QWEN2.replace(_MARKS, r" ?[^\s\p{L}\p{N}]+"),)),
    ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"):
        Words((_CASED % {"endings": f"{_ENDINGS}?", "digits": "{1,3}"},)),
    ("tekken",): Words((_CASED % {"endings": "", "digits": ""},), whole=True, adds_bos=True),
    ("deepseek-llm",): Words((
        r"[\r\n]", rf"\s?{_DEEPSEEK_LETTERS}+", rf"\s?{_DEEPSEEK_MARKS}+",
        r"\s+$", _EAST_ASIAN, r"\p{N}+",
    )),
    ("deepseek-coder",): Words((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, r"\p{N}")),
    ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"): Words((
        r"\p{N}{1,3}", r"[\x{4e00}-\x{9fa5}\x{3040}-\x{30ff}]+",
        rf"{_ASCII_MARKS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_BLANKS}",
    )),
    ("falcon",): Words((r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9]{3}")),
    ("default",): Words((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9]{3}")),
}  # fmt: skip
WORDS = {name: words for names, words in _BY_NAMES.items() for name in names}
