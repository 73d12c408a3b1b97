"""Tokenizers from local files; needs the extra `text`, which `dev` has."""

import pytest

from crcm_jax import models

TEXTS = ["a cat sits on a mat", "the dog and the cat", "a man walks a dog"] * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The same pieces as a tokenizer.json and as a sentencepiece model."""
  tokenizers = pytest.importorskip("tokenizers")
  spm = pytest.importorskip("sentencepiece")
  folder = tmp_path_factory.mktemp("tokenizer")
  spm.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS),
    model_prefix=str(folder / "spiece"),
    vocab_size=22,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    minloglevel=2,
  )
  pieces = spm.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
  vocabulary = [
    (pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))
  ]
  unigram = tokenizers.models.Unigram(vocabulary, unk_id=2)
  tokenizer = tokenizers.Tokenizer(unigram)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="$A </s>", special_tokens=[("</s>", 1)]
  )
  # As files on the Hub have it: to be ignored, prompts have another length.
  tokenizer.enable_truncation(4)
  tokenizer.enable_padding(length=4)
  tokenizer.save(str(folder / "tokenizer.json"))
  return folder


def test_both_files_give_the_same_tokens(folder):
  from_json = models.load_tokenizer(folder / "tokenizer.json")
  from_spm = models.load_tokenizer(folder / "spiece.model")
  assert models.load_tokenizer(folder)("a cat") == from_json("a cat")
  for text in (TEXTS[0], "the mat walks", "", "zebra"):
    tokens = from_json(text)
    assert tokens == from_spm(text)
    assert tokens[-1] == 1
    assert 0 not in tokens
    assert tokens.count(1) == 1
  assert len(from_json(" ".join(TEXTS))) > 100


def test_what_is_no_tokenizer(folder, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"google/umt5-xxl"):
    models.load_tokenizer(tmp_path)
  for name in ("tokenizer.json", "spiece.model"):
    path = tmp_path / name
    path.write_text("<html>")
    with pytest.raises(ValueError, match=r"must be a tokenizer.json or a sen"):
      models.load_tokenizer(path)
