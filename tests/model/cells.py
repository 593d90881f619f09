"""Every state of `states.py` before every public function, and the page that says what comes of it.

    python tests/model/cells.py            # docs/states.md and tests/model/states.json, anew
    python tests/model/cells.py NAME ...   # these states only, printed

A cell is one of

- "works": the law of the function held, in numbers;
- "refused: SENTENCE": an `AdaptiveLoraError` came, of one paragraph, and nothing was changed or
  written;
- "none: SENTENCE": there is nothing to try, such as a folder that stock PEFT does not write;
- "FAULT: ...": anything else.
"""

from __future__ import annotations

import atexit
import gc
import hashlib
import json
import os
import re
import shutil
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers as hf
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from states import BY_NAME, NOT_BUILT, STATES, State, quiet
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear as MultiheadOutput
from transformers.pytorch_utils import Conv1D

import adaptive_lora as al
from adaptive_lora.adapter_tools.export import export
from adaptive_lora.errors import AdaptiveLoraError

ROOT = Path(__file__).parent.parent.parent
RECORD, PAGE = Path(__file__).with_name("states.json"), ROOT / "docs" / "states.md"
WORKS, NO_WEIGHTS = "works", "no weights"
AS_STOCK = "works: answers as stock PEFT does with this folder, which is not as the live model did"


class FaultError(Exception):
    """A law that did not hold."""


class NothingError(Exception):
    """There is nothing to try."""


# What is looked at


def answers(state: State, model: Any, *, inside: bool = True) -> torch.Tensor | str:
    """Return the logits of `model` in evaluation mode, or why it has none; leaves it as it was."""
    if not state.runs:
        return "it cannot run"
    inner = state.inside(model) if inside else model
    modes = [(module, module.training) for module in inner.modules()]
    torch.manual_seed(0)
    try:
        with quiet(), torch.no_grad():
            output = inner.eval()(**state.inputs())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        for module, mode in modes:
            module.training = mode
    logits = output.get("logits", output.get("last_hidden_state"))
    return NO_WEIGHTS if logits.is_meta else logits.detach().clone()


def apart(one: torch.Tensor | str, two: torch.Tensor | str) -> float:
    """Return max |one − two| / max |two|; infinity where one of them is missing or does not fit."""
    if isinstance(one, str) or isinstance(two, str) or one.shape != two.shape:
        return float("inf")
    one, two = one.double(), two.double()
    if not torch.equal(one.isfinite(), two.isfinite()):
        return float("inf")
    one, two = one[one.isfinite()], two[two.isfinite()]
    return float((one - two).abs().max() / two.abs().max().clamp_min(1e-30)) if len(one) else 0.0


def same(state: State, one: torch.Tensor | str, two: torch.Tensor | str, what: str) -> None:
    for side in (one, two):
        if isinstance(side, str):
            raise FaultError(f"{what}: no answers ({side.splitlines()[-1][:150]})")
    off = apart(one, two)
    if not off <= state.tolerance:
        raise FaultError(f"{what}: off {off:.2g} of the largest logit")


def digest(tensor: torch.Tensor) -> str:
    if tensor.is_meta:
        return "meta"
    plain = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(plain.numpy().tobytes()).hexdigest()[:12]


def is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(is_plain, value.values()))
    if isinstance(value, list | tuple | set):
        return all(map(is_plain, value))
    return value is None or isinstance(value, int | float | str | torch.Tensor)


