"""The metrics against the libraries they come from, against slow twins written from the
definitions, and by hand."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats
from sklearn import metrics as sklearn_metrics

from adaptive_lora.errors import InputError
from adaptive_lora.tasks import metrics
from adaptive_lora.tasks.metrics import (
    classification,
    language_model,
    normalize_answer,
    regression,
    rouge,
    squad,
)

# --- classification
# -------------------------------------------------------------------------------------------------


def one_hot(predicted: list[int], classes: int) -> np.ndarray:
    """Logits (N, C) whose argmax is `predicted`."""
    return np.eye(classes)[predicted]


def classification_twin(predicted: list[int], labels: list[int], classes: int) -> dict[str, float]:
    """From the confusion matrix: matrix[y][ŷ] counts the records of class y called ŷ."""
    matrix = [[0] * classes for _ in range(classes)]
    for truth, guess in zip(labels, predicted, strict=True):
        matrix[truth][guess] += 1
    every = range(classes)
    records = len(labels)
    right = sum(matrix[c][c] for c in every)
    true = [sum(matrix[c]) for c in every]
    called = [sum(matrix[row][c] for row in every) for c in every]

    def f1(c: int) -> Fraction:
        return (
            Fraction(2 * matrix[c][c], true[c] + called[c]) if true[c] + called[c] else Fraction(0)
        )

    seen = [c for c in every if true[c] + called[c]]
    covariance = right * records - sum(true[c] * called[c] for c in every)
    spread = (records**2 - sum(n * n for n in called)) * (records**2 - sum(n * n for n in true))
    twin = {
        "accuracy": right / records,
        "f1_macro": float(sum(map(f1, seen), Fraction(0)) / len(seen)),
        "matthews": covariance / math.sqrt(spread) if spread else 0.0,
    }
    return {**twin, "f1": float(f1(1))} if classes == 2 else twin


@st.composite
def guesses(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    classes = draw(st.integers(1, 5))
    pairs = draw(st.lists(st.tuples(*[st.integers(0, classes - 1)] * 2), min_size=1, max_size=40))
    return [guess for guess, _ in pairs], [truth for _, truth in pairs], classes


@given(guesses())
@example(([0, 0, 0], [0, 0, 0], 2))
@example(([1, 1, 1], [0, 1, 0], 2))
@example((list(range(30)), list(range(30))[::-1], 30))
def test_classification_is_its_twin_and_scikit_learn(
    case: tuple[list[int], list[int], int],
) -> None:
    predicted, labels, classes = case
    values = classification(one_hot(predicted, classes), labels)
    assert values == pytest.approx(classification_twin(*case), abs=1e-12)
    assert values["accuracy"] == sklearn_metrics.accuracy_score(labels, predicted)
    assert values["f1_macro"] == sklearn_metrics.f1_score(
        labels, predicted, average="macro", zero_division=0
    )
    if len({*labels, *predicted}) > 1:
        assert values["matthews"] == pytest.approx(
            sklearn_metrics.matthews_corrcoef(labels, predicted), abs=1e-12
        )
    if classes == 2:
        assert values["f1"] == sklearn_metrics.f1_score(labels, predicted, zero_division=0)
    assert all(type(value) is float for value in values.values())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("classes", [2, 3, 28])
def test_classification_of_random_logits(classes: int, dtype: type) -> None:
    generator = np.random.default_rng(classes)
    logits = generator.normal(size=(500, classes)).astype(dtype)
    labels = generator.integers(0, classes, size=500)
    predicted = [max(range(classes), key=lambda c: row[c]) for row in logits]
    twin = classification_twin(predicted, labels.tolist(), classes)
    assert classification(logits, labels) == pytest.approx(twin, abs=1e-12)


@given(guesses(), st.floats(0.1, 10), st.floats(-5, 5))
def test_only_the_order_within_a_row_counts(
    case: tuple[list[int], list[int], int], scale: float, shift: float
) -> None:
    predicted, labels, classes = case
    logits = one_hot(predicted, classes)
    assert classification(scale * logits + shift, labels) == classification(logits, labels)


@given(guesses(), st.randoms(use_true_random=False))
def test_renaming_the_classes_changes_nothing_but_the_positive_one(
    case: tuple[list[int], list[int], int], source: random.Random
) -> None:
    predicted, labels, classes = case
    names = list(range(classes))
    source.shuffle(names)
    renamed = classification(
        one_hot([names[c] for c in predicted], classes), [names[c] for c in labels]
    )
    values = classification(one_hot(predicted, classes), labels)
    for name in ("accuracy", "f1_macro", "matthews"):
        assert renamed[name] == pytest.approx(values[name], abs=1e-12)


def test_classification_by_hand() -> None:
    """TP 3, FP 1, FN 2, TN 4: F1 = 6/9 and 8/11; MCC = (3·4 - 1·2) / √(4·5·5·6)."""
    labels = [1] * 5 + [0] * 5
    predicted = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert classification(one_hot(predicted, 2), labels) == pytest.approx(
        {
            "accuracy": 0.7,
            "f1_macro": (6 / 9 + 8 / 11) / 2,
            "matthews": 10 / math.sqrt(600),
            "f1": 6 / 9,
        }
    )


def test_only_two_classes_have_a_positive_one() -> None:
    assert "f1" in classification(np.eye(2), [0, 1])
    assert "f1" not in classification(np.eye(3), [0, 1, 2])


def test_a_constant_guess_earns_no_matthews_correlation() -> None:
    assert classification(one_hot([1, 1, 1], 2), [0, 1, 1])["matthews"] == 0.0
    # right, and still nothing told apart
    assert classification(one_hot([1, 1, 1], 2), [1, 1, 1])["matthews"] == 0.0


def test_a_nan_logit_spoils_every_metric_and_a_masked_class_none() -> None:
    logits = np.eye(2)
    logits[0, 0] = np.nan
    assert all(math.isnan(value) for value in classification(logits, [0, 1]).values())
    masked = np.array([[1.0, 0.0, -np.inf], [0.0, 1.0, -np.inf]])
    assert classification(masked, [0, 1])["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((0, 2)), np.zeros(0, dtype=int), "N and C > 0"),
        (np.zeros((2, 0)), [0, 0], "N and C > 0"),
        (np.zeros(3), [0, 0, 0], r"expected \(N, C\)"),
        (np.zeros((3, 2)), [0, 1], r"\(3, 2\) and labels \(2,\)"),
        (np.zeros((2, 2)), [0, 2], r"0 to 2; expected integers in 0\.\.1"),
        (np.zeros((2, 2)), [0, -100], "from -100"),
        (np.zeros((2, 2)), [0.0, 1.0], "float64"),
    ],
)
def test_classification_refuses(logits: np.ndarray, labels: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        classification(logits, labels)  # type: ignore[arg-type]


# --- regression
# -------------------------------------------------------------------------------------------------


def exact_correlation(x: list[Fraction], y: list[Fraction]) -> float:
    mean_x, mean_y = sum(x, Fraction(0)) / len(x), sum(y, Fraction(0)) / len(y)
    together = sum(((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)), Fraction(0))
    alone = sum(((a - mean_x) ** 2 for a in x), Fraction(0)) * sum(
        ((b - mean_y) ** 2 for b in y), Fraction(0)
    )
    if alone == 0:
        return 0.0
    return math.copysign(math.sqrt(together * together / alone), together)


def mean_ranks(values: list[float]) -> list[Fraction]:
    """1 + the number below + half the number of others that tie."""
    return [
        1
        + sum(other < value for other in values)
        + Fraction(sum(other == value for other in values) - 1, 2)
        for value in values
    ]


def regression_twin(predicted: list[float], target: list[float]) -> dict[str, float]:
    x, y = list(map(Fraction, predicted)), list(map(Fraction, target))
    return {
        "pearson": exact_correlation(x, y),
        "spearman": exact_correlation(mean_ranks(predicted), mean_ranks(target)),
        "mse": float(sum(((a - b) ** 2 for a, b in zip(x, y, strict=True)), Fraction(0)) / len(x)),
    }


# Eighths of small numbers: ties are frequent, and nothing is lost before the correlation.
ratings = st.integers(-40, 40).map(lambda n: n / 8)
rating_pairs = st.lists(st.tuples(ratings, ratings), min_size=1, max_size=30)


@given(rating_pairs)
@example([(1.0, 2.0)])
@example([(1.0, 2.0), (1.0, 3.0)])
@example([(1.0, 2.0), (3.0, 2.0)])
def test_regression_is_its_twin_and_scipy(pairs: list[tuple[float, float]]) -> None:
    predicted, target = [a for a, _ in pairs], [b for _, b in pairs]
    values = regression(predicted, target)
    assert values == pytest.approx(regression_twin(predicted, target), abs=1e-12)
    if len(set(predicted)) > 1 and len(set(target)) > 1:
        assert values["pearson"] == stats.pearsonr(predicted, target).statistic
        assert values["spearman"] == stats.spearmanr(predicted, target).statistic
    assert all(type(value) is float for value in values.values())


def test_regression_of_single_precision_outputs() -> None:
    generator = np.random.default_rng(3)
    target = generator.uniform(0, 5, size=200).round(1)
    predicted = (target + generator.normal(size=200)).astype(np.float32)
    twin = regression_twin(predicted.astype(float).tolist(), target.tolist())
    assert regression(predicted, target) == pytest.approx(twin, rel=1e-12)


@given(rating_pairs, st.integers(1, 8), st.integers(-8, 8))
def test_what_correlations_do_not_see(
    pairs: list[tuple[float, float]], scale: int, shift: int
) -> None:
    x, y = np.array(pairs).T
    values = regression(x, y)
    assert regression(y, x) == pytest.approx(values, abs=1e-12)
    moved = regression(scale * x + shift, y)
    assert moved["pearson"] == pytest.approx(values["pearson"], abs=1e-9)
    assert moved["spearman"] == pytest.approx(values["spearman"], abs=1e-12)
    assert regression(np.exp(x), y)["spearman"] == pytest.approx(values["spearman"], abs=1e-12)
    turned = regression(-x, y)
    assert turned["pearson"] == pytest.approx(-values["pearson"], abs=1e-12)
    assert regression(x, x)["mse"] == 0.0


@given(
    st.lists(
        st.tuples(*[st.floats(allow_nan=False, allow_infinity=False, width=32)] * 2),
        min_size=1,
        max_size=10,
    )
)
@example([(1.0, 1.0), (1.0 + 2**-52, 2.0), (1.0, 3.0)])  # constant up to rounding
@example([(0.0, 1.0), (2.0**-149, 2.0)])
def test_every_finite_model_output_has_finite_metrics(pairs: list[tuple[float, float]]) -> None:
    values = regression(*np.array(pairs, dtype=np.float64).T)
    assert all(map(math.isfinite, values.values()))
    assert -1 <= values["pearson"] <= 1
    assert -1 - 1e-12 <= values["spearman"] <= 1 + 1e-12


@pytest.mark.parametrize(
    ("predicted", "target"),
    [([3.0, 3.0, 3.0], [1.0, 2.0, 3.0]), ([1.0, 2.0], [0.5, 0.5]), ([1.0], [2.0])],
)
def test_a_constant_side_has_no_correlation(predicted: list[float], target: list[float]) -> None:
    values = regression(predicted, target)
    assert values["pearson"] == values["spearman"] == 0.0
    assert values["mse"] == np.mean((np.array(predicted) - target) ** 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_regression_on_what_is_not_finite(bad: float) -> None:
    for pair in (([1.0, bad, 2.0], [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], [1.0, bad, 2.0])):
        assert all(math.isnan(value) for value in regression(*pair).values())


def test_an_overflow_is_infinite_and_quiet() -> None:
    assert regression([1e200, -1e200], [0.0, 1.0])["mse"] == math.inf


@pytest.mark.parametrize(
    ("predicted", "target"), [([], []), ([1.0, 2.0], [1.0]), ([[1.0], [2.0]], [1.0, 2.0])]
)
def test_regression_refuses(predicted: list, target: list) -> None:
    with pytest.raises(InputError, match=r"expected \(N,\) and \(N,\)"):
        regression(predicted, target)


# --- ROUGE
# -------------------------------------------------------------------------------------------------


def f_measure(hits: int, found: int, wanted: int) -> float:
    return float(Fraction(2 * hits, found + wanted)) if hits else 0.0


def rouge_n_twin(found: list[str], wanted: list[str], n: int) -> float:
    """Cross each n-gram of the prediction off a list of those of the reference."""
    grams = [found[i : i + n] for i in range(len(found) - n + 1)]
    left = [wanted[i : i + n] for i in range(len(wanted) - n + 1)]
    size, hits = len(left), 0
    for gram in grams:
        if gram in left:
            left.remove(gram)
            hits += 1
    return f_measure(hits, len(grams), size)


def longest_common_subsequence(a: list[str], b: list[str]) -> int:
    """By the recursion of the definition, without a table."""
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + longest_common_subsequence(a[:-1], b[:-1])
    return max(longest_common_subsequence(a[:-1], b), longest_common_subsequence(a, b[:-1]))


# Words of three letters or fewer are not stemmed.
words = st.lists(st.sampled_from(["cat", "dog", "ox", "a", "ran", "7"]), max_size=7)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=4))
@example([(["cat"], ["cat"])])  # no bigram
@example([(["a", "a", "a"], ["a", "a"])])
@example([([], ["a"]), ([], [])])
def test_rouge_is_its_twin(records: list[tuple[list[str], list[str]]]) -> None:
    values = rouge(
        [" ".join(found) for found, _ in records], [" ".join(wanted) for _, wanted in records]
    )
    twin = {
        "rouge1": [rouge_n_twin(found, wanted, 1) for found, wanted in records],
        "rouge2": [rouge_n_twin(found, wanted, 2) for found, wanted in records],
        "rougeL": [f_measure(longest_common_subsequence(f, w), len(f), len(w)) for f, w in records],
    }
    for name, scores in twin.items():
        assert values[name] == pytest.approx(100 * math.fsum(scores) / len(scores), abs=1e-9)
    assert values["rougeLsum"] == pytest.approx(values["rougeL"], abs=1e-9)  # one sentence each


sentences = st.lists(
    st.lists(
        st.sampled_from(["Cats", "running", "Dr", "3.5", "relational", "été", "U.S", "ponies"]),
        min_size=1,
    ).map(" ".join),
    min_size=2,
    max_size=4,
)


@given(st.lists(st.tuples(sentences, sentences), min_size=1, max_size=3))
def test_rouge_is_rouge_score(records: list[tuple[list[str], list[str]]]) -> None:
    predictions, references = (
        ["\n".join(sentences) for sentences in side] for side in zip(*records, strict=True)
    )
    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = RougeScorer(names, use_stemmer=True)
    scores = [
        scorer.score(wanted, found) for found, wanted in zip(predictions, references, strict=True)
    ]
    values = rouge(predictions, references)
    assert list(values) == names
    for name in names:
        assert values[name] == pytest.approx(
            100 * sum(score[name].fmeasure for score in scores) / len(scores)
        )
    # Ends of sentences in one line are as good as lines.
    in_line = rouge(
        *([text.replace("\n", ".  ") + "." for text in side] for side in (predictions, references))
    )
    assert in_line == pytest.approx(values)


@given(words, words)
def test_laws_of_rouge(found: list[str], wanted: list[str]) -> None:
    one, other = " ".join(found), " ".join(wanted)
    values = rouge([one], [other])
    assert all(0 <= value <= 100 for value in values.values())
    assert values == pytest.approx(rouge([other], [one]))  # precision and recall change places
    assert values["rougeL"] <= values["rouge1"] + 1e-9
    assert rouge([one.upper() + " !"], [f"({other})"]) == pytest.approx(values)
    assert rouge([one, one], [other, other]) == pytest.approx(values)
    if len(found) > 1:
        assert rouge([one], [one]) == pytest.approx(dict.fromkeys(values, 100.0))


def test_rouge_by_hand() -> None:
    """The example of Lin 2004, section 3.2: the union of w1 w2 and w1 w3 w5 has 4 of the 5 words of
    the reference."""
    values = rouge(["w1 w3 w8 w9 w5\nw1 w2 w6 w7 w8"], ["w1 w2 w3 w4 w5"])
    assert values["rougeLsum"] == pytest.approx(100 * f_measure(4, 10, 5))
    assert values["rougeL"] == pytest.approx(100 * f_measure(3, 10, 5))
    # Stemmed: "runs" and "running" are both "run"; "ran" is not.
    assert rouge(["running cats"], ["runs cat"])["rouge2"] == pytest.approx(100.0)
    assert rouge(["ran cats"], ["runs cat"])["rouge1"] == pytest.approx(50.0)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One is a cat. It ran!  Did he? Yes.", 4),
        ('He said "no." (She ran.) They’d say ‘yes.’ End', 4),
        ("Up 3.5 points at U.S.A", 1),
        ("Once Mr. Smith ran", 2),  # no list of abbreviations
        ("one. two\nthree. four", 2),  # has lines: they are the sentences
        ("  one. two.\n", 2),
    ],
)
def test_where_sentences_end(text: str, count: int) -> None:
    """Backwards, a sentence of different words has one word in common with itself: ROUGE-Lsum
    counts sentences."""
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in text).split()
    values = rouge([text], [" ".join(words[::-1])])
    assert values["rougeLsum"] == pytest.approx(100 * count / len(words))
    # references too
    assert rouge([" ".join(words[::-1])], [text])["rougeLsum"] == pytest.approx(values["rougeLsum"])


def test_other_scripts_score_nothing() -> None:
    assert rouge(["кошка"], ["кошка"])["rouge1"] == 0.0


@pytest.mark.parametrize(
    ("predictions", "references"), [([], []), (["a"], []), (["a"], ["a", "b"])]
)
def test_rouge_refuses(predictions: list[str], references: list[str]) -> None:
    with pytest.raises(
        InputError, match=f"{len(predictions)} predictions and {len(references)} references"
    ):
        rouge(predictions, references)


# --- SQuAD
# -------------------------------------------------------------------------------------------------


def squad_tokens(text: str) -> list[str]:
    """Lower case; without each ASCII punctuation mark; the words that are no article.

    An article is one between word boundaries, which a sign outside ASCII is as well ("the–cat").
    """
    kept = "".join(c for c in text.lower() if not (33 <= ord(c) <= 126) or c.isalnum())
    runs: list[str] = []  # of word characters and of others, alternately
    for c in kept:
        inside = c.isalnum() or c == "_"
        if runs and (runs[-1][-1].isalnum() or runs[-1][-1] == "_") == inside:
            runs[-1] += c
        else:
            runs.append(c)
    return "".join(" " if run in ("a", "an", "the") else run for run in runs).split()


def squad_twin(predictions: list[str], answers: list[list[str]]) -> dict[str, float]:
    exact = f1 = 0.0
    for prediction, golds in zip(predictions, answers, strict=True):
        tokens = squad_tokens(prediction)
        if not golds:
            exact += not tokens
            f1 += not tokens
            continue
        best = 0.0
        for gold in golds:
            left = squad_tokens(gold)
            size, same = len(left), 0
            for token in tokens:
                if token in left:
                    left.remove(token)
                    same += 1
            if same:
                precision, recall = same / len(tokens), same / size
                best = max(best, 2 * precision * recall / (precision + recall))
        exact += any(tokens == squad_tokens(gold) for gold in golds)
        f1 += best
    return {"exact_match": 100 * exact / len(predictions), "f1": 100 * f1 / len(predictions)}


phrases = st.lists(
    st.sampled_from(
        [
            "the",
            "A",
            "an",
            "cat",
            "Cat.",
            "theatre",
            "U.S.",
            "1,000",
            "the–cat",
            "is",
            "'s",
            "!",
            "  ",
            "é",
        ]
    ),
    max_size=6,
).map(" ".join)
questions = st.lists(st.tuples(phrases, st.lists(phrases, max_size=3)), min_size=1, max_size=5)


@given(questions)
@example([("", [])])
@example([("the", ["a"])])  # version 1.1: an exact match without a token to share
def test_squad_is_its_twin(records: list[tuple[str, list[str]]]) -> None:
    predictions, answers = [found for found, _ in records], [wanted for _, wanted in records]
    values = squad(predictions, answers)
    assert values == pytest.approx(squad_twin(predictions, answers), abs=1e-9)
    assert all(type(value) is float for value in values.values())


@given(st.text(max_size=20))
def test_normalising_is_the_twins_and_settles(text: str) -> None:
    assume(text.lower().upper().lower() == text.lower())  # one-way letters such as "ſ"
    once = normalize_answer(text)
    assert once == " ".join(once.split())
    assert normalize_answer(text.upper()) == once
    assert normalize_answer(f"The {text}?!") == once
    assert not set(once) & set("""!"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~""")
    assert once.split() == squad_tokens(text)


