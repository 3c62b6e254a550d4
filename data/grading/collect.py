"""Put the recorded responses into ``responses.jsonl``: those of two models (``sample.py``) and those of ``written.py``.

python data/grading/collect.py runs/grading/sampled.jsonl
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import written

from toolkit import store

HERE = Path(__file__).parent
_END = re.compile(r"<\|im_end\|>$")  # both tools stop at this token and never see it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sampled", type=Path)
    sampled = store.read_rows(parser.parse_args().sampled, {"model": str, "question": str, "gold": str, "response": str})
    rows = [
        {
            "source": row["model"],
            "format": written.G,
            "question": row["question"],
            "gold": row["gold"],
            "response": _END.sub("", row["response"]),
        }
        for row in sampled
    ]
    rows += [
        {"source": "written", "style": style, "format": name, "gold": gold, "right": right, "response": response}
        for style, name, gold, right, response in written.ROWS
    ]
    store.write_rows([{"id": f"{i:03}", **row} for i, row in enumerate(rows)], HERE / "responses.jsonl")


if __name__ == "__main__":
    main()
