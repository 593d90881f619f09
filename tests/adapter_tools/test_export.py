"""`export`: every form answers as the live model does, also by the arithmetic of other readers;
nothing wrong is handed out."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from architectures import STEPS, answers, batch_for, make, method_for, train
from dynamic import DYNAMIC
from model_folders import Command, digests
from peft import LoraConfig, PeftModel, get_peft_model
from readers import llama_cpp, read, vllm, why_not_served
from safetensors.torch import load_file, save_file

import adaptive_lora as al
from adaptive_lora import IntegrityError, methods
from adaptive_lora.adapter_tools import export as export_module
from adaptive_lora.adapter_tools.export import FORMS, export
from adaptive_lora.adapter_tools.folder import read_adapter
from adaptive_lora.adapter_tools.forms import max_lora_rank
from adaptive_lora.adapter_tools.probe import answers as all_answers
from adaptive_lora.adapter_tools.probe import difference, probe_inputs
from adaptive_lora.methods import METHODS
from adaptive_lora.model.adapters import adapters, weights
from adaptive_lora.model.base_model import BASE_FILE

pytest_plugins = ("model_folders",)
# Conv1D, grouped queries, an encoder with a head, encoder and decoder with tied embeddings, images.
ARCHITECTURES = ["gpt2", "llama", "bert", "t5", "vit"]
LIMIT = 1e-5  # relative to the largest logit, float32


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the tiny base models."""
    folder = tmp_path_factory.mktemp("bases")
    for name in ARCHITECTURES:
        make(name).save_pretrained(folder / name)
    return folder


def apart(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).detach().abs().max() / two.detach().abs().max())


