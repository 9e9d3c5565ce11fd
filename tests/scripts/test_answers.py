"""Answers of two models side by side: each figure against a plain formulation, and the files that are left."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import error_line, tiny_sentences
from transformers import AutoTokenizer, LlamaForCausalLM

from lib.calibration.own_text import Answer
from lib.calibration.texts import read_text
from scripts import answers


@pytest.mark.parametrize(
    ("answer", "share"),
    [([], 0), ([1, 2, 3], 0), ([1, 2, 3, 4], 0), ([1] * 6, 2 / 3), ([1, 2, 3, 4, 5, 1, 2, 3, 4], 1 / 6)],
)
def test_repeated_four_grams(answer, share):
    assert answers.repeated(answer) == pytest.approx(share)


def test_perplexity_counts_the_answers_alone(tiny_model):
    pairs = [Answer([5, 9], [7, 8, 2], True), Answer([4], [200], False)]
    losses = []
    for prompt, answer, _ in pairs:
        logs = tiny_model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        losses += [-logs[len(prompt) + i - 1, token].item() for i, token in enumerate(answer)]
    assert answers.answers_perplexity(tiny_model, pairs) == pytest.approx(math.exp(sum(losses) / 4), rel=1e-5)


def test_models_are_compared(run_inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text(tiny_sentences(5))
    model, rooms, load_llm = str(run_inputs / "tiny-llama"), [], answers.load.load_llm
    monkeypatch.setattr(answers.load, "load_llm", lambda *a, reserve: rooms.append(reserve) or load_llm(*a))
    assert answers.main([model, model, *"--prompts prompts.txt --count 3 --tokens 12 --save out".split()]) == 0
    assert "answers to 3 prompts" in capsys.readouterr().out and Path("out/answers.png").stat().st_size > 1000
    one, two = json.loads(Path("out/answers.json").read_text())["models"]
    assert [*one] == [*answers.HEADINGS] and one == two | {"model": model}
    assert 0 < one["tokens"] <= 12 and one["perplexity of dense answers"] > 1
    assert min(rooms) > 2**30 and len(rooms) == 2  # the answers' own memory is left on a GPU
    assert len(read_text("eval_data", "out/dense.jsonl", "test").records) == 3
    line = error_line(capsys, answers.main([model, model, "--prompts", "none.txt"]))
    assert "--prompts none.txt: cannot be read" in line
    line = error_line(capsys, answers.main([model, "no/thing", "--prompts", "prompts.txt"]))
    assert line.startswith("answers.py: error: no/thing: ")
    line = error_line(capsys, answers.main([model, model, *"--prompts prompts.txt --prompt_data c4".split()]))
    assert "--prompt_data c4: does nothing with --prompts" in line
    other = LlamaForCausalLM.from_pretrained(model)
    other.resize_token_embeddings(304)
    other.save_pretrained("other")
    AutoTokenizer.from_pretrained(model).save_pretrained("other")
    monkeypatch.setattr(answers.load, "load_llm", lambda *_: pytest.fail("loaded"))
    line = error_line(capsys, answers.main([model, model, *"--prompts prompts.txt --tokens 128".split()]))
    assert re.search(r"--tokens 128: is, with prompts of up to \d+ tokens, more than .*'s context, 128; lower it", line)
    line = error_line(capsys, answers.main([model, "other", "--prompts", "prompts.txt"]))
    assert "error: the models' vocabularies have different sizes" in line
