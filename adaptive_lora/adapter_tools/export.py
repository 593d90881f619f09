"""`export`: an adapter in the form its reader needs, written, read back by the real reader, and
compared.

A form that does not answer as the adapter does on its base model is not handed out: the folder is
removed again.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.utils import CONFIG_NAME

from adaptive_lora.adapter_tools.base import (
    base_of_adapter,
    check_fits,
    is_quantised,
    load_base,
)
from adaptive_lora.adapter_tools.folder import (
    StoredAdapter,
    copy_companions,
    new_folder,
    read_adapter,
    write_adapter,
)
from adaptive_lora.adapter_tools.forms import LinearFeatures, max_lora_rank, native, uniform
from adaptive_lora.adapter_tools.probe import Inputs, answers, difference, probe_inputs
from adaptive_lora.errors import InputError, IntegrityError, unknown
from adaptive_lora.files import check_new, read_file, write_json
from adaptive_lora.model.adapter_file import PREFIX
from adaptive_lora.model.base_model import BASE_FILE, Base
from adaptive_lora.model.saving import load
from adaptive_lora.model.targets import linear_features
from adaptive_lora.naming import passes

FORMS = ("native", "uniform", "merged", "gguf")
# of the largest logit, in float32: one matrix product in another order moves it by some 1e-7
TOLERANCE = 1e-5
GGUF_FILE = "adapter.gguf"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        folder: where.
        adapter: its content; None for a merged model.
        difference: of its logits from the adapter's, relative to the largest; None when not
            compared.
        notes: what its user should know, a line each.
    """

    folder: Path
    adapter: StoredAdapter | None
    difference: float | None
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return what to print; an indented line is a command, not to be wrapped."""
        what = "a full model"
        if self.adapter is not None:
            ranks, config = self.adapter.ranks.values(), self.adapter.config
            spread = (
                f"rank {max(ranks)}"
                if min(ranks) == max(ranks)
                else f"ranks {min(ranks)}..{max(ranks)}"
            )
            what = (
                f"{len(ranks)} targets, {spread}, lora_alpha {config.lora_alpha:g} / r {config.r}"
            )
        checked = (
            "NOT CHECKED: nothing was read back, and no answer compared"
            if self.difference is None
            else "checked: read back, its logits differ from the adapter's by "
            f"{self.difference:.1g} of the largest"
        )
        return [f"written: {self.folder} ({what})", checked, *self.notes]


def export(
    source: str | Path,
    to: str,
    output: str | Path,
    *,
    model: str | None = None,
    check: bool = True,
    converter: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Exported:
    """Write the adapter `source` in another form to the new folder `output`.

    Args:
        source: a PEFT LoRA adapter folder, or a run directory.
        to: `native`, `uniform` (see `forms`), `merged` (base model and adapter in one, safetensors)
            or `gguf` (llama.cpp).
        model: the base model, a folder or a name on the hub; by default what the adapter names.
        check: read the result back on the base model and compare answers to seeded random inputs.
        converter: llama.cpp's convert_lora_to_gguf.py, for `gguf`; without it the uniform form is
            written.
        trust_remote_code: whether code that comes with the base model may run; an adapter's own
            record never decides that.

    Raises `InputError` for a request that cannot be met, `IntegrityError` for damaged files and
    when the result answers otherwise (more than 1e-5 of the largest logit, float32); nothing is
    left behind then.
    """
    path = check_new(output)
    _check_form(to, converter)
    adapter = read_adapter(source)
    if to == "gguf" and adapter.rest:
        first = next(iter(adapter.rest)).removeprefix(PREFIX)
        raise InputError(
            f"llama.cpp reads no module trained whole, and the adapter has {first!r}; use --to "
            "merged"
        )
    base = None
    if check or to == "merged" or model is not None:
        base = _base(adapter, model, trust_remote_code)
    if to == "merged":
        assert base is not None
        return _merged(adapter, base, path, check=check)

    loaded = load_base(base, adapter.folder) if base is not None else None
    modules = _modules(loaded, adapter, base) if loaded is not None and base is not None else None
    written = native(adapter) if to == "native" else uniform(adapter, modules)
    inputs, expected = _probed(_on(loaded, adapter)) if check else ([], [])
    del loaded
    write_adapter(written, path)
    worst = None
    with _removed_on_failure(path):
        if check:
            assert base is not None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reloaded = PeftModel.from_pretrained(load_base(base, path), str(path))
            worst = difference(answers(reloaded, inputs), expected)
            _refuse_above(worst, "reloaded by PEFT")
        notes = _notes(written, modules, base)
        if to == "gguf":
            notes = _gguf(path, adapter, base, converter)
    return Exported(path, written, worst, notes)


def _check_form(to: str, converter: str | Path | None) -> None:
    """Raise `InputError` for an unknown form, or a converter that is none or not needed."""
    if to not in FORMS:
        raise InputError(unknown(f"unknown form {to!r}", to, FORMS))
    if converter is not None and (to != "gguf" or not Path(converter).is_file()):
        what = (
            f"there is no file {converter}"
            if to == "gguf"
            else f"a converter is for --to gguf, not {to}"
        )
        raise InputError(
            f"{what}; expected the path of llama.cpp's convert_lora_to_gguf.py with --to gguf"
        )


class _removed_on_failure:  # noqa: N801
    """Remove the folder when what follows raises."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            shutil.rmtree(self.path, ignore_errors=True)


