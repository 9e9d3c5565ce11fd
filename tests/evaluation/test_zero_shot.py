"""Zero-shot accuracy: against log-likelihoods added up in float64, on the small real model, and as a run leaves it."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_sentences

import main
from lib.allocation.formulas import uniform
from lib.core.errors import UserError
from lib.evaluation import zero_shot
from lib.models.load import load_tokenizer
from lib.models.weights import weights_of
from lib.pruning.plan import SparsityPlan
from lib.pruning.pruners import PRUNERS
from lib.pruning.walk import walk

TASKS = ROOT / "data" / "tasks"


def write_task(folder: Path, rows: list[dict], more: str = "") -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "made_up.yaml").write_text(
        "task: made_up\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}, cache_dir: {folder / 'cache'}}}\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
        "metric_list:\n- {metric: acc, aggregation: mean, higher_is_better: true}\n"
        "- {metric: acc_norm, aggregation: mean, higher_is_better: true}\nmetadata: {version: 7}\n" + more
    )


@pytest.fixture(scope="module")
def made_up(tmp_path_factory) -> tuple[Path, list[dict]]:
    """Return a folder with a task of 12 questions, choices of unequal lengths, and its rows."""
    lines = tiny_sentences(60, seed=4).splitlines()
    rows = [
        {"question": lines[5 * i], "choices": [lines[5 * i + k][: 6 * k] for k in range(1, 5)], "answer": i % 4}
        for i in range(12)
    ]
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, rows)
    return folder, rows


@torch.no_grad()
def log_likelihood(model, tokenizer, question: str, choice: str) -> float:
    """Return the log-likelihood in nats of `` choice`` after ``question``, summed in float64."""
    context = tokenizer(question).input_ids
    ids = torch.tensor(tokenizer(f"{question} {choice}").input_ids)
    logp = model.double()(ids[None]).logits[0].log_softmax(-1)
    return sum(logp[i - 1, ids[i]].item() for i in range(len(context), len(ids)))


@pytest.mark.parametrize("batch", ["auto", 3])
def test_accuracy_is_that_of_log_likelihoods_in_float64(made_up, tiny_model, tiny_tokenizer, batch):
    folder, rows = made_up
    tasks = zero_shot.find_tasks("made_up", str(folder), 0)
    result, _ = zero_shot.zero_shot(tiny_model, tiny_tokenizer, tasks, batch_size=batch)
    plain = normed = 0
    for row in rows:
        # acc_norm: per byte of the choice itself, without the space before it
        scores = [log_likelihood(tiny_model, tiny_tokenizer, row["question"], c) for c in row["choices"]]
        plain += scores.index(max(scores)) == row["answer"]
        per_byte = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        normed += per_byte.index(max(per_byte)) == row["answer"]
    assert plain != normed, "the two metrics would not be told apart"
    figures = result["lm_eval"]["results"]["made_up"]
    assert figures["acc,none"] == plain / 12 and figures["acc_norm,none"] == normed / 12
    # standard error of a mean of twelve zeros and ones
    p = plain / 12
    assert figures["acc_stderr,none"] == pytest.approx(math.sqrt(p * (1 - p) / 11), rel=1e-9)
    assert result["means"] == {"acc": plain / 12, "acc_norm": normed / 12}
    assert result["lm_eval"]["versions"] == {"made_up": 7}
    assert result["lm_eval"]["n-samples"]["made_up"]["effective"] == 12


def test_evaluation_repeats_itself_and_leaves_model_and_tokenizer_alone(made_up, tiny_model, tiny_tokenizer, caplog):
    tiny_tokenizer = copy.deepcopy(tiny_tokenizer)
    tiny_tokenizer.pad_token = None
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    tasks = zero_shot.find_tasks("made_up", str(made_up[0]), 0)
    first, again = (zero_shot.zero_shot(tiny_model, tiny_tokenizer, tasks, limit=5)[0] for _ in range(2))
    assert first["lm_eval"]["results"] == again["lm_eval"]["results"]
    assert first["lm_eval"]["n-samples"]["made_up"]["effective"] == 5
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())
    assert tiny_tokenizer.pad_token is None and "log-likelihoods" not in caplog.text

    tiny_model.model.norm.weight.data.fill_(math.nan)
    zero_shot.zero_shot(tiny_model, tiny_tokenizer, tasks)
    assert "48 of 48 log-likelihoods" in caplog.text


def test_worked_examples_are_asked_for_or_refused(made_up, tmp_path, tiny_model, tiny_tokenizer):
    folder, rows = made_up
    tasks = zero_shot.find_tasks("made_up", str(folder), 2)
    zero_shot.zero_shot(tiny_model, tiny_tokenizer, tasks, num_fewshot=2, limit=2)
    prompt = tasks[0].instances[0].args[0]
    assert prompt.count("\n\n") == 2 and prompt.endswith(rows[0]["question"])
    write_task(tmp_path, rows, "num_fewshot: 0\n")
    with pytest.raises(UserError, match="--num_fewshot 2: made_up is zero-shot"):
        zero_shot.find_tasks("made_up", str(tmp_path), 2)


@pytest.mark.slow
def test_published_tasks_are_known_to_the_installed_harness():
    from lm_eval.tasks import TaskManager

    published = "boolq rte hellaswag winogrande arc_easy arc_challenge openbookqa".split()
    assert sorted(zero_shot.ZERO_SHOT_TASKS) == sorted(published)
    assert set(published) <= set(TaskManager().all_subtasks)


def test_own_tasks_are_four_choices_without_a_favourite_place():
    loaded = zero_shot.find_tasks("capital_cities,lm_eval_worked_questions", str(TASKS), 0)
    tasks = {task.task_name: list(task.test_docs()) for task in loaded}
    assert len(tasks["capital_cities"]) > 100 and len(tasks["lm_eval_worked_questions"]) >= 273
    for docs in tasks.values():
        assert all(len(doc["choices"]) == len(set(doc["choices"])) == 4 for doc in docs)
        share = [sum(doc["answer"] == place for doc in docs) / len(docs) for place in range(4)]
        assert max(share) < 0.3, "always taking one place must not pay"
    facts = dict(line.split("\t") for line in (TASKS / "capital_cities.tsv").read_text(encoding="utf-8").splitlines())
    assert all(doc["choices"][doc["answer"]] == facts[doc["country"]] for doc in tasks["capital_cities"])
    assert facts["France"] == "Paris" and facts["Australia"] == "Canberra" and len(facts) == len(set(facts.values()))


@pytest.mark.slow
def test_heavily_pruned_smollm2_falls_to_chance(smollm2, smollm2_source):
    tokenizer, tasks = load_tokenizer(smollm2_source), zero_shot.find_tasks("capital_cities", str(TASKS), 0)
    dense, _ = zero_shot.zero_shot(smollm2, tokenizer, tasks)
    weights = weights_of(smollm2)
    walk(weights, SparsityPlan(0.8, uniform(weights.layers, 0.8)), PRUNERS["magnitude"], None)
    pruned, _ = zero_shot.zero_shot(smollm2, tokenizer, tasks)
    assert dense["means"]["acc"] > 0.75  # measured: 0.85
    error = math.sqrt(0.25 * 0.75 / 114)
    assert abs(pruned["means"]["acc"] - 0.25) < 3 * error, "four choices: chance is a quarter"


@pytest.mark.usefixtures("few_tasks")
def test_a_run_leaves_the_table_and_the_full_result(made_up, tmp_path, tiny_folder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = f"--model {tiny_folder} --eval_wikitext false --prune_method magnitude --sparsity_ratio 0.5 --save save"
    flags += f" --eval_zero_shot --tasks made_up,capital_cities --include_path {made_up[0]} --limit 9"
    status = main.main([*flags.split()])
    assert status == 2 and "--tasks capital_cities" in capsys.readouterr().err, "that one lies in another folder"
    assert not Path("save").exists()
    assert main.main(flags.replace("made_up,capital_cities", "made_up").split()) == 0
    out, err = capsys.readouterr()
    assert "%|" not in err, "bars of lm-eval do not fill a log file"
    written = Path("save/zero_shot_magnitude_sparsity_0.5.txt").read_text()
    first, table = written.split("\n", 1)
    assert first == "magnitude:" and table in out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert rows[0] == ["Tasks", "Version", "Filter", "n-shot", "Metric", "", "Value", "", "Stderr"]
    run = json.loads(Path("save/run_magnitude_sparsity_0.5.json").read_text())
    full = run["zero_shot"]["lm_eval"]
    assert full["versions"]["made_up"] == 7 and full["n-samples"]["made_up"] == {"original": 12, "effective": 9}
    figures = full["results"]["made_up"]
    assert rows[2][0] == "made_up" and rows[2][4] == "acc"
    assert (rows[2][6], rows[2][8]) == (f"{figures['acc,none']:.4f}", f"{figures['acc_stderr,none']:.4f}")
    assert f"\nmean acc: {run['zero_shot']['means']['acc']:.4f}\n" in table
    assert {"prepare", "zero_shot"} <= set(run["stages"]) and run["versions"]["lm_eval"]
    assert not Path("save/perplexity_magnitude_sparsity_0.5.txt").exists()
