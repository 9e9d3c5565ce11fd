"""Cards of saved models, read back by the hub's own classes: what they say of the run, and what they take over."""

import json
import logging
import re
from pathlib import Path

import pytest
from conftest import ROOT
from huggingface_hub import ModelCard

import main
from lib.cli.command import parse
from lib.cli.settings import Experiment
from lib.pruning.walk import LayerReport
from lib.run.card import _hub_card, write_card
from lora_ft import recover

MODEL = {"given": "a/b", "path": "a/b", "name": "b", "cache_dir": "none"}
CONTENT = {
    "model": MODEL, "method": "wanda_ww", "sparsity": 0.49876, "perplexity": 35.6, "dense": 13.98,
    "flags": {"model": "a/b", "calib_data": "c4", "save": "results", "epsilon": 0.2, "farms": False, "seed": 0},
    "calibration": {"text": "c4", "windows": 4, "seqlen": 8},
    "evaluation": {"text": "wikitext2", "windows": 3, "seqlen": 8},
    "versions": {"torch": "2.0"}, "git_commit": None,
}  # fmt: skip
"""What a record tells, of which a test changes some."""


def card(folder: Path) -> ModelCard:
    """Return the card of a folder; its metadata survive being written and read, as the hub demands."""
    read = ModelCard.load(folder / "README.md")
    assert ModelCard(str(read)).data.to_dict() == read.data.to_dict()
    read.text = re.sub(" {2,}", " ", read.text)  # in tables
    return read


def test_card_of_a_model_of_the_hub(tmp_path):
    rows = [LayerReport("h.0.q", (2, 3), None, 0.25, 0.5), LayerReport("h.0.k", (2, 1), None, 0.75, 0.0)]
    write_card(tmp_path, CONTENT, [*rows, LayerReport("h.1.q", (2, 3), None, 0.5, 0.625)])
    assert card(tmp_path).data.to_dict() == {
        "base_model": "a/b", "base_model_relation": "finetune", "datasets": ["allenai/c4"],
        "library_name": "transformers", "pruning_method": "wanda_ww", "sparsity": 0.4988,
        "tags": ["pruned", "wanda", "ww"],
    }  # fmt: skip
    text = card(tmp_path).text
    for line in (
        "| h.0 | 0.3750 | 0.3750 |", "| h.1 | 0.5000 | 0.6250 |", "| dense | 13.98 |",
        "| wanda_ww | 35.60 |", "3 windows of 8 tokens of `wikitext2`", "`--model a/b --epsilon 0.2`", "torch 2.0",
        f'from_pretrained("{tmp_path}")', "## What it is worse at",
    ):  # fmt: skip
        assert line in text.replace("'", '"'), line


def test_base_models_card_is_taken_over_and_a_damaged_one_is_not(tmp_path, caplog, monkeypatch):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\ntags: [chat]\ndatasets: [x/y]\n---\n# Secret\n")
    local = CONTENT | {"model": MODEL | {"given": str(base), "path": str(base)}, "calibration": None, "dense": None}
    write_card(tmp_path, local)
    data = card(tmp_path).data.to_dict()
    assert (data["license"], data["language"], data["tags"]) == ("mit", ["en"], ["chat", "pruned", "wanda", "ww"])
    assert not {"base_model", "base_model_relation", "datasets"} & data.keys() and "Secret" not in card(tmp_path).text
    assert "| dense | -" in card(tmp_path).text
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: asked.append(1) or str(base / "README.md"))
    _hub_card.cache_clear()
    for _ in range(2):  # of the hub, where a model is loaded without its card, which is fetched once
        write_card(tmp_path, CONTENT)
    _hub_card.cache_clear()
    assert len(asked) == 1
    assert (card(tmp_path).data.license, card(tmp_path).data.base_model) == ("mit", "a/b")
    (base / "README.md").write_text("---\nlicense: [\n---\n")
    with caplog.at_level(logging.WARNING):
        write_card(tmp_path, local)
    assert "license and tags are not taken over" in caplog.text and "license" not in card(tmp_path).data.to_dict()


