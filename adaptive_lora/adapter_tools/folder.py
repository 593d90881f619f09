"""Any PEFT LoRA adapter folder as plain data, and back: no model, no base weights.

    update of a target = scale · B A,   A (R, I), B (O, R)

The scale is the one PEFT applies: alpha / R, or alpha / √R with `use_rslora`, alpha and R by
`alpha_pattern` and `rank_pattern`. What is no sum of scaled components of a linear layer is refused
by name, with a way out.
"""

from __future__ import annotations

import copy
import math
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from adaptive_lora.adapter_tools.checks import (
    Tensors,
    check_names,
    check_supported,
    split_tensors,
)
from adaptive_lora.allocation.allocate import RankPattern
from adaptive_lora.errors import InputError, IntegrityError
from adaptive_lora.files import ADAPTER_FOLDER, check_new, whole
from adaptive_lora.model.adapter_file import CONFIG_NAME, LORA_A, LORA_B, PREFIX, WEIGHTS_NAME
from adaptive_lora.model.adapters import scaled_config
from adaptive_lora.model.base_model import BASE_FILE
from adaptive_lora.model.fingerprint import FINGERPRINT_FILE
from adaptive_lora.model.saving import check_finite, check_kind, read_config

# What belongs to the base model's text or images rather than to the adapter, and is copied along.
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "chat_template*",
    "*processor_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Update:
    """The update of one target: scale · B A, with A (R, I) and B (O, R)."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]

    @property
    def cost(self) -> int:
        """Parameters of one component, I + O."""
        return self.a.shape[1] + self.b.shape[0]


@dataclass(frozen=True)
class StoredAdapter:
    """What an adapter folder holds.

    Args:
        config: PEFT's config; it describes `updates`.
        updates: {full target name: its update}, in the order of layers.
        rest: the other tensors by their name in the file: trained heads, biases, embeddings.
        folder: where it was read from.
    """

    config: LoraConfig
    updates: dict[str, Update]
    rest: Tensors = field(default_factory=dict)
    folder: Path | None = None

    @property
    def ranks(self) -> RankPattern:
        """{full target name: rank}."""
        return {name: update.rank for name, update in self.updates.items()}

    @property
    def costs(self) -> dict[str, int]:
        """{full target name: parameters of one component, I + O}."""
        return {name: update.cost for name, update in self.updates.items()}

    @property
    def parameters(self) -> int:
        """The LoRA parameters, Σ R (I + O)."""
        return sum(update.rank * update.cost for update in self.updates.values())

    @property
    def base(self) -> str | None:
        """The base model's name, as the config has it."""
        return self.config.base_model_name_or_path


def find_folder(path: str | Path) -> Path:
    """Return the adapter folder at `path`: itself, or `adapter` inside a run directory. Raises
    `InputError` without one."""
    folder = Path(path).expanduser()
    for candidate in (folder, folder / ADAPTER_FOLDER):
        if (candidate / CONFIG_NAME).is_file():
            return candidate
    if not folder.exists():
        fetch = f". One on the hub must be fetched first: hf download {path} --local-dir FOLDER"
        on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) is not None
        raise InputError(
            f"there is no folder {folder}; expected a PEFT adapter folder"
            + (fetch if on_hub else "")
        )
    raise InputError(f"{folder} is no adapter folder: it has no {CONFIG_NAME}")


def read_files(path: str | Path) -> tuple[Path, PeftConfig, Tensors]:
    """Return (folder, config, tensors by their name in the file) of an adapter of any kind PEFT
    knows.

    Raises `InputError` for what is no adapter folder or is pickled, `IntegrityError` for damaged
    files.
    """
    folder = find_folder(path)
    config = read_config(folder)
    try:
        tensors = load_file(folder / WEIGHTS_NAME)
    except Exception as error:  # of many kinds; all mean the same to the caller
        raise IntegrityError(f"{folder / WEIGHTS_NAME} is damaged: {error}") from error
    return folder, config, tensors


def read_adapter(path: str | Path, *, finite: bool = True) -> StoredAdapter:
    """Return the LoRA adapter in the folder `path` (or in `adapter` of a run directory).

    Args:
        finite: refuse tensors that hold a NaN or an infinity.

    Raises `InputError` for what is no LoRA adapter folder or a kind of LoRA that is no sum of
    components, `IntegrityError` for damaged files: tensors missing, unexpected, of shapes that do
    not fit, or not finite.

    >>> import tempfile
    >>> from peft import LoraConfig, get_peft_model
    >>> from transformers import BertConfig, BertModel
    >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    >>> tiny = BertModel(BertConfig(num_hidden_layers=1, **sizes))
    >>> config = LoraConfig(r=4, lora_alpha=8, target_modules=["query"], use_rslora=True)
    >>> model = get_peft_model(tiny, config)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save_pretrained(folder)
    ...     adapter = read_adapter(folder)
    >>> {name: (update.rank, update.scale) for name, update in adapter.updates.items()}
    {'encoder.layer.0.attention.self.query': (4, 4.0)}
    """
    folder, config, tensors = read_files(path)
    check_kind(folder, config)
    assert isinstance(config, LoraConfig)
    check_supported(f"the adapter in {folder}", config)
    pairs, rest = split_tensors(folder, tensors, {"a": LORA_A, "b": LORA_B})
    check_names(folder, config, pairs, rest)
    updates = {
        name: Update(parts["a"], parts["b"], _scale(folder, config, name, parts["a"].shape[0]))
        for name, parts in pairs.items()
    }
    if finite:
        check_finite(folder, tensors)
    return StoredAdapter(config, updates, rest, folder)


