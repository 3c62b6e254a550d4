"""Kill every command at file operations and at random times, give it again, and look at what is there.

``python tests/torture.py --kills 1000 --report torture.json`` (``make torture``); ``--only rollouts,grpo`` picks commands. A trial kills
one command up to six times, each at the n-th file operation inside its working directory or after a random time, then lets the same
command finish, and compares what it wrote with a run that was never killed. Four things must not happen:

* stuck: the command does not finish, or ends in an error, when it is given again;
* lost: what was kept is made again: a response, a step of training, a policy, a point of a board;
* different: a file holds something else than without the kill (timings and identifiers of figures left out);
* litter: a temporary file or directory of a dead process stays behind.

Processes are forked from one that has imported everything, so that a kill costs about a second. Linux and macOS only.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1", TOOLKIT_FAST="1")

FILE_EVENTS = frozenset(
    [
        "open",
        "os.rename",
        "os.remove",
        "os.mkdir",
        "os.rmdir",
        "os.link",
        "os.symlink",
        "os.truncate",
        "shutil.rmtree",
        "shutil.move",
        "shutil.copyfile",
    ]
)
TIMINGS = re.compile(r"(^|[_/])(time|seconds?|runtime|created|started|date)($|[_/])|/s$")  # names of what is measured with a clock
TEMPORARY = (".partial", ".tmp", ".writable")
LOCK = ".lock"
CLOCK = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[.\d]*")
KILLS_A_TRIAL = 6
ASIDE = "kept.log"  # what was kept, by the processes that kept it; beside the working directory, not in it
WHOLE = ("about.json", "toolkit.json")  # written last into a point of a board and into a checkpoint: both are then kept


@dataclass(frozen=True)
class Command:
    """A command to kill.

    Attributes:
        args: Command line, with the working directory as ``cwd``.
        weight: How often it is chosen.
        timeout: Seconds after which it is stuck; at least ten times as long as it took without a kill.
        skipped: Parts of paths whose files must be there and are not read: pictures of numbers that are compared elsewhere.
        finished: What the command says, as an error, when it is given again after it had finished; "" if it then just ends.
    """

    args: tuple[str, ...]
    weight: float = 1.0
    timeout: float = 120.0
    skipped: tuple[str, ...] = (".html",)
    finished: str = ""

    def ended(self, status: int, log: Path) -> bool:
        """Whether a process that was not killed did what it should."""
        return status == 0 or (status == 1 and bool(self.finished) and self.finished in log.read_text(errors="replace"))


SMALL = ("-n", "8", "-k", "2", "--batch-size", "4", "--max-new-tokens", "60")
GRPO = (
    "grpo", "--steps", "3", "--set", "problems=4", "--set", "samples=4", "--set", "max_tokens=60", "-n", "16", "--save-every", "1",
    "--evaluate-every", "2", "--resume", "-o", "out",
)  # fmt: skip
RATE = ("--set", "learning_rate=0.01")
TRAINED = "this run is finished"
THERE = "already exists"
BOARD = ("board", "--conditions", "../inputs/conditions.py", "-o", "out")
EDIT = ("--plan", "../inputs/edited/plan.safetensors")
EXPORTED = {
    ("-v", "../inputs/post.safetensors", "--layers", "1-3"): (
        "vllm-lens",
        "hotwire",
        "easysteer",
        "nnsight-serve",
        "lm-eval-steered",
    ),
    EDIT: ("adapter", "merged", "plan"),
    (*EDIT, "--base", "qwen3"): ("ollama",),
    ("-n", "8"): ("inspect", "lm-eval"),
}
"""Input of ``toolkit export`` -> the formats that are a directory."""
COMMANDS = {
    "rollouts": Command(("rollouts", *SMALL, "-o", "out"), 4),
    "direction": Command(("direction", "-r", "../inputs/rollouts", "--share", "0.3", "-o", "out/v.safetensors"), 2, finished=THERE),
    "thinkedit": Command(
        ("thinkedit", "-m", "tiny-reasoner", *SMALL, "-k", "4", "--share", "0.4", "-o", "out/edited", "--adapter", "out/adapter"), 4
    ),
    "thinkedit --rollouts": Command(
        ("thinkedit", "-m", "tiny-reasoner", "--rollouts", "../inputs/rollouts", *SMALL, "-o", "out/edited"), 1
    ),
    "compare": Command(("compare", "base=tiny-reasoner", "edited=../inputs/edited", *SMALL, "-o", "out"), 3),
    "dose": Command(("dose", "-v", "../inputs/v.safetensors", "-a", "-1,1", *SMALL, "-o", "out"), 2),
    "steer": Command(
        ("steer", "-v", "../inputs/v.safetensors", "-a", "-1,1", "-p", "12+3=?", "-p", "7+8-3=?", "--max-new-tokens", "60", "-o", "out"), 1
    ),
    "steer without --alpha": Command(
        ("steer", "-v", "../inputs/v.safetensors", "-p", "12+3=?", "-k", "2", "--max-new-tokens", "60", "-o", "out"), 0.5
    ),
    "import": Command(("import", "../inputs/v.gguf", "--from", "gguf", "-o", "out/v.safetensors"), 0.5, finished=THERE),
    "entropy": Command(("entropy", *SMALL, "-o", "out"), 2),
    "claims": Command(
        ("claims", *SMALL, "-k", "3", "--train-problems", "24", "--claims", "length,entropy,edit", "--fraction", "0.1", "-o", "out"), 1
    ),
    "replicate": Command(("replicate", "../inputs/plan.toml", "-o", "out"), 1),
    "heads": Command(("heads", *SMALL, "-n", "16", "-k", "4", "-o", "out"), 0.2, timeout=600),
    "retrieval-heads": Command(
        ("retrieval-heads", "-n", "4", "--counts", "1", "--ops", "", "--draws", "1", "--max-new-tokens", "40", "-o", "out"), 1
    ),
    "why": Command(("why", "tiny-reasoner", "../inputs/edited", *SMALL, "-n", "30", "-k", "4", "--draws", "1", "-o", "out"), 0.2, timeout=600),
    "dto": Command(("dto", *SMALL, "--segments", "lines", "--probes", "2", "--completions", "2", "--steps", "1", "-o", "out"), 1),
    "giraffe": Command(
        ("giraffe", "-t", "lookup", "--lengths", "60,90", "-n", "2", "--max-new-tokens", "20", "-o", "out"), 1
    ),
    "export": Command(("export", "-v", "../inputs/post.safetensors", "--to", "gguf", "--drop-layer-0", "-o", "out/v.gguf"), 1, finished=THERE),
    "export --to gguf-lora": Command(("export", *EDIT, "--to", "gguf-lora", "-o", "out/edit.gguf"), 0.5, finished=THERE),
    "export --to safetensors": Command(
        ("export", "-v", "../inputs/post.safetensors", "--to", "safetensors", "-o", "out/v.safetensors"), 0.5, finished=THERE
    ),
    "export --to folder": Command(
        ("export", "-v", "../inputs/post.safetensors", "--to", "folder", "--drop-layer-0", "-o", "out/v"), 0.5, finished="is not empty"
    ),
    **{
        f"export --to {name}": Command(("export", *source, "--to", name, "-o", "out/x"), 0.3, finished="is not empty")
        for source, names in EXPORTED.items()
        for name in names
    },
    "grpo": Command(GRPO, 3, finished=TRAINED),
    "grpo --train adapter": Command((*GRPO, "--train", "adapter", "--rank", "4", "--dtype", "bfloat16"), 1, finished=TRAINED),
    "grpo --train vector": Command((*GRPO, "--train", "vector", *RATE), 1, finished=TRAINED),
    "grpo --train heads": Command((*GRPO, "--train", "heads", *EDIT, *RATE), 0.5, finished=TRAINED),
    "grpo --train head-scales": Command((*GRPO, "--train", "head-scales", *EDIT, *RATE), 0.5, finished=TRAINED),
    "board": Command(BOARD, 3),
    "board --jobs": Command((*BOARD, "--jobs", "2"), 0.5),
    "demo": Command(("demo", "-n", "16", "-k", "4", "-o", "out"), 1),
}  # fmt: skip
CONDITIONS = """
from toolkit.baselines import Budget
from toolkit.board import Sizes, base, edited, with_rule, trained
from toolkit.grpo.plan import TrainingPlan
from toolkit.grpo import recipes