def trained(
    architecture: str, method_name: str, folder: Path
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Train, save to `folder`, and return the live model's answers with the batch they are to."""
    base = make(architecture)
    batch, method = batch_for(base), method_for(base, method_name)
    model = al.attach(base, method, scale=1.5)
    train(model, method, batch)
    al.save(model, folder)
    return answers(model, batch), batch


@pytest.mark.parametrize("method_name", METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_form_of_every_methods_checkpoint_answers_as_the_live_model(
    architecture: str, method_name: str, bases: Path, tmp_path: Path
) -> None:
    live, batch = trained(architecture, method_name, tmp_path / "adapter")
    before = digests(tmp_path / "adapter")

    def difference(model: torch.nn.Module) -> float:
        return apart(answers(model, batch), live)

    for form in ("native", "uniform", "merged"):
        done = export(tmp_path / "adapter", form, tmp_path / form, model=str(bases / architecture))
        assert done.difference is not None
        assert done.difference <= LIMIT
    for form in ("native", "uniform"):
        stock = PeftModel.from_pretrained(make(architecture), str(tmp_path / form))
        assert difference(stock) <= LIMIT, form
        for patterns in (False, True):
            assert (
                difference(vllm(make(architecture), tmp_path / form, patterns=patterns)) <= LIMIT
            ), form
    assert difference(llama_cpp(make(architecture), tmp_path / "uniform")) <= LIMIT
    assert why_not_served(make(architecture), tmp_path / "uniform") == []
    merged = type(make(architecture)).from_pretrained(tmp_path / "merged")
    assert difference(merged) <= LIMIT
    assert digests(tmp_path / "adapter") == before


def test_there_are_methods_that_the_readers_without_a_form_get_wrong(
    bases: Path, tmp_path: Path
) -> None:
    """Else the test above would hold of readers that change nothing."""
    live, batch = trained("llama", "linear_decay", tmp_path / "adapter")
    assert apart(answers(make("llama"), batch), live) > 0.01
    assert apart(answers(llama_cpp(make("llama"), tmp_path / "adapter"), batch), live) > 0.01
    live, batch = trained("llama", "custom", tmp_path / "custom")
    assert any(
        "no adapter" in problem for problem in why_not_served(make("llama"), tmp_path / "custom")
    )


@pytest.fixture
def foreign(tmp_path: Path) -> tuple[Path, torch.Tensor, dict[str, torch.Tensor]]:
    """An adapter of PEFT alone: ranks, alphas and rsLoRA mixed, some layers without; GPT-2, whose
    weights lie transposed."""
    base = make("gpt2")
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["c_attn", "c_fc", "lm_head"],
        exclude_modules=["transformer.h.1.mlp.c_fc"],
        rank_pattern={"h.0.attn.c_attn": 2},
        alpha_pattern={"c_fc": 3},
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    torch.manual_seed(2)
    for layer in adapters(model).values():
        torch.nn.init.normal_(weights(layer)[1], std=0.3)
    model.save_pretrained(tmp_path / "foreign")
    batch = batch_for(base)
    return tmp_path / "foreign", answers(model, batch), batch


@pytest.mark.filterwarnings(
    "ignore:.*tied:UserWarning", "ignore:fan_in_fan_out is set to True:UserWarning"
)
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_an_adapter_with_several_scales_and_a_tied_target(
    foreign: Any, bases: Path, tmp_path: Path
) -> None:
    folder, live, batch = foreign
    scales = {update.scale for update in read_adapter(folder).updates.values()}
    assert len(scales) == 3
    for form in ("native", "uniform", "merged"):
        done = export(folder, form, tmp_path / form, model=str(bases / "gpt2"))
        assert done.difference is not None
        assert done.difference <= LIMIT
        if form == "merged":
            assert (
                "lm_head shared its weights with the embeddings, and has its own now" in done.notes
            )
            merged = hf.GPT2LMHeadModel.from_pretrained(tmp_path / form)
            assert not torch.equal(merged.lm_head.weight, merged.transformer.wte.weight)
            assert apart(answers(merged, batch), live) <= LIMIT
        else:
            config, pairs, _ = read(tmp_path / form)
            assert config["r"] == max(a.shape[0] for a, _ in pairs.values()) == 4
            assert not config["use_rslora"]
            assert apart(answers(vllm(make("gpt2"), tmp_path / form), batch), live) <= LIMIT
    _, pairs, _ = read(tmp_path / "uniform")
    assert not pairs["transformer.h.1.mlp.c_fc"][1].any()
    assert apart(answers(llama_cpp(make("gpt2"), tmp_path / "uniform"), batch), live) <= LIMIT
    assert why_not_served(make("gpt2"), tmp_path / "uniform") == []


def test_without_the_base_model_layers_are_filled_in_by_name(tmp_path: Path) -> None:
    _, batch = trained("llama", "custom", tmp_path / "adapter")
    absent = set(adapters(al.attach(make("llama"), methods.lora(1)))) - set(
        read_adapter(tmp_path / "adapter").updates
    )
    assert absent
    done = export(tmp_path / "adapter", "uniform", tmp_path / "out", check=False)
    assert done.difference is None
    assert "NOT CHECKED" in "\n".join(done.lines())
    assert any("the base model was not looked at" in note for note in done.notes)
    assert absent <= set(read(tmp_path / "out")[1])
    stock = PeftModel.from_pretrained(make("llama"), str(tmp_path / "out"))
    source = PeftModel.from_pretrained(make("llama"), str(tmp_path / "adapter"))
    assert apart(answers(stock, batch), answers(source, batch)) <= LIMIT


def test_a_base_model_in_bfloat16_is_merged_in_float32_and_written_as_it_was(
    bases: Path, tmp_path: Path
) -> None:
    trained("llama", "lora", tmp_path / "adapter")
    base = make("llama").to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    done = export(tmp_path / "adapter", "merged", tmp_path / "out", model=str(tmp_path / "base"))
    assert done.difference is not None
    assert done.difference <= LIMIT  # before the rounding to bfloat16
    assert "rounded to bfloat16, as the base model is" in done.notes[0]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    name = "model.layers.0.self_attn.q_proj"
    update = read_adapter(tmp_path / "adapter").updates[name]
    exact = base.get_submodule(name).weight.float() + update.scale * update.b @ update.a
    # One unit in the last place of bfloat16: the merge may round the last bit of float32 the other
    # way.
    torch.testing.assert_close(tensors[f"{name}.weight"].float(), exact, rtol=2**-8, atol=0)


def test_half_precision_adapters_keep_their_dtype_where_it_can_hold_the_scale(
    tmp_path: Path,
) -> None:
    model = al.attach(make("llama"), methods.lora(4), ["q_proj"], scale=2.0)
    for layer in adapters(model).values():
        torch.nn.init.normal_(weights(layer)[1])
    model.to(torch.bfloat16)
    al.save(model, tmp_path / "two")
    config = json.loads((tmp_path / "two" / "adapter_config.json").read_text())
    shutil.copytree(tmp_path / "two", tmp_path / "third")
    (tmp_path / "third" / "adapter_config.json").write_text(
        json.dumps({**config, "lora_alpha": 1.3})
    )
    for name, dtype in (("two", torch.bfloat16), ("third", torch.float32)):
        export(tmp_path / name, "uniform", tmp_path / f"{name} out", check=False)
        tensors = load_file(tmp_path / f"{name} out" / "adapter_model.safetensors")
        assert {t.dtype for key, t in tensors.items() if "lora_B" in key} == {dtype}
        for target, update in read_adapter(tmp_path / name).updates.items():
            b = tensors[f"base_model.model.{target}.lora_B.weight"]
            torch.testing.assert_close(
                b.double(), update.b.double() * update.scale, rtol=1e-7, atol=0
            )


# --- runs, and the command ---


def test_a_run_is_exported_with_its_head_tokenizer_and_class_names(
    classification_run: Path, bert_folder: str, command: Command, tmp_path: Path
) -> None:
    for form in ("native", "uniform", "merged"):
        done = command("export", classification_run, "--to", form, "--output", tmp_path / form)
        assert done.code == 0, done.err
        assert "checked: read back" in done.out
        assert max(map(len, done.out.splitlines())) <= 100 + len(str(tmp_path))
    assert (
        "--max-lora-rank 8"
        in command("export", classification_run, "--to", "uniform", "--output", tmp_path / "x").out
    )
    merged = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert set(merged.config.id2label.values()) == {"positive", "negative"}
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "merged")
    live = PeftModel.from_pretrained(
        hf.AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=2),
        str(classification_run / "adapter"),
    ).eval()
    batch = tokenizer(["the film is good", "a bad day"], return_tensors="pt", padding=True)
    assert apart(merged(**batch).logits, live(**batch).logits) <= LIMIT


