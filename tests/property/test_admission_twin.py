"""What `Predictive` and `Forecast` expect of the decode pool, against twins that count request by request.

The twins follow docs/decisions/0015 and the policies' words: one asks, for each open request, whether it decodes then;
the other goes through every way in which the running requests may have ended.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conductor.admission import Case, Flight, Stage
from conductor.admission_config import AdmissionConfig
from conductor.admission_policies import Forecast, Predictive
from conductor.config import ConductorConfig
from conductor.effects import Slo
from conductor.scoring import DecodeScore, PrefillScore
from conductor.survival import OutputLengths
from conductor.view import ClusterView, DecodeBook
from core.messages import LoadReport
from halfmoon.types import AttemptId, NodeId, RequestId
from tests.conductor_kit import PRIOR, info

BLOCK = 16
P0, D0 = NodeId("p0"), NodeId("d0")
SLO = Slo(ttft_s=5.0, tbt_s=0.1)


def tenths(least: int, most: int) -> st.SearchStrategy[float]:
    """Seconds, spread evenly, which floats are not."""
    return st.integers(least, most).map(lambda number: number / 10)


FLIGHTS = st.lists(
    st.builds(
        Flight,
        decode_node=st.just(D0),
        tokens=st.integers(100, 4000),
        emitted=st.sampled_from([0, 0, 7, 60]),
        output_max=st.integers(64, 2000),
        prefill_left_s=st.one_of(st.just(0.0), tenths(1, 40), tenths(1, 40)),
        decoding_for_s=st.one_of(st.none(), tenths(0, 120)),
        share=st.just(1.0),
    ).map(lambda f: f._replace(decoding_for_s=None) if f.prefill_left_s else f),
    min_size=1,
    max_size=7,
)


def case(
    flights: list[Flight], *, ttft_s: float, tokens: int = 900, decode_s: float | None = 8.0, room_load: float = 1.2,
    outputs: list[int] | None = None, workers: int = 3, in_line: int = 0,
) -> Case:  # fmt: skip
    view = ClusterView(ConductorConfig(prior=PRIOR))
    for name in [f"d{i}" for i in range(workers)]:
        view.join(info(name, num_device_blocks=300, sequences_max=8), 0.0)
    view.join(info("p0"), 0.0).book_prefill(AttemptId(RequestId("other"), 1), 0.1, 0.0)
    busy = view.get(D0)
    assert busy is not None
    busy.load = LoadReport(running_sequences=4, kv_tokens=3000)
    busy.book_decode(AttemptId(RequestId("other"), 1), DecodeBook(1, 1))
    lengths = OutputLengths()
    for length in outputs or ():
        lengths.see(length)
    return Case(
        stage=Stage.ARRIVAL,
        request_id=RequestId("r"),
        slo=SLO,
        default_slo=Slo(),
        priority=0,
        now_s=100.0,
        waited_s=0.0,
        tokens=tokens,
        output_tokens=100,
        output_max=1000,
        block_size=BLOCK,
        prefill=PrefillScore(P0, ttft_s, 0.0, 0.0, ttft_s, 0.0, 0, 0, None, True, False),
        decode=DecodeScore(D0, room_load, 0.03, 0.0, 0.3, room_load, 0, True, False),
        view=view,
        flights=lambda node_id: flights,
        in_line=in_line,
        decode_s=decode_s,
        lengths=lengths,
        config=AdmissionConfig(),
    )


# ---- predictive ----


def then(flight: Flight, at_s: float, decode_s: float | None, step_s: float) -> float | None:
    """KV tokens of a request that decodes at that moment; None: it does not, for it still prefills or has ended."""
    if flight.decoding_for_s is None:
        return float(flight.tokens) if flight.prefill_left_s <= at_s else None
    ended = decode_s is not None and flight.decoding_for_s + at_s > decode_s
    return None if ended else flight.tokens + flight.decoding_for_s / step_s


@settings(max_examples=300, deadline=None)
@given(
    flights=FLIGHTS,
    ttft_s=tenths(1, 60),
    decode_s=st.one_of(st.none(), tenths(20, 140), tenths(20, 140)),
    workers=st.integers(1, 5),
)
def test_predictive_spreads_evenly_who_decodes_when_the_prefill_ends(
    flights: list[Flight], ttft_s: float, decode_s: float | None, workers: int
) -> None:
    asked = case(flights, ttft_s=ttft_s, decode_s=decode_s, workers=workers)
    sizes = [size for f in flights if (size := then(f, ttft_s, decode_s, asked.decode.tbt_s)) is not None]
    found = {finding.reason: finding for finding in Predictive().findings(asked)}
    assert found.keys() == {"ttft_slo", "tbt_slo", "decode_room", "decode_sequences"}
    assert (found["ttft_slo"].predicted, found["ttft_slo"].limit) == (ttft_s, SLO.ttft_s)
    tokens, batch = sum(sizes) / workers + asked.tokens, len(sizes) / workers + 1
    assert found["decode_room"].predicted == pytest.approx(tokens)
    assert found["decode_room"].limit == 300 * BLOCK
    assert found["decode_sequences"].predicted == pytest.approx(batch)
    assert asked.worker is not None
    step = asked.worker.cost.decode_step_s(round(batch), round(tokens))
    assert found["tbt_slo"].predicted == pytest.approx(step.seconds, rel=1e-3)


# ---- forecast ----


def expected(asked: Case, flights: list[Flight], at_s: float) -> tuple[float, float]:
    """KV tokens with the margin, and sequences, at that moment: over all ways in which requests may have ended."""
    assert asked.worker is not None
    assert asked.prefill is not None
    per_s = 1.0 / asked.worker.cost.decode_step_s(asked.worker.batch, asked.worker.kv_tokens).seconds
    spare = 1.5 * BLOCK  # half of the last block, and the one that is kept for the next token
    there = []
    for f in flights:
        if f.prefill_left_s <= at_s:
            made = f.emitted + (f.decoding_for_s or 0.0) * per_s
            more = min(at_s - f.prefill_left_s, asked.config.horizon_s) * per_s
            size = f.tokens - f.emitted + min(made + more, f.output_max) + spare
            there.append((asked.lengths.outlives(made, more, f.output_max), size))
    mean = square = batch = 0.0
    for alive in product((True, False), repeat=len(there)):
        chance = math.prod(p if lives else 1.0 - p for lives, (p, _) in zip(alive, there, strict=True))
        total = sum(size for lives, (_, size) in zip(alive, there, strict=True) if lives)
        mean, square, batch = mean + chance * total, square + chance * total**2, batch + chance * sum(alive)
    own_more = min(at_s - asked.prefill.ttft_s, asked.config.horizon_s) * per_s
    own = asked.lengths.outlives(0.0, own_more, asked.output_max) if own_more else 1.0
    margin = asked.config.sigmas * math.sqrt(max(0.0, square - mean**2))
    return mean + margin + own * (asked.tokens + own_more + spare), batch + own


@settings(max_examples=300, deadline=None)
@given(
    flights=FLIGHTS,
    ttft_s=tenths(1, 20),
    outputs=st.one_of(st.just([]), st.lists(st.integers(1, 600), min_size=20, max_size=40)),
)
def test_forecast_expects_what_all_the_ways_to_end_come_to(
    flights: list[Flight], ttft_s: float, outputs: list[int]
) -> None:
    asked = case(flights, ttft_s=ttft_s, outputs=outputs)
    later = sorted({f.prefill_left_s for f in flights if f.prefill_left_s > ttft_s})
    tokens, batch = max(expected(asked, flights, at_s) for at_s in (ttft_s, *later[-4:]))
    found = {finding.reason: finding for finding in Forecast().findings(asked)}
    assert found["decode_room"].predicted == pytest.approx(tokens, rel=1e-6, abs=1e-3)
    assert found["decode_sequences"].predicted == pytest.approx(batch, rel=1e-6, abs=1e-6)


@given(flights=FLIGHTS, room_load=st.floats(0.01, 1.0))
def test_forecast_forecasts_nothing_while_all_that_is_booked_fits(flights: list[Flight], room_load: float) -> None:
    found = {f.reason: f.predicted for f in Forecast().findings(case(flights, ttft_s=1.0, room_load=room_load))}
    assert found.pop("decode_room") == pytest.approx(room_load * 300 * BLOCK)
    assert found == {"ttft_slo": 1.0, "tbt_slo": 0.03}
    waiting = Forecast().findings(case(flights, ttft_s=1.0, room_load=room_load, in_line=1))
    assert "decode_sequences" in {f.reason for f in waiting}


def test_a_request_that_may_decode_anywhere_counts_by_its_share() -> None:
    whole = [Flight(D0, 1000, 0, 1000, 0.0, None)]
    half = [whole[0]._replace(share=0.5)] * 2
    findings = [Forecast().findings(case(flights, ttft_s=1.0)) for flights in (whole, half)]
    assert findings[0] == findings[1]