CONDITIONS = [base(), with_rule("budget", Budget(12, before="\\n")), edited("adapter", adapter=True), trained("policy", recipes.plain("correctness"))]
SIZES = Sizes(
    main=(("arithmetic", 6),), unseen=(("running_sum", 2),), samples=2, max_new_tokens=60, unseen_tokens=40, seeds=1, extraction=(24, 4),
    haystacks=4, texts=6, training=TrainingPlan(steps=1, pool=16, held_out=4, evaluate_every=1, changes=(("problems", 2), ("samples", 4))),
)
"""


@dataclass(frozen=True)
class Kill:
    """When a process dies: before its n-th file operation in the working directory, or after some seconds."""

    operation: int | None = None
    seconds: float | None = None


@dataclass
class Tally:
    """What was seen."""

    kills: Counter[str] = field(default_factory=Counter)
    trials: Counter[str] = field(default_factory=Counter)
    faults: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        kinds = Counter(fault["kind"] for fault in self.faults)
        return {
            "kills": sum(self.kills.values()),
            "trials": sum(self.trials.values()),
            **{kind: kinds[kind] for kind in ("stuck", "lost", "different", "litter")},
            "kills_by_command": dict(self.kills),
            "faults": self.faults,
        }


# --- processes ---------------------------------------------------------------------------------------------------


def forked(work: Callable[[], int], log: Path, *, kill_after: float | None = None, timeout: float = 120.0) -> tuple[int, float]:
    """Run ``work`` in a forked process group; its exit status (negative: the signal that ended it) and the seconds it took.

    A process that outlives ``timeout`` is killed and reported as status 1000.
    """
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setsid()
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        code = 1
        try:
            code = work()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:  # noqa: BLE001  # whatever ends a child is in its log
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - began
        if done:
            return os.waitstatus_to_exitcode(status), seconds
        if kill_after is not None and seconds >= kill_after:
            os.kill(child, signal.SIGKILL)
            kill_after = None
        if seconds > timeout:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return 1000, seconds
        time.sleep(0.005)


def watch_operations(folder: str, act: Callable[[int], None]) -> None:
    """Call ``act(n)`` in this process before its n-th file operation inside ``folder``."""
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in FILE_EVENTS or not isinstance(args[0], str | bytes | os.PathLike):
            return
        if event == "open" and isinstance(args[2], int) and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return  # reading
        if os.path.abspath(os.fsdecode(args[0])).startswith(folder):
            seen += 1
            act(seen)

    sys.addaudithook(hook)


def die() -> None:
    """End this process as ``kill -9`` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def note_what_is_kept(aside: Path) -> None:
    """Make this process write down in ``aside`` what it keeps, once it is kept: responses, checkpoints, policies, points of a board."""
    from toolkit import store

    def note(*lines: str) -> None:
        with open(aside, "a") as stream:
            stream.write("".join(f"{line}\n" for line in lines))

    append, write = store.append_rollouts, store.write_json

    def append_rollouts(rollouts: Sequence[Any], directory: str | Path) -> Path:
        path = append(rollouts, directory)
        note(*(f"{os.path.abspath(directory)}\t{r.problem_id}\t{r.sample}" for r in rollouts))
        return path

    def write_json(value: Any, path: str | Path) -> Path:
        written = write(value, path)
        if Path(path).name in WHOLE:
            note(os.path.abspath(path))
        return written

    store.append_rollouts, store.write_json = append_rollouts, write_json
    if "toolkit.grpo.saved" in sys.modules:
        saved = sys.modules["toolkit.grpo.saved"]
        keep = saved.save_policy

        def kept(trainer: Any, recorder: Any, out: Path, *args: Any) -> Any:
            policy = keep(trainer, recorder, out, *args)
            note(f"{os.path.abspath(out)}\tpolicy")
            return policy

        saved.save_policy = kept


