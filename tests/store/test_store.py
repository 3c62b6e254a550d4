"""Files: what is saved comes back bit by bit, and what cannot be used is a named error, never a wrong number."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from toolkit import edits, store
from toolkit.engines import adapter
from toolkit.generate import Sampling
from toolkit.store import DamagedFileError, DiskFullError, ForeignFileError, WrongModelError
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
    value = HeadScores(score.T if transposed else score, "short_thinking", "residual-stream units", provenance)
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
    value = Plan(edits, direction(provenance, random((100, 4), torch.float32, seed)), name, provenance)
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
    with pytest.raises(DamagedFileError, match=r"v\.safetensors is not a complete safetensors file"):
        store.load(saved, Direction)


def test_noise_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "x").write_bytes(b"\xff" * 400)
    with pytest.raises(DamagedFileError, match="x is not a complete safetensors file"):
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
    with pytest.raises(WrongModelError, match=r"made from tiny llama, whose weights differ .*Extract it again"):
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


# --- headers are checked before a value is made of them ------------------------------------------------------


def rewritten(path, body=lambda body: body, tensors=lambda tensors: tensors):
    """The same file with another header, or other tensors."""
    with safe_open(path, framework="pt") as file:
        header, held = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors(held), path, metadata={**header, "value": json.dumps(body(json.loads(header["value"])))})
    return path


def field(name, value):
    return lambda body: {**body, "fields": {**body["fields"], name: value}}


WRONG_HEADERS = {
    "a field missing": (lambda body: {**body, "fields": {k: v for k, v in body["fields"].items() if k != "kind"}}, "no 'kind'"),
    "a field too many": (field("colour", 1), "unknown field 'colour'"),
    "an unknown type": (lambda body: {**body, "type": "Directoin"}, "unknown type 'Directoin', expected Direction"),
    "no fields": (lambda body: {"type": "Direction"}, "no 'fields'"),
    "a list": (lambda body: [body], "expected an object with type, fields"),
    "text for a number": (field("n_pos", "4"), "n_pos is '4', expected a whole number"),
    "true for a number": (field("n_pos", True), "n_pos is True, expected a whole number"),
    "a negative count": (field("n_pos", -1), "n_pos=-1"),
    "an unknown site": (field("kind", "resid_mdi"), "resid_mdi.*expected one of resid_pre"),
    "a site of another width": (field("kind", "z"), "'z'"),
    "a number for text": (field("positions", 3), "positions is 3, expected text"),
    "no provenance": (field("provenance", None), "provenance is None"),
    "another tensor": (field("vector", {"tensor": "other"}), "vector names the tensor 'other'"),
    "no tensor": (field("vector", [1.0]), r"vector is \[1.0\]"),
}


@pytest.mark.parametrize("case", WRONG_HEADERS)
def test_a_header_that_is_not_what_its_type_says_is_an_error_that_names_file_and_field(saved, case):
    body, message = WRONG_HEADERS[case]
    with pytest.raises(DamagedFileError, match=message) as caught:
        store.load(rewritten(saved, body), Direction)
    assert str(saved) in str(caught.value) and "again, or copy it" in str(caught.value)


WRONG_TENSORS = {
    "NaN": (lambda t: {"vector": torch.full((2, 3), float("nan"))}, "vector holds NaN or infinity"),
    "another rank": (
        lambda t: {"vector": torch.ones(2, 3, 1)},
        r"vector is float32 \[2, 3, 1\], expected floats \[layers d_model\]",
    ),
    "whole numbers": (lambda t: {"vector": torch.ones(2, 3).long()}, r"vector is int64"),
    "none": (lambda t: {}, "vector names the tensor 'vector', expected 'vector', which the file must hold"),
    "one more": (lambda t: {**t, "more": torch.ones(1)}, "tensor 'more' belongs to no field"),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_tensors_that_do_not_fit_the_header_are_an_error_on_load(saved, case):
    tensors, message = WRONG_TENSORS[case]
    with pytest.raises(DamagedFileError, match=message):
        store.load(rewritten(saved, tensors=tensors), Direction)


WRONG_MOMENTS = {
    "classes": (field("labels", ["long"]), lambda t: t, "one count of at least 0 per class"),
    "class twice": (field("labels", ["long", "long"]), lambda t: t, "without duplicates"),
    "shape": (lambda body: body, lambda t: {**t, "sums.z": torch.ones(3, 2, 4)}, "there are 2 classes"),
    "layers": (lambda body: body, lambda t: {**t, "sums.z": torch.ones(2, 9, 4)}, "differ in their number of layers"),
    "outer": (lambda body: body, lambda t: {**t, "outer.z": torch.ones(2, 2, 4, 5)}, "outer.z has shape"),
}


@pytest.mark.parametrize("case", WRONG_MOMENTS)
def test_moments_whose_parts_contradict_each_other_are_an_error(tmp_path, provenance, case):
    body, tensors, message = WRONG_MOMENTS[case]
    sums, outer = {"resid_mid": torch.ones(2, 2, 3), "z": torch.ones(2, 2, 4)}, {"z": torch.ones(2, 2, 4, 4)}
    path = store.save(Moments(("long", "short"), (1, 2), "think", sums, outer, provenance), tmp_path / "m.safetensors")
    with pytest.raises(DamagedFileError, match=message):
        store.load(rewritten(path, body, tensors), Moments)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"op": "erase"}, "op is 'erase', expected one of 'project_out', 'scale'"),
        ({"strength": None}, "strength is None, expected a finite number"),
        ({"layer": -1}, "expected numbers from 0"),
        ({"head": 1.5}, "head is 1.5, expected a whole number"),
        ({"layer": 7}, r"layers 0\.\.1"),
    ],
)
def test_an_edit_that_cannot_be_is_an_error_on_load(tmp_path, provenance, edit, message):
    path = store.save(
        Plan((HeadEdit(1, 0, "project_out", 1.0),), direction(provenance), "p", provenance), tmp_path / "p.safetensors"
    )

    def change(body):
        body["fields"]["edits"][0]["fields"].update(edit)
        return body

    with pytest.raises(DamagedFileError, match=message):
        store.load(rewritten(path, change), Plan)


def test_values_in_memory_are_checked_when_they_are_made(provenance):
    with pytest.raises(ValueError, match=r"Direction\.vector is .*\(0, 3\): expected floats with 2 axes, none empty"):
        direction(provenance, torch.ones(0, 3))
    with pytest.raises((ValueError, TypeError), match=r"layers d_model|2 axes"):  # the tests' own type checker may be the first
        direction(provenance, torch.ones(3))
    with pytest.raises(ValueError, match="finite strength"):
        HeadEdit(0, 0, "scale", float("nan"))
    with pytest.raises(IndexError, match=r"layers 0\.\.1"):
        Plan((HeadEdit(2, 0, "project_out", 1.0),), direction(provenance), "p", provenance)


def test_a_note_that_could_not_be_read_again_is_refused_when_it_is_saved(tmp_path, provenance):
    value = direction(replace(provenance, notes={"span": Span(0, 1)}))
    with pytest.raises(ValueError, match="could not be loaded again"):
        store.save(value, tmp_path / "v.safetensors")
    assert not list(tmp_path.iterdir())


# --- a full disk ---------------------------------------------------------------------------------------------


def full(number=errno.ENOSPC):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return fail


WRITERS = {
    "value": lambda folder, provenance, rollout: store.save(direction(provenance), folder / "x.safetensors"),
    "table": lambda folder, provenance, rollout: store.save_table(pd.DataFrame({"a": [1]}), folder / "x.parquet"),
    "rollouts": lambda folder, provenance, rollout: store.append_rollouts([rollout], folder),
    "json": lambda folder, provenance, rollout: store.write_json({"a": 1}, folder / "x.json"),
    "problems": lambda folder, provenance, rollout: store.save_problems([Problem("p", ({"role": "user", "content": "q"},), "1")], folder / "x.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_fills_is_said_with_what_is_free_and_leaves_nothing(
    tmp_path, provenance, rollout_of, monkeypatch, writer, number
):
    monkeypatch.setattr(os, "replace", full(number))
    with pytest.raises(
        DiskFullError, match=r"Cannot write .*(the disk is full|the quota is used up).*free there.*run it again"
    ) as caught:
        WRITERS[writer](tmp_path, provenance, rollout_of(3))
    assert str(tmp_path) in str(caught.value) and len(str(caught.value)) <= 400
    assert not list(tmp_path.iterdir())


def test_a_value_that_does_not_fit_says_how_much_was_needed(tmp_path, provenance, monkeypatch):
    monkeypatch.setattr(os, "replace", full())
    with pytest.raises(DiskFullError, match=r"0\.4 MB were needed"):
        store.save(direction(provenance, torch.ones(100, 1000)), tmp_path / "v.safetensors")


LIMITED = """
import resource, sys, torch, pandas as pd
from pathlib import Path
from toolkit import store
from toolkit.types import Direction, Provenance, Rollout
folder, what = Path(sys.argv[1]), sys.argv[2]
about = Provenance("m", None, "f" * 64, "t", "0", 0)
noise = torch.randn(20, 1000)
rollout = Rollout("p", 0, tuple(range(100000, 140000)), 3, None, None, "stop", "x", True)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    if what == "value":
        store.save(Direction(noise, "resid_mid", "think", "x", 1, 1, about), folder / "v.safetensors")
    elif what == "table":
        store.save_table(pd.DataFrame({"a": noise.flatten().tolist()}), folder / "t.parquet")
    elif what == "rollouts":
        store.append_rollouts([rollout], folder)
    elif what == "log":
        for _ in range(2):
            store.append_line({"a": list(range(3000))}, folder / "log.jsonl")
    else:
        with store.atomic_directory(folder / "model") as partial:
            store.write_json([1], partial / "config.json")
            torch.save(noise, partial / "weights.pt")