def snapshot(state: State, model: Any, *, inside: bool = True) -> dict[str, Any]:
    """Return everything that a refusal must leave alone, by name."""
    seen: dict[str, Any] = {}
    for kind, tensors in (("", model.named_parameters), ("buffer ", model.named_buffers)):
        for name, tensor in tensors(remove_duplicate=False):
            seen[f"tensor {kind}{name}"] = (
                # Of the others a forward pass can put new ones in place, of hooks and attention.
                id(tensor) if tensor.requires_grad and not tensor.is_meta else None,
                tensor.dtype,
                tuple(tensor.shape),
                tensor.requires_grad,
                None if tensor.is_inference() else tensor.grad is None,
                digest(tensor),
            )
    for name, module in model.named_modules(remove_duplicate=False):
        own = {k: v for k, v in vars(module).items() if k != "training"}
        seen[f"mode {name}"] = module.training
        seen[f"module {name}"] = type(module).__name__
        seen.update(dict.fromkeys((f"attribute {name}.{k}" for k in own), "there"))
        seen[f"hooks {name}"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
        if isinstance(module, BaseTunerLayer):
            seen[f"layer {name}"] = repr({k: v for k, v in own.items() if is_plain(v)})
        if isinstance(vars(module).get("config"), hf.PreTrainedConfig):
            seen[f"config {name}"] = repr(sorted(module.config.to_dict().items(), key=str))
        configs = vars(module).get("peft_config", vars(module).get("_peft_config"))
        for adapter, config in dict(configs or {}).items():
            for key, value in config.to_dict().items():
                shown = sorted(value, key=str) if isinstance(value, set) else value
                seen[f"peft_config {adapter}.{key}"] = repr(shown)
    logits = answers(state, model, inside=inside)
    seen["answers"] = "none" if isinstance(logits, str) else digest(logits)
    return seen


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    keys = [*before, *(key for key in after if key not in before)]
    return [key for key in keys if before.get(key) != after.get(key)]


def lora_layers(model: Any) -> dict[str, LoraLayer]:
    """Return PEFT's layers by their names in the base of the one `PeftModel` there is (in `model`,
    where there are none or several)."""
    found = [module for module in model.modules() if isinstance(module, PeftModel)]
    base = found[0].base_model if len(found) == 1 else model
    base = getattr(base, "model", base) if len(found) == 1 else base
    return {name: m for name, m in base.named_modules() if isinstance(m, LoraLayer)}


def rank_of(layer: Any) -> int:
    """Return the ranks of the layer's active adapters, together, read from the tensors."""
    found = 0
    for adapter in (a for a in layer.active_adapters if a in layer.r):
        for holder in (layer.lora_A, layer.lora_embedding_A):
            if adapter in holder:
                a = holder[adapter]
                rows = (a if isinstance(a, torch.Tensor) else a.weight).shape[0]
                found += rows // getattr(layer, "num_experts", 1)
    return found


def expected_ranks(model: Any) -> dict[str, int]:
    return {
        name: rank_of(layer)
        for name, layer in lora_layers(model).items()
        if any(adapter in layer.r for adapter in layer.active_adapters)
    }


def is_active(layer: Any, name: str) -> bool:
    names = {*layer.active_adapters, "lora_parked"}
    return "lora_" in name and bool(names & set(name.split(".")))


def counted(model: Any) -> int:
    """Return the LoRA parameters of the active adapters, by the names of all parameters."""
    found = {}
    for layer in lora_layers(model).values():
        for name, parameter in layer.named_parameters():
            if "base_layer" not in name and is_active(layer, name):
                found[id(parameter)] = parameter.numel()
    return sum(found.values())


def bystanders(model: Any) -> dict[str, str]:
    """Return the digests of the base's weights and of the adapters that are not active."""
    active = {
        id(parameter)
        for layer in lora_layers(model).values()
        for name, parameter in layer.named_parameters()
        if "base_layer" not in name and is_active(layer, name)
    }
    parked = {id(p) for layer in lora_layers(model).values() if hasattr(layer, "parked")
              for p in layer.parked.parameters()}  # fmt: skip
    return {name: digest(p) for name, p in model.named_parameters() if id(p) not in active | parked}


# What stock PEFT makes of a state


def written_by_stock(state: State, model: Any, folder: Path) -> Path:
    """Have stock PEFT (transformers, where the model is its own) save `model`; return the folder of
    the active adapter."""
    inner = state.inside(model)
    try:
        with quiet():
            inner.save_pretrained(str(folder))
    except Exception as error:
        raise NothingError(f"stock PEFT cannot save it: {short(error)}") from error
    active = getattr(inner, "active_adapter", "default")
    name = "default" if callable(active) else active if isinstance(active, str) else str(active)
    for place in (folder / name, folder):
        if (place / "adapter_config.json").is_file():
            return place
    raise NothingError("stock PEFT writes no adapter of it")


def read_by_stock(state: State, folder: Path, base: Any = None) -> Any:
    try:
        with quiet():
            return PeftModel.from_pretrained(state.base() if base is None else base, str(folder))
    except Exception as error:
        raise FaultError(f"stock PEFT cannot read what was written: {short(error)}") from error


@lru_cache(maxsize=1)
def live(name: str) -> torch.Tensor | str:
    """Return the answers that a saved adapter should have."""
    return answers(BY_NAME[name], BY_NAME[name].as_saved(built(BY_NAME[name])))


@lru_cache(maxsize=1)
def stock_keeps(name: str) -> bool:
    """True when stock PEFT writes and reads the state without a loss."""
    state = BY_NAME[name]
    with TemporaryDirectory() as folder:
        try:
            place = written_by_stock(state, built(state), Path(folder))
            read = answers(state, read_by_stock(state, place), inside=False)
        except Exception:
            return False
    return apart(read, live(name)) <= state.tolerance


@lru_cache
def stored(make: Callable[[], Any]) -> str:
    """Return a folder with this base in it."""
    folder = mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with quiet():
        make().save_pretrained(folder)
    return folder


def built(state: State) -> Any:
    with quiet():
        return state.build()


# The functions and their laws


class Try:
    """One try: which call is the public function's, and what it was given."""

    def __init__(self, state: State, model: Any, folder: Path) -> None:
        self.state, self.model, self.folder = state, model, folder
        self.subject, self.inside = model, True  # what a refusal must leave alone
        self.before: dict[str, Any] | None = None
        self.done = False

    @contextmanager
    def public(self) -> Iterator[None]:
        """Around the call of the public function: a refusal counts here only."""
        self.files = listing(self.folder)
        self.before = snapshot(self.state, self.subject, inside=self.inside)
        self.done = False
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        ours = [str(w.message) for w in caught if "/adaptive_lora/" in w.filename]
        if ours:
            raise FaultError(f"warned: {ours[0]}")
        self.done = True


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def attach(t: Try) -> str:
    """The answers stay; saved by `al.save` and read by stock PEFT they are the same."""
    before = answers(t.state, t.model, inside=False)
    with t.public():
        model = al.attach(t.model, al.methods.lora(2))
    if set(expected_ranks(model).values()) != {2}:
        raise FaultError(f"ranks {expected_ranks(model)}; asked for 2")
    if before == NO_WEIGHTS:
        return "works: the ranks are there; without weights there are no answers to compare"
    same(t.state, answers(t.state, model, inside=False), before, "the answers after attaching")
    from states import fill

    expected = answers(t.state, fill(model), inside=False)
    al.save(model, t.folder / "out")
    read = read_by_stock(t.state, t.folder / "out")
    same(t.state, answers(t.state, read, inside=False), expected, "attached, saved and read back")
    return WORKS


def resize(t: Try) -> None:
    """Two components more, and away again: the answers stay, also after stock PEFT's save and load,
    and when the state is taken back (`unmerge_adapter`, `set_adapter`); nothing beside changes."""
    state, model = t.state, t.model
    before, ranks, others = answers(state, model), expected_ranks(model), bystanders(model)
    name, rank = next(((n, r) for n, r in ranks.items() if r), ("model.layers.0.mlp.up_proj", 1))
    with t.public():
        al.resize(model, {name: rank + 2})
    same(state, answers(state, model), before, "grown")
    if expected_ranks(model) != {**ranks, name: rank + 2}:
        raise FaultError(f"grown: ranks {expected_ranks(model)}")
    if stock_keeps(state.name):
        place = written_by_stock(state, model, t.folder / "stock")
        read = answers(state, read_by_stock(state, place), inside=False)
        same(state, read, live(state.name), "grown, saved by stock PEFT and read back")
    al.resize(model, {name: rank})
    same(state, answers(state, model), before, "the dead components dropped")
    if expected_ranks(model) != ranks:
        raise FaultError(f"shrunk: ranks {expected_ranks(model)}")
    if bystanders(model) != others:
        raise FaultError(f"changed beside it: {changes(others, bystanders(model))[0]}")
    with quiet():
        after, untouched = state.undone(model), state.undone(built(state))
    same(state, answers(state, after), answers(state, untouched), "the state undone afterwards")


def ranks(t: Try) -> None:
    """What the shapes of the tensors say, of every adapted module."""
    with t.public():
        got = al.ranks(t.model)
    expected = expected_ranks(t.model)
    if got != expected:
        odd = sorted(set(got.items()) ^ set(expected.items()))
        raise FaultError(f"{len(got)} targets, expected {len(expected)}; they differ in {odd[:2]}")


def lora_parameters(t: Try) -> None:
    """What the names of all parameters say."""
    with t.public():
        got = al.lora_parameters(t.model)
    if got != counted(t.model):
        raise FaultError(f"{got}, by the names of the parameters {counted(t.model)}")


def save(t: Try) -> None:
    """Read on a fresh base by stock PEFT and by `al.load`, the answers are those of the model."""
    before = answers(t.state, t.model)
    with t.public():
        al.save(t.model, t.folder / "out")
    same(t.state, answers(t.state, t.model), before, "the live model after saving")
    _read_back(t, live(t.state.name), t.folder / "out")


def _read_back(t: Try, expected: torch.Tensor | str, folder: Path) -> None:
    if not t.state.reads:
        try:
            al.load(t.state.base(), folder)
        except AdaptiveLoraError:
            return
        raise FaultError("al.load reads it on a base that it is not for")
    read = answers(t.state, read_by_stock(t.state, folder), inside=False)
    same(t.state, read, expected, "read back by stock PEFT")
    with quiet():
        own = al.load(t.state.base(), folder)
    same(t.state, answers(t.state, own, inside=False), expected, "read back by al.load")


def _of_stock(t: Try, make: Callable[[], Any]) -> tuple[Path, torch.Tensor | str]:
    """Return the folder that stock PEFT writes, and the answers it reads out of it."""
    place = written_by_stock(t.state, t.model, t.folder / "stock")
    try:
        read = read_by_stock(t.state, place, make())
    except FaultError as fault:
        return place, str(fault)
    return place, answers(t.state, read, inside=False)


def _as_stock(t: Try, got: torch.Tensor | str, reference: torch.Tensor | str, what: str) -> str:
    """Raise unless the folder was read as stock PEFT does; return whether it is the live model."""
    expected = live(t.state.name) if isinstance(reference, str) else reference
    same(t.state, got, expected, f"{what}, compared with stock PEFT")
    return WORKS if apart(expected, live(t.state.name)) <= t.state.tolerance else AS_STOCK


def load(t: Try) -> str:
    """A folder that stock PEFT wrote, read on a fresh base."""
    place, reference = _of_stock(t, t.state.base)
    t.subject, t.inside = t.state.base(), False
    with t.public():
        read = al.load(t.subject, place)
    return _as_stock(t, answers(t.state, read, inside=False), reference, "read by al.load")


def compress(t: Try) -> str:
    """Half the parameters, with the energy it says; saved and read back as by `save`; nothing
    beside changes."""
    state, model = t.state, t.model
    there, others, before = counted(model), bystanders(model), updates(built(state))
    with t.public():
        result = al.compress(model, budget=0.5)
    if counted(model) > there / 2:
        raise FaultError(f"{counted(model)} of {there} parameters are left; the budget is half")
    if bystanders(model) != others:
        raise FaultError(f"changed beside it: {changes(others, bystanders(model))[0]}")
    after = updates(model)
    lost = sum(float((before[n] - after.get(n, 0.0)).square().sum()) for n in before)
    kept = 1 - lost / sum(float(w.square().sum()) for w in before.values())
    if abs(kept - result.energy) > max(1e-5, state.tolerance):
        raise FaultError(
            f"says that it kept {result.energy:.4f} of the updates, which kept {kept:.4f}"
        )
    expected = answers(state, state.as_saved(model))
    try:
        al.save(model, t.folder / "out")
    except AdaptiveLoraError:
        if not save_is_refused(state):
            raise
        return "works: but the state is one that `save` refuses"
    _read_back(t, expected, t.folder / "out")
    return WORKS


def save_is_refused(state: State) -> bool:
    with TemporaryDirectory() as folder:
        try:
            al.save(built(state), folder)
        except AdaptiveLoraError:
            return True
    return False


def updates(model: Any) -> dict[str, torch.Tensor]:
    """Return what PEFT would add to each weight."""
    found = {}
    for name, layer in lora_layers(model).items():
        for adapter in (a for a in layer.active_adapters if a in layer.lora_A):
            with suppress(Exception):  # there is none of some variants, which are refused
                found[f"{name} {adapter}"] = layer.get_delta_weight(adapter).detach().double()
    return found


def _export(t: Try, form: str) -> str:
    make = t.state.stored
    place, reference = _of_stock(t, lambda: (make or t.state.base)().float())
    base = stored(make) if make is not None else None
    t.subject, t.inside = nn.Identity(), False
    with t.public():
        export(place, form, t.folder / "out", model=base)
    assert make is not None
    with quiet():
        if form == "merged":
            read = type(make()).from_pretrained(t.folder / "out", dtype=torch.float32)
        else:
            on = (t.state.resized or make)()
            read = read_by_stock(t.state, t.folder / "out", on.float())
    got = answers(t.state, read, inside=False)
    expected = live(t.state.name) if isinstance(reference, str) else reference
    same(t.state, got, expected, f"the {form} form, compared with stock PEFT")
    return WORKS


def export_native(t: Try) -> str:
    """That folder in native form, on the base from a folder."""
    return _export(t, "native")


def export_merged(t: Try) -> str:
    """That folder in merged form."""
    return _export(t, "merged")


def callback(t: Try) -> str | None:
    """Four steps of a `Trainer` with `AdaptiveRankCallback(squeeze)` end within the budget; saved
    by stock PEFT (by `al.save`, where stock PEFT loses something) and read back as by `save`."""
    state, model = t.state, t.model
    method = al.methods.squeeze(rank=2, factor=2.0, initial=1, final=1, every=1)
    costs = {n: costs_of(layer) for n, layer in lora_layers(model).items() if is_linear(layer)}
    budget = 2 * sum(costs[name] for name in expected_ranks(model) if name in costs)
    above = spent(model, costs) > budget
    trainer = None
    try:
        with t.public():
            rank_callback = al.AdaptiveRankCallback(method)
            trainer = trainer_of(state, model, t.folder / "out", [rank_callback])
            trainer.train()
    except AdaptiveLoraError as error:
        if trainer is not None and (steps := trainer.state.global_step):
            if state.late:
                return f"refused after {steps} steps: {error}"
            raise FaultError(f"refused only after {steps} steps of training: {error}") from error
        raise
    except Exception as error:
        with TemporaryDirectory() as folder:
            try:
                trainer_of(state, built(state), Path(folder), []).train()
            except Exception as alone:
                if type(alone) is type(error):
                    raise NothingError(f"the Trainer alone fails: {short(alone)}") from alone
        raise
    if above and all(decision.status != "changed" for decision in rank_callback.history):
        raise FaultError("trained, and no rank was changed")
    if (left := spent(model, costs)) > budget:
        raise FaultError(f"ends with {left} parameters; the budget of rank 2 is {budget}")
    expected = answers(state, state.as_saved(model))
    if stock_keeps(state.name):
        place = written_by_stock(state, model, t.folder / "stock")
    else:
        place = al.save(model, t.folder / "stock")
    _read_back(t, expected, place)
    return None


def spent(model: Any, costs: dict[str, int]) -> int:
    """Return the parameters of the linear targets; of others the rank stays as it is."""
    return sum(rank * costs.get(name, 0) for name, rank in expected_ranks(model).items())


def is_linear(layer: Any) -> bool:
    base = (
        layer.get_base_layer()
    )  # MultiheadAttention reads its output's weight, and calls it never
    return isinstance(base, nn.Linear | Conv1D) and type(base) is not MultiheadOutput


def costs_of(layer: Any) -> int:
    return (layer.in_features or 0) + (layer.out_features or 0)


def trainer_of(state: State, model: Any, folder: Path, callbacks: list[Any]) -> hf.Trainer:
    arguments = hf.TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
    )
    with quiet():
        return hf.Trainer(model, arguments, train_dataset=state.rows(), callbacks=callbacks)