def command(args: Sequence[str], folder: Path, kill: Kill = Kill()) -> Callable[[], int]:
    """Work for :func:`forked`: one command line in ``folder``, dying as ``kill`` says."""

    def work() -> int:
        from toolkit import cli

        os.chdir(folder)
        note_what_is_kept(folder.parent / ASIDE)
        if kill.operation is not None:
            watch_operations(str(folder), lambda n: die() if n == kill.operation else None)
        sys.argv = ["toolkit", *args]
        cli.main()
        return 0

    return work


# --- what is compared --------------------------------------------------------------------------------------------


def contents(folder: Path, skipped: Sequence[str]) -> dict[str, str]:
    """Digest of what each file means, by path: timings left out, rollouts in order of problem and sample, tensors without their padding."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if not name.endswith((LOCK, *TEMPORARY)):
            name = re.sub(r"part-.*\.parquet$", "parts", name)
            found[name] = found.get(name, "") + ("skipped" if any(part in name for part in skipped) else digest(path))
    return {name: "".join(sorted(value.split())) for name, value in found.items()}


def digest(path: Path) -> str:
    """Digests of a file's rows (parquet, JSON lines) or of all of it, with a blank after each."""
    import pandas as pd
    from safetensors import safe_open

    def short(value: Any) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16] + " "

    if path.suffix == ".parquet":
        table = pd.read_parquet(path)
        kept = [c for c in table.columns if not TIMINGS.search(str(c))]
        return "".join(short(timeless(row)) for row in table[kept].astype(object).to_dict("records"))
    if path.suffix == ".jsonl":
        return "".join(short(timeless(json.loads(line))) for line in path.read_text().splitlines() if line.strip())
    if path.suffix == ".json":
        return short(timeless(json.loads(path.read_text())))
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            tensors = {k: hashlib.sha256(file.get_tensor(k).float().numpy().tobytes()).hexdigest() for k in file.keys()}  # noqa: SIM118
            return short([tensors, timeless(file.metadata())])
    return short(CLOCK.sub("", path.read_bytes().decode("latin-1")))