def _scale(folder: Path, config: LoraConfig, name: str, rank: int) -> float:
    """Return what PEFT multiplies B A with. Raises `IntegrityError` when the config gives another
    rank than the tensor's."""
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    try:
        r = ranks.get(get_pattern_key(list(ranks), name), config.r)
        alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    except re.error as error:
        raise IntegrityError(
            f"a pattern in {folder / CONFIG_NAME} is no regular expression: {error}"
        ) from error
    if r != rank:
        raise IntegrityError(
            f"{name!r} in {folder} has rank {rank}, but its {CONFIG_NAME} says {r}; PEFT could not "
            "load it"
        )
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise IntegrityError(
            f"lora_alpha of {name!r} in {folder} is {alpha!r}; expected a finite number"
        )
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def one_scale(updates: Mapping[str, Update]) -> dict[str, Update]:
    """Return the same updates with one constant scale, the most frequent; what differs from it goes
    into B (see `times`). Where no scale is positive it is 1."""
    counts = Counter(update.scale for update in updates.values() if update.scale > 0)
    scale = max(counts, key=lambda one: (counts[one], one)) if counts else 1.0
    return {
        name: update
        if update.scale == scale
        else Update(update.a, times(update.b, update.scale / scale), scale)
        for name, update in updates.items()
    }


def times(b: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    """Return factor · B, exact but for one rounding to float32: in B's dtype where that holds it
    (16 bits hold a power of two times B, and little else), else in float32."""
    exact = b.double() * factor
    same = exact.to(b.dtype)
    return same if torch.equal(same.double(), exact) else exact.float()


def with_updates(adapter: StoredAdapter, updates: Mapping[str, Update]) -> StoredAdapter:
    """Return `adapter` with these updates, all of one scale and none of rank 0, and a config in
    native form for them.

    Native form: r the largest rank, lora_alpha = scale · r, rank_pattern and alpha_pattern by full
    names; exact in PEFT and under readers that know one lora_alpha / r.
    """
    if not updates:
        raise InputError("no target is left: an adapter of rank 0 everywhere changes nothing")
    (scale,) = {update.scale for update in updates.values()}
    config = copy.copy(adapter.config)
    for name, value in scaled_config(
        {name: update.rank for name, update in updates.items()}, scale
    ).items():
        setattr(config, name, value)
    if (
        set(updates) != set(adapter.updates)
        or config.target_modules == "all-linear"
        or config.target_modules is None
    ):
        config.target_modules = _target_modules(updates, adapter.updates)
        config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    # PiSSA and its kin would change the base weights again at every load.
    config.init_lora_weights = True
    return replace(adapter, config=config, updates=dict(updates))


def _target_modules(names: Iterable[str], known: Iterable[str]) -> Any:
    """Return full names in a list, as readers like them; a regular expression where a name could
    end another's."""
    wanted = sorted(names)
    others = set(known) - set(wanted)
    if all("." in name for name in wanted) and not any(
        o.endswith(f".{name}") for name in wanted for o in others
    ):
        return wanted
    return "|".join(map(re.escape, wanted))


def state_dict(adapter: StoredAdapter) -> Tensors:
    """Return the tensors by their names in an adapter file."""
    pairs = {
        f"{PREFIX}{name}{end}": tensor.contiguous()
        for name, update in adapter.updates.items()
        for end, tensor in ((LORA_A, update.a), (LORA_B, update.b))
    }
    return {**pairs, **adapter.rest}


def write_adapter(adapter: StoredAdapter, output: str | Path) -> Path:
    """Write the adapter as a folder that PEFT reads, with the tokenizer of the folder it came from,
    and return its path.

    Raises `InputError` when `output` exists or cannot be written, `IntegrityError` when a tensor is
    not finite.
    """
    tensors = state_dict(adapter)
    check_finite(adapter.folder, tensors)
    with new_folder(output) as staging, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on the config
        adapter.config.save_pretrained(str(staging))
        save_file(tensors, staging / WEIGHTS_NAME, metadata={"format": "pt"})
        copy_companions(adapter.folder, staging, FINGERPRINT_FILE, BASE_FILE)
    return Path(output).expanduser()


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """Yield a folder that becomes `output` when it is complete; see `files.whole`. Raises
    `InputError` when `output` exists or cannot be written."""
    path = check_new(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as staging:
            staging.mkdir()
            yield staging
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from error


def copy_companions(source: Path | None, target: Path, *further: str) -> bool:
    """Copy the companions in the folder `source`, and files named `further`; return whether there
    were any."""
    patterns = (*COMPANIONS, *further) if source is not None else ()
    files = [file for pattern in patterns for file in Path(source or "").glob(pattern)]
    for file in filter(Path.is_file, files):
        shutil.copy(file, target)
    return any(map(Path.is_file, files))
