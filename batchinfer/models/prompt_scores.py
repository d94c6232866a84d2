"""Log-probabilities of the tokens of prompts: the output head runs over them a few rows at a time.

A row of logits has a float32 for each token of the vocabulary: those of a whole step of prompts would take gigabytes.
"""

import torch
from torch import Tensor

from batchinfer.kernels.grain import MIN_ROWS
from batchinfer.kernels.rows import Rows
from batchinfer.kernels.scores import LogProbabilities, ScoredTokens, with_likeliest
from batchinfer.models.batch import ScoringStep
from batchinfer.models.decoder import Decoder

LOGITS_BYTES = 256 << 20  # most bytes of logits at a time


def known_log_probabilities(decoder: Decoder, x_SD: Tensor, y: Rows, scoring: ScoringStep) -> LogProbabilities:
    """Return the log-probabilities of a step's known tokens, from what `Decoder.hidden` returns of their p rows.

    S is p and padding: a multiple of `MIN_ROWS`, as is each part that the head computes.
    """
    vocabulary, rows, tokens = decoder.config.vocab_size, scoring.known.rows, scoring.known.tokens
    count = min(scoring.likeliest, vocabulary)
    size = max(1, LOGITS_BYTES // (4 * vocabulary * MIN_ROWS)) * MIN_ROWS
    values = torch.zeros(len(tokens), device=x_SD.device)
    parts: list[LogProbabilities] = []
    for begin in range(0, len(x_SD), size):
        end = min(begin + size, len(x_SD))
        logits = decoder.logits(x_SD[begin:end], y.between(begin, end))
        # Tokens of other parts get numbers that are not used, so that a GPU need not be asked how many there are.
        within = ScoredTokens((rows - begin).clamp(0, end - begin - 1), tokens)
        parts.append(with_likeliest(logits, within, count))
        values = torch.where((rows >= begin) & (rows < end), parts[-1].values, values)
    top_ids, top_values = torch.cat([part.top_ids for part in parts]), torch.cat([part.top_values for part in parts])
    return LogProbabilities(values, top_ids, top_values)