def _base(adapter: StoredAdapter, model: str | None, trust_remote_code: bool) -> Base:
    try:
        base = base_of_adapter(adapter, model, trust_remote_code=trust_remote_code)
        base.config()
    except InputError as error:
        raise InputError(
            f"{error}; give the base model with --model, or write without comparing: --no-check"
        ) from error
    return base


def _modules(model: nn.Module, adapter: StoredAdapter, base: Base) -> LinearFeatures:
    """Return the linear modules of the base model, those of a trained head left out."""
    shapes = {
        name: (update.a.shape[1], update.b.shape[0]) for name, update in adapter.updates.items()
    }
    check_fits(model, shapes, base.name)
    heads = adapter.config.modules_to_save or ()
    return {
        name: features
        for name, module in model.named_modules()
        if (features := linear_features(module)) is not None and not passes(name, heads)
    }


def _on(model: Any, adapter: StoredAdapter) -> PeftModel:
    assert adapter.folder is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT looks for the base model where it was
        return load(model, adapter.folder)


def _probed(model: PeftModel) -> tuple[Inputs, list[torch.Tensor]]:
    """Return seeded random inputs for the model, and its answers to them."""
    inputs = probe_inputs(model.get_base_model())
    return inputs, answers(model, inputs)


def _refuse_above(worst: float, how: str, *, what: str = "the adapter's") -> None:
    if not worst <= TOLERANCE:
        raise IntegrityError(
            f"{how}, the logits differ from {what} by {worst:.2g} of the largest (allowed: "
            f"{TOLERANCE:g}); nothing is kept"
        )


def _notes(adapter: StoredAdapter, modules: LinearFeatures | None, base: Base | None) -> list[str]:
    rank = max(adapter.ranks.values())
    size = max_lora_rank(rank)
    notes = [
        f"vLLM: --enable-lora --max-lora-rank {size}"
        if size
        else f"vLLM takes ranks up to 512; this adapter has {rank}"
    ]
    # With an adapter on the output embeddings PEFT saves what it is on, too.
    trained = [key for key in adapter.rest if ".base_layer." not in key]
    if trained:
        whole = ", ".join(sorted({key.removeprefix(PREFIX).rpartition(".")[0] for key in trained}))
        notes.append(
            f"trained whole: {whole}. PEFT loads that; llama.cpp and most of vLLM need --to merged"
        )
    if base is None and modules is None and adapter.config.rank_pattern == {}:
        notes.append(
            "the base model was not looked at: layers are taken to run from 0 to the last one "
            "adapted"
        )
    return notes


