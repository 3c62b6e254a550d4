"""Rewards as models of preference: none is missing, and what can be checked in the code is as the table says."""

from __future__ import annotations

from batches import every_reward

from toolkit import rewards
from toolkit.rewards import kinds
from toolkit.rewards.columns import LABEL_COLUMNS

LABELS = {"correct", "gold_answer", *LABEL_COLUMNS}
POLICY = {"logprob", "logprob_without", "think_entropy", "answer_entropy"}
MODELS = {"conciseness", "model_score"}


def test_every_reward_has_a_kind_with_known_sources():
    assert kinds.KINDS.keys() == rewards.ALL.keys()
    assert all(set(k.sources) <= kinds.SOURCES.keys() and k.sources and k.assumes.endswith(".") for k in kinds.KINDS.values())
    assert {source for k in kinds.KINDS.values() for source in k.sources} == kinds.SOURCES.keys()


def test_a_reward_reads_labels_if_and_only_if_its_source_is_an_outcome():
    read = {name: bool(r.needs & LABELS) for name, r in every_reward().items()}
    assert read == {name: kinds.OUTCOME in k.sources for name, k in kinds.KINDS.items()}


def test_a_reward_reads_the_policys_probabilities_if_and_only_if_its_source_is_the_policy():
    read = {name: bool(r.needs & POLICY) for name, r in every_reward().items()}
    assert read == {name: kinds.POLICY in k.sources for name, k in kinds.KINDS.items()}


def test_a_column_of_a_trained_model_makes_a_preference_model():
    for name, r in every_reward().items():
        assert not r.needs & MODELS or kinds.PREFERENCE in kinds.KINDS[name].sources, name


def test_a_dense_reward_has_a_process_as_source():
    for name, r in every_reward().items():
        assert not kinds.is_dense(r) or kinds.PROCESS in kinds.KINDS[name].sources, name
    assert {name for name, r in every_reward().items() if kinds.is_dense(r)} >= {"ppr", "fine_grained", "page_llm"}
