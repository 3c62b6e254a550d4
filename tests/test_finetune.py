"""Supervised fine-tuning: the model learns the responses and only them, can be stopped, and remembers its problems."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

pytest.importorskip("trl")

from toolkit import finetune, origins, store, tensors
from toolkit import lm as lms
from toolkit.finetune import Example, Settings
from toolkit.lm import UnsupportedModelError

PROMPT, RESPONSE = [5, 6, 7], [9, 8, 11, 4]
EXAMPLES = [Example(problem=f"p{i}", prompt=[*PROMPT, i], response=RESPONSE) for i in range(20, 24)]


def loss(lm, examples) -> float:
    """Mean negative log-probability of the response tokens, computed one example at a time."""
    losses = []
    for e in examples:
        ids = torch.tensor([[*e.prompt, *e.response]])
        with torch.inference_mode():
            logs = lm.model(ids).logits[0].log_softmax(-1)
        losses += [-logs[len(e.prompt) + i - 1, t].item() for i, t in enumerate(e.response)]
    return sum(losses) / len(losses)


def test_training_lowers_the_loss_of_the_responses_and_leaves_the_initial_model_alone(tiny, tmp_path):
    before = loss(tiny, EXAMPLES)
    trained = finetune.train(tiny, EXAMPLES, Settings(steps=8, batch=4), tmp_path, name="taught")
    assert loss(trained, EXAMPLES) < before - 1
    assert loss(tiny, EXAMPLES) == before
    assert trained.name == "taught" and trained.parent == tiny.fingerprint
    assert set(trained.made_from[-1]["problem_ids"]) == {origins.digest(e.problem) for e in EXAMPLES}


def test_the_first_step_follows_the_gradient_of_response_tokens_alone(tiny, tmp_path):
    """AdamW's first step is the sign of the gradient, so two runs whose losses differ only by prompt tokens would differ here."""
    taken = finetune.train(tiny, EXAMPLES, Settings(steps=1, batch=4, rate=1e-3), tmp_path, name="one step")
    ids = torch.tensor([[*e.prompt, *e.response] for e in EXAMPLES])
    model = copy.deepcopy(tiny.model).train()
    logs = model(ids).logits.log_softmax(-1)
    first = len(PROMPT) + 1
    picked = logs[:, first - 1 : -1].gather(2, ids[:, first:, None])
    (-picked.mean()).backward()
    for (name, old), new in zip(model.named_parameters(), taken.model.parameters(), strict=True):
        clear = old.grad.abs() > 1e-3  # far above Adam's epsilon after clipping to norm 1, so that the step is the sign
        assert torch.allclose((new - old)[clear], -1e-3 * old.grad[clear].sign(), atol=3e-6), name


def test_a_stopped_run_ends_with_the_weights_of_a_run_that_was_not_stopped(tiny, tmp_path, monkeypatch):
    settings = Settings(steps=4, batch=2, save_every=2)
    whole = finetune.train(tiny, EXAMPLES, settings, tmp_path / "whole", name="whole")

    from trl import SFTTrainer

    step, done = SFTTrainer.training_step, []

    def stops(self, *args, **kwargs):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(1)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "training_step", stops)
    with pytest.raises(KeyboardInterrupt):
        finetune.train(tiny, EXAMPLES, settings, tmp_path / "stopped", name="whole")
    monkeypatch.setattr(SFTTrainer, "training_step", step)
    again = finetune.train(tiny, EXAMPLES, settings, tmp_path / "stopped", name="whole")
    assert again.fingerprint == whole.fingerprint
    assert not (tmp_path / "stopped" / finetune.PASSES).exists()


def test_killed_while_a_checkpoint_is_written_a_run_goes_on_from_the_one_before(tiny, tmp_path, monkeypatch):
    settings = Settings(steps=4, batch=2, save_every=2)
    whole = finetune.train(tiny, EXAMPLES, settings, tmp_path / "whole", name="whole")

    from transformers import Trainer

    save, saved = Trainer._save_rng_state, []

    def killed(self, folder):
        saved.append(folder)
        if len(saved) == 2:
            raise KeyboardInterrupt
        save(self, folder)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_save_rng_state", killed)
        finetune.train(tiny, EXAMPLES, settings, tmp_path / "run", name="whole")
    left = {path.name for path in (tmp_path / "run" / finetune.PASSES).glob("checkpoint-*")}
    assert left == {"checkpoint-2", "checkpoint-4"}
    taken, step = [], Trainer.training_step
    monkeypatch.setattr(Trainer, "training_step", lambda *args, **kwargs: taken.append(1) or step(*args, **kwargs))
    again = finetune.train(tiny, EXAMPLES, settings, tmp_path / "run", name="whole")
    assert again.fingerprint == whole.fingerprint and len(taken) == 2


