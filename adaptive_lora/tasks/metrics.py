"""What an evaluation reports: predictions and truth in, numbers out. Pure; no torch.

Symbols: N records, C classes. Every function returns Python floats. Input that is not finite gives
metrics that are not finite, never a number that looks like a result: `AdaptiveTrainer.evaluate`
turns those into a `DivergedError`.
"""

from __future__ import annotations

import math
import re
import string
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from adaptive_lora.errors import InputError

# By packages, and not by `evaluate`, which downloads and runs a script for each metric.
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
LARGEST_EXPONENT = 700.0  # e^709 is the largest power of e that a float holds
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+")
# IOB1, IOB2, IOBES and BILOU: how a tag begins, in the letters of IOBES
_PREFIXES = {"B": "B", "I": "I", "E": "E", "S": "S", "L": "E", "U": "S"}
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def classification(logits: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Return accuracy, macro F1 and Matthews' correlation of ŷ_n = argmax_c logits_nc; with two
    classes also F1.

    F1_c = 2 TP_c / (2 TP_c + FP_c + FN_c); f1_macro is its mean over the classes that occur in y or
    ŷ (0 for one that is never right), f1 is F1_1: class 1 is the positive one. With K the confusion
    matrix, t = K 1, p = Kᵀ 1 and N = Σ K, matthews = (N tr K - t·p) / √((N² - p·p)(N² - t·t)), in
    [-1, 1], and 0.0 where ŷ or y is constant.

    logits (N, C), of which only the order within a row matters; labels (N,), integers in 0..C-1.
    Raises `InputError` for no records, other shapes, or a label that is not a class. A NaN among
    the logits makes every metric NaN; infinities are ordered as they are (a masked class is -inf).
    Source: Matthews 1975 for two classes, Gorodkin 2004 for more; GLUE (arXiv 1804.07461) takes it
    for CoLA.

    >>> classification([[2.0, 1.0], [0.0, 3.0], [1.0, 5.0], [4.0, 0.0]], [0, 1, 1, 0])
    {'accuracy': 1.0, 'f1_macro': 1.0, 'matthews': 1.0, 'f1': 1.0}
    """
    scores, truth = np.asarray(logits), np.asarray(labels)
    if scores.ndim != 2 or truth.shape != scores.shape[:1] or not scores.size:
        raise InputError(
            f"logits are {scores.shape} and labels {truth.shape}; expected (N, C) and (N,), N and "
            "C > 0"
        )
    classes = scores.shape[1]
    if not np.issubdtype(truth.dtype, np.integer) or truth.min() < 0 or truth.max() >= classes:
        raise InputError(
            f"labels are {truth.dtype} from {truth.min()} to {truth.max()}; expected integers in "
            f"0..{classes - 1}: leave out the records that have no label"
        )
    names = ["accuracy", "f1_macro", "matthews", *(["f1"] if classes == 2 else [])]
    if np.isnan(scores).any():
        return dict.fromkeys(names, math.nan)
    predicted = scores.argmax(axis=1)
    values = {
        "accuracy": float(accuracy_score(truth, predicted)),
        "f1_macro": float(f1_score(truth, predicted, average="macro", zero_division=0)),
        "matthews": 0.0 if np.ptp(predicted) == 0 else float(matthews_corrcoef(truth, predicted)),
    }
    if classes == 2:
        values["f1"] = float(
            f1_score(truth, predicted, pos_label=1, average="binary", zero_division=0)
        )
    return values


def multi_label(logits: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Return micro and macro F1 of ŷ_nc = [logit_nc > 0], and the share of records that are wholly
    right.

    With TP, FP and FN counted over all records and classes, f1_micro = 2 TP / (2 TP + FP + FN).
    F1_c is the same of class c alone, and f1_macro its mean over the classes that occur in y or ŷ.
    Both are 0.0 where nothing occurs. exact_match = #{n: ŷ_n = y_n} / N, in [0, 1].

    logits (N, C); labels (N, C), zeros and ones. Raises `InputError` for no records, other shapes,
    or other labels. A NaN among the logits makes every metric NaN.

    >>> multi_label([[1.0, -1.0], [1.0, 2.0]], [[1, 0], [0, 1]])["exact_match"]
    0.5
    """
    scores, truth = np.asarray(logits), np.asarray(labels)
    if scores.ndim != 2 or truth.shape != scores.shape or not scores.size:
        raise InputError(
            f"logits are {scores.shape} and labels {truth.shape}; expected (N, C) twice, N and C "
            "> 0"
        )
    if not np.isin(truth, (0, 1)).all():
        raise InputError("labels are neither 0 nor 1; expected one of both for each class")
    if np.isnan(scores).any():
        return dict.fromkeys(("f1_micro", "f1_macro", "exact_match"), math.nan)
    found, wanted = scores > 0, truth == 1
    right, all_of = (found & wanted).sum(axis=0), found.sum(axis=0) + wanted.sum(axis=0)
    occur = all_of > 0
    return {
        "f1_micro": _share(2 * int(right.sum()), int(all_of.sum())),
        "f1_macro": float(np.mean(2 * right[occur] / all_of[occur])) if occur.any() else 0.0,
        "exact_match": float((found == wanted).all(axis=1).mean()),
    }


def names_entities(tags: Iterable[str]) -> bool:
    """Return whether tags say where entities begin and end: "O", and B-, I-, E-, S- (L-, U-) before
    a type, or alone.

    >>> names_entities(["O", "B-PER", "I-PER"]), names_entities(["NOUN", "VERB"])
    (True, False)
    """
    others = [tag for tag in tags if tag != "O"]
    return bool(others) and all(tag[:1] in _PREFIXES and tag[1:2] in ("", "-") for tag in others)


def spans(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """Return (first word, last word, type) of each entity of one sentence.

    A word goes on with the entity of the word before it when both are of one type, that one began
    or was inside (B, I), and this one is inside or ends (I, E); any other word that is not "O"
    opens an entity, with whatever letter: CoNLL-2000's rule, as seqeval has it by default. L is E
    and U is S.

    >>> spans(["B-PER", "I-PER", "O", "I-LOC", "I-ORG", "B-ORG"])
    [(0, 1, 'PER'), (3, 3, 'LOC'), (4, 4, 'ORG'), (5, 5, 'ORG')]
    """
    found: list[tuple[int, int, str]] = []
    before = ("O", "")
    for place, tag in enumerate(tags):
        letter, kind = _PREFIXES.get(tag[:1], "O"), tag[2:]
        if letter in "IE" and before[0] in "BI" and before[1] == kind:
            found[-1] = (found[-1][0], place, kind)
        elif letter != "O":
            found.append((place, place, kind))
        before = (letter, kind)
    return found


def entities(
    predicted: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Return F1, precision and recall of whole entities, and the accuracy of tags, in [0, 1].

    An entity is right when its first word, last word and type are. Over all sentences, with TP the
    right ones, P those predicted and T those there are: precision = TP / P, recall = TP / T, f1 =
    2 TP / (P + T); each is 0.0 where it would be 0 / 0. Entities are those of `spans`.

    predicted, truth: N sentences, each with a tag for every word. Raises `InputError` for no word,
    or other lengths. Source: Tjong Kim Sang and De Meulder 2003 (aclanthology.org/W03-0419).

    >>> entities([["B-PER", "O", "B-LOC"]], [["B-PER", "I-PER", "B-LOC"]])["f1"]
    0.5
    """
    accuracy = _tag_accuracy(predicted, truth)
    pairs = [(set(spans(p)), set(spans(t))) for p, t in zip(predicted, truth, strict=True)]
    right = sum(len(p & t) for p, t in pairs)
    given, wanted = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
    return {
        "f1": _share(2 * right, given + wanted),
        "precision": _share(right, given),
        "recall": _share(right, wanted),
        "accuracy": accuracy,
    }


def tags(predicted: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the accuracy of tags that name no entities (parts of speech), and their macro F1.

    Arguments and errors as of `entities`; f1_macro as of `classification`.

    >>> tags([["NOUN", "VERB"]], [["NOUN", "NOUN"]])["accuracy"]
    0.5
    """
    accuracy = _tag_accuracy(predicted, truth)
    found, wanted = ([tag for tags in side for tag in tags] for side in (predicted, truth))
    macro = float(f1_score(wanted, found, average="macro", zero_division=0))
    return {"accuracy": accuracy, "f1_macro": macro}


def _tag_accuracy(predicted: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> float:
    words = [len(tags) for tags in truth]
    if not sum(words) or [len(tags) for tags in predicted] != words:
        raise InputError(
            f"{len(predicted)} predicted sentences and {len(truth)} true ones; expected a tag for "
            "every word of each, and one word at least"
        )
    pairs = zip(predicted, truth, strict=True)
    return sum(sum(map(str.__eq__, p, t)) for p, t in pairs) / sum(words)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def regression(predicted: ArrayLike, target: ArrayLike) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation and the mean squared error.

    pearson = Σ (x - x̄)(y - ȳ) / √(Σ (x - x̄)² Σ (y - ȳ)²); spearman is pearson of the ranks, ties
    at their mean rank; mse = Σ (x - y)² / N, in the target's unit squared. Where a side is
    constant, a single record included, a correlation is undefined: it is given as 0.0, as a model
    that says the same of every record has found nothing.

    predicted (N,), target (N,); a model's (N, 1) must be flattened first. Computed in double
    precision. Raises `InputError` for no records or other shapes. A NaN or an infinity on either
    side makes every metric NaN; an mse too large for a float is infinite. Source: GLUE (arXiv
    1804.07461) takes both correlations for STS-B.

    >>> regression([1.0, 2.0, 4.0], [1.0, 2.0, 3.0])["spearman"]
    1.0
    >>> regression([5.0, 5.0], [1.0, 2.0])
    {'pearson': 0.0, 'spearman': 0.0, 'mse': 12.5}
    """
    x, y = np.asarray(predicted, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or not x.size:
        raise InputError(
            f"predictions are {x.shape} and targets {y.shape}; expected (N,) and (N,), N > 0"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return dict.fromkeys(("pearson", "spearman", "mse"), math.nan)
    pearson = spearman = 0.0
    with np.errstate(over="ignore", invalid="ignore"), warnings.catch_warnings():
        # a collapsed model's correlation is mere noise
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        if (x != x[0]).any() and (y != y[0]).any():
            pearson, spearman = (
                float(stats.pearsonr(x, y).statistic),
                float(stats.spearmanr(x, y).statistic),
            )
        return {"pearson": pearson, "spearman": spearman, "mse": float(np.mean(np.square(x - y)))}


def rouge(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]]
) -> dict[str, float]:
    """Return the mean ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum F-measures over the records, in
    percent (0..100). Of several references of a record the best counts, for each of the four.

    F = 2 P R / (P + R), with P = hits / |prediction| and R = hits / |reference|. ROUGE-n: hits and
    sizes in n-grams, each hit counted as often as both have it. ROUGE-L: hits = the longest common
    subsequence, in tokens. ROUGE-Lsum: for each sentence of the reference the union of its longest
    common subsequences with the sentences of the prediction. Tokens are runs of a-z and 0-9 after
    lower-casing, Porter-stemmed where longer than 3: other scripts score 0.

    predictions: N texts; references: N texts, or lists of at least one. One sentence per line, as
    CNN/DailyMail highlights have it. A text in one line is split after ".", "!" or "?" and white
    space, with no list of abbreviations ("Mr. Smith" ends a sentence). Only ROUGE-Lsum sees
    sentences. An empty text, or one that is too short for an n-gram, scores 0. Raises `InputError`
    when there are no records or the lists differ in length. Source: Lin 2004
    (aclanthology.org/W04-1013), by the rouge-score package.

    >>> scores = rouge(["The cat sat. It slept."], ["the cat sat\\nit ate"])
    >>> {name: round(score, 1) for name, score in scores.items()}
    {'rouge1': 80.0, 'rouge2': 75.0, 'rougeL': 80.0, 'rougeLsum': 80.0}
    """
    from rouge_score.rouge_scorer import RougeScorer  # here: it imports nltk, which takes a second

    _check_paired("references", predictions, references)
    scorer = RougeScorer(list(ROUGE_TYPES), use_stemmer=True)
    best: dict[str, list[float]] = {name: [] for name in ROUGE_TYPES}
    for prediction, given in zip(predictions, references, strict=True):
        written = _sentence_per_line(prediction)
        scores = [
            scorer.score(target=_sentence_per_line(reference), prediction=written)
            for reference in ([given] if isinstance(given, str) else given)
        ]
        for name, values in best.items():
            values.append(max(score[name].fmeasure for score in scores))
    return {name: 100.0 * fmean(values) for name, values in best.items()}


def _sentence_per_line(text: str) -> str:
    """Return `text` with each sentence in its own line; what has lines already is left as it is."""
    stripped = text.strip()
    return stripped if "\n" in stripped else _SENTENCE_END.sub("\n", stripped)


def normalize_answer(text: str) -> str:
    """Return `text` as SQuAD compares it: lower case, no ASCII punctuation, no a/an/the, single
    spaces, in that order.

    Source: the SQuAD evaluation script (arXiv 1606.05250).

    >>> normalize_answer("  The U.S.   Constitution! ")
    'us constitution'
    """
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def squad(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return SQuAD's exact match and token F1: per record the best over its gold answers, then the
    mean, in percent.

    F1 = 2 s / (|p| + |g|) for the tokens p of the prediction and g of a gold answer, both
    normalised; s is the number of tokens they share, each as often as both have it. F1 is 0 when
    they share none, even if both are empty. A record without gold answers (SQuAD 2.0: unanswerable)
    scores 1 in both if the prediction normalises to "", else 0.

    predictions: N texts, "" to abstain; answers: N lists of gold answers, which may be empty.
    Raises `InputError` when there are no records or the lists differ in length. Source:
    evaluate-v1.1.py (SQuAD, arXiv 1606.05250); unanswerable records as SQuAD 2.0 (arXiv 1806.03822)
    has them.

    >>> squad(["the cat", "a black cat", "", "dog"], [["Cat."], ["white cat", "dog"], [], []])
    {'exact_match': 50.0, 'f1': 62.5}
    """
    _check_paired("answers", predictions, answers)
    exact, f1 = [], []
    for prediction, golds in zip(predictions, answers, strict=True):
        found = normalize_answer(prediction)
        wanted = [normalize_answer(gold) for gold in golds]
        if wanted:
            exact.append(float(found in wanted))
            f1.append(max(_token_f1(found.split(), gold.split()) for gold in wanted))
        else:
            exact.append(float(found == ""))
            f1.append(exact[-1])
    return {"exact_match": 100.0 * fmean(exact), "f1": 100.0 * fmean(f1)}


def _token_f1(found: list[str], wanted: list[str]) -> float:
    shared = (Counter(found) & Counter(wanted)).total()
    return 2.0 * shared / (len(found) + len(wanted)) if shared else 0.0


def language_model(nll: float, tokens: int, byte_count: int) -> dict[str, float]:
    """Return the loss per token, its perplexity, and the bits per byte, which do not depend on the
    tokenizer.

    token_loss = nll / tokens, in nats; perplexity = exp(min(token_loss, 700)); bits_per_byte = nll
    / (ln 2 · bytes).

    nll: total negative log-likelihood in nats, of all the tokens that bear loss; tokens: how many
    those are; byte_count: the UTF-8 bytes of the text they spell. Raises `InputError` when there
    are no tokens or no bytes. A NaN nll makes every metric NaN, an infinite one the loss and the
    bits per byte: perplexity stops at e^700. Source: bits per byte as in the Pile (arXiv
    2101.00027, section 3.1).

    >>> language_model(math.log(4) * 10, tokens=10, byte_count=20)["bits_per_byte"]
    1.0
    """
    if tokens <= 0 or byte_count <= 0:
        raise InputError(
            f"{tokens} tokens bear loss and spell {byte_count} bytes; expected at least one of "
            "each: check that the evaluation records have text to predict"
        )
    loss = float(nll / tokens)
    return {
        "token_loss": loss,
        "perplexity": math.exp(min(loss, LARGEST_EXPONENT)),
        "bits_per_byte": float(nll / (math.log(2.0) * byte_count)),
    }


def _check_paired(name: str, predictions: Sequence[str], truth: Sequence[Any]) -> None:
    if not predictions or len(predictions) != len(truth):
        raise InputError(
            f"{len(predictions)} predictions and {len(truth)} {name}; expected one for each, and "
            "one at least"
        )
