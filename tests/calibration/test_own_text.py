"""A model's own text: answers against plain sampling of one prompt at a time, and the file that a run makes of them."""

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from conftest import error_line, saved_tensors, settings, tiny_sentences

import main
from lib.calibration import own_text
from lib.core import processes
from lib.core.errors import UserError
from lora_ft import recover

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
PROMPTS = [[{"role": "user", "content": tiny_sentences(1, seed)}] for seed in range(40)]


@pytest.fixture
def chat_tokenizer(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@torch.no_grad()
def plain_answer(model, prompt: list[int], limit: int) -> list[int]:
    """Return the likeliest tokens, one prompt at a time, without padding and cache, up to the end </s>, 2."""
    ids = list(prompt)
    while len(ids) < len(prompt) + limit and (len(ids) == len(prompt) or ids[-1] != 2):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_answers_are_those_of_one_prompt_at_a_time(tiny_model, tiny_tokenizer):
    prompts = [own_text.prompt_tokens(tiny_tokenizer, messages) for messages in PROMPTS[:20]]
    assert len({len(ids) for ids in prompts}) > 3
    tiny_model.lm_head.weight.data[2] *= 1.5  # some of them end early
    tiny_model.generation_config.top_k = 1
    batches = list(own_text.write_answers(tiny_model, tiny_tokenizer, prompts, 12, 0))
    assert [len(batch) for batch in batches] == [16, 4]
    answers = [answer for batch in batches for answer in batch]
    assert [answer.prompt for answer in answers] == prompts
    assert [answer.answer for answer in answers] == [plain_answer(tiny_model, ids, 12) for ids in prompts]
    assert {answer.ended for answer in answers} == {True, False}
    assert all(answer.ended == (answer.answer[-1] == 2) for answer in answers)


def test_answers_with_unusual_settings_of_generation(tiny_model, tiny_tokenizer):
    prompts = [own_text.prompt_tokens(tiny_tokenizer, messages) for messages in PROMPTS[:3]]
    tokenizer, config = copy.deepcopy(tiny_tokenizer), tiny_model.generation_config
    tokenizer.eos_token = tokenizer.pad_token = config.eos_token_id = config.pad_token_id = None
    config.temperature, config.stop_strings = 0.0, "never"
    tiny_model.lm_head.weight.data[2] = 0  # nothing ends here
    (answers,) = own_text.write_answers(tiny_model, tokenizer, prompts, 6, 0)
    assert [answer.answer for answer in answers] == [plain_answer(tiny_model, ids, 6) for ids in prompts]


def test_answers_depend_on_the_seed_and_not_on_the_processes(tiny_model, tiny_tokenizer, monkeypatch):
    prompts = [own_text.prompt_tokens(tiny_tokenizer, messages) for messages in PROMPTS]
    tiny_model.generation_config.temperature = 0.7

    def batches(seed: int) -> list:
        return list(own_text.write_answers(tiny_model, tiny_tokenizer, prompts, 6, seed))

    torch.manual_seed(1)
    state, alone = torch.get_rng_state(), batches(3)
    assert torch.equal(state, torch.get_rng_state()) and len(alone) == 3
    assert batches(3) == alone != batches(4)
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "gathered", lambda answers: [answers])  # of the process alone
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        shares.append(batches(3))
    assert shares == [[alone[0], alone[2]], [alone[1]]]


def test_own_text_is_long_enough_in_both_halves(tiny_model, chat_tokenizer):
    records = own_text.own_text(tiny_model, chat_tokenizer, PROMPTS, 128, (500, 300), 0)
    counts = [len(chat_tokenizer(record, add_special_tokens=False).input_ids) for record in records]
    assert sum(counts) >= 600 and min(sum(counts[0::2]), sum(counts[1::2])) >= 300 and len(records) < 40
    for record, (message,) in zip(records, PROMPTS, strict=False):
        assert record.startswith(f"<s>user {message['content']}</s><s>assistant ")
    assert own_text.own_text(tiny_model, chat_tokenizer, PROMPTS, 128, (500, 300), 0) == records
    with pytest.raises(UserError, match=r"gives token 300 and the model has 300 embeddings"):
        chat_tokenizer.add_tokens("<|im_start|>")
        own_text.own_text(tiny_model, chat_tokenizer, [[{"content": "<|im_start|>"}]], 128, (5, 3), 0)
    chat_tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(UserError, match=r"^the prompts: the model's chat template fails \(no system\)$"):
        own_text.prompt_tokens(chat_tokenizer, PROMPTS[0])