FUNCTIONS: dict[str, Callable[[Try], str | None]] = {
    function.__name__: function
    for function in (
        attach,
        resize,
        ranks,
        lora_parameters,
        save,
        load,
        compress,
        export_native,
        export_merged,
        callback,
    )
}
# The model is what it was after these.
READERS = ("ranks", "lora_parameters", "load", "export_native", "export_merged")
# What a Trainer alone does to a model that it is given.
BY_THE_TRAINER = ("mode ", "config ", "attribute ._is_accelerate_prepared")
# What is noted of a base says nothing of the function.
NOTES = (".base_fingerprint", ".load_adapter")


def outcome(state: State, function: str, model: Any) -> tuple[str, bool]:
    """Return what comes of `function` on `model`, in this state; and whether the model is as it
    was."""
    # PEFT makes a model card at each save, which takes longer than the rest of it.
    card = mock.patch.object(PeftModel, "create_or_update_model_card")
    eager = torch.compiler.set_stance("force_eager")  # what torch compiles is torch's own matter
    # What PEFT itself warns of; what this library does is looked for in `Try.public`.
    with TemporaryDirectory() as place, card, eager, quiet():
        t = Try(state, model, Path(place))
        try:
            result = FUNCTIONS[function](t) or WORKS
        except NothingError as nothing:
            result = f"none: {nothing}"
        except AdaptiveLoraError as error:
            result = _refusal(t, function, error)
        except FaultError as fault:
            result = f"FAULT: {fault}"
        except Exception as error:
            result = f"FAULT: {short(error)} [{where(error)}]"
        untouched = result.startswith("refused" if function not in READERS else (WORKS, "refused"))
        result = result.replace(place, "FOLDER")
    result = re.sub(r"/tmp/tmp\w+", "FOLDER", result)
    return re.sub(r"\b\d\.\d+(e-?\d+)? of the largest", "N of the largest", result), untouched


