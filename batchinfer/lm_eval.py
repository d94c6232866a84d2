"""The model `batchinfer` of lm-evaluation-harness (lm-eval 0.4.13): its tasks run through `LLM`.

    import lm_eval
    import batchinfer.lm_eval  # makes the model known

    lm_eval.simple_evaluate("batchinfer", {"pretrained": "MODEL"}, tasks=["hellaswag"])

Requests are cut into tokens as lm-eval does it for its own `hf` model. lm-eval is no dependency of batchinfer.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.llm import LLM

MAX_GEN_TOKS = 256
PASSED_ON = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

Pair = tuple[Any, Sequence[int], Sequence[int]]
"""What lm-eval knows the request by, the context's tokens, and those of the continuation."""


@register_model("batchinfer")
class BatchinferLM(TemplateLM):  # type: ignore[misc]
    """Computes all requests of a kind in one call of `LLM`, which orders them itself."""

    def __init__(
        self, pretrained: str, max_length: int | None = None, max_gen_toks: int = MAX_GEN_TOKS, **arguments: Any
    ) -> None:
        """Load the model `pretrained`; further arguments are those of `LLM`, but those that lm-eval gives every model
        and that mean nothing here: `batch_size`, `max_batch_size`.

        All tokens of a row are computed, so `max_length` is one less than `LLM` allows. Raises what `LLM` raises.
        """
        super().__init__()
        for name in ("batch_size", "max_batch_size"):
            arguments.pop(name, None)
        if arguments.get("device") is None:
            arguments.pop("device", None)
        length = None if max_length is None else max_length + 1
        self._llm = LLM(pretrained, max_model_len=length, **arguments)
        self._max_gen_toks = max_gen_toks

    @property
    def max_length(self) -> int:
        """The most tokens of a context and a continuation together, but the last one."""
        return self._llm.max_model_len - 1

    @property
    def max_gen_toks(self) -> int:
        """The most tokens of an answer, where a task does not say it."""
        return self._max_gen_toks

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token. Raises `ValueError` if the model has none."""
        if not self._llm.tokenizer.eos_ids:
            raise ValueError("the model has no end-of-text token, and lm-eval needs one")
        return self._llm.tokenizer.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has nothing before it."""
        bos = self._llm.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval tells cached requests of other tokenizers by."""
        return self._llm.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **ignored: Any) -> list[int]:
        """Return the token ids of a text, in which control tokens are recognized."""
        return self._llm.tokenizer.encode_rendered(string, add_special_tokens is not False)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation by the checkpoint's chat template."""
        template = self._llm.tokenizer.template
        if template is None:
            raise ValueError("the model has no chat template; leave apply_chat_template out")
        if not add_generation_prompt:
            raise ValueError("fewshot_as_multiturn with a begun answer is not supported; leave gen_prefix out")
        return str(template.render(chat_history, None, {}))

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **ignored: Any) -> list[tuple[float, bool]]:
        pairs = [self._fitted(context, continuation) for _, context, continuation in requests]
        scores = self._llm.score([list(context) for context, _ in pairs], [list(tokens) for _, tokens in pairs])
        found = []
        for (known_by, _, _), score in zip(requests, scores, strict=True):
            if score.error is not None:
                raise ValueError(f"request {score.index}: {score.error.message} ({score.error.code})")
            found.append((score.log_probability, score.greedy))
            if known_by is not None:
                self.cache_hook.add_partial("loglikelihood", known_by, found[-1])
        return found

    def _fitted(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        """Return a pair without the first tokens of a context that is too long."""
        most = self._llm.max_model_len - len(continuation)
        return context[-most:] if most > 0 else context, continuation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text, of whatever length: the sum over its windows."""
        windows, counts = list[Pair](), []
        for (text,) in (request.args for request in requests):
            cut = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1)
            mine = [(None, *make_disjoint_window(window)) for window in cut]
            windows += mine
            counts.append(len(mine))
        values = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(values)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the answer of each request, up to the first of its stop texts."""
        answers: dict[int, str] = {}
        for params, indices in self._by_params(requests):
            most = self.max_length - params.max_tokens
            if most < 1:
                raise ValueError(
                    f"max_gen_toks is {params.max_tokens}; it must be below max_length, which is {self.max_length}"
                )
            prompts = [self.tok_encode(requests[i].args[0])[-most:] for i in indices]
            for i, done in zip(indices, self._llm.generate(prompts, params), strict=True):
                if done.text is None:
                    raise ValueError(f"request {i}: {done.error}")
                answers[i] = done.text
                self.cache_hook.add_partial("generate_until", requests[i].args, done.text)
        return [answers[i] for i in range(len(requests))]

    def _by_params(self, requests: list[Instance]) -> Iterable[tuple[SamplingParams, list[int]]]:
        """Group requests that are sampled alike: (params, indices)."""
        groups: dict[SamplingParams, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(self._params(dict(request.args[1])), []).append(i)
        return groups.items()

    def _params(self, given: dict[str, Any]) -> SamplingParams:
        """Return what a task's `generation_kwargs` mean. Raises `ValueError` naming one that is not known."""
        known = normalize_gen_kwargs(given, self.max_gen_toks)
        until, most = known.pop("until", None) or [], known.pop("max_gen_toks")
        known.pop("do_sample", None)
        if unknown := sorted(known.keys() - set(PASSED_ON)):
            raise ValueError(
                f"generation_kwargs has {unknown[0]!r}; it must be one of until, max_gen_toks, do_sample, "
                f"{', '.join(PASSED_ON)}"
            )
        stop = tuple(filter(None, [until] if isinstance(until, str) else until))
        return SamplingParams(max_tokens=most, stop=stop, **known)