def test_data_set_of_the_hub_is_named(tmp_path):
    write_card(tmp_path, CONTENT | {"flags": {"calib_data": "hf:o/chats:c", "drop_experts": 0.25, "drop_by": "reap"}})
    assert card(tmp_path).data.datasets == ["o/chats"]
    assert "0.25 of each block's experts, rounded down, were dropped by reap." in card(tmp_path).text
    for key, named in (("price_search", ["allenai/c4"]), ("epsilon", None)):
        write_card(tmp_path, CONTENT | {"calibration": None, key: {"kept": "start"}})
        assert card(tmp_path).data.datasets == named, "read by a search alone, or by nothing"


RUN = "--model tiny-llama --calib_data text.txt --eval_data other.txt --seqlen 32 --nsamples 3 --eval_windows 3"


@pytest.fixture
def place(run_inputs, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for path in run_inputs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def test_runs_write_cards_and_recovery_adds_to_them(place):
    assert main.main(RUN.split()) == 0
    assert main.main([*RUN.split(), *"--prune_method wanda --sparsity_ratio 0.5 --save_model out".split()]) == 0
    figures = {name: json.loads(Path(f"results/run_{name}.json").read_text())["perplexity"]
               for name in ("dense_sparsity_0.0", "wanda_sparsity_0.5")}  # fmt: skip
    first = card(Path("out/wanda_0.5"))
    assert first.data.to_dict()["sparsity"] == 0.5 and "| model.layers.2 |" in first.text
    for name, figure in figures.items():
        assert f"{figure:.2f} |" in first.text, name

    text = "--calib_data text.txt --eval_data other.txt --seqlen 32 --eval_windows 3 --tokens 256 --save_model better"
    assert recover.main(["--model", "out/wanda_0.5", *text.split()]) == 0
    second = card(Path("better"))
    made = first.text.strip().replace('"out/wanda_0.5"', '"better"')
    assert made in second.text and second.data.tags == ["pruned", "wanda"]
    added = second.text.partition(made)[2]
    assert "# Recovered" in added and "256 tokens of training changed the held-out loss from" in added
    assert f"| before recovery | {figures['wanda_sparsity_0.5']:.2f} |" in added


def test_card_of_a_model_beside_the_recovered_one_has_its_figure(place):
    flags = "--prune_method wanda --sparsity_ratio 0.5 --recover 256 --batch 4 --save_model out"
    assert main.main([*RUN.split(), *flags.split()]) == 0
    content = json.loads(Path("results/run_wanda_sparsity_0.5_recovered.json").read_text())
    pruned, recovered = card(Path("out/wanda_0.5")), card(Path("out/wanda_0.5_recovered"))
    before, after = f"{content['recovery']['perplexity_before']:.2f} |", f"{content['perplexity']:.2f} |"
    assert f"| wanda | {before}" in pruned.text and "--recover" not in pruned.text
    assert f"| wanda_recovered | {after}" in recovered.text and f"| before recovery | {before}" in recovered.text
    assert "--recover 256 --batch 4" in recovered.text
    # Pruned once more, it is another model than the card said.
    flags = "--model out/wanda_0.5_recovered --prune_method magnitude --sparsity_ratio 0.75 --save_model twice"
    assert main.main([*RUN.split(), *flags.split()]) == 0
    twice = card(Path("twice/magnitude_0.75"))
    shares = re.findall(r"([\d.]+%) of the weights", twice.text)
    assert shares == ["50.0%", f"{twice.data.to_dict()['sparsity']:.1%}"] != ["50.0%"] * 2
    assert re.findall(r"from_pretrained\(\"(.*)\"\)", twice.text) == ["twice/magnitude_0.75"]


def test_flags_of_a_card_can_be_pasted(tmp_path):
    given = "--model a/b --prune_method wanda --sparsity_ratio 0.5 --use_variant --refit 0 --eval_wikitext False"
    write_card(tmp_path, CONTENT | {"flags": parse(Experiment, given.split(), main.PARSER).flags()})
    assert f"`{given}`" in card(tmp_path).text


def test_document_says_how_to_upload():
    assert "hf upload" in (ROOT / "docs" / "evaluation.md").read_text()