def test_a_language_models_run(causal_run: Path, command: Command, tmp_path: Path) -> None:
    for form in FORMS:
        done = command("export", causal_run, "--to", form, "--output", tmp_path / form)
        assert done.code == 0, done.err
    assert "convert_lora_to_gguf.py --base" in " ".join(done.out.split())
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.vocab_size > 0


def test_gguf_runs_the_users_converter_on_the_uniform_form(
    causal_run: Path, command: Command, tmp_path: Path
) -> None:
    script = tmp_path / "convert_lora_to_gguf.py"
    script.write_text(
        "import sys, pathlib\n"
        "arguments = dict(zip(sys.argv[1:-1:2], sys.argv[2:-1:2]))\n"
        "assert pathlib.Path(arguments['--base'], 'config.json').is_file()\n"
        "assert pathlib.Path(sys.argv[-1], 'adapter_model.safetensors').is_file()\n"
        "pathlib.Path(arguments['--outfile']).write_bytes(b'GGUF' + b'0' * 9)\n"
    )
    done = command(
        "export", causal_run, "--to", "gguf", "--converter", script, "--output", tmp_path / "out"
    )
    assert done.code == 0, done.err
    assert (tmp_path / "out" / "adapter.gguf").is_file()
    script.write_text("import sys; sys.exit('Model BertModel is not supported')")
    failed = command(
        "export", causal_run, "--to", "gguf", "--converter", script, "--output", tmp_path / "failed"
    )
    assert failed.code == 2
    assert "Model BertModel is not supported" in failed.err
    assert not (tmp_path / "failed").exists()


# --- what must not be handed out ---


