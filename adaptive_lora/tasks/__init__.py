"""Tasks: what the records mean. One file each; `TASKS` maps a recipe's `task` to its class."""

from adaptive_lora.tasks.base import Task
from adaptive_lora.tasks.causal_lm import CausalLanguageModelling
from adaptive_lora.tasks.classification import Classification
from adaptive_lora.tasks.image_classification import ImageClassification
from adaptive_lora.tasks.multi_label import MultiLabelClassification
from adaptive_lora.tasks.question_answering import QuestionAnswering
from adaptive_lora.tasks.regression import Regression
from adaptive_lora.tasks.summarization import Summarization
from adaptive_lora.tasks.token_classification import TokenClassification

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "multi_label_classification": MultiLabelClassification,
    "token_classification": TokenClassification,
    "regression": Regression,
    "causal_lm": CausalLanguageModelling,
    "summarization": Summarization,
    "question_answering": QuestionAnswering,
    "image_classification": ImageClassification,
}

__all__ = ["TASKS", "Task"]