@given(questions)
def test_what_squad_does_not_see(records: list[tuple[str, list[str]]]) -> None:
    predictions, answers = [found for found, _ in records], [wanted for _, wanted in records]
    values = squad(predictions, answers)
    for same in (
        str.upper,
        lambda text: f"the {text}",
        lambda text: f"({text} )!",
        lambda text: f"\t{text}\n",
    ):
        assert squad([same(text) for text in predictions], answers) == pytest.approx(values)
    assert squad(predictions, [wanted[::-1] for wanted in answers]) == pytest.approx(values)
    more = squad(predictions, [[*wanted, "cat"] if wanted else [] for wanted in answers])
    assert all(more[name] >= values[name] - 1e-9 for name in values)  # the best gold answer counts


@pytest.mark.parametrize(
    ("prediction", "golds", "exact", "f1"),
    [
        ("Denver Broncos", ["The Denver Broncos", "Broncos"], 100, 100),
        ("the Broncos of Denver", ["Denver Broncos"], 0, 100 * 2 * (2 / 3) / (2 / 3 + 1)),
        ("cat cat", ["cat"], 0, 100 * 2 * 0.5 / 1.5),
        (
            "Santa Clara, California",
            ["Levi's Stadium", "santa-clara california"],
            0,
            100 * 2 * (1 / 3) / (1 / 3 + 1 / 2) / 2,
        ),
        ("dog", ["cat"], 0, 0),
        ("", ["cat"], 0, 0),
        ("", [], 100, 100),
        (" The. ", [], 100, 100),
        ("cat", [], 0, 0),
        ("the", ["a"], 100, 0),
    ],
)
def test_squad_by_hand(prediction: str, golds: list[str], exact: float, f1: float) -> None:
    assert squad([prediction], [golds]) == pytest.approx({"exact_match": exact, "f1": f1})


