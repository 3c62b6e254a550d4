"""Evaluations before and after training can be sampled by a server: the same numbers, and refusals before any work."""

from __future__ import annotations

from dataclasses import replace

import pytest
from servers import serving
from typer.testing import CliRunner

from toolkit import cli, tasks
from toolkit.engines import CannotSampleError, connect
from toolkit.generate import Sampling
from toolkit.grpo import parts, recipes
from toolkit.grpo.extras import Extras
from toolkit.grpo.run import Run, train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*is_gradient_checkpointing:FutureWarning")
GREEDY = Sampling(n=1, temperature=0.0, max_new_tokens=80)


@pytest.fixture
def small():
    return replace(recipes.plain("arora_zanette"), problems=2, samples=4, max_tokens=80, learning_rate=2e-2)


def trained(lm, recipe, out, engine=None, adapter=True):
    settings = {} if engine is None else {"evaluation_engine": engine}
    held_out = tuple(tasks.arithmetic.load("dev", 6, operands=(3, 6)))
    run = Run(out, 2, held_out=held_out, evaluate_every=1, evaluate=GREEDY, micro_batch=8, **settings)
    extras = Extras(train=parts.adapter(4) if adapter else None)
    return train(lm, recipe, tasks.arithmetic.load("train", 24, operands=(3, 6)), run, extras=extras)


def judged(done) -> list[dict]:
    """The evaluations before and after training."""
    columns = [c for c in done.log.columns if c.startswith("held_out/") and c != "held_out/kl"]
    return done.log.iloc[[0, -1]][columns].to_dict("records")


def test_a_server_judges_base_and_the_trained_adapter_as_the_own_loop_does(tiny, small, tmp_path):
    with serving("vllm", tiny) as (url, state):
        served = trained(tiny, small, tmp_path / "served", connect(url, tiny, adapters=tmp_path / "adapters"))
    own = trained(tiny, small, tmp_path / "own")
    assert judged(served) == judged(own)
    assert judged(own)[0] != judged(own)[1]  # what was trained shows
    assert state.loaded == [f"toolkit-{tiny.fingerprint[:8]}-{served.lm.fingerprint[:16]}"]


@pytest.mark.parametrize(
    ("kind", "adapter", "why"), [("vllm", False, "nothing but a trained adapter"), ("llama", True, "load an adapter")]
)
def test_a_server_that_cannot_be_given_the_trained_weights_is_refused_before_any_work(kind, adapter, why, tiny, small, tmp_path):
    with serving(kind, tiny) as (url, _), pytest.raises(CannotSampleError, match=why):
        trained(tiny, small, tmp_path / "run", connect(url, tiny), adapter)
    assert not (tmp_path / "run").exists()


def test_the_command_names_the_missing_adapter_in_one_line(tiny, tmp_path):
    with serving("vllm", tiny) as (url, _):
        result = CliRunner().invoke(cli.app, ["grpo", "--steps", "1", "--engine", url, "-o", str(tmp_path / "run")])
    assert result.exit_code
    assert "--train adapter" in str(result.exception or result.output)
