"""experiments/imdb.py on the real reviews: what is held out is held out, and the gold reads what it should."""

import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
REVIEWS = [("a great film , truly great", 9), ("dull and bad", 2), ("a great cast", 8), ("bad , bad acting", 1)] * 5


@pytest.fixture
def imdb(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    if not (data_dir / "imdb").is_dir():
        pytest.skip(f"no reviews at {data_dir / 'imdb'}")
    monkeypatch.setenv("RTO_DATA", str(data_dir))
    monkeypatch.setenv("RTO_RUNS", str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT))
    for name in [m for m in sys.modules if m.startswith("experiments")]:
        monkeypatch.delitem(sys.modules, name)
    from experiments import imdb as module

    yield module
    module.regressor.cache_clear()


@pytest.fixture
def fitted(imdb: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(imdb, "labelled", lambda: {"train": REVIEWS, "test": REVIEWS})
    imdb.fit_gold(penalty=1.0)
    return imdb


@pytest.mark.slow
def test_held_out_reviews_are_held_out(imdb: ModuleType) -> None:
    halves = imdb.labelled()
    texts = {half: [text for text, _ in rows] for half, rows in halves.items()}
    train, test = set(texts["train"]), set(texts["test"])
    assert (len(train), len(test)) == (len(texts["train"]), len(texts["test"]))  # no text twice
    assert not train & test
    assert 49_000 < len(train | test) < 50_000 - 400  # 418 duplicates among the labelled
    assert not any("<br" in text for text in train | test)
    read = set(imdb.language_texts())
    assert len(read) > 70_000
    assert not read & test
    starts: dict[str, set[int]] = {}
    for text in test:
        for n in range(4, 9):
            starts.setdefault(" ".join(text.split()[:n]), set()).add(zlib.crc32(text.encode()) % 10)
    asked = {split: set(imdb.openings(200, 0, split)) for split in imdb.SPLITS}
    for split, found in asked.items():
        assert len(found) == 200
        assert all(4 <= len(text.split()) <= 8 for text in found)
        assert all(starts[text] & set(imdb.SPLITS[split]) for text in found)
    with pytest.raises(ValueError, match="99999 openings are asked for, split 'test' has"):
        imdb.openings(99999, 0, "test")


def test_features_count_once(imdb: ModuleType) -> None:
    once, twice = imdb.features(["good film", "Good film good film"]).toarray()
    assert once.sum() == 3  # good, film, good film
    assert twice.sum() == 4  # and: film good
    assert set(np.unique(twice)) == {0, 1}


def test_gold_is_the_ridge_solution(fitted: ModuleType) -> None:
    """The normal equations, solved densely."""
    texts, targets = fitted.pieces(REVIEWS, fitted.PIECE)
    counts = fitted.features(texts).toarray()
    used = np.flatnonzero(counts.any(0))
    idf = np.log((1 + len(texts)) / (1 + counts[:, used].sum(0))) + 1
    x = counts[:, used] * idf
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    w = np.linalg.solve(x.T @ x + np.eye(len(used)), x.T @ (targets - targets.mean()))
    np.testing.assert_allclose(fitted.predict(texts), x @ w, atol=2e-3)


def test_gold_prefers_praise_and_is_not_paid_for_saying_it_again(fitted: ModuleType) -> None:
    good, bad, again = fitted.rating(["the film is"] * 3, [" great", " bad", " great great great great"])
    assert good > 0 > bad
    assert again <= good + 0.05
    assert fitted.rating([""], [""]) == [0.0]


def test_a_missing_gold_is_told(imdb: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"fit it with python experiments/imdb\.py gold"):
        imdb.rating(["a"], ["b"])
    with pytest.raises(ValueError, match=r"train it with python experiments/imdb\.py lm"):
        imdb.language_model(0)


def test_rows_of_the_language_model_end_where_reviews_do(imdb: ModuleType) -> None:
    from rto.demo.embedded import build_tokenizer

    tokenizer = build_tokenizer(["a b c d"] * 4, vocab_size=300)
    text = "abcd" * 60  # 240 tokens and EOS: a full row and one of 113
    rows = imdb.token_blocks(tokenizer, [text])
    assert rows.shape[1] == imdb.CONTEXT
    assert (rows[0] != tokenizer.pad_token_id).any()
    assert sum(int((row == tokenizer.eos_token_id).sum()) for row in rows) <= 1
    assert tokenizer.decode([i for row in rows for i in row if i > 2]).startswith("abcdabcd")