def timeless(value: Any) -> Any:
    """A JSON value without what is measured with a clock."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not TIMINGS.search(str(k))}
    if isinstance(value, str):
        return CLOCK.sub("", value)
    return [timeless(v) for v in value] if isinstance(value, list | tuple) else value


def litter(folder: Path) -> list[str]:
    """Temporary files and directories that are left."""
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.name.endswith(TEMPORARY)]


def made_twice(folder: Path) -> list[str]:
    """What was kept and yet made again in the same place: responses, steps of training, policies, points."""
    log = folder.parent / ASIDE
    rows = Counter(log.read_text().splitlines()) if log.exists() else Counter()
    return [os.path.relpath(row, folder) for row, n in rows.items() if n > 1]


# --- trials ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def place(root: Path, name: str) -> Iterator[Path]:
    """A fresh working directory ``.../work`` in a folder of its own, removed afterwards."""
    outer = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=root))
    (outer / "inputs").symlink_to(root / "inputs")
    (outer / "work").mkdir()
    try:
        yield outer / "work"
    finally:
        shutil.rmtree(outer, ignore_errors=True)


@dataclass(frozen=True)
class Reference:
    """A run that was never killed: what it wrote, how long it took, how many file operations it did."""

    contents: dict[str, str]
    seconds: float
    operations: int


def compared(folder: Path, spec: Command, log: Path) -> dict[str, str]:
    """:func:`contents`, read in a process of its own: this one must stay free of threads to fork."""
    target = folder.parent / "contents.json"
    forked(lambda: int(not target.write_text(json.dumps(contents(folder / "out", spec.skipped)))), log)
    return json.loads(target.read_text())


def reference(root: Path, name: str, spec: Command) -> Reference:
    """Run a command once without killing it."""
    with place(root, name) as folder:
        log = folder.parent / "log"
        counter = folder.parent / "operations"

        def counted() -> int:
            count = [0]
            watch_operations(str(folder), lambda n: count.__setitem__(0, n))
            try:
                return command(spec.args, folder)()
            finally:
                counter.write_text(str(count[0]))

        status, seconds = forked(counted, log, timeout=4 * spec.timeout)
        if status != 0:
            raise RuntimeError(f"{name} fails without being killed:\n{log.read_text()[-3000:]}")
        return Reference(compared(folder, spec, log), seconds, int(counter.read_text()))


def trial(root: Path, name: str, spec: Command, whole: Reference, rng: random.Random, tally: Tally) -> None:
    """Kill a command up to six times, let it finish, and note what is wrong.

    A process that ends before it was to die has to end well, as the last one, which nobody kills.
    """
    with place(root, name) as folder:
        log, kills = folder.parent / "log", []

        def fault(kind: str, detail: Any) -> None:
            tail = log.read_text(errors="replace")[-1500:] if log.exists() else ""
            tally.faults.append({"command": name, "kind": kind, "kills": [str(k) for k in kills], "detail": detail, "log": tail})

        def once(kill: Kill = Kill()) -> int:
            log.unlink(missing_ok=True)  # of one process: what an earlier one said is no excuse
            # On a busy machine everything takes longer, the run that was not killed too.
            limit = max(spec.timeout, 10 * whole.seconds)
            return forked(command(spec.args, folder, kill), log, kill_after=kill.seconds, timeout=limit)[0]

        status = -signal.SIGKILL
        for _ in range(rng.randint(1, KILLS_A_TRIAL)):
            by_time = rng.random() < 0.4 or not whole.operations
            kill = Kill(seconds=rng.uniform(0, whole.seconds)) if by_time else Kill(operation=rng.randint(1, whole.operations))
            if (status := once(kill)) != -signal.SIGKILL:
                break
            kills.append(kill)
        tally.kills[name] += len(kills)
        tally.trials[name] += 1
        if status == -signal.SIGKILL or spec.ended(status, log):
            status = once()
        if not spec.ended(status, log):
            fault("stuck", status)
            return
        ours = compared(folder, spec, log)
        if ours != whole.contents:
            names = {*ours, *whole.contents}
            fault("different", sorted(n for n in names if ours.get(n) != whole.contents.get(n)))
        if left := litter(folder):
            fault("litter", left)
        if again := made_twice(folder):
            fault("lost", again)


def prepare(root: Path) -> None:
    """Inputs that commands read: rollouts, a direction, an edited model, a board's conditions."""
    inputs = root / "inputs"
    inputs.mkdir(parents=True, exist_ok=True)
    (inputs / "conditions.py").write_text(CONDITIONS)
    plan = (Path(__file__).parents[1] / "plans" / "tiny-reasoner.toml").read_text()
    (inputs / "plan.toml").write_text(re.sub(r"(?m)^problems = \d+$", "problems = 10", plan))
    for args in (
        ("rollouts", "-n", "40", "-k", "4", "--max-new-tokens", "100", "-o", "rollouts"),
        ("direction", "-r", "rollouts", "-o", "v.safetensors"),
        ("direction", "-r", "rollouts", "--site", "resid_post", "-o", "post.safetensors"),
        ("thinkedit", "-m", "tiny-reasoner", "-n", "40", "-k", "4", "--max-new-tokens", "100", "-o", "edited"),
        ("export", "-v", "post.safetensors", "--to", "gguf", "--drop-layer-0", "-o", "v.gguf"),
    ):
        status, _ = forked(command(args, inputs), root / "prepare.log", timeout=300)
        if status != 0:
            raise RuntimeError((root / "prepare.log").read_text()[-3000:])


