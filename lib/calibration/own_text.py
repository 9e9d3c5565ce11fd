"""Answers of a model to prompts: its own text, to calibrate on, or to compare with a pruned model's."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from itertools import islice, takewhile
from pathlib import Path
from random import Random
from typing import NamedTuple

from tqdm import tqdm

from lib.calibration import texts
from lib.calibration.hidden import entry_device
from lib.core import processes
from lib.core.digests import digest
from lib.core.errors import UserError
from lib.core.files import reading
from lib.core.lazy import torch, transformers
from lib.models.load import Tokenizer, check_vocabulary

log = logging.getLogger(__name__)

_BATCH = 16  # prompts that are answered at a time
_MOST_DOCUMENTS = 20_000  # from which prompts are drawn
_LEAST_WORDS = 5  # of a sentence that is a prompt


class Answer(NamedTuple):
    """Token ids of a prompt, with the chat template's marks, and of the answer, with its end if it has ended itself."""

    prompt: list[int]
    answer: list[int]
    ended: bool


def read_prompts(field: str, name: str, split: str, seed: int | None) -> list[list[dict]]:
    """Return prompts: of a conversation the messages before its first answer, of a text what is in it.

    With a ``seed``, it is the first sentence of each document, or of each paragraph of a stream, in a random order;
    without one, each line of the ``.txt`` file ``name``, or record of a ``.json`` or ``.jsonl`` file, as a whole.
    """
    path, prompts = Path(name).expanduser(), []
    if seed is not None:
        source = texts.read_text(field, name, split)
        documents = islice(source.records or source.stream.split("\n\n"), _MOST_DOCUMENTS)
    elif path.suffix == ".txt":
        documents = filter(str.strip, texts.file_content(field, path).splitlines())
    else:
        documents = texts.documents_of(field, name, texts.json_records(field, path), kind="prompt")
    for document in documents:
        if isinstance(document, str):
            words = document.strip() if seed is None else re.match(r".+?[.!?](?=\s)|.*", document.strip())[0]
            fits = type(document) is str and (seed is None or len(words.split()) >= _LEAST_WORDS)
            document = [{"role": "user", "content": words}] if fits else []
        prompts.append([*takewhile(lambda message: message["role"] != "assistant", document)])
    prompts = [prompt for prompt in prompts if any(message["content"] for message in prompt)]
    if not prompts:
        fix = f"of a text, the first sentence of a paragraph of at least {_LEAST_WORDS} words is one"
        raise UserError(field, name, "holds no prompt", fix)
    if seed is not None:
        Random(seed).shuffle(prompts)
    return prompts


def prompt_tokens(tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    """Return the tokens of a prompt, as the chat template marks it; a model without one continues the text."""
    if not tokenizer.chat_template:
        with reading(Path("the prompts"), "cannot be continued by a model without a chat template"):
            return tokenizer("\n".join(message["content"] for message in messages)).input_ids
    marked = texts.with_marks(None, "the prompts", tokenizer, messages, add_generation_prompt=True)
    return tokenizer(marked, add_special_tokens=False).input_ids


def write_answers(
    model: transformers.PreTrainedModel, tokenizer: Tokenizer, prompts: Sequence[list[int]], limit: int, seed: int
) -> Iterator[list[Answer]]:
    """Yield the answers to each batch of ``prompts``, of at most ``limit`` tokens, in order.

    They are sampled as the model's own generation config says, whose temperature may be 0. A batch has a seed of its
    own, so that the answers do not depend on how many processes share the batches.
    """
    eos = model.generation_config.eos_token_id
    ends = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    how = {"max_new_tokens": limit, "pad_token_id": pad, "eos_token_id": sorted(ends) or None}
    how |= {"do_sample": model.generation_config.temperature != 0, "tokenizer": tokenizer}
    batches = [prompts[start : start + _BATCH] for start in range(0, len(prompts), _BATCH)]
    for first in range(0, len(batches), processes.count()):
        answers, mine = [], first + processes.rank()
        if mine < len(batches):
            batch, longest = batches[mine], max(map(len, batches[mine]))
            ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in batch], device=entry_device(model))
            mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch], device=ids.device)
            with torch.random.fork_rng([ids.device] if ids.device.type == "cuda" else []), torch.inference_mode():
                torch.manual_seed(int(digest([seed, mine])[:8], 16))
                written = model.generate(ids, attention_mask=mask, **how)[:, longest:].tolist()
            for prompt, answer in zip(batch, written, strict=True):
                end = next((i for i, token in enumerate(answer) if token in ends), limit)
                answers.append(Answer(prompt, answer[: end + 1], end < len(answer)))
        yield from filter(None, processes.gathered(answers))


def own_text(
    model: transformers.PreTrainedModel, tokenizer: Tokenizer, prompts: Sequence, seqlen: int, needed: tuple, seed: int
) -> list[str]:
    """Return conversations of the model, with their marks, until there are as many tokens as are ``needed``.

    These are two counts: in all, and in each half if every second conversation is held out. Prompts (lists of messages)
    and answers have at most half a window of ``seqlen`` tokens; prompts that do not fit, and empty answers,
    are left out with a warning. If the prompts do not suffice, it is a UserError.
    """
    tokens = [prompt_tokens(tokenizer, messages) for messages in prompts]
    check_vocabulary(model.name_or_path, model, *tokens)
    fitting = [ids for ids in tokens if len(ids) <= seqlen // 2]
    if left_out := len(tokens) - len(fitting):
        log.warning("%d prompts of more than half a window, %d tokens, are left out", left_out, seqlen // 2)
    records, halves, empty = [], [0, 0], 0
    with tqdm(desc="the model's own text", total=max(needed[0], 2 * needed[1]), unit="token", disable=None) as bar:
        for answers in write_answers(model, tokenizer, fitting, seqlen // 2, seed):
            empty += sum(len(answer) == ended for _, answer, ended in answers)
            for prompt, answer, ended in answers:
                if len(answer) > ended:
                    records.append(tokenizer.decode(prompt + answer, clean_up_tokenization_spaces=False))
                    count = len(tokenizer(records[-1], add_special_tokens=False).input_ids)
                    halves[len(records) % 2] += count
                    bar.update(count)
            if sum(halves) >= needed[0] and min(halves) >= needed[1]:
                break
    if empty:
        log.warning("%d prompts have an empty answer, and are left out", empty)
    if sum(halves) < needed[0] or min(halves) < needed[1]:
        problem = f"{len(prompts)} prompts give {sum(halves)} tokens, and {bar.total} are needed"
        raise UserError("calib_data", "self", problem, "give more prompts, or shorter ones, or fewer windows")
    return records