def _refusal(t: Try, function: str, error: AdaptiveLoraError) -> str:
    text = str(error)
    if t.done or t.before is None:
        return f"FAULT: went ahead, then refused: {text}"
    now = snapshot(t.state, t.subject, inside=t.inside)
    changed = changes(t.before, now)
    written = listing(t.folder) - t.files
    if function == "callback":
        changed = [name for name in changed if not name.startswith(BY_THE_TRAINER)]
        changed = [name for name in changed if not name.endswith(NOTES)]
        written -= {"out"}
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        return f"FAULT: refused, but changed {changed[0]}{more}: {text}"
    if written:
        return f"FAULT: refused, but wrote {sorted(written)[0]}: {text}"
    if "\n" in text.strip() or not text.strip():
        return f"FAULT: refused, not in one paragraph: {text!r}"
    return f"refused: {text}"


def short(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[-1][:200]}"


def where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/adaptive_lora/" in f.filename]
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"


@lru_cache(maxsize=2)
def cells(name: str) -> dict[str, str]:
    """Return {function: outcome} of one state, which is made anew when a function changed it."""
    state, model, found = BY_NAME[name], None, {}
    leave_imports_alone()
    for function in FUNCTIONS:
        if model is None:
            model = built(state)
            answers(state, model)  # int8 layers unpack themselves at the first
        found[function], untouched = outcome(state, function, model)
        if not untouched:
            model = None
    return found


