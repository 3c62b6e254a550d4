"""A board with a server: it samples the conditions that a server can sample, and the toolkit's own loop samples the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
from servers import serving

from toolkit import board
from toolkit.board import Sizes, TrainingPlan, default, measure
from toolkit.engines import connect

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:An input array is constant")
SIZES = Sizes(
    main=(("arithmetic", 6),), unseen=(("running_sum", 3),), samples=2, max_new_tokens=120, unseen_tokens=80, seeds=1, extraction=(24, 4),
    haystacks=2, texts=6, training=TrainingPlan(),
)  # fmt: skip


def test_a_server_samples_edits_and_the_own_loop_samples_steering(tiny, tmp_path):
    specs = board.select_conditions(default.CONDITIONS, "base,ThinkEdit (ours),steered -0.5")
    with serving("vllm", tiny) as (url, state):
        ground = board.Ground(tiny, SIZES, tmp_path, engine=connect(url, tiny, adapters=tmp_path / "adapters"))
        board.run(ground, specs, progress=False)
        sampled = [body for body in state.requests if "logprobs" not in body]
        assert len(sampled) == 24 * 4 + 2 * (6 * 2 + 3), "the extraction, and the responses of base and of the edited model"
        assert len(state.loaded) == 1
        board.run(ground, specs, progress=False)
        assert len([body for body in state.requests if "logprobs" not in body]) == len(sampled), "nothing is sampled twice"
    for spec in specs:
        result = measure.read_result(ground, spec, 0)
        assert (result.rows["answer_entropy"].dropna() > 0).any(), "entropies are measured whatever sampled the response"
    own = replace(ground, engine=board.Ground(tiny, SIZES, tmp_path).engine)
    assert {s.name: s.key(own, 0) for s in specs}.items().isdisjoint({s.name: s.key(ground, 0) for s in specs}.items())
