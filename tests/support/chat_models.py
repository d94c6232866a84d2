"""Tokenizers with chat templates of the kinds that checkpoints have."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

CHATML = """{% for message in messages %}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
QWEN = """{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and '</think>' in message.content %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
    {%- else %}
        {%- set content = message.content %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}
{%- endif %}"""
LLAMA_2 = """{% if messages[0]['role'] == 'system' %}
{% set loop_messages = messages[1:] %}
{% set system_message = '<<SYS>>\\n' + messages[0]['content'].strip() + '\\n<</SYS>>\\n\\n' %}
{% else %}
{% set loop_messages = messages %}
{% set system_message = '' %}
{% endif %}
{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% set content = (system_message if loop.index0 == 0 else '') + message['content'] %}
{% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
{{ ' ' + content.strip() + ' ' + eos_token }}
{% endif %}
{% endfor %}"""
LLAMA_3 = """{{- bos_token }}
{%- if strftime_now is defined %}
    {%- set date_string = strftime_now("%Y") %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}\
{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}\
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
TOOLS = """{%- for message in messages %}
{%- if loop.index > 3 %}{% break %}{% endif %}
{% generation %}{{ message | tojson }}{% endgeneration %}
{{ message | tojson(indent=2, sort_keys=true) }}<|im_end|>
{%- endfor %}
{%- if tools is none and not documents and unk_token is not defined %}<|im_start|>{% endif %}"""
# Templates that read arguments: how models that think have them.
HYBRID = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
OPENED = """{% if not thinking is defined %}{% set thinking = true %}{% endif %}{{ bos_token }}\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + message['content'] }}{% endfor %}\
{{ '<|im_start|>assistant' }}{% if thinking %}{{ '<think>\\n' }}{% else %}{{ '</think>' }}{% endif %}"""
NEEDY = """{%- macro say(text) %}{{ text }} in {{ language }}{{ style.tone | default('') }}{% endmacro %}
{%- for message in messages %}{{- say(message.content) + '<|im_end|>' }}{%- endfor %}
{%- for key in options | default({}) %}{{ key }}={{ options[key] | tojson }};{% endfor %}"""
ARGUED = {"hybrid": HYBRID, "opened": OPENED, "needy": NEEDY}
TEMPLATES = {"chatml": CHATML, "qwen": QWEN, "llama 2": LLAMA_2, "llama 3": LLAMA_3, "gemma": GEMMA, "tools": TOOLS}
SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>"),
]
TAGS = ["<think>", "</think>", "[A]", "[A][B]"]  # added tokens, not special ones
# Templates with the expressions of well-known checkpoints' own, and their control tokens, special and not.
FOLDER = Path(__file__).parent / "chat_templates"
WELL_KNOWN = {file.stem: file.read_text().removesuffix("\n") for file in sorted(FOLDER.glob("*.jinja"))}
KNOWN_SPECIAL, KNOWN_TAGS = ((FOLDER / name).read_text().split() for name in ("special.txt", "tags.txt"))
CORPUS = ["system user assistant model Hello 日本語", re.sub("<[^ ]*>", "", "\n".join(TEMPLATES.values()))]


def chat_model(make_model: Callable[..., Path], folder: Path) -> Path:
    """Make a tiny model with a tokenizer of 520 tokens and the template of ChatML; return its folder in `folder`."""
    shutil.copytree(make_model("llama", vocab_size=520), folder / "tiny")
    return save(folder / "tiny", CHATML)


def save(
    folder: Path,
    template: Any,
    sentence_piece: bool = False,
    corpus: Sequence[str] = CORPUS,
    special: Sequence[str] = SPECIAL,
    tags: Sequence[str] = TAGS,
) -> Path:
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>") if sentence_piece else models.BPE())
    if sentence_piece:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<unk>", *special] if sentence_piece else [*special]
    backend.train_from_iterator(
        corpus,
        trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    backend.add_tokens([*tags])
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    config |= {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
