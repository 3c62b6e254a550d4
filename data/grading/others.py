"""Grade the recorded responses with the graders of lm-eval 0.4.13 and lighteval 0.13.0, each in an environment of its own.

    python data/grading/others.py lm-eval
    python data/grading/others.py lighteval

writes ``lm-eval.jsonl`` and ``lighteval.jsonl`` beside ``responses.jsonl``, one line per response. A command that was stopped goes on where
it was. Each line has a hash of what was graded; a line without one, or of another response, is graded again. This file needs the tool and nothing of the toolkit. The two tools need different versions of the same packages:

    pip install 'lm-eval[math]==0.4.13'
    pip install lighteval==0.13.0

Both tools remove thoughts first, by their own function. Their graders need different things: those for GSM8K get the gold answer after
``####``, those for MATH get it in a box. Graders for GSM8K see the responses with whole numbers as gold answers, those for MATH all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TOOLS = ("lm-eval", "lighteval")
GSM8K = "gsm8k"
Graders = dict[str, Callable[[str, str], bool]]
"""Name of a grader -> function of response and gold answer."""


def lm_eval_graders() -> tuple[Callable[[str], str], Graders]:
    """Return lm-eval's function that removes thoughts, and its graders."""
    import lm_eval.tasks
    import yaml
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter
    from lm_eval.models.utils import postprocess_generated_text
    from lm_eval.tasks.hendrycks_math import utils as hendrycks
    from lm_eval.tasks.minerva_math import utils as minerva

    task = yaml.safe_load((Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k.yaml").read_text(encoding="utf-8"))
    options = {k: v for k, v in task["metric_list"][0].items() if k in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}

    def filtered(name: str) -> Callable[[str, str], bool]:
        first = next(f["filter"][0] for f in task["filter_list"] if f["name"] == name)
        extract = RegexFilter(**{k: v for k, v in first.items() if k != "function"})

        def grade(response: str, gold: str) -> bool:
            found = extract.apply([[response]], [{}])[0][0]
            return bool(exact_match_hf_evaluate([found], [f"Some steps.\n#### {gold}"], **options)["exact_match"])

        return grade

    def minerva_of(metric: str) -> Callable[[str, str], bool]:
        def grade(response: str, gold: str) -> bool:
            solution = f"Some steps. The answer is $\\boxed{{{gold}}}$."
            answer = minerva.normalize_final_answer(minerva.remove_boxed(minerva.last_boxed_only_string(solution)))
            return bool(minerva.process_results({"solution": solution, "answer": answer}, [response])[metric])

        return grade

    def hendrycks_math(response: str, gold: str) -> bool:
        return bool(hendrycks.process_results({"solution": f"Some steps: $\\boxed{{{gold}}}$."}, [response])["exact_match"])

    graders: Graders = {
        "gsm8k strict-match": filtered("strict-match"),
        "gsm8k flexible-extract": filtered("flexible-extract"),
        "minerva_math exact_match": minerva_of("exact_match"),
        "minerva_math math_verify": minerva_of("math_verify"),
        "hendrycks_math exact_match": hendrycks_math,
    }
    return lambda text: postprocess_generated_text(text, None, "</think>"), graders


def lighteval_graders() -> tuple[Callable[[str], str], Graders]:
    """Return lighteval's function that removes thoughts, and its graders."""
    from lighteval.metrics.metrics import Metrics
    from lighteval.models.model_output import ModelResponse
    from lighteval.tasks.requests import Doc
    from lighteval.utils.utils import remove_reasoning_tags

    def graded(metric: Any, choice: str) -> Callable[[str, str], bool]:
        def grade(response: str, gold: str) -> bool:
            doc = Doc(query="Question", choices=[choice.format(gold)], gold_index=0)
            return bool(metric.compute_sample(doc=doc, model_response=ModelResponse(text=[response]))[metric.metric_name])

        return grade

    expressions, latex = Metrics.expr_gold_metric.value, Metrics.pass_at_k_math(sample_params={"k": 1, "n": 1})
    latex = getattr(latex, "value", latex)
    graders: Graders = {
        "gsm8k expr_gold_metric": graded(expressions, " Some steps.\n#### {}"),
        "math_500 pass_at_k_math": graded(latex, "ANSWER: Some steps: $\\boxed{{{}}}$."),
    }
    return lambda text: remove_reasoning_tags(text, [("<think>", "</think>")]), graders


def graded(row: dict[str, Any]) -> str:
    """Return a short hash of what is graded: the format, the gold answer and the response."""
    return hashlib.sha256(json.dumps([row["format"], row["gold"], row["response"]]).encode()).hexdigest()[:12]


def current(lines: list[str], responses: list[dict[str, Any]]) -> dict[str, str]:
    """Return id -> line of the verdicts that are whole and of the recorded responses. A killed process may leave half a line at the end."""
    wanted = {row["id"]: graded(row) for row in responses}
    rows = [(json.loads(line), line) for line in lines if line.endswith("\n")]
    return {row["id"]: line for row, line in rows if row.get("graded") == wanted.get(row["id"], "")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tool", choices=TOOLS)
    tool = parser.parse_args().tool
    answer_of, graders = lm_eval_graders() if tool == "lm-eval" else lighteval_graders()
    responses = [json.loads(line) for line in (HERE / "responses.jsonl").read_text(encoding="utf-8").splitlines()]
    file = HERE / f"{tool}.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    done = current(lines, responses)
    file.write_text("".join(done.values()), encoding="utf-8")
    with file.open("a", encoding="utf-8") as out:
        for row in responses:
            if row["id"] not in done:
                text = answer_of(row["response"])
                used = {name: g for name, g in graders.items() if row["format"] == GSM8K or not name.startswith(GSM8K)}
                verdicts = {name: g(text, row["gold"]) for name, g in used.items()}
                out.write(json.dumps({"id": row["id"], "graded": graded(row), **verdicts}) + "\n")
                out.flush()


if __name__ == "__main__":
    main()