def test_normalising_by_hand() -> None:
    assert normalize_answer("A Theatre, an anthem & the\n\u00a0end_ing") == "theatre anthem ending"
    assert normalize_answer("a-the") == "athe"  # punctuation goes before the articles
    assert normalize_answer("“the”") == "“ ”"  # and only ASCII punctuation goes


@pytest.mark.parametrize(
    ("predictions", "answers"), [([], []), (["a"], []), (["a"], [["a"], ["b"]])]
)
def test_squad_refuses(predictions: list[str], answers: list[list[str]]) -> None:
    with pytest.raises(
        InputError, match=f"{len(predictions)} predictions and {len(answers)} answers"
    ):
        squad(predictions, answers)


# --- language modelling
# -------------------------------------------------------------------------------------------------

counts = st.integers(1, 10**9)


@given(counts)
def test_a_uniform_model_over_bytes_needs_eight_bits_per_byte(size: int) -> None:
    values = language_model(size * math.log(256), tokens=size, byte_count=size)
    assert values["bits_per_byte"] == 8.0
    assert values["perplexity"] == pytest.approx(256)
    assert values["token_loss"] == pytest.approx(math.log(256))


@given(st.floats(0, 1e12), counts, counts, st.integers(2, 9))
def test_merging_tokens_changes_perplexity_and_not_bits_per_byte(
    nll: float, tokens: int, byte_count: int, merged: int
) -> None:
    fine, coarse = (
        language_model(nll, tokens * merged, byte_count),
        language_model(nll, tokens, byte_count),
    )
    assert fine["bits_per_byte"] == coarse["bits_per_byte"]
    assert coarse["token_loss"] == pytest.approx(merged * fine["token_loss"])
    if coarse["token_loss"] < 100:
        assert coarse["perplexity"] == pytest.approx(fine["perplexity"] ** merged)
    # Either way the text costs the same: tokens · log2(perplexity) = bytes · bits per byte.
    if fine["token_loss"] < 700:
        bits = tokens * merged * math.log2(fine["perplexity"])
        assert bits == pytest.approx(byte_count * fine["bits_per_byte"], abs=1e-6 * tokens)


