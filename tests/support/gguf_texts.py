"""Texts on which tokenizers of GGUF files are trained and compared."""

TEXTS = [
    "Hello, world! I'm here; they'LL go.",
    "  leading spaces\n\n and   runs \t of them  ",
    "numbers 1234567 and 3.14, naïve café, 漢字かな交じり, emoji 🙂🙃",
    "def f(x):\n    return {'a': x ** 2}  # done\r\n",
    "",
]