def test_what_is_left_out_is_one_line_each(tiny_model, chat_tokenizer, monkeypatch, caplog):
    answer = [own_text.Answer([5, 6], [7, 8, 2], True)]
    empty = [own_text.Answer([5, 6], [2], True), own_text.Answer([5, 6], [], False)]
    monkeypatch.setattr(own_text, "write_answers", lambda *_: [answer + empty, answer])
    two, long = [[{"role": "user", "content": "abe"}]] * 2, [[{"role": "user", "content": "ab " * 100}]]
    with caplog.at_level(logging.WARNING):
        assert len(own_text.own_text(tiny_model, chat_tokenizer, two + long, 64, (8, 0), 0)) == 2
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "1 prompts of more than half a window, 32 tokens, are left out",
        "2 prompts have an empty answer, and are left out",
    ]
    chat_tokenizer.chat_template = None
    for content in (None, [{"type": "text", "text": "abe"}]):
        with pytest.raises(UserError, match="^the prompts: cannot be continued by a model without a chat template "):
            own_text.prompt_tokens(chat_tokenizer, [*two[0], {"role": "user", "content": content}])
    with pytest.raises(UserError, match=r"--calib_data self: 2 prompts give 10 tokens, and 800 are needed; give more"):
        own_text.own_text(tiny_model, chat_tokenizer, two, 64, (0, 400), 0)


def test_prompts_of_files(tmp_path):
    def read(name: str, content: str) -> list:
        (tmp_path / name).write_text(content)
        return own_text.read_prompts("prompts", str(tmp_path / name), "train", None)

    assert [prompt[0]["content"] for prompt in read("p.txt", "Abe ku?\n\n Dos.\n")] == ["Abe ku?", "Dos."]
    chat = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    lines = json.dumps({"prompt": "a"}) + "\n" + json.dumps({"messages": chat})
    assert read("p.jsonl", lines) == [[{"role": "user", "content": "a"}], chat[:1]]
    both = {"messages": None, "prompt": "a", "text": "a, and its answer"}
    assert read("p.jsonl", json.dumps(both)) == [[{"role": "user", "content": "a"}]]
    assert read("p.jsonl", '{"prompt": " "}\n{"prompt": "a"}\n{"messages": []}') == [[{"role": "user", "content": "a"}]]
    for wrong in ('{"words": "a"}', '{"prompt": 3}', "3", '{"messages": [{}]}', '{"marked": "<s>a</s>"}'):
        with pytest.raises(UserError, match="--prompts .* every record needs a field `prompt` .* or `messages`"):
            read("p.jsonl", wrong)
    for wrong, say in (
        ("{", "cannot be read"),
        (r'{"prompt": "\ud83d"}', "cannot be read"),
        ("[]", "holds no prompt"),
        ('{"prompt": ""}', "holds no prompt"),
        ('{"messages": []}', "holds no prompt"),
    ):
        with pytest.raises(UserError, match=rf"--prompts .*p\.jsonl: {say}"):
            read("p.jsonl", wrong)


def test_prompts_are_first_sentences_or_what_comes_before_an_answer(tmp_path):
    text = "One two three four five. Six.\n\nToo short.\n\nA b c d e f\ng h.\n\n"
    (tmp_path / "t.txt").write_text(text)
    drawn = own_text.read_prompts("prompt_data", str(tmp_path / "t.txt"), "train", 0)
    assert sorted(prompt[0]["content"] for prompt in drawn) == ["A b c d e f", "One two three four five."]
    chat = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": chat}))
    (tmp_path / "short.txt").write_text("Too short.\nToo.")
    (tmp_path / "marked.jsonl").write_text(json.dumps({"marked": "<s>a b c d e f g</s>"}))
    for name in ("short.txt", "marked.jsonl"):
        with pytest.raises(UserError, match="holds no prompt; of a text, the first sentence"):
            own_text.read_prompts("prompt_data", str(tmp_path / name), "train", 0)
    assert own_text.read_prompts("prompt_data", str(tmp_path / "t.jsonl"), "train", 0) == [chat[:2]]


# ------------------------------------------------------------------------------------------------------------ in a run

