"""Shell: the next token from a row of logits. The noise is a function of (seed, position), of nothing else.

Sampling is the Gumbel-max trick: the candidate with the greatest logit / temperature + noise is a draw from the
softmax over the candidates. The noise of token t is the t-th number of a Philox stream (Salmon et al. 2011) whose key
is the seed and whose counter starts at the position: rows in a batch share no state, so a batch changes no draw.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.protocol import Sampled
from halfmoon.errors import IntegrityError
from halfmoon.types import SamplingParams

Logits = NDArray[np.float32]
Ids = NDArray[np.int64]

NUCLEUS_FIRST_TRY = 512  # candidates sorted before the whole vocabulary is: enough for all but flat distributions


def sample(logits: Logits, params: SamplingParams, position: int) -> Sampled:
    """Choose the token at `position` from logits [vocab].

    Equal logits: the lowest id wins. top_k is applied first, then top_p within it, after the temperature.

    Raises:
        IntegrityError: if the logits are not finite (damaged KV or weights; never a token).
    """
    if not np.isfinite(logits).all():
        raise IntegrityError(f"logits for position {position} are not finite: KV or weights are damaged")
    token_id = int(logits.argmax()) if params.greedy else _draw(logits, params, position)
    if params.logprobs is None:
        return Sampled(token_id=token_id)
    log_norm = _log_sum_exp(logits)
    top = _greatest(logits, params.logprobs)[: params.logprobs]
    return Sampled(
        token_id=token_id,
        logprob=float(logits[token_id] - log_norm),
        top=tuple((int(i), float(logits[i] - log_norm)) for i in top),
    )


def noise(seed: int, position: int, count: int) -> NDArray[np.float64]:
    """Uniform in (0, 1), [count]: entry t belongs to token t, whatever `count` is."""
    words = np.random.Philox(key=seed, counter=[0, position, 0, 0]).random_raw(count)  # a stream that numpy keeps
    return np.maximum((words >> np.uint64(11)) * 2.0**-53, 2.0**-54)  # never 0: its logarithm is taken


def _draw(logits: Logits, params: SamplingParams, position: int) -> int:
    scaled = logits.astype(np.float64) / params.temperature
    candidates = _candidates(scaled, params)
    uniform = noise(params.seed, position, len(logits))
    if candidates is None:
        return int((scaled - np.log(-np.log(uniform))).argmax())
    keys = scaled[candidates] - np.log(-np.log(uniform[candidates]))
    return int(candidates[keys.argmax()])


def _candidates(scaled: NDArray[np.float64], params: SamplingParams) -> Ids | None:
    """The ids left by top_k and top_p, likeliest first; None: all."""
    top_k = params.top_k if 0 < params.top_k < len(scaled) else 0
    if top_k:
        kept = _greatest(scaled, top_k)[:top_k]
        return kept if params.top_p >= 1.0 else _nucleus(scaled, kept, _log_sum_exp(scaled[kept]), params.top_p)
    if params.top_p >= 1.0:
        return None
    log_norm = _log_sum_exp(scaled)
    first = _greatest(scaled, min(NUCLEUS_FIRST_TRY, len(scaled)))
    if np.exp(scaled[first] - log_norm).sum() < params.top_p:
        first = _greatest(scaled, len(scaled))
    return _nucleus(scaled, first, log_norm, params.top_p)


def _nucleus(scaled: NDArray[np.float64], ordered: Ids, log_norm: float, top_p: float) -> Ids:
    """The shortest head of `ordered` whose mass reaches top_p; at least one."""
    mass = np.exp(scaled[ordered] - log_norm).cumsum()
    return ordered[: int(np.searchsorted(mass, top_p)) + 1]


def _greatest(values: NDArray[np.floating], count: int) -> Ids:
    """Ids of at least the `count` greatest values (all that equal the last one), greatest first, then lowest id."""
    if count == 0:
        return np.empty(0, np.int64)
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    ids = np.flatnonzero(values >= threshold)
    return ids[np.argsort(-values[ids], kind="stable")]


def _log_sum_exp(values: NDArray[np.floating]) -> float:
    top = float(values.max())
    return top + float(np.log(np.exp(values.astype(np.float64) - top).sum()))
