"""Files: what is saved comes back bit by bit, and what cannot be used is a named error, never a wrong number."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from toolkit import store
from toolkit.store import DamagedFileError, ForeignFileError, WrongModelError
from toolkit.types import Direction, HeadEdit, HeadScores, Moments, Plan, Problem, Provenance, Rollout, Span

shapes = st.tuples(st.integers(1, 5), st.integers(1, 9))
dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
seeds = st.integers(0, 2**31)
every_file = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random(shape, dtype, seed) -> Tensor:
    """Random bits as numbers: every finite pattern may come up, subnormals and -0.0 included."""
    width = torch.finfo(dtype).bits // 8
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, (*shape, width), generator=generator, dtype=torch.uint8)
    value = bits.view(dtype).squeeze(-1)
    return torch.where(value.isfinite(), value, -torch.zeros_like(value))


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = [x.reshape(-1).clone().view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def direction(provenance: Provenance, vector: Tensor | None = None) -> Direction:
    return Direction(torch.ones(2, 3) if vector is None else vector, "resid_mid", "think", "mean_difference", 4, 5, provenance)


# --- round trips ---------------------------------------------------------------------------------------------


@every_file
@given(shape=shapes, dtype=dtypes, seed=seeds)
def test_a_direction_comes_back_bit_by_bit(tmp_path, provenance, shape, dtype, seed):
    value = direction(provenance, random(shape, dtype, seed))
    again = store.load(store.save(value, tmp_path / "v.safetensors"), Direction)
    assert same_bits(again.vector, value.vector)
    assert replace(again, vector=value.vector) == value


@every_file
@given(shape=shapes, dtype=dtypes, seed=seeds, transposed=st.booleans())
def test_head_scores_come_back_bit_by_bit(tmp_path, provenance, shape, dtype, seed, transposed):
    score = random(shape, dtype, seed)
    value = HeadScores(score.T if transposed else score, "short_thinking", "residual stream norm", provenance)
    again = store.load(store.save(value, tmp_path / "s.safetensors"), HeadScores)
    assert same_bits(again.score, value.score)
    assert again.ranked() == value.ranked()
    assert replace(again, score=value.score) == value


@every_file
@given(shape=shapes, seed=seeds, n=st.tuples(st.integers(0, 9), st.integers(1, 9)), second=st.booleans())
def test_moments_come_back_bit_by_bit(tmp_path, provenance, shape, seed, n, second):
    layers, width = shape
    sums = {k: random((2, layers, w), torch.float64, seed) for k, w in (("resid_mid", width), ("z", 2 * width))}
    outer = {"resid_mid": random((2, layers, width, width), torch.float64, seed)} if second else {}
    value = Moments(("long", "short"), n, "think", sums, outer, provenance)
    again = store.load(store.save(value, tmp_path / "m.safetensors"), Moments)
    for mine, theirs in ((value.sums, again.sums), (value.outer, again.outer)):
        assert mine.keys() == theirs.keys()
        assert all(same_bits(mine[k], theirs[k]) for k in mine)
    assert replace(again, sums=sums, outer=outer) == value


edits_of_a_plan = st.lists(
    st.builds(
        HeadEdit,
        layer=st.integers(0, 99),
        head=st.integers(0, 99),
        op=st.sampled_from(["project_out", "scale"]),
        strength=st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False),
    ),
    max_size=6,
).map(tuple)


@every_file
@given(edits=edits_of_a_plan, seed=seeds, name=st.text(max_size=20))
def test_a_plan_comes_back_with_its_direction(tmp_path, provenance, edits, seed, name):
    value = Plan(edits, direction(provenance, random((3, 4), torch.float32, seed)), name, provenance)
    again = store.load(store.save(value, tmp_path / "p.safetensors"), Plan)
    assert same_bits(again.direction.vector, value.direction.vector)
    assert replace(again, direction=value.direction) == value
    assert replace(again.direction, vector=value.direction.vector) == value.direction


def test_a_plan_without_a_direction_comes_back(tmp_path, provenance):
    value = Plan((HeadEdit(1, 2, "scale", 0.5),), None, "silence", provenance)
    assert store.load(store.save(value, tmp_path / "p.safetensors"), Plan) == value


def test_a_view_of_a_larger_tensor_is_saved_as_what_it_shows(tmp_path, provenance):
    whole = torch.arange(24.0).view(2, 3, 4)
    for view in (whole[1], whole[:, 1], whole[0].T):
        path = store.save(direction(provenance, view), tmp_path / "v.safetensors")
        assert torch.equal(store.load(path, Direction).vector, view)
        assert path.stat().st_size < 1500


# --- files that cannot be used -------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path, provenance):
    return store.save(direction(provenance), tmp_path / "v.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.999])
def test_a_truncated_file_is_an_error_that_names_it(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DamagedFileError, match=r"v\.safetensors is not a whole safetensors file"):
        store.load(saved, Direction)


def test_noise_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "x").write_bytes(b"\xff" * 400)
    with pytest.raises(DamagedFileError, match="x is not a whole safetensors file"):
        store.load(tmp_path / "x", Direction)


def test_a_foreign_safetensors_file_is_an_error(tmp_path):
    save_file({"vector": torch.ones(2, 3)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    with pytest.raises(ForeignFileError, match=r"x\.safetensors was not written by reasoning-length-toolkit.*'pt'"):
        store.load(tmp_path / "x.safetensors", Direction)


def test_a_file_of_a_later_format_is_an_error_and_not_misread(tmp_path, saved):
    from safetensors import safe_open

    with safe_open(saved, framework="pt") as file:
        header, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header["format_version"] = str(store.FORMAT_VERSION + 1)
    save_file(tensors, saved, metadata=header)
    with pytest.raises(ForeignFileError, match="version"):
        store.load(saved, Direction)


def test_another_kind_of_value_is_an_error_with_both_kinds(saved):
    with pytest.raises(ForeignFileError, match=r"v\.safetensors holds a Direction, not a Moments"):
        store.load(saved, Moments)


def test_another_models_artifact_is_an_error_with_both_fingerprints(saved, provenance):
    assert store.load(saved, Direction, fingerprint=provenance.fingerprint).n_pos == 4
    with pytest.raises(WrongModelError, match=r"tiny llama \(weights ffffffffffff\).*weights aaaaaaaaaaaa.*Extract it again"):
        store.load(saved, Direction, fingerprint="a" * 64)


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No file at .*nothing\.safetensors"):
        store.load(tmp_path / "nothing.safetensors", Direction)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_and_the_old_file_stays(bad, saved, provenance):
    old = saved.read_bytes()
    vector = torch.ones(2, 3)
    vector[1, 2] = bad
    with pytest.raises(ValueError, match=r"Direction\.vector holds NaN or infinity: not saved to .*v\.safetensors"):
        store.save(direction(provenance, vector), saved)
    assert saved.read_bytes() == old


def test_nan_in_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        store.write_json({"x": float("nan")}, tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


def test_json_that_is_not_json_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(DamagedFileError, match=r"x\.json is not valid JSON"):
        store.read_json(tmp_path / "x.json")


# --- writing is atomic ---------------------------------------------------------------------------------------


@pytest.fixture
def below_a_file(tmp_path):
    (tmp_path / "file").write_text("in the way")
    return tmp_path / "file" / "below"


def test_an_output_directory_that_cannot_be_written_is_an_error_that_names_it(below_a_file):
    with pytest.raises(OSError, match=r"Cannot write to .*file/below.*Choose another output directory"):
        store.writable(below_a_file)


def test_saving_below_a_file_is_an_error_that_names_the_path(below_a_file, provenance):
    with pytest.raises(OSError, match="file"):
        store.save(direction(provenance), below_a_file / "v.safetensors")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_an_error_that_names_it(tmp_path):
    (tmp_path / "ro").mkdir(mode=0o500)
    with pytest.raises(OSError, match=r"Cannot write to .*ro"):
        store.writable(tmp_path / "ro")


def test_writable_leaves_nothing_behind(tmp_path):
    assert list(store.writable(tmp_path / "a" / "b").iterdir()) == []


def killed(work) -> None:
    """Run ``work`` in a process that is killed at its end, before anything is cleaned up."""
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


def test_a_kill_while_a_directory_is_filled_leaves_no_directory_and_its_litter_goes_with_the_next_write(tmp_path):
    def work():
        with store.filling(tmp_path / "model") as partial:
            (partial / "config.json").write_text("{}")
            os.kill(os.getpid(), signal.SIGKILL)

    killed(work)
    (litter,) = tmp_path.iterdir()
    assert litter.name.endswith(".partial") and not store.is_whole(tmp_path / "model")
    store.write_text("else", tmp_path / "other.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["other.txt"]


def test_a_kill_while_a_file_is_written_leaves_nothing_after_the_next_write(tmp_path):
    def work():
        with store.atomic(tmp_path / "x.json") as partial:
            partial.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    killed(work)
    store.write_json({}, tmp_path / "x.json")
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_what_a_living_process_or_another_machine_is_writing_is_left_alone(tmp_path):
    names = {f".x.{os.getpid()}.partial", f".x.h{'0' * 8}.999999999.partial"}
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / ".a.b.999999999.partial").mkdir()  # of a dead one
    store.write_text("", tmp_path / "y")
    assert {p.name for p in tmp_path.iterdir()} == {"y", *names}


def test_an_empty_directory_is_filled_and_a_full_one_is_not_touched(tmp_path):
    (tmp_path / "a").mkdir()
    for _ in range(2):
        with pytest.raises(RuntimeError), store.filling(tmp_path / "a"):
            raise RuntimeError
        assert list((tmp_path / "a").iterdir()) == []
    with store.filling(tmp_path / "a") as partial:
        (partial / "file").touch()
        assert list((tmp_path / "a").iterdir()) == []
    with pytest.raises(FileExistsError, match="is not empty"), store.filling(tmp_path / "a"):
        pass
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["file"]


def test_asking_for_a_new_directory_does_not_make_it(tmp_path):
    assert store.new_directory(tmp_path / "a" / "model") == tmp_path / "a" / "model"
    assert not (tmp_path / "a" / "model").exists()


def test_two_processes_that_ask_whether_they_may_write_leave_nothing_and_do_not_meet(tmp_path):
    def work():
        for _ in range(200):
            store.writable(tmp_path)
        os._exit(0)

    pids = []
    for _ in range(2):
        if not (pid := os.fork()):
            work()
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["config.json", "model-00002-of-00002.safetensors"])
def test_a_checkpoint_is_whole_with_its_config_and_every_shard(tmp_path, missing):
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name in ("config.json", *shards):
        (tmp_path / name).write_text("x")
    store.write_json({"weight_map": {"a": shards[0], "b": shards[1]}}, tmp_path / "model.safetensors.index.json")
    assert store.is_whole(tmp_path)
    (tmp_path / missing).unlink()
    assert not store.is_whole(tmp_path) and not store.is_whole(tmp_path / "nothing")


@pytest.mark.parametrize("text", ["..", ".", "", "/etc/passwd", "../../x", "a/b", "\\0", "x" * 300, ".hidden/.."])
def test_any_text_is_the_name_of_one_entry_of_a_directory(tmp_path, text):
    path = tmp_path / store.as_name(text)
    path.mkdir()
    assert path.resolve().parent == tmp_path.resolve() and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_plain_names_stay_and_no_two_texts_share_one():
    assert store.as_name("budget_12+0.5") == "budget_12+0.5"
    texts = ["a b", "a_b", "a/b", "..", "...", ".", "", "x" * 90, "x" * 91]
    assert len({store.as_name(text) for text in texts}) == len(texts)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_while_writing_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(error), store.atomic(path) as partial:
        partial.write_text("half of the n")
        raise error
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def test_a_reader_never_sees_a_half_written_file(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with store.atomic(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_save_that_fails_half_way_leaves_the_old_value(saved, provenance, monkeypatch):
    def half(tensors, path, **kwargs):
        path.write_bytes(b"\x10")
        raise OSError("No space left on device")

    monkeypatch.setattr(store.values, "save_file", half)
    with pytest.raises(OSError, match="No space left"):
        store.save(direction(provenance, torch.zeros(2, 3)), saved)
    assert torch.equal(store.load(saved, Direction).vector, torch.ones(2, 3))
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


# --- rollouts ------------------------------------------------------------------------------------------------

tokens = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=8).map(tuple)
spans = st.none() | st.tuples(st.integers(0, 50), st.integers(0, 50)).map(lambda p: Span(min(p), max(p)))
floats = st.none() | st.lists(st.floats(-100, 100, allow_subnormal=False), min_size=1, max_size=5).map(tuple)
any_rollout = st.builds(  # built in the test: the type checker of the tests draws random numbers of its own
    dict,
    problem_id=st.text(max_size=9),
    sample=st.integers(0, 10**6),
    token_ids=tokens,
    prompt_len=st.integers(0, 100),
    think=spans,
    answer=spans,
    finish=st.sampled_from(["stop", "length"]),
    text=st.text(max_size=30),
    correct=st.booleans(),
    logprobs=floats,
    entropies=floats,
)


@every_file
@given(parts=st.lists(st.lists(any_rollout, min_size=1, max_size=4), min_size=1, max_size=4))
def test_rollouts_come_back_as_they_were_whatever_the_parts(tmp_path_factory, parts):
    out = tmp_path_factory.mktemp("rollouts")
    assert store.open_rollouts(out, {"model": "m"}) == []
    made = [[Rollout(**fields) for fields in part] for part in parts]
    for part in made:
        store.append_rollouts(part, out)
    everything = [r for part in made for r in part]
    again = store.load_rollouts(out)
    assert again == everything
    assert store.open_rollouts(out, {"model": "m"}) == everything
    assert [type(v) for v in vars(again[0]).values()] == [type(v) for v in vars(everything[0]).values()]
    assert {type(t) for r in again for t in r.token_ids} == {int}


def test_an_empty_span_comes_back_as_empty_not_as_none(tmp_path, rollout_of):
    """Thinking that is switched off, an answer without a token: closed stays closed."""
    written = [replace(rollout_of(0), answer=Span(9, 9)), replace(rollout_of(0, name="q"), think=None, answer=None)]
    again = store.load_rollouts(store.append_rollouts(written, tmp_path))
    assert again == written
    assert [r.closed for r in again] == [True, False]


def test_more_than_ten_parts_keep_their_order(tmp_path, rollout_of):
    written = [rollout_of(3, name=f"p{i}") for i in range(12)]
    for rollout in written:
        store.append_rollouts([rollout], tmp_path)
    assert store.load_rollouts(tmp_path) == written


def test_one_parquet_file_of_rollouts_is_read_too(tmp_path, rollout_of):
    path = store.append_rollouts([rollout_of(3), rollout_of(4, name="q")], tmp_path)
    assert store.load_rollouts(path) == [rollout_of(3), rollout_of(4, name="q")]


def test_resuming_with_another_header_is_an_error_that_names_the_difference(tmp_path):
    store.open_rollouts(tmp_path, {"model": "a", "sampling": {"seed": 0}})
    with pytest.raises(WrongModelError) as caught:
        store.open_rollouts(tmp_path, {"model": "a", "sampling": {"seed": 1}})
    for part in (str(tmp_path), "another sampling", "'seed': 0", "'seed': 1", "Choose another directory"):
        assert part in str(caught.value), part


def test_a_damaged_part_is_an_error_that_names_it(tmp_path, rollout_of):
    path = store.append_rollouts([rollout_of(3)], tmp_path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DamagedFileError, match=r"part-00000\.parquet is not a parquet file of rollouts"):
        store.load_rollouts(tmp_path)


def test_a_table_of_something_else_is_an_error_that_names_it(tmp_path):
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(DamagedFileError, match=r"x\.parquet is not a parquet file of rollouts"):
        store.load_rollouts(tmp_path / "x.parquet")


def test_missing_rollouts_are_an_error_that_names_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No rollouts at .*nowhere"):
        store.load_rollouts(tmp_path / "nowhere")


def test_a_directory_without_any_part_is_not_silently_no_rollouts(tmp_path):
    """A mistyped directory that exists: an empty list would fail much later, with another message."""
    with pytest.raises(FileNotFoundError, match=f"No rollouts at {tmp_path}"):
        store.load_rollouts(tmp_path)


# --- problems and tables -------------------------------------------------------------------------------------

words = st.text(min_size=1, max_size=12)
any_problem = st.builds(
    dict,
    id=words,
    messages=st.lists(st.fixed_dictionaries({"role": words, "content": st.text(max_size=20)}), min_size=1, max_size=3).map(tuple),
    answer=st.text(max_size=8),
    meta=st.dictionaries(words, st.integers() | words | st.booleans(), max_size=3),
)


@every_file
@given(problems=st.lists(any_problem, min_size=1, max_size=4))
def test_problems_come_back_as_they_were(tmp_path, problems):
    problems = [Problem(**fields) for fields in problems]
    assert store.load_problems(store.save_problems(problems, tmp_path / "p.jsonl")) == problems


def test_characters_that_python_but_not_json_takes_for_line_ends_are_content(tmp_path):
    text = "a\u2028b\x85c"
    (tmp_path / "p.jsonl").write_text(json.dumps({"question": text, "answer": "1"}, ensure_ascii=False), encoding="utf-8")
    assert store.load_problems(tmp_path / "p.jsonl")[0].messages[0]["content"] == text


def test_a_question_is_a_users_message_and_ids_default_to_line_numbers(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"question": "1+1?", "answer": 2}\n\n{"id": "x", "question": "?", "answer": "y"}\n')
    first, second = store.load_problems(tmp_path / "p.jsonl")
    assert first == Problem("1", ({"role": "user", "content": "1+1?"},), "2")
    assert second.id == "x"


@pytest.mark.parametrize(
    "line", ["{", "[1]", '"text"', '{"answer": "2"}', '{"question": "q"}', '{"messages": "hello", "answer": "2"}', "null"]
)
def test_a_line_that_is_no_problem_is_an_error_with_its_number(tmp_path, line):
    (tmp_path / "p.jsonl").write_text('{"question": "q", "answer": "a"}\n' + line + "\n")
    with pytest.raises(DamagedFileError, match=r"p\.jsonl, line 2.*Expected id, messages or question, answer"):
        store.load_problems(tmp_path / "p.jsonl")


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_an_empty_problem_file_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"p\.jsonl holds no problem: give one JSON object a line"):
        store.load_problems(tmp_path / "p.jsonl")


def test_a_missing_problem_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No problem file at .*p\.jsonl"):
        store.load_problems(tmp_path / "p.jsonl")


def test_tables_of_three_kinds_are_read_and_others_named(tmp_path):
    frame = pd.DataFrame({"question": ["a,b", "c"], "answer": ["1", "x"]})
    frame.to_parquet(tmp_path / "t.parquet")
    frame.to_csv(tmp_path / "t.csv", index=False)
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in frame.to_dict("records")))
    for suffix in ("parquet", "csv", "jsonl"):
        assert store.read_table(tmp_path / f"t.{suffix}").to_dict("records") == frame.to_dict("records"), suffix
    (tmp_path / "t.xls").write_text("")
    with pytest.raises(ValueError, match=r"t\.xls: cannot read '\.xls' files; give one of \.jsonl, \.csv, \.parquet"):
        store.read_table(tmp_path / "t.xls")
    with pytest.raises(FileNotFoundError, match=r"No file at .*none\.csv"):
        store.read_table(tmp_path / "none.csv")
