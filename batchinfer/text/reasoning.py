"""Telling a model's thinking from its answer, by the tags between which it thinks.

Which tags a family has, and whether its template opens them in the prompt, is in its model card and its template; vLLM
and SGLang list them too (https://docs.vllm.ai/en/latest/features/reasoning_outputs/).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from batchinfer.text import harmony
from batchinfer.text.harmony import messages_of
from batchinfer.text.pieces import Piece, plain, shown


class ReasoningFormat(Protocol):
    """How answers of some models hold their thinking."""

    @property
    def marks(self) -> tuple[str, ...]:
        """The texts at which answers are cut."""

    def is_opened(self, end_of_prompt: Sequence[Piece]) -> bool:
        """Tell whether the prompt opens the thinking, so that the answer begins in it."""

    def split(self, pieces: list[Piece], opened: bool) -> tuple[str | None, list[Piece]]:
        """Split an answer into (thinking, the pieces of the rest). Where there is no thinking, it is None."""

    def is_closed_by(self, prompt: str) -> bool:
        """Tell whether a prompt ends with thinking that is over, so that the answer has none."""

    def is_written_by(self, source: str, texts: Iterable[str]) -> bool:
        """Tell whether models with this chat template think in this format. `texts` are prompts that it rendered."""


@dataclass(frozen=True)
class Tags:
    """Thinking between an opening and a closing tag, each of which may have several forms.

    An answer that was cut in its thinking has no closing tag. Where the prompt, or nobody, opens the thinking, it has
    no opening tag. Tags behind the thinking are part of the answer.
    """

    opening: tuple[str, ...]
    closing: tuple[str, ...]
    around: tuple[str, ...] = ()  # tags around the answer, which are left out
    label: str = ""  # a word behind the opening tag that is no thinking

    @property
    def marks(self) -> tuple[str, ...]:
        return *self.opening, *self.closing, *self.around

    def is_opened(self, end_of_prompt: Sequence[Piece]) -> bool:
        last = end_of_prompt[-1]
        return last.mark in self.opening and last.text.strip() in ("", self.label)

    def split(self, pieces: list[Piece], opened: bool) -> tuple[str | None, list[Piece]]:
        closed = next((i for i, piece in enumerate(pieces) if piece.mark in self.closing), len(pieces))
        begun = next((i for i, piece in enumerate(pieces[:closed]) if piece.mark in self.opening), closed)
        if not opened and begun == closed == len(pieces):
            return None, self._answer(pieces)
        before = [] if opened or begun == closed or not shown(pieces[:begun]).strip() else pieces[:begun]
        thought = pieces[len(before) : closed]
        text = "".join(piece.text if piece.mark in self.opening else piece.shown for piece in thought).strip()
        behind = [plain(pieces[closed].text.lstrip()), *pieces[closed + 1 :]] if closed < len(pieces) else []
        return text.removeprefix(self.label).strip() or None, self._answer(before + behind)

    def is_written_by(self, source: str, texts: Iterable[str]) -> bool:
        tags = (*self.opening, *self.closing)
        known = any(tag in text for tag in tags for text in texts)
        return known and all(tag in source for tag in self.around)

    def is_closed_by(self, prompt: str) -> bool:
        return prompt.rstrip().endswith(self.closing)

    def _answer(self, pieces: list[Piece]) -> list[Piece]:
        """Return pieces without the tags around the answer, and without the space that these leave."""
        if not any(piece.mark in self.around for piece in pieces):
            return pieces
        return [plain(piece.text.strip()) if piece.mark in self.around else piece for piece in pieces]


class Channels:
    """The channels of the harmony format: `analysis` is thinking, what goes to the user and to functions is not."""

    marks = harmony.MARKS

    def is_opened(self, end_of_prompt: Sequence[Piece]) -> bool:
        return False

    def split(self, pieces: list[Piece], opened: bool) -> tuple[str | None, list[Piece]]:
        thought: list[str] = []
        rest: list[Piece] = []
        for message in messages_of(pieces):
            if message.channel == "analysis":
                thought.append(message.text.strip())
            elif message.recipient:
                rest += message.pieces
            elif message.text:
                rest.append(plain(message.text))
        return "\n".join(filter(None, thought)) or None, rest

    def is_closed_by(self, prompt: str) -> bool:
        return False

    def is_written_by(self, source: str, texts: Iterable[str]) -> bool:
        return "<|channel|>" in source and "analysis" in source


_THINK = (("<think>",), ("</think>",))
# In the order in which a template is compared with them: a narrower format comes before a wider one.
FORMATS: dict[str, ReasoningFormat] = {
    "harmony": Channels(),
    "mistral": Tags(("[THINK]",), ("[/THINK]",)),
    "cohere": Tags(
        ("<|START_THINKING|>",), ("<|END_THINKING|>",), ("<|START_RESPONSE|>", "<|END_RESPONSE|>")
    ),
    "gemma4": Tags(("<|channel>",), ("<channel|>",), label="thought"),
    "seed": Tags(("<seed:think>",), ("</seed:think>",)),
    "kimi": Tags(("◁think▷",), ("◁/think▷",)),
    "granite": Tags(
        ("Here is my thought process:", "Here's my thought process:"), ("Here is my response:", "Here's my response:")
    ),
    "think-response": Tags(*_THINK, ("<response>", "</response>")),
    "think-answer": Tags(*_THINK, ("<answer>", "</answer>")),
    "think": Tags(*_THINK),
}  # fmt: skip