@lru_cache
def leave_imports_alone() -> None:
    """A Trainer collects garbage; what is imported is none, and takes longer than the training."""
    gc.collect()
    gc.freeze()


# The page


HEAD = """# States

What people's models are in when they meet a function of this library, and what comes of it:
{states} states × {functions} functions, made on one CPU by `python tests/model/cells.py`, and held
by `tests/model/test_states.py`. The states are the functions of `tests/model/states.py`.

- **yes**: the law of the function held, in numbers (tolerance 1e-5 of the largest logit; 3e-2 with
  anything in bfloat16, 4e-3 in float16: a few roundings).
- **as PEFT**: the folder answers as stock PEFT reads it, which is not as the live model did: stock
  PEFT does not save this state whole.
- **[n]**: refused, in the words of note n, with nothing changed or written.
- **·[n]**: there is nothing to try, for the reason in note n.

Of a disabled adapter the answers are those when it is enabled.
"""


def page(found: dict[str, dict[str, str]]) -> str:
    """Return the page of these outcomes."""
    notes: dict[str, int] = {}

    def short_form(text: str) -> str:
        kind, _, sentence = text.partition(": ")
        if kind == WORKS:
            return "as PEFT" if text == AS_STOCK else "yes"
        if kind == "FAULT":
            return "**FAULT**"
        number = notes.setdefault(sentence, len(notes) + 1)
        return f"[{number}]" if kind == "refused" else f"·[{number}]"

    lines = [HEAD.format(states=len(found), functions=len(FUNCTIONS))]
    lines += ["| function | its law |", "|---|---|"]
    for name, function in FUNCTIONS.items():
        lines.append(f"| {name.replace('_', ' ')} | {' '.join((function.__doc__ or '').split())} |")
    lines.append("")
    titles = [name.replace("_", " ") for name in FUNCTIONS]
    for group, states in STATES.items():
        lines += [f"## {group}", "", f"| state | | {' | '.join(titles)} |"]
        lines.append("|---" * (len(FUNCTIONS) + 2) + "|")
        for state in (state for state in states if state.name in found):
            row = [short_form(found[state.name][function]) for function in FUNCTIONS]
            sentence = state.sentence.replace("|", "\\|")
            lines.append(f"| `{state.name}` | {sentence} | {' | '.join(row)} |")
        lines.append("")
    lines += ["## Notes", ""]
    for sentence, number in notes.items():
        lines.append(wrapped(f"{number}. {sentence}"))
    lines += ["", "## States that are not here", ""]
    lines += [wrapped(f"- {what}: {why}.") for what, why in NOT_BUILT.items()]
    return "\n".join(lines) + "\n"


def wrapped(text: str) -> str:
    return textwrap.fill(
        text, 100, subsequent_indent="   ", break_long_words=False, break_on_hyphens=False
    )


def recorded() -> dict[str, dict[str, str]]:
    return json.loads(RECORD.read_text(encoding="utf-8"))


def main(names: list[str]) -> None:
    hf.utils.logging.disable_progress_bar()
    hf.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = {name: cells(name) for name in names or BY_NAME if BY_NAME[name].available}
    if names:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    # What a package is missing for here is kept as it was.
    kept = recorded() if RECORD.exists() else {}
    found = {name: found.get(name, kept.get(name)) for name in BY_NAME if name in {**found, **kept}}
    RECORD.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(found), encoding="utf-8")
    for name, row in found.items():
        for function, text in row.items():
            if text.startswith("FAULT"):
                print(f"{name}.{function}: {' '.join(text.split())}")


if __name__ == "__main__":
    main(sys.argv[1:])