@given(st.lists(st.lists(st.floats(2**-20, 1), min_size=1, max_size=6), min_size=1, max_size=6))
def test_perplexity_is_the_inverse_geometric_mean_of_the_probabilities(
    records: list[list[float]],
) -> None:
    """Over all the tokens at once: a short record weighs less than a long one."""
    tokens = sum(map(len, records))
    product = math.prod(Fraction(p) for record in records for p in record)
    values = language_model(
        sum(-math.log(p) for record in records for p in record), tokens, 3 * tokens
    )
    assert values["perplexity"] == pytest.approx(float(1 / product) ** (1 / tokens))
    assert values["bits_per_byte"] == pytest.approx(
        math.log2(1 / product) / (3 * tokens), abs=1e-12
    )


def test_a_hopeless_model_has_a_finite_perplexity() -> None:
    assert (
        language_model(1e6, 1, 1)["perplexity"]
        == language_model(700.0, 1, 1)["perplexity"]
        == math.exp(700)
    )
    assert language_model(1e6, 1, 1)["token_loss"] == 1e6


def test_a_certain_model_has_nothing_to_tell() -> None:
    assert language_model(0.0, 5, 9) == {"token_loss": 0.0, "perplexity": 1.0, "bits_per_byte": 0.0}


def test_language_model_on_what_is_not_finite() -> None:
    assert all(math.isnan(value) for value in language_model(math.nan, 2, 3).values())
    values = language_model(math.inf, 2, 3)
    assert values["token_loss"] == values["bits_per_byte"] == math.inf


def test_language_model_takes_numpy_numbers() -> None:
    values = language_model(np.float32(2.0), np.int64(2), np.int64(4))  # type: ignore[arg-type]
    assert all(type(value) is float for value in values.values())


@pytest.mark.parametrize(("tokens", "byte_count"), [(0, 5), (5, 0), (0, 0), (-1, 5)])
def test_language_model_refuses(tokens: int, byte_count: int) -> None:
    with pytest.raises(InputError, match=f"{tokens} tokens bear loss and spell {byte_count} bytes"):
        language_model(1.0, tokens, byte_count)


# --- the module
# -------------------------------------------------------------------------------------------------


def test_the_module_waits_for_neither_torch_nor_nltk() -> None:
    """A real process, and the file by itself: the package around it imports torch."""
    script = (
        "import sys, importlib.util as util\n"
        f"spec = util.spec_from_file_location('metrics', {metrics.__file__!r})\n"
        "spec.loader.exec_module(util.module_from_spec(spec))\n"
        "print(sorted({'nltk', 'rouge_score', 'torch', 'transformers'} & set(sys.modules)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert ended.stdout == "[]\n"
