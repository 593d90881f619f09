"""Extractive question answering: where in the context the answer begins and ends. Long contexts by
overlapping windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding

from adaptive_lora.errors import InputError
from adaptive_lora.tasks import metrics
from adaptive_lora.tasks.base import ROW, Task
from adaptive_lora.tasks.data import RECORD, Split

# starts and ends of a window that are tried with each other, as in the BERT paper's code
N_BEST = 20
SPANS, CONTEXT, ANSWERS = "spans", "context_text", "answer_texts"
_READ = ("input_ids", "attention_mask", "token_type_ids", "start_positions", "end_positions")


class QuestionAnswering(Task):
    """Exact match and F1 of the SQuAD evaluation.

    A context too long for one window is read in several, which overlap by `data.stride` tokens;
    where a window does not hold the answer, its label is the first token ([CLS]). `data.too_long`
    is about questions that leave a window no room: they cannot be cut, only dropped or refused. The
    answer to a record is the span of largest start + end logit over its windows; "" if the training
    records have unanswerable ones and the first token scores higher. Source: Devlin et al. 2019,
    arXiv 1810.04805, sections 4.2 and 4.3.
    """

    auto_class = AutoModelForQuestionAnswering
    metrics = ("f1", "exact_match")

    def features(self, split: Split, *, labelled: bool = True) -> Dataset:
        data = self.data
        split.require(data.question, data.context, *([data.answers] if labelled else []))
        contexts = split.texts(data.context)
        answers: list[list[tuple[int, str]]] = [[] for _ in contexts]
        if labelled:
            answers = [self._answers(split, row, text) for row, text in enumerate(contexts)]
        encoded, rows, spans, kept = self._windows(split, contexts, labelled)
        places = [_locate(span, answers[row]) for span, row in zip(spans, rows, strict=True)]
        columns: dict[str, Any] = {key: value for key, value in encoded.items() if key in _READ}
        columns |= {
            SPANS: spans,
            CONTEXT: [contexts[row] for row in rows],
            ANSWERS: [[text for _, text in answers[row]] for row in rows],
            ROW: rows,
        }
        if labelled:
            starts, ends = zip(*places, strict=True)
            columns |= {"start_positions": list(starts), "end_positions": list(ends)}
        found = [row for row, (start, _) in zip(rows, places, strict=True) if start]
        self._say(split, kept, rows, found, answers if labelled else None)
        return self._checked(Dataset.from_dict(columns), split)

    def _say(
        self, split: Split, kept: list[int], rows: list[int], found: list[int], answers: Any
    ) -> None:
        """Note how many windows there are, and how many hold their answer (in the rows `found`).

        Raises `InputError` when records have answers and no window holds one.
        """
        note = (
            f"{split.part}: {len(kept):,} records in {len(rows):,} windows of at most "
            f"{self.longest:,} tokens ({len(rows) - len(kept):,} more than records)"
        )
        if answers is not None:
            lost = sum(bool(answers[row]) for row in set(kept) - set(found))
            note += (
                f"; {len(found):,} windows hold their answer; {lost:,} records have an answer that "
                "no window holds whole"
            )
        self.notes.append(note)
        if answers is not None and not found:
            raise InputError(
                f"{split.source}: no window of any {split.part} record holds its answer; nothing "
                "to learn from"
            )

    def _windows(
        self, split: Split, contexts: list[str], labelled: bool
    ) -> tuple[Any, list[int], list[list[list[int]]], list[int]]:
        """Return (what the tokenizer gives, the row of each window, the characters of the context
        that its tokens stand for, the rows that are kept)."""
        if not self.tokenizer.is_fast:
            raise InputError(
                f"{type(self.tokenizer).__name__} gives no character positions; question_answering "
                "needs them"
            )
        questions = split.texts(self.data.question)
        kept = self._readable(split, questions, labelled)
        encoded = self.tokenizer(
            [questions[row] for row in kept],
            [contexts[row] for row in kept],
            truncation="only_second",
            max_length=self.longest,
            stride=self.data.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        rows = [kept[place] for place in encoded.pop("overflow_to_sample_mapping")]
        offsets = encoded.pop("offset_mapping")
        spans = [_context_spans(encoded, window, offsets[window]) for window in range(len(rows))]
        return encoded, rows, spans, kept

    def model_arguments(self) -> dict[str, Any]:
        # A start and an end; many heads have as many outputs as the configuration has classes.
        return {"num_labels": 2}

    def learn(self, split: Split) -> None:
        split.require(self.data.answers)
        places = zip(split.records[RECORD], split.records[self.data.answers], strict=True)
        if any(not "".join(_texts(value, split.at(record))).strip() for record, value in places):
            self.notes.append("some records have no answer: the model may answer nothing")
            self.learned(unanswerable=True)

    def collator(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        inner = DataCollatorWithPadding(self.tokenizer)
        return lambda items: inner(
            [{k: v for k, v in item.items() if k in _READ} for item in items]
        )

    def reduce(self, logits: Any, labels: Any) -> Any:
        return tuple(logits[:2])  # start and end; some models add hidden states

    def score(
        self, outputs: Any, labels: Any, features: Dataset, model: nn.Module
    ) -> dict[str, float]:
        gold = dict(zip(features[ROW], features[ANSWERS], strict=True))
        predicted = self._best(outputs, features)
        rows = sorted(gold)
        return metrics.squad([predicted[row][0] for row in rows], [gold[row] for row in rows])

    def predict(self, outputs: Any, features: Dataset, model: nn.Module) -> list[dict[str, Any]]:
        best = self._best(outputs, features)
        return [{"prediction": best[row][0], "score": best[row][1]} for row in sorted(best)]

    def show(self, item: dict[str, Any]) -> str:
        answer = item["input_ids"][item["start_positions"] : item["end_positions"] + 1]
        read, learned = (self.tokenizer.decode(ids) for ids in (item["input_ids"], answer))
        return f"{read}  [learned: {learned}]"

    def bears_loss(self, features: Dataset) -> int:
        return 2 * len(features)

    def _best(self, outputs: Any, features: Dataset) -> dict[int, tuple[str, float]]:
        """Return {row: (answer, its score)} over the windows of each row."""
        best: dict[int, tuple[str, float]] = {}
        nothing: dict[int, float] = {}
        for window, (row, spans, context) in enumerate(
            zip(features[ROW], features[SPANS], features[CONTEXT], strict=True)
        ):
            start, end = (
                np.asarray(part[window][: len(spans)], dtype=np.float64) for part in outputs[:2]
            )
            # The least of the windows, as in the BERT paper's code: one that sees an answer counts.
            nothing[row] = min(nothing.get(row, np.inf), float(start[0] + end[0]))
            inside = np.array([span[0] >= 0 for span in spans])
            answer, score = _best_span(start, end, inside, self.data.max_answer_length)
            text = context[spans[answer[0]][0] : spans[answer[1]][1]] if answer else ""
            if row not in best or score > best[row][1]:
                best[row] = (text, score)
        if self.data.unanswerable:
            best = {
                row: found if found[1] > nothing[row] else ("", nothing[row])
                for row, found in best.items()
            }
        return best

    def _answers(self, split: Split, row: int, context: str) -> list[tuple[int, str]]:
        """Return (first character, text) of each answer. Raises `InputError` where one is not in
        the context."""
        record = split.records[row]
        value, begin = record[self.data.answers], record.get(self.data.answer_start)
        place = split.at(record[RECORD])
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            begin = [one.get("answer_start") for one in value]
        elif isinstance(value, dict):
            begin = value.get("answer_start", begin)
        texts = _texts(value, place)
        begins = begin if isinstance(begin, list) else [begin] * len(texts)
        if len(begins) != len(texts):
            raise InputError(
                f"{place}: {len(texts)} answers and {len(begins)} values of "
                f"{self.data.answer_start!r}"
            )
        pairs = zip(texts, begins, strict=True)
        return [_answer(context, text, given, place) for text, given in pairs if text.strip()]

    def _readable(self, split: Split, questions: list[str], labelled: bool) -> list[int]:
        """Return the rows whose question leaves its windows more than the stride for the context.
        The others are dropped or refused."""
        special = self.tokenizer.num_special_tokens_to_add(pair=True)
        lengths = [
            len(ids)
            for ids in self.tokenizer(questions, add_special_tokens=False, verbose=False)[
                "input_ids"
            ]
        ]
        rooms = [self.longest - special - length for length in lengths]
        kept = [row for row, room in enumerate(rooms) if room > self.data.stride]
        long = [row for row, room in enumerate(rooms) if room <= self.data.stride]
        if long and not (self.data.too_long == "drop" and labelled and kept):
            record, length, room = (
                split.records[RECORD][long[0]],
                lengths[long[0]],
                max(rooms[long[0]], 0),
            )
            raise InputError(
                f"{split.at(record)}: a question of {length:,} tokens leaves {room} of "
                f"{self.longest} for the context, no more than data.stride {self.data.stride} "
                f"({len(long):,} such records); raise data.max_length, lower data.stride, shorten "
                "the question, or to train without such records set data.too_long: drop"
            )
        if long:
            self.notes.append(
                f"{split.part}: {len(long):,} records dropped (the question leaves no room for the "
                "context)"
            )
        return kept


def _texts(value: Any, place: str) -> list[str]:
    """Return the answers of the record at `place`: a text, a list of texts, SQuAD's {"text":
    [...]}, or a list of {"text": ...}. A text may be a whole number; an empty one is no answer."""
    if isinstance(value, dict):
        value = value.get("text")
    if value is None or value == "":
        return []
    texts = []
    for given in value if isinstance(value, list) else [value]:
        one = given.get("text") if isinstance(given, dict) else given
        if isinstance(one, float) and one.is_integer():
            one = int(one)
        if isinstance(one, bool) or not isinstance(one, str | int):
            raise InputError(
                f"{place}: the answer is {given!r:.60}; expected text, a whole number, or a list "
                "of them; write it as the text that is in the context, or leave the answer empty "
                "if there is none"
            )
        texts.append(str(one))
    return texts


def _context_spans(encoded: Any, window: int, offsets: Any) -> list[list[int]]:
    """Return the characters of the context that each token of a window stands for; [-1, -1] of one
    that is of the question, or special."""
    parts = encoded.sequence_ids(window)
    pairs = zip(parts, offsets, strict=True)
    return [list(span) if part == 1 else [-1, -1] for part, span in pairs]


def _answer(context: str, written: str, given: Any, place: str) -> tuple[int, str]:
    """Return (first character, text) of an answer, without white space around it: tokens have none.

    Raises `InputError` where it does not stand in the context, or not at the character `given`.
    """
    text, at, where = written.strip(), context.find(written.strip()), ""
    if given is not None:
        whole = isinstance(given, int) or (isinstance(given, float) and given.is_integer())
        at = int(given) + len(written) - len(written.lstrip()) if whole else -1
        where = f" at character {given}"
    if at < 0 or not context.startswith(text, at):
        raise InputError(
            f"{place}: the answer {text!r:.60} is not in the context{where}; an extractive model "
            "can only copy"
        )
    return at, text


def _locate(spans: list[list[int]], answers: list[tuple[int, str]]) -> tuple[int, int]:
    """Return the first and last token of the first answer, or (0, 0) when it is not wholly in this
    window."""
    if not answers or not answers[0][1]:
        return 0, 0
    first, last = answers[0][0], answers[0][0] + len(answers[0][1])
    inside = [
        i for i, (start, end) in enumerate(spans) if start >= 0 and start < last and end > first
    ]
    if not inside or spans[inside[0]][0] > first or spans[inside[-1]][1] < last:
        return 0, 0
    return inside[0], inside[-1]


def _best_span(
    start: np.ndarray, end: np.ndarray, inside: np.ndarray, longest: int
) -> tuple[tuple[int, int] | None, float]:
    """Return the span (i, j) of largest start_i + end_j with i <= j < i + longest among the best
    ends, and its score."""
    tokens = np.flatnonzero(inside)
    firsts = tokens[np.argsort(-start[tokens], kind="stable")[:N_BEST]]
    lasts = tokens[np.argsort(-end[tokens], kind="stable")[:N_BEST]]
    scores = start[firsts][:, None] + end[lasts][None, :]
    width = lasts[None, :] - firsts[:, None]
    scores[(width < 0) | (width >= longest)] = -np.inf
    if not scores.size or np.isneginf(scores.max()):
        return None, -np.inf
    i, j = np.unravel_index(scores.argmax(), scores.shape)
    return (int(firsts[i]), int(lasts[j])), float(scores[i, j])
