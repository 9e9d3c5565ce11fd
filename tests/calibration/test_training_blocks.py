"""Blocks to train on: joined tokens of documents or of a stream, cut into blocks of one size."""

import copy

import pytest
import torch
from conftest import tiny_sentences
from tokenizers.processors import TemplateProcessing

from lib.calibration import texts


@pytest.fixture
def with_bos(tiny_tokenizer):
    """Return a tokenizer that begins every text with <s>, as LLaMA's does."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def test_blocks_of_documents(monkeypatch, with_bos):
    documents = [tiny_sentences(count, seed) for seed, count in enumerate([1, 30, 2, 25, 1, 40, 3, 60])]
    monkeypatch.setitem(texts.DATASETS, "c4", lambda split: texts.Text(documents))
    monkeypatch.setattr(texts, "_DOCUMENTS_AT_ONCE", 2)
    joined = [token for text in documents for token in [1, *with_bos(text, add_special_tokens=False).input_ids]]
    tokenised, tokenise = [], type(with_bos).__call__

    def noted(self, text, **kwargs):
        tokenised.extend(text)
        return tokenise(self, text, **kwargs)

    monkeypatch.setattr(type(with_bos), "__call__", noted)
    blocks = texts.training_blocks("dataset_name", "c4", "train", with_bos, 50)
    assert blocks.flatten().tolist() == joined[: len(joined) // 50 * 50] and tokenised == documents
    tokenised.clear()
    few = texts.training_blocks("dataset_name", "c4", "train", with_bos, 50, most=3)
    assert torch.equal(few, blocks[:3]) and tokenised == documents[:2]  # the first two hold enough


def test_blocks_of_a_stream(monkeypatch, with_bos, tmp_path):
    text = tiny_sentences(120)
    (tmp_path / "text.txt").write_text(text)
    monkeypatch.setattr(texts, "_PIECE", 500)
    assert "".join(texts._pieces(text)) == text and len(texts._pieces(text)) > 5
    blocks = texts.training_blocks("train_file", str(tmp_path / "text.txt"), "train", with_bos, 50)
    whole = with_bos(text, verbose=False).input_ids
    assert blocks.flatten().tolist() == whole[: len(whole) // 50 * 50]