RUN = "--model tiny-llama --eval_data text.txt --seqlen 64 --nsamples 4 --eval_windows 2 --prune_method"
SELF = f"{RUN} wanda_price --sparsity_ratio 0.5 --price_steps 2 --calib_data self --prompts prompts.txt"


@pytest.fixture
def place(run_inputs, tmp_path, monkeypatch, chat_tokenizer, few_windows) -> Path:
    """Return the working folder: a chat model, a text and prompts."""
    monkeypatch.chdir(tmp_path)
    for path in (run_inputs / "tiny-llama").iterdir():
        (tmp_path / "tiny-llama" / path.name).parent.mkdir(exist_ok=True)
        (tmp_path / "tiny-llama" / path.name).write_bytes(path.read_bytes())
    chat_tokenizer.save_pretrained("tiny-llama")
    (tmp_path / "text.txt").write_bytes((run_inputs / "text.txt").read_bytes())
    Path("prompts.txt").write_text("\n".join(" ".join(line.split()[:2]) for line in tiny_sentences(40, 3).split("\n")))
    return tmp_path


def test_own_text_is_written_once_and_is_an_ordinary_file(place, monkeypatch, capsys):
    assert main.main([*SELF.split(), "--save_model", "first", "--save_calib", "calib.jsonl"]) == 0
    (path,) = Path("data/tiny-llama").glob("self_*.jsonl")
    assert path.read_bytes() == Path("calib.jsonl").read_bytes()
    assert json.loads(path.read_text().split("\n")[0])["written_by"]["model"] == "tiny-llama"

    monkeypatch.setattr(own_text, "write_answers", lambda *_: pytest.fail("written again"))
    assert main.main([*SELF.split(), "--save_model", "second"]) == 0
    text = SELF.replace("self --prompts prompts.txt", "calib.jsonl")
    assert main.main([*text.split(), "--save_model", "third"]) == 0
    models = [saved_tensors(Path(folder, "wanda_price_0.5")) for folder in ("first", "second", "third")]
    assert all(torch.equal(tensor, model[name]) for model in models[1:] for name, tensor in models[0].items())
    record = json.loads(Path("results/run_wanda_price_sparsity_0.5.json").read_text())
    assert record["calibration"] == {"text": "calib.jsonl", "windows": 4, "seqlen": 64}

    flags = [*SELF.replace("prompts.txt", "text.txt").split(), "--ww_metric_cache", "prompts.txt/no"]
    assert "--ww_metric_cache prompts.txt/no: cannot be written" in error_line(capsys, main.main(flags))
    path.write_text(path.read_text()[:-20])
    capsys.readouterr()
    assert f"{path}: cannot be read" in error_line(capsys, main.main(SELF.split()))


def test_model_that_does_not_fit_writes_no_text(place, monkeypatch, capsys):
    monkeypatch.setattr("lib.models.memory.fits_in_memory", lambda *_: False)
    line = error_line(capsys, main.main(f"{RUN} wanda --sparsity_ratio 0.5 --calib_data self --save_model out".split()))
    assert "--calib_data self: the model does not fit" in line and "--save_calib FILE" in line


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ("--prompts p.txt", "--prompts does nothing with wanda; it is for --calib_data self"),
        ("--save_calib p.jsonl", "--save_calib does nothing with wanda"),
        ("--prune_method magnitude --calib_data self --save_calib p.jsonl", "--save_calib does nothing with magnitude"),
        ("--calib_data self --prompts nothing.txt", "--prompts nothing.txt: file not found"),
        ("--calib_data self --prompt_data nothing", "--prompt_data nothing: unknown data set"),
        ("--calib_data self --prompts p.txt --prompt_data c4", "--prompt_data c4: does nothing with --prompts"),
        ("--eval_data self", "--eval_data self: unknown data set"),
        ("--calib_data self --save_calib out/own.txt", "--save_calib out/own.txt: would be read as a plain text"),
    ],
)
def test_flags_of_own_text_that_cannot_work(flags, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a")
    with pytest.raises(UserError, match=match):
        settings(f"--model m --prune_method wanda --sparsity_ratio 0.5 {flags}")


def test_pruned_model_writes_no_text_to_recover_on(capsys):
    line = error_line(capsys, recover.main("--model m --tokens 100 --save_model out --calib_data self".split()))
    assert "--calib_data self: a pruned model has no text of its own" in line and "--save_calib" in line
