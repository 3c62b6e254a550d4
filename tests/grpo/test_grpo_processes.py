"""Two gloo processes train as one: same problems, rollouts, rewards and advantages, and the same weights afterwards."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import grpo_worker
import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*is_gradient_checkpointing:FutureWarning")


def launch(out: Path, world: int, what: str = "main") -> list[dict]:
    """What each process saw, by rank, in a function of ``grpo_worker``."""
    out.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", **where}
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(
            subprocess.Popen([sys.executable, grpo_worker.__file__, str(out), what], env=env, stderr=subprocess.PIPE, text=True)
        )
    try:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(out / f"rank-{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What one process saw, and what each of two did."""
    base = tmp_path_factory.mktemp("processes")
    (base / "alone").mkdir()
    grpo_worker.main(base / "alone")
    return torch.load(base / "alone" / "rank-0.pt"), launch(base / "two", 2)


def by_row(seen: list[dict], name: str) -> dict[int, float]:
    pairs = [
        (r, v) for s in seen for rows, values in zip(s["rows"], s[name], strict=True) for r, v in zip(rows, values, strict=True)
    ]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def test_every_process_sees_the_whole_batch_of_one(runs):
    one, two = runs
    for seen in two:
        assert seen["problems"] == one["problems"] and seen["samples"] == one["samples"]
        assert seen["rewards"] == pytest.approx(one["rewards"], abs=1e-9)
    assert len(set(one["rewards"])) > 1


def test_what_rewards_remember_is_on_every_process_what_one_would_remember(runs):
    one, two = runs
    assert two[0]["state"] == two[1]["state"] == one["state"]
    assert one["state"]["hapo"]["history"] and one["state"]["laser_d"]["set_at"] == 1
    assert one["state"]["laser_d"]["monitored"], "a part of a sum is shown its monitoring set"


def test_every_process_judges_and_the_first_writes(runs):
    one, two = runs
    assert (one["logged"], two[0]["logged"], two[1]["logged"]) == (3, 3, 0)


def test_the_processes_advantages_together_are_those_of_one(runs):
    one, two = runs
    together, alone = by_row(two, "advantages"), by_row([one], "advantages")
    assert together.keys() == alone.keys() == set(range(16))
    assert [together[r] for r in alone] == pytest.approx(list(alone.values()), abs=1e-6)
    assert sorted(r for rows in two[1]["rows"] for r in rows) == list(range(8, 16))


def test_the_weights_after_training_are_those_of_one(runs):
    one, two = runs
    assert torch.equal(two[0]["weights"], two[1]["weights"])
    torch.testing.assert_close(two[0]["weights"], one["weights"], rtol=0, atol=1e-4)


def test_processes_that_train_together_do_not_wait_for_each_others_lock(tmp_path):
    """Only the main process locks a policy's folder; all train it, and all read it when it is finished."""
    seen = launch(tmp_path / "policy", 2, "policy")
    fingerprints = {done["fingerprint"] for rank in seen for done in rank["asked"]}
    assert len(fingerprints) == 1 and fingerprints != {seen[0]["base"]}
    assert [[done["main"] for done in rank["asked"]] for rank in seen] == [[True, True], [False, False]]
    assert [[done["rows"] for done in rank["asked"]] for rank in seen] == [[2, 2], [0, 0]]
    (folder,) = (path for path in (tmp_path / "policy" / "runs").iterdir() if path.is_dir())
    assert not list(folder.glob("checkpoint-*"))
