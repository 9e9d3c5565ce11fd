"""Facts and questions that are on this machine anyway become four-choice tasks for lm-eval: no hub, no download."""

import re
from importlib.util import find_spec
from pathlib import Path

import datasets
import yaml

# "Question\n(A) one (B) two (C) three (D) four", and "... The answer is (B)." at the end of the worked answer.
_OPTION = re.compile(r"\s*\(([A-Z])\)\s*")
_ANSWER = re.compile(r"[Tt]he answer is \(([A-D])\)")


def capital_cities(**_) -> dict[str, datasets.Dataset]:
    """Return a question per line of capital_cities.tsv; the wrong choices are the capitals of the next three lines.

    The right choice goes round the four places, so that a model that always takes one place is right by chance.
    """
    lines = (Path(__file__).parent / "capital_cities.tsv").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("\t") for line in lines]
    rows = []
    for i, (country, _) in enumerate(pairs):
        choices = [pairs[(i + k) % len(pairs)][1] for k in range(4)]
        turn = i % 4
        rows.append({"country": country, "choices": choices[-turn:] + choices[:-turn], "answer": turn})
    return {"test": datasets.Dataset.from_list(rows)}


def worked_questions(**_) -> dict[str, datasets.Dataset]:
    """Return the four-choice questions among the worked examples (MMLU's development split) in lm-eval's own files."""
    folder = Path(find_spec("lm_eval").origin).parent / "tasks" / "mmlu" / "flan_cot_fewshot"
    rows = []
    for path in sorted(folder.glob("mmlu_*.yaml")):
        for sample in yaml.safe_load(path.read_text(encoding="utf-8"))["fewshot_config"]["samples"]:
            row = _four_choice(sample["question"], sample["target"])
            if row is not None:
                rows.append(row)
    if not rows:
        raise FileNotFoundError(f"this version of lm-eval has no worked questions in {folder}")
    return {"test": datasets.Dataset.from_list(rows)}


def _four_choice(question: str, target: str) -> dict | None:
    """Return the parts of a question, None if it has other than four choices or no single answer."""
    start = question.rfind("\n(A)")
    pieces = _OPTION.split(question[start:]) if start > 0 else []
    answers = set(_ANSWER.findall(target))
    if pieces[1::2] != list("ABCD") or len(answers) != 1:
        return None
    choices = [piece.strip() for piece in pieces[2::2]]
    if len(set(choices)) < 4 or not all(choices):
        return None
    return {"question": question[:start].strip(), "choices": choices, "answer": "ABCD".index(answers.pop())}