def _merged(adapter: StoredAdapter, base: Base, path: Path, *, check: bool) -> Exported:
    """Merge in float32, write in the dtype of the base model's files; compare before and after the
    rounding to it."""
    if is_quantised(base):
        raise InputError(
            f"the base model {base.name!r} is quantised: merging into such weights would round the "
            "adapter away. Give the full-precision model it was made from with --model"
        )
    dtype = getattr(base.config(), "dtype", None) or torch.float32
    model = load_base(base, adapter.folder)
    _modules(model, adapter, base)
    notes = _untie(model, adapter)
    if "num_labels" in base.head and "id2label" not in base.head:
        notes.append(
            f"the class names are not known: the adapter has no {BASE_FILE}, which neither PEFT "
            "nor version 0.1 at first wrote"
        )
    before = _on(model, adapter)
    inputs, expected = _probed(before) if check else ([], [])
    try:
        merged: Any = before.merge_and_unload(safe_merge=True)
    except (NotImplementedError, ValueError) as error:  # of a kind that depends on the input
        raise InputError(f"PEFT cannot merge this adapter: {error}; use --to native") from error
    worst = difference(answers(merged, inputs), expected) if check else None
    if worst is not None:
        _refuse_above(worst, "merged")
    if dtype != torch.float32:
        for parameter in merged.parameters():
            parameter.data = parameter.data.to(dtype)
    merged.config.dtype = dtype
    _write_model(merged, path, [adapter.folder, Path(base.name)])
    with _removed_on_failure(path):
        if check:
            rounded = (
                answers(merged.float(), inputs)
                if dtype != torch.float32
                else answers(merged, inputs)
            )
            reloaded = load_base(replace(base, name=str(path), kind=type(merged)))
            read_back = answers(reloaded, inputs)
            _refuse_above(
                difference(read_back, rounded),
                "reloaded by transformers",
                what="the merged model's",
            )
            if dtype != torch.float32:
                notes.append(
                    f"rounded to {str(dtype).removeprefix('torch.')}, as the base model is: that "
                    f"moves the logits by {difference(read_back, expected):.1g} of the largest"
                )
            else:
                worst = difference(read_back, expected)
                _refuse_above(worst, "reloaded by transformers")
    return Exported(path, None, worst, notes)


def _untie(model: Any, adapter: StoredAdapter) -> list[str]:
    """Give a target whose weight is that of the embeddings too (a tied output) a weight of its own
    to merge into."""
    notes = []
    for name in adapter.updates:
        module = model.get_submodule(name)
        if sum(p is module.weight for _, p in model.named_parameters(remove_duplicate=False)) > 1:
            module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
            for config in (model.config, model.config.get_text_config()):
                config.tie_word_embeddings = False
            notes.append(f"{name} shared its weights with the embeddings, and has its own now")
    return notes


def _write_model(model: Any, path: Path, sources: list[Path | None]) -> None:
    """Write model and configuration to the new folder `path`, with the tokenizer of the first
    source that has one."""
    with new_folder(path) as staging:
        model.save_pretrained(staging)
        _say_labels(staging / CONFIG_NAME, model.config)
        any(copy_companions(source, staging) for source in sources)


def _say_labels(file: Path, config: Any) -> None:
    """Write the labels where transformers leaves them out: two are its default, but not that of
    every architecture."""
    values = read_file(file, "configuration")
    if config.id2label and "id2label" not in values:
        values |= {"id2label": config.id2label, "label2id": config.label2id}
        write_json(file, dict(sorted(values.items())), indent=2)


def _gguf(
    path: Path, adapter: StoredAdapter, base: Base | None, converter: str | Path | None
) -> list[str]:
    """Run llama.cpp's converter on the uniform form at `path`, or return the command that does."""
    name = base.name if base is not None else adapter.base
    script = str(converter or "llama.cpp/convert_lora_to_gguf.py")
    target = str(path / GGUF_FILE)
    command = [sys.executable if converter else "python", script, "--base",
               name or "BASE_MODEL_FOLDER",
               "--outtype", "f32", "--outfile", target, str(path)]  # fmt: skip
    if converter is None:
        return [
            "the uniform form is written; with llama.cpp at hand, run:",
            f"    {shlex.join(command)}",
        ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if (
        done.returncode != 0
        or not (path / GGUF_FILE).is_file()
        or (path / GGUF_FILE).read_bytes()[:4] != b"GGUF"
    ):
        lines = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise InputError(
            f"{script} failed (exit {done.returncode}): {' / '.join(lines)}. It needs the packages "
            "of llama.cpp's requirements-convert_lora_to_gguf.txt, and knows fewer architectures "
            "than PEFT"
        )
    return [f"llama.cpp: llama-cli -m BASE.gguf --lora {target}"]