@pytest.mark.parametrize("form", ["native", "uniform", "merged"])
def test_a_form_that_answers_otherwise_is_an_error_and_removed(
    form: str, bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained("llama", "linear_decay", tmp_path / "adapter")
    if form == "merged":
        real = export_module._write_model

        def spoil(model: Any, *rest: Any) -> None:
            model.model.layers[0].self_attn.q_proj.weight.data[0] *= 1.01
            real(model, *rest)
            model.model.layers[0].self_attn.q_proj.weight.data[0] /= 1.01

        monkeypatch.setattr(export_module, "_write_model", spoil)
    else:
        write = export_module.write_adapter

        def write_badly(adapter: Any, path: Path) -> Path:
            next(iter(adapter.updates.values())).b[0] *= 1.01
            return write(adapter, path)

        monkeypatch.setattr(export_module, "write_adapter", write_badly)
    with pytest.raises(IntegrityError, match=r"the logits differ from .* nothing is kept"):
        export(tmp_path / "adapter", form, tmp_path / "out", model=str(bases / "llama"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved adapter of the tiny Llama. Read only."""
    folder = tmp_path_factory.mktemp("adapters") / "llama"
    trained("llama", "linear_decay", folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{bases} --to native", "is no adapter folder"),
        ("{adapter}/absent --to native", "there is no folder"),
        (
            "{adapter} --to nativ --model {bases}/llama",
            "unknown form 'nativ'. Did you mean 'native'?",
        ),
        (
            "{adapter} --to native",
            "does not say which base model it is for; give the base model with --model",
        ),
        ("{adapter} --to merged --no-check", "does not say which base model it is for"),
        ("{adapter} --to native --model {bases}/absent", "does not exist; give a folder"),
        ("{adapter} --to native --model {bases}/gpt2", "is a 'gpt2' model; expected 'llama'"),
        ("{bare} --to native --model {bases}/gpt2", "has no module 'model.layers.0."),
        ("{adapter} --to merged --model {bases}/wide", "has 32 inputs and"),
        (
            "{adapter} --to merged --model {bases}/quantised",
            "is quantised: merging into such weights would round",
        ),
        (
            "{adapter} --to native --converter {adapter}/README.md",
            "a converter is for --to gguf, not native",
        ),
        ("{adapter} --to gguf --converter absent.py", "there is no file absent.py"),
        ("{nan} --to native --model {bases}/llama", "NaN or infinite"),
        ("{head} --to gguf --model {bases}/bert", "llama.cpp reads no module trained whole"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(
    arguments: str, message: str, adapter: Path, bases: Path, command: Command, tmp_path: Path
) -> None:
    files = {"adapter": adapter, "bases": bases}
    files |= {name: tmp_path / name for name in ("nan", "head", "bare")}
    if "{bare}" in arguments:
        shutil.copytree(adapter, tmp_path / "bare")
        (tmp_path / "bare" / BASE_FILE).unlink()
    if "{nan}" in arguments:
        shutil.copytree(adapter, tmp_path / "nan")
        tensors = load_file(adapter / "adapter_model.safetensors")
        next(iter(tensors.values()))[0, 0] = float("nan")
        save_file(
            tensors, tmp_path / "nan" / "adapter_model.safetensors", metadata={"format": "pt"}
        )
    if "{head}" in arguments:
        al.save(al.attach(make("bert"), methods.lora(1)), tmp_path / "head")
    if "wide" in arguments and not (bases / "wide").exists():
        make("llama").__class__(
            hf.LlamaConfig(**{**make("llama").config.to_dict(), "hidden_size": 32})
        ).save_pretrained(bases / "wide")
    if "quantised" in arguments and not (bases / "quantised").exists():
        shutil.copytree(bases / "llama", bases / "quantised")
        config = json.loads((bases / "quantised" / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (bases / "quantised" / "config.json").write_text(json.dumps(config))
    done = command(
        "export",
        *[word.format_map(files) for word in arguments.split()],
        "--output",
        tmp_path / "out",
    )
    assert done.code in (2, 4), done.out
    assert message in " ".join(done.err.split())
    assert done.err.count("error:") == 1
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(
    adapter: Path, bases: Path, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    for form in FORMS:
        done = command(
            "export",
            adapter,
            "--to",
            form,
            "--model",
            bases / "llama",
            "--output",
            tmp_path / "out",
        )
        assert done.code == 2
        assert "exists; give another name or remove it" in " ".join(done.err.split())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


# --- comparing ---


def test_inputs_are_made_up_for_every_kind_of_model_and_depend_on_the_seed() -> None:
    for name in (
        "bert",
        "bert qa",
        "gpt2",
        "llama classifier",
        "t5",
        "bart classifier",
        "vit",
        "deberta-v3",
    ):
        model = make(name)
        one, two, other = (probe_inputs(model, seed=seed) for seed in (0, 0, 1))
        assert difference(all_answers(model, one), all_answers(model, two)) == 0
        assert difference(all_answers(model, one), all_answers(model, other)) > 1e-3, name


def test_answers_that_are_not_finite_or_of_another_shape_are_infinitely_far() -> None:
    one = torch.ones(2, 3)
    assert difference([one], [one]) == 0
    assert difference([one * float("nan")], [one]) == float("inf")
    assert difference([one], [one[:1]]) == float("inf")
    assert difference([], [one]) == float("inf")


def test_the_sizes_vllm_takes() -> None:
    assert [max_lora_rank(rank) for rank in (1, 2, 8, 9, 65, 257, 512)] == [
        1,
        8,
        8,
        16,
        128,
        320,
        512,
    ]
    assert max_lora_rank(513) is None


def test_trainings_here_are_long_enough_for_ranks_to_change() -> None:
    assert STEPS == 6
    assert set(DYNAMIC) & set(METHODS) >= {
        "adalora",
        "squeeze",
        "grad_delta",
        "plateau",
        "peft_adalora",
    }
    assert sys.version_info >= (3, 11)
