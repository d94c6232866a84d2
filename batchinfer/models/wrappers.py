"""Checkpoints that wrap a language model: it is read from them, and what else they hold is left aside.

Their `config.json` keeps the language model's fields in `text_config`, and their tensors' names have a prefix. The
parts that read images lie beside it. For text alone, the language model computes what it would compute by itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_BESIDE = (
    "model.visual.", "visual.", "model.vision_tower.", "vision_tower.", "model.multi_modal_projector.",
    "multi_modal_projector.", "model.audio_tower.", "model.vision_embedder.", "model.embed_vision.",
    "model.embed_audio.",
)  # fmt: skip
_BASES = ("model.language_model.", "language_model.model.", "model.")
_HEADS = ("language_model.lm_head.", "lm_head.")


@dataclass(frozen=True)
class Wrapper:
    """One kind of wrapper."""

    architecture: str
    families: tuple[tuple[str, str], ...]  # (model_type of text_config, family) of the language models inside


@dataclass(frozen=True)
class Prefixes:
    """The beginnings of a wrapped language model's tensor names: of its layers' and its head's."""

    base: str = "model."
    head: str = "lm_head."
    beside: tuple[str, ...] = ()  # beginnings of the names of what is left aside

    @classmethod
    def of(cls, names: Iterable[str]) -> "Prefixes":
        """Find them among the names of a wrapper's tensors."""
        found = set(names)
        base = next((base for base in _BASES if f"{base}embed_tokens.weight" in found), "model.")
        head = next((head for head in _HEADS if any(name.startswith(head) for name in found)), "lm_head.")
        return cls(base, head, _BESIDE)

    def stored(self, name: str) -> str:
        """Return the name in the file of a language model's tensor or module. Names of the file stay as they are."""
        for plain, prefix in (("model.", self.base), ("lm_head.", self.head)):
            if name.startswith(plain) and not name.startswith(prefix):
                return prefix + name.removeprefix(plain)
        return name

    def plain(self, name: str) -> str:
        """Return the name in a language model of a tensor in the file."""
        for plain, prefix in (("model.", self.base), ("lm_head.", self.head)):
            if name.startswith(prefix):
                return plain + name.removeprefix(prefix)
        return name


WRAPPERS = {
    "gemma3": Wrapper("Gemma3ForConditionalGeneration", (("gemma3_text", "gemma3_text"),)),
    "gemma4": Wrapper("Gemma4ForConditionalGeneration", (("gemma4_text", "gemma4_text"),)),
    "gemma4_unified": Wrapper(
        "Gemma4UnifiedForConditionalGeneration", (("gemma4_unified_text", "gemma4_unified_text"),)
    ),
    "internvl": Wrapper("InternVLForConditionalGeneration", (("qwen2", "qwen2"), ("qwen3", "qwen3"))),
    "llava": Wrapper("LlavaForConditionalGeneration", (("llama", "llama"), ("mistral", "mistral"), ("qwen2", "qwen2"))),
    "mistral3": Wrapper("Mistral3ForConditionalGeneration", (("mistral", "mistral"), ("ministral3", "ministral3"))),
    "qwen2_vl": Wrapper("Qwen2VLForConditionalGeneration", (("qwen2_vl_text", "qwen2"), ("qwen2_vl", "qwen2"))),
    "qwen2_5_vl": Wrapper(
        "Qwen2_5_VLForConditionalGeneration", (("qwen2_5_vl_text", "qwen2"), ("qwen2_5_vl", "qwen2"))
    ),
    "qwen3_5": Wrapper("Qwen3_5ForConditionalGeneration", (("qwen3_5_text", "qwen3_5_text"),)),
    "qwen3_5_moe": Wrapper("Qwen3_5MoeForConditionalGeneration", (("qwen3_5_moe_text", "qwen3_5_moe_text"),)),
    "qwen3_vl": Wrapper("Qwen3VLForConditionalGeneration", (("qwen3_vl_text", "qwen3"),)),
}
"""The wrappers by the `model_type` of `config.json`."""
_OF_THE_WHOLE = ("quantization_config", "dtype", "torch_dtype", "eos_token_id")
_ROPES = ("rope_parameters", "rope_scaling")
_OTHER_PARTS = {"vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"}
_OTHER_PARTS |= {"vision_token_id"}


def text_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the language model, as if `config.json` were its own; `raw` itself if nothing wraps it.

    The head is said to be tied: the stored tensors decide. Raises `ValueError` naming a kind of language model that is
    not supported in this wrapper.
    """
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in WRAPPERS:
        return raw
    wrapper, text = WRAPPERS[name], raw.get("text_config")
    if text is None:  # as the first Qwen2-VL files have it: one object for all
        text = {key: value for key, value in raw.items() if key not in _OTHER_PARTS}
    if not isinstance(text, dict):
        raise ValueError(f"config.json: text_config is {text!r}; it must be an object")
    families = dict(wrapper.families)
    inside = text.get("model_type")
    if not isinstance(inside, str) or inside not in families:
        raise ValueError(
            f"config.json: model_type is {name!r}, which wraps a language model of type {inside!r}; supported in it "
            f"are {', '.join(families)}"
        )
    named = raw.get("architectures")
    if named and named != [wrapper.architecture]:
        raise ValueError(f"config.json: architectures is {named}; for {name} it must be ['{wrapper.architecture}']")
    fields = {**text, "model_type": families[inside], "architectures": None, "tie_word_embeddings": True}
    fields |= {key: raw[key] for key in _OF_THE_WHOLE if raw.get(key) is not None}
    return fields | {key: _plain_rope(fields[key]) for key in _ROPES if key in fields}


def is_wrapper(raw: dict[str, Any]) -> bool:
    """Whether `config.json` is that of a wrapper."""
    name = raw.get("model_type")
    return isinstance(name, str) and name in WRAPPERS


def _plain_rope(rope: Any) -> Any:
    """Return rotary embedding's parameters for text, whose three positions by Qwen2-VL's count are one."""
    if not isinstance(rope, dict):
        return rope
    return {key: "default" if key in ("type", "rope_type") and kind == "mrope" else kind for key, kind in rope.items()}
