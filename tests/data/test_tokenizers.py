"""Published tokenizers' files give ids with their special tokens, or say in one line why not."""

import builtins
import io

import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.data.tokenizers import open_tokenizer, tokenize
from tests.tiny_text import WORDS, write_tokenizer

pytest.importorskip("tokenizers")
sentencepiece = pytest.importorskip("sentencepiece")


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["a red circle moves left", "a blue square moves right"] * 20),
        model_writer=model, vocab_size=24, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2)
    (folder / "spiece.model").write_bytes(model.getvalue())
    return folder / "spiece.model"


def test_a_json_file_gives_the_words_their_end_and_padding(tmp_path):
    tokenizer = open_tokenizer(write_tokenizer(tmp_path))
    ids, mask = tokenize(tokenizer, "A red  circle", 6)
    assert list(ids) == [WORDS.index(word) for word in ("a", "red", "circle")] + [1, 0, 0]
    assert list(mask) == [1, 1, 1, 1, 0, 0]
    assert list(tokenize(tokenizer, "", 2)[0]) == [1, 0], "the empty text is its end alone"
    assert open_tokenizer(tmp_path).digest == tokenizer.digest


def test_a_sentencepiece_file_gives_its_pieces_their_end_and_padding(sentencepiece_file):
    tokenizer = open_tokenizer(sentencepiece_file.parent)
    ids, mask = tokenize(tokenizer, "a red circle", 24)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    expected = pieces.encode("a red circle") + [1]
    assert list(ids) == expected + [0] * (24 - len(expected)) and mask.sum() == len(expected)
    assert list(tokenize(tokenizer, "", 2)[0]) == [1, 0]


def test_a_text_over_its_budget_is_refused_or_cut_before_its_end(tmp_path, sentencepiece_file):
    for file in (write_tokenizer(tmp_path), sentencepiece_file):
        tokenizer = open_tokenizer(file)
        with pytest.raises(UserError, match=r"tokens and its budget is .* = 3: 'a red circle'"):
            tokenize(tokenizer, "a red circle", 3)
        whole, _ = tokenize(tokenizer, "a red circle", 24)
        ids, mask = tokenize(tokenizer, "a red circle", 3, truncate=True)
        assert list(ids) == [*whole[:2], 1] and np.all(mask == 1)
        assert list(tokenize(tokenizer, "a red circle", 24)[0]) == list(whole), "nothing stuck"


def test_the_padding_that_the_model_names_is_taken(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": {"content": "<unk>"}}')
    assert list(tokenize(open_tokenizer(tmp_path), "", 3)[0]) == [1, 2, 2]


@pytest.mark.parametrize("name, content, words", [
    ("tokenizer.json", "{", "tokenizer.json cannot be read as a tokenizer"),
    ("spiece.model", "no model", "spiece.model cannot be read as a tokenizer"),
    ("vocab.txt", "a", "should end in .json or .model"),
])
def test_a_damaged_or_foreign_file_is_refused_in_one_line(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        open_tokenizer(tmp_path / name)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="there is no tokenizer at .*nowhere"):
        open_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no tokenizer: none of tokenizer.json"):
        (tmp_path / "empty").mkdir()
        open_tokenizer(tmp_path / "empty")


@pytest.mark.parametrize("package, name", [
    ("tokenizers", "tokenizer.json"), ("sentencepiece", "spiece.model")])
def test_a_missing_package_is_named_with_the_remedy(tmp_path, monkeypatch, package, name):
    (tmp_path / name).write_text("{}")
    real = builtins.__import__

    def without(asked, *arguments, **options):
        if asked == package:
            raise ModuleNotFoundError(f"No module named {asked!r}", name=asked)
        return real(asked, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=rf"needs the package {package}; pip install '.\[text\]'"):
        open_tokenizer(tmp_path / name)