def torture(root: Path, kills: int, names: Sequence[str], seed: int, say: Callable[[str], None]) -> Tally:
    """Kill the named commands until ``kills`` processes have died, each of them at least once."""
    rng, tally = random.Random(seed), Tally()
    prepare(root)
    whole = {}
    for name in names:
        whole[name] = reference(root, name, COMMANDS[name])
        say(f"{name}: {whole[name].seconds:.1f} s, {whole[name].operations} file operations, {len(whole[name].contents)} files")
    turn = 0
    while sum(tally.kills.values()) < kills:
        name = names[turn] if turn < len(names) else rng.choices(names, [COMMANDS[n].weight for n in names])[0]
        before = len(tally.faults)
        trial(root, name, COMMANDS[name], whole[name], rng, tally)
        turn += 1
        for fault in tally.faults[before:]:
            say(f"{fault['command']}: {fault['kind']} {fault['detail']} after {fault['kills']}")
        if turn % 20 == 0:
            say(f"{sum(tally.kills.values())} kills, {turn} trials, {len(tally.faults)} faults")
    return tally


def main() -> None:
    """Torture, print, and exit with 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="how many processes die")
    parser.add_argument("--only", default="", help="commands, with commas between; without it, all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="file for the figures, as JSON")
    given = parser.parse_args()
    names = [name.strip() for name in given.only.split(",")] if given.only else list(COMMANDS)
    if unknown := [name for name in names if name not in COMMANDS]:
        parser.error(f"unknown command {unknown[0]!r}: choose from {', '.join(COMMANDS)}")
    if any(name.startswith(("grpo", "board")) for name in names):  # everything a child needs is imported here, once
        import toolkit.jobs.grpo
    import torch

    import toolkit.board
    import toolkit.cli
    import toolkit.jobs  # noqa: F401

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="torture-") as root:
        tally = torture(Path(root).resolve(), given.kills, names, given.seed, lambda text: print(text, flush=True))
    found = tally.as_json()
    if given.report:
        given.report.write_text(json.dumps(found, indent=1) + "\n")
    print({k: v for k, v in found.items() if k != "faults"})
    raise SystemExit(bool(tally.faults))


if __name__ == "__main__":
    main()