def test_killed_while_the_first_checkpoint_is_written_a_run_begins_anew(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    assert finetune._last_checkpoint(tmp_path) is None and not list(tmp_path.iterdir())


def test_a_trained_model_with_code_of_its_own_is_read_with_it(tiny, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(lms, "load", lambda folder, **how: given.update(how) or tiny)
    (tmp_path / finetune.MODEL).mkdir()
    for module in ("transformers.models.llama", "transformers_modules.theirs"):
        monkeypatch.setattr(type(tiny.model), "__module__", module)
        finetune.finished(tiny, tmp_path, lambda: None, "a", [])
        assert given["trust_remote_code"] == (module == "transformers_modules.theirs")


def test_a_finished_run_is_read_and_another_run_is_refused(tiny, tmp_path):
    settings = Settings(steps=1, batch=2)
    first = finetune.train(tiny, EXAMPLES, settings, tmp_path, name="a")
    written = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    assert finetune.train(tiny, EXAMPLES, settings, tmp_path, name="a").fingerprint == first.fingerprint
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(store.WrongModelError, match="examples"):
        finetune.train(tiny, EXAMPLES[:2], settings, tmp_path, name="a")
    with pytest.raises(store.WrongModelError, match="seed"):
        finetune.train(tiny, EXAMPLES, dataclasses.replace(settings, seed=1), tmp_path, name="a")


@pytest.mark.parametrize(
    "examples, message",
    [
        ([], "no examples"),
        ([Example(problem="p", prompt=[], response=[1])], "0 prompt and 1 response"),
        ([Example(problem="p", prompt=[1], response=[10**6])], "ids from 0 to"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_anything_is_written(tiny, tmp_path, examples, message):
    with pytest.raises(ValueError, match=message):
        finetune.train(tiny, examples, Settings(steps=1), tmp_path / "out", name="a")
    assert not (tmp_path / "out").exists()


def test_examples_longer_than_the_context_are_refused_with_their_number_and_the_longest_before_anything_is_written(tiny, tmp_path):
    context = tiny.model.config.max_position_embeddings
    long = [Example(problem=f"long {n}", prompt=[5] * n, response=[6] * context) for n in (1, 3, 2)]
    message = f"3 of 7 texts .* longer than the {context} tokens .* problem 'long 3', has {context + 3} tokens"
    with pytest.raises(ValueError, match=message):
        finetune.train(tiny, [*EXAMPLES, *long], Settings(steps=1), tmp_path / "out", name="a")
    assert not (tmp_path / "out").exists()
    finetune.check_context(tiny, ["fits"], [context])


def test_a_directory_that_another_process_trains_into_is_refused(tiny, tmp_path):
    with store.locked(tmp_path / ".training") as mine:
        assert mine
        with pytest.raises(store.StoreError, match="Another process is training"):
            finetune.train(tiny, EXAMPLES, Settings(steps=1), tmp_path, name="a")


def test_a_model_trained_by_other_code_is_not_taken_for_this_run(tiny, tmp_path, monkeypatch):
    settings = Settings(steps=1, batch=2)
    finetune.train(tiny, EXAMPLES, settings, tmp_path, name="a")
    monkeypatch.setattr(store, "code_of", lambda *names: "another version")
    with pytest.raises(store.WrongModelError, match="training code"):
        finetune.train(tiny, EXAMPLES, settings, tmp_path, name="a")


def test_quantised_weights_are_refused_before_anything_is_written(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "storage", lambda model: "4-bit")
    with pytest.raises(UnsupportedModelError, match="4-bit weights, so training is not possible"):
        finetune.train(tiny, EXAMPLES, Settings(steps=1), tmp_path / "out", name="a")
    assert not (tmp_path / "out").exists()