except store.DiskFullError as error:
    print(error)
"""


@pytest.mark.parametrize("what", ["value", "table", "rollouts", "checkpoint", "log"])
def test_a_write_that_the_system_refuses_leaves_nothing_half_written(tmp_path, what):
    """A limit on the size of files, as the system has it: each library that writes reports it in its own way."""
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path), what], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Cannot write" in done.stdout, done.stdout
    why = "refused a write" if what == "checkpoint" else "the file may not grow so large"  # torch.save does not say why
    assert why in done.stdout, done.stdout
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    if what == "log":
        assert [len(store.read_rows(path)) for path in left] == [1]
        assert left[0].read_text().endswith("\n")
    else:
        assert not left


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
        with store.atomic_directory(tmp_path / "model") as partial:
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


def test_a_kill_while_a_directory_is_removed_leaves_no_half_of_it_and_its_litter_goes_with_the_next_removal(tmp_path, monkeypatch):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "weights").touch()

    def work():
        monkeypatch.setattr(
            store.files.shutil,
            "rmtree",
            lambda path, ignore_errors=False: os.kill(os.getpid(), signal.SIGKILL) if path.exists() else None,
        )
        store.remove(tmp_path / "checkpoint")

    killed(work)
    assert [p.name.endswith(".partial") for p in tmp_path.iterdir()] == [True]
    store.remove(tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []


def test_what_a_living_process_or_another_machine_is_writing_is_left_alone(tmp_path):
    own = store.files.HOST
    names = {f".x.h{own}.{os.getpid()}.partial", f".x.h{'0' * 8}.999999999.partial", ".download.999999999.partial"}
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / f".a.b.h{own}.999999999.partial").mkdir()  # of a dead one
    store.write_text("", tmp_path / "y")
    assert {p.name for p in tmp_path.iterdir()} == {"y", *names}


def test_what_a_dead_process_with_this_ones_id_left_is_replaced(tmp_path):
    """In a container that is started again, every process may have the id of the one that was killed."""
    left = tmp_path / f".model.h{store.files.HOST}.{os.getpid()}.partial"
    left.mkdir()
    (left / "half").touch()
    with store.atomic_directory(tmp_path / "model") as partial:
        (partial / "whole").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "whole"]


def test_an_empty_directory_is_filled_and_a_full_one_is_not_touched(tmp_path):
    (tmp_path / "a").mkdir()
    for _ in range(2):
        with pytest.raises(RuntimeError), store.atomic_directory(tmp_path / "a"):
            raise RuntimeError
        assert list((tmp_path / "a").iterdir()) == []
    with store.atomic_directory(tmp_path / "a") as partial:
        (partial / "file").touch()
        assert list((tmp_path / "a").iterdir()) == []
    with pytest.raises(FileExistsError, match="is not empty"), store.atomic_directory(tmp_path / "a"):
        pass
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["file"]


@pytest.mark.parametrize("begun", ["absent", "empty"])
@pytest.mark.parametrize("other", ["directory", "file"])
def test_a_directory_that_another_process_writes_first_is_left_and_named_as_existing(begun, other, tmp_path):
    target = tmp_path / "model"
    if begun == "empty":
        target.mkdir()
    with pytest.raises(FileExistsError, match=r"model.*another process"), store.atomic_directory(target) as partial:
        (partial / "mine").touch()
        if begun == "empty" and other == "file":
            target.rmdir()
        if other == "file":
            target.write_text("theirs")
        else:
            target.mkdir(exist_ok=True)
            (target / "theirs").touch()
    assert (
        sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["model", "model/theirs"][: 1 + (other == "directory")]
    )


def test_an_adapter_that_another_process_saves_first_is_used(tiny, tmp_path, monkeypatch):
    edited = edits.apply(tiny, Plan((HeadEdit(2, 1, "scale", 1.0),), None, "head off", tiny.provenance()))
    write, folder = adapter._write, tmp_path / "adapter"

    def slow(directory, *args):
        with store.atomic_directory(directory) as partial:
            (partial / "half").touch()
            write(tmp_path / "theirs", *args)
            (tmp_path / "theirs").rename(directory)

    monkeypatch.setattr(adapter, "_write", slow)
    assert adapter.save_difference(tiny, edited, folder) == folder and store.is_whole(folder)


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
    store.write_json({"weight_map": {}}, tmp_path / "model.safetensors.index.json")
    assert not store.is_whole(tmp_path)


@pytest.mark.parametrize("text", ["..", ".", "", "/etc/passwd", "../../x", "a/b", "\\0", "x" * 300, ".hidden/.."])
def test_any_text_is_the_name_of_one_entry_of_a_directory(tmp_path, text):
    path = tmp_path / store.safe_name(text)
    path.mkdir()
    assert path.resolve().parent == tmp_path.resolve() and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_plain_names_stay_and_no_two_texts_share_one():
    assert store.safe_name("budget_12+0.5") == "budget_12+0.5"
    texts = ["a b", "a_b", "a/b", "..", "...", ".", "", "x" * 90, "x" * 91]
    assert len({store.safe_name(text) for text in texts}) == len(texts)


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

HEADER = {"fingerprint": "f", "interventions": [], "eos_ids": [2], "template": "t", "tags": None, "problems": "p",
          "sampling": Sampling().identity}  # fmt: skip


@st.composite
def any_rollout(draw) -> dict:  # built in the test: the type checker of the tests draws random numbers of its own
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=8).map(tuple))
    ends = sorted(draw(st.lists(st.integers(0, len(ids)), min_size=4, max_size=4)))
    prompt = draw(st.integers(1, len(ids)))
    rest = len(ids) - prompt
    floats = st.none() | st.lists(st.floats(0, 100, allow_subnormal=False), min_size=rest, max_size=rest).map(tuple)
    return {
        "problem_id": draw(st.text(max_size=9)),
        "sample": draw(st.integers(0, 10**6)),
        "token_ids": ids,
        "prompt_len": prompt,
        "think": draw(st.sampled_from([None, Span(ends[0], ends[1])])),
        "answer": draw(st.sampled_from([None, Span(ends[2], ends[3])])),
        "finish": draw(st.sampled_from(["stop", "length"])),
        "text": draw(st.text(max_size=30)),
        "correct": draw(st.booleans()),
        "logprobs": draw(floats.map(lambda values: values and tuple(-v for v in values))),
        "entropies": draw(floats),
    }


@every_file
@given(parts=st.lists(st.lists(any_rollout(), min_size=1, max_size=4), min_size=1, max_size=4))
def test_rollouts_come_back_as_they_were_whatever_the_parts(tmp_path_factory, parts):
    out = tmp_path_factory.mktemp("rollouts")
    assert store.open_rollouts(out, HEADER) == []
    made = [[Rollout(**fields | {"sample": 10 * i + j}) for j, fields in enumerate(part)] for i, part in enumerate(parts)]
    for part in made:
        store.append_rollouts(part, out)
    everything = [r for part in made for r in part]
    again = store.load_rollouts(out)
    assert again == everything
    assert store.open_rollouts(out, HEADER) == everything
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
    store.open_rollouts(tmp_path, HEADER)
    with pytest.raises(WrongModelError) as caught:
        store.open_rollouts(tmp_path, HEADER | {"sampling": Sampling(seed=1).identity})
    for part in (str(tmp_path), "sampling seed 0 there, 1 here", "Choose another directory"):
        assert part in str(caught.value), part


def test_a_damaged_part_is_an_error_that_names_it(tmp_path, rollout_of):
    path = store.append_rollouts([rollout_of(3)], tmp_path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DamagedFileError, match=r"part-00000-\w+\.parquet is not a parquet file of rollouts"):
        store.load_rollouts(tmp_path)


BAD = {
    "a negative token": ({"token_ids": [3, -1, 4]}, "token_ids holds -1, expected 0.."),
    "a token past the vocabulary": ({"token_ids": [3, 103, 4]}, r"token_ids holds 103, expected 0\.\.102"),
    "tokens that are no whole numbers": ({"token_ids": [1.5, 2.0, 3.0]}, "token_ids is .*1.5.*, expected whole numbers"),
    "a token instead of tokens": ({"token_ids": 3}, "token_ids is 3, expected whole numbers"),
    "no token": ({"token_ids": []}, r"token_ids is \[\], expected whole numbers"),
    "a prompt longer than all": ({"prompt_len": 4}, r"prompt_len is 4, expected 1\.\.3"),
    "no prompt": ({"prompt_len": 0}, r"prompt_len is 0, expected 1\.\.3"),
    "one log-probability": ({"logprobs": 0.5}, r"logprobs is 0\.5, expected a list of numbers"),
    "a span past the end": ({"answer_stop": 9}, r"answer is 2\.\.9, expected a span within 2\.\.3"),
    "an answer before its thinking": ({"answer_start": 1}, r"answer is 1\.\.3, expected a span within 2\.\.3"),
    "a span that ends before it starts": ({"think_start": 3}, r"think is 3\.\.2, expected a span"),
    "a third way to finish": ({"finish": "crash"}, "finish is 'crash', expected 'stop' or 'length'"),
    "too few entropies": ({"entropies": [1.0]}, "entropies has 1 numbers, expected 2, one per token"),
    "an entropy that is none": ({"entropies": [1.0, float("nan")]}, "entropies holds a value that is not a finite number"),
    "an infinite log-probability": ({"logprobs": [0.0, -float("inf")]}, "logprobs holds a value that is not a finite number"),
    "a sample that is text": ({"sample": "one"}, "sample is 'one', expected int"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_row_that_cannot_be_a_rollout_is_an_error_with_file_row_and_what_was_expected(what, tmp_path):
    change, message = BAD[what]
    row = Rollout("p", 0, (1, 2, 3), 1, Span(1, 2), Span(2, 3), "stop", "", True, (-1.0, 0.0), (0.5, 0.5))
    rows = store.rollout_table([row]).to_dict("records")
    pd.DataFrame([rows[0] | change]).to_parquet(tmp_path / "part-00000.parquet")
    with pytest.raises(DamagedFileError, match=r"part-00000\.parquet, row 0: " + message) as caught:
        store.load_rollouts(tmp_path, vocab=103)
    assert len(str(caught.value).removeprefix(str(tmp_path))) < 400


def test_a_sample_that_is_there_twice_is_an_error_that_names_both_rows(tmp_path, rollout_of):
    store.append_rollouts([rollout_of(3, name="q"), rollout_of(3)], tmp_path)
    store.append_rollouts([rollout_of(4)], tmp_path)
    with pytest.raises(
        DamagedFileError, match=r"part-00001-\w+\.parquet, row 0: sample 0 of problem 'p' .*part-00000-\w+\.parquet, row 1"
    ):
        store.load_rollouts(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([1], r"the file is \[1\], expected an object with fingerprint"),
        (HEADER | {"fingerprint": 3}, "fingerprint is 3, expected text"),
        (HEADER | {"sampling": None}, "sampling is None, expected an object"),
        (HEADER | {"sampling": HEADER["sampling"] | {"n": "8"}}, r"sampling\.n is '8', expected a whole number"),
        (
            HEADER | {"sampling": HEADER["sampling"] | {"temperature": "x"}},
            r"sampling\.temperature is 'x', expected a finite number",
        ),
        (HEADER | {"eos_ids": [1, "2"]}, r"eos_ids\[1\] is '2', expected a whole number"),
        (HEADER | {"interventions": "none"}, "interventions is 'none', expected a list"),
        (HEADER | {"rollouts": True}, "rollouts is True, expected a whole number"),
        ({"fingerprint": "f"}, "the file has no 'interventions', expected an object with"),
    ],
)
def test_a_header_of_another_shape_is_an_error_that_names_the_field(tmp_path, header, message):
    store.write_json(header, tmp_path / "header.json")
    with pytest.raises(DamagedFileError, match=rf"header\.json: {message}"):
        store.open_rollouts(tmp_path, HEADER)


def test_parts_without_a_header_are_an_error_and_not_an_empty_directory(tmp_path, rollout_of):
    store.append_rollouts([rollout_of(3)], tmp_path)
    with pytest.raises(DamagedFileError, match=r"holds 1 part-\*\.parquet but no header\.json"):
        store.open_rollouts(tmp_path, HEADER)
    assert not (tmp_path / "header.json").exists()


def test_a_flipped_bit_in_the_tokens_of_a_part_is_found(tmp_path, rollout_of):
    part = store.append_rollouts([rollout_of(3)], tmp_path)
    assert store.count_rollouts(tmp_path) == 1
    whole, found = part.read_bytes(), 0
    for place in range(4, len(whole) - 8 - int.from_bytes(whole[-8:-4], "little"), 5):  # the pages, which stand before the footer
        (tmp_path / "flipped.parquet").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert store.load_rollouts(tmp_path / "flipped.parquet") == [rollout_of(3)], place
        except DamagedFileError:
            found += 1
    assert found


def test_the_name_of_a_model_does_not_decide_whether_a_run_goes_on_and_its_weights_do(tmp_path):
    old = HEADER | {"model": "a"}
    store.open_rollouts(tmp_path, old)
    assert store.open_rollouts(tmp_path, old | {"model": "runs/b", "task": "arithmetic"}) == []
    assert store.load_header(tmp_path) == old | {"task": "arithmetic"}
    with pytest.raises(WrongModelError, match="other weights of a"):
        store.open_rollouts(tmp_path, old | {"fingerprint": "g"})


def test_parts_written_at_once_never_overwrite_one_another(tmp_path, rollout_of, monkeypatch):
    from pathlib import Path

    first = store.append_rollouts([rollout_of(3)], tmp_path)
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: (f for f in glob(self, pattern) if f != first))  # not seen in time
    second = store.append_rollouts([rollout_of(3, name="q")], tmp_path)
    monkeypatch.undo()
    assert first != second and len(store.load_rollouts(tmp_path)) == 2


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

words = st.text(min_size=1, max_size=12).filter(str.strip)
any_problem = st.builds(
    dict,
    id=words,
    messages=st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": words}), min_size=1, max_size=3).map(tuple),
    answer=words,
    meta=st.dictionaries(words, st.integers() | words | st.booleans(), max_size=3),
)


@every_file
@given(problems=st.lists(any_problem, min_size=1, max_size=4, unique_by=lambda fields: fields["id"]))
def test_problems_come_back_as_they_were(tmp_path, problems):
    problems = [Problem(**fields) for fields in problems]
    assert store.load_problems(store.save_problems(problems, tmp_path / "p.jsonl")) == problems


def test_characters_that_python_but_not_json_takes_for_line_ends_are_content(tmp_path):
    text = "a\u2028b\x85c"
    (tmp_path / "p.jsonl").write_text(json.dumps({"question": text, "answer": "1"}, ensure_ascii=False), encoding="utf-8")
    assert store.load_problems(tmp_path / "p.jsonl")[0].messages[0]["content"] == text


def test_a_question_is_a_users_message_and_a_missing_id_is_made_of_it_and_not_of_its_line(tmp_path):
    lines = ['{"question": "1+1?", "answer": 2}', '{"id": "x", "question": "?", "answer": "y"}']
    (tmp_path / "p.jsonl").write_text("\n\n".join(lines))
    first, second = store.load_problems(tmp_path / "p.jsonl")
    assert first == Problem(first.id, ({"role": "user", "content": "1+1?"},), "2")
    assert second.id == "x"
    (tmp_path / "p.jsonl").write_text("\n".join(lines[::-1]))
    assert store.load_problems(tmp_path / "p.jsonl") == [second, first]


@pytest.mark.parametrize(
    "line", ["{", "[1]", '"text"', '{"answer": "2"}', '{"question": "q"}', '{"messages": "hello", "answer": "2"}', "null"]
)
def test_a_line_that_is_no_problem_is_an_error_with_its_number(tmp_path, line):
    (tmp_path / "p.jsonl").write_text('{"question": "q", "answer": "a"}\n' + line + "\n")
    with pytest.raises(DamagedFileError, match=r"p\.jsonl, line 2.*Expected id, messages or question, answer"):
        store.load_problems(tmp_path / "p.jsonl")


WRONG_PROBLEMS = {
    "null answer": ({"answer": None}, "answer is None, expected text or a whole number or a finite number"),
    "true answer": ({"answer": True}, "answer is True"),
    "list answer": ({"answer": ["1"]}, r"answer is \['1'\]"),
    "empty answer": ({"answer": " "}, "answer is empty"),
    "null id": ({"id": None}, "id is None"),
    "empty id": ({"id": ""}, "id is empty"),
    "number for a question": ({"question": 3}, "question is 3, expected text"),
    "empty question": ({"question": ""}, "question is empty"),
    "no message": ({"messages": []}, "messages is empty"),
    "null messages": ({"messages": None}, "messages is None, expected a list"),
    "messages of text": ({"messages": ["hi"]}, r"messages\[0\] is 'hi', expected an object with role, content"),
    "unknown role": (
        {"messages": [{"role": "usr", "content": "hi"}]},
        r"messages\[0\]\.role is 'usr', expected one of system, developer, user",
    ),
    "no content": ({"messages": [{"role": "user"}]}, r"messages\[0\] has no 'content'"),
    "content of parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        r"messages\[0\]\.content is .*expected text",
    ),
    "a list for meta": ({"meta": [1]}, r"meta is \[1\], expected an object"),
    "a fact beside meta": (
        {"split": "test"},
        "the line has the unknown field 'split': put facts about a problem into meta",
    ),
    "two questions": (
        {"question": "p", "messages": [{"role": "user", "content": "q"}]},
        "the line has the unknown field 'question'",
    ),
    "the id of another": ({"id": "first"}, "the id 'first' is also that of line 1"),
}


@pytest.mark.parametrize("case", WRONG_PROBLEMS)
def test_a_problem_that_is_not_one_is_an_error_with_line_found_and_expected(tmp_path, case):
    change, message = WRONG_PROBLEMS[case]
    asked = {} if "messages" in change else {"question": "p"}
    rows = [{"id": "first", "question": "q", "answer": "1"}, {"id": "second", **asked, "answer": "1", **change}]
    path = store.write_text("\n".join(json.dumps(row) for row in rows), tmp_path / "p.jsonl")
    with pytest.raises(DamagedFileError, match=rf"p\.jsonl, line 2: {message}") as caught:
        store.load_problems(path)
    assert len(str(caught.value)) <= 400 and "Expected id, messages or question, answer" in str(caught.value)


def test_numbers_are_answers_and_ids_as_they_are_written(tmp_path):
    answers = ["42", "0.5", "0.00001", "1e16", "2.50", "-1E-7", "1e-99999999"]
    lines = [f'{{"id": {k}.50, "question": "q", "answer": {answer}}}' for k, answer in enumerate(answers)]
    store.write_text("\n".join(lines), tmp_path / "p.jsonl")
    found = store.load_problems(tmp_path / "p.jsonl")
    assert [p.answer for p in found] == [*answers[:3], "1" + "0" * 16, "2.50", "-0.0000001", "1e-99999999"]
    assert [p.id for p in found][:2] == ["0.50", "1.50"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q", "answer": NaN}', "it holds NaN, which is not a JSON number"),
        ('{"question": "q", "answer": 1e999}', "answer is inf"),
        ('{"question": "q", "answer": "1", "answer": "2"}', "it has the field 'answer' twice"),
        ('{"question": "\\ud800", "answer": "1"}', "half of a surrogate pair"),
        ("[" * 100_000, "nested too deep"),
        (json.dumps({"question": "q" * 10**6, "answer": None}), "answer is None"),
    ],
    ids=["NaN", "infinite", "twice", "surrogate", "nested", "huge"],
)
def test_json_that_says_two_things_or_nothing_is_an_error_with_its_line(tmp_path, line, message):
    store.write_text('{"question": "p", "answer": "1"}\n' + line, tmp_path / "p.jsonl")
    with pytest.raises(DamagedFileError, match=f"line 2: .*{message}") as caught:
        store.load_problems(tmp_path / "p.jsonl")
    assert len(str(caught.value)) <= 400


def test_a_byte_order_mark_changes_nothing_and_other_encodings_are_named(tmp_path):
    text = '{"id": "a", "question": "caf\u00e9", "answer": "1"}\r\n'
    path = tmp_path / "p.jsonl"
    path.write_bytes(text.encode("utf-8-sig"))
    assert store.load_problems(path)[0].messages[0]["content"] == "caf\u00e9"
    named = {"utf-16": "is UTF-16", "utf-32": "is UTF-32", "latin-1": "line 1: byte 0xe9 is not UTF-8", "utf-16-le": "NUL byte"}
    for encoding, message in named.items():
        path.write_bytes(text.encode(encoding))
        with pytest.raises(DamagedFileError, match=f"p.jsonl.*{message}.*Expected UTF-8"):
            store.load_problems(path)


def test_problems_that_could_not_be_read_again_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"'p' is not saved.*answer is empty"):
        store.save_problems([Problem("p", ({"role": "user", "content": "q"},), "")], tmp_path / "p.jsonl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_an_empty_problem_file_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"p\.jsonl holds no problem: write one JSON object per line"):
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
    with pytest.raises(ValueError, match=r"t\.xls: cannot read '\.xls' files. Give a file that ends in \.jsonl, \.csv, \.parquet"):
        store.read_table(tmp_path / "t.xls")
    with pytest.raises(FileNotFoundError, match=r"No file at .*none\.csv"):
        store.read_table(tmp_path / "none.csv")


WRONG_TABLES = {
    "a missing value": ("x,n\na,1\nb,\n", "column 'n', row 2, is nan, expected a finite number"),
    "an infinite one": ("x,n\na,1\nb,inf\n", "column 'n', row 2, is inf"),
    "text": ("x,n\na,1\nb,two\n", "column 'n', row 1, is '1'"),
    "a missing column": ("x,m\na,1\n", "has no column n: it has x, m"),
    "a column twice": ("x,n,n\na,1,2\n", "expected a name for every column, each once"),
    "a field too many": ("x,n\na,1,3\n", "line 2 has 3 fields, the header has 2"),
    "a field too few": ("x,n\na\n", "line 2 has 1 fields"),
    "an open quote": ('x,n\n"a,1\n', "is not CSV"),
}


@pytest.mark.parametrize("case", WRONG_TABLES)
def test_a_table_that_is_not_what_is_expected_is_an_error_that_names_column_and_row(tmp_path, case):
    content, message = WRONG_TABLES[case]
    path = store.write_text(content, tmp_path / "t.csv")
    with pytest.raises(DamagedFileError, match=rf"t\.csv.*{message}"):
        store.read_table(path, {"x": str, "n": float})


def test_text_in_a_table_stays_as_it_is_written(tmp_path):
    path = store.write_text("answer,level\n007,1\nNA,2\nNone,3\n", tmp_path / "t.csv")
    assert store.read_table(path, {"answer": str, "level": int})["answer"].tolist() == ["007", "NA", "None"]
    store.write_text('{"date": "2024-01-02"}\n', tmp_path / "t.jsonl")
    assert store.read_table(tmp_path / "t.jsonl")["date"].tolist() == ["2024-01-02"]


def test_a_flipped_bit_in_a_saved_table_is_found(tmp_path):
    path = store.save_table(pd.DataFrame({"x": [0.125 * i for i in range(500)]}), tmp_path / "t.parquet")
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"t\.parquet: it is not a complete parquet file"):
        store.read_table(path)


def test_a_log_keeps_its_last_line_without_an_end_and_drops_only_a_torn_one(tmp_path):
    path = store.write_text('{"a": 1}\n{"a": 2}', tmp_path / "log.jsonl")
    assert store.read_rows(path) == [{"a": 1}, {"a": 2}]
    store.write_text('{"a": 1}\n{"a": ', path)
    assert store.read_rows(path) == [{"a": 1}]
    for whole in ('{"a": 1}\n{"a": \n', '{"a": 1}\n[2', '{"a": 1}\n[2]\n'):
        store.write_text(whole, path)
        with pytest.raises(DamagedFileError, match=r"log\.jsonl, line 2"):
            store.read_rows(path)
