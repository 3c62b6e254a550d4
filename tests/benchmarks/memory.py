"""One piece of work in a process of its own; prints its peak memory: ``memory.py collect 64``."""

from __future__ import annotations

import json
import sys

from clock import peak, start
from models import by_parity, large, tiny, traces


def main() -> None:
    start()
    what, n = sys.argv[1], int(sys.argv[2])
    lm = large() if what.startswith("large") else tiny()
    if what == "large bare":
        from collecting import bare

        bare(lm, traces(lm, n))
    elif what in ("collect", "large collect"):
        from toolkit import collect

        collect.moments(lm, traces(lm, n), by_parity)
    elif what == "rollouts":
        from toolkit import generate, tasks

        problems = tasks.load("arithmetic", "train", n)
        generate.rollouts(lm, problems, generate.Sampling(n=4, max_new_tokens=200), progress=False)
    print(json.dumps({"peak": peak()}))


if __name__ == "__main__":
    main()
