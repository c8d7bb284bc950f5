"""`loralab export`: what is written, for which engine, and what is refused."""

import json
import shlex
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file
from tiny_decoder import save_decoder
from transformers import AutoModelForCausalLM

import loralab
from loralab.adapters import adapter_parameters, extract, read_adapter
from loralab.cli import main
from loralab.config import parse_config
from loralab.errors import AdapterError, ConfigError, OutputError, RunError
from loralab.exporting import TEXTS, Exported, find_engine, plan_launch, read_probe_file
from loralab.exporting.launch import chat_format
from loralab.models import load_tokenizer
from loralab.runs.export import export
from loralab.runs.probe import probe
from loralab.runs.train import train

FEW = ("The lazy fox, and then", "Will it rain tomorrow? It is")


@pytest.fixture(scope="module")
def source(make_adapter: Any) -> Path:
    return make_adapter(rank=3, scaling="alpha/sqrt(rank)", rank_pattern={"q_proj": 2})[1]


def test_for_vllm(source: Path, decoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "reviews"
    told = export(source, out, engine="vllm", base=str(decoder), texts=FEW)
    names = {str(f.relative_to(out)) for f in out.rglob("*") if f.is_file()}
    assert names == set(told["files"])
    assert {"adapter/adapter_config.json", "probes.json", "serve.sh", "README.txt"} <= names
    assert json.loads((out / "export.json").read_text()) == told
    assert told["rank"] == 3
    assert told["largest_error"] == 0
    assert told["effect_kept"] > 0.9999
    words = shlex.split(told["commands"][0])
    assert words[:3] == ["vllm", "serve", str(decoder.resolve())]
    assert words[words.index("--max-lora-rank") + 1] == "8"
    assert words[words.index("--lora-modules") + 1] == "reviews=adapter"
    assert (out / "serve.sh").stat().st_mode & stat.S_IXUSR
    assert told["commands"][0] in (out / "serve.sh").read_text()
    assert (
        f"loralab probe http://localhost:8000 --probes probes.json --model {told['model']}"
        in (out / "README.txt").read_text()
    )
    assert read_probe_file(out).effect == pytest.approx(told["probes"]["effect_nats"])


def test_for_sglang_and_peft(source: Path, decoder: Path, tmp_path: Path) -> None:
    told = export(source, tmp_path / "a", engine="sglang", base=str(decoder), probes=False)
    assert told["model"] == "base:a"
    assert "--lora-strict-loading" in told["commands"][0]
    assert not (tmp_path / "a" / "probes.json").exists()
    told = export(source, tmp_path / "b", engine="peft", probes=False)
    assert told["commands"] == []
    config: Any = PeftConfig.from_pretrained(tmp_path / "b" / "adapter")
    assert (config.r, config.lora_alpha, config.use_rslora) == (3, 3, False)
    assert config.lora_dropout == 0


def test_for_ollama_with_its_template(source: Path, decoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "Reviews.1"
    told = export(source, out, engine="ollama", base=str(decoder), probes=False)
    assert {"base.gguf", "adapter.gguf", "Modelfile"} <= set(told["files"])
    text = (out / "Modelfile").read_text()
    assert text.startswith("FROM ./base.gguf\nADAPTER ./adapter.gguf\nTEMPLATE ")
    assert told["commands"][0] == "ollama create reviews.1 -f Modelfile"


def test_a_chat_template_is_found_by_what_it_renders(decoder: Path) -> None:
    words = load_tokenizer(str(decoder))
    lines = chat_format(words)
    assert lines is not None
    template = lines[0].removeprefix('TEMPLATE """').removesuffix('"""')
    turn = template.removeprefix("{{- range .Messages }}").partition("{{ end }}")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    made = "".join(
        turn[0].replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"])
        for m in messages
    )
    wanted = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert made + turn[2] == wanted
    assert lines[1] == 'PARAMETER stop "<|im_end|>"'
    words.chat_template = "{{ messages[0]['content'] }}"
    assert chat_format(words) is None


def test_an_adapter_alone_for_llama_cpp(source: Path, decoder: Path, tmp_path: Path) -> None:
    told = export(
        source,
        tmp_path / "out",
        engine="llama.cpp",
        base=str(decoder),
        adapter_only=True,
        probes=False,
    )
    assert not (tmp_path / "out" / "base.gguf").exists()
    assert "YOUR-BASE.gguf" in told["commands"][0]


def test_merged_for_vllm_is_the_adapted_model(
    make_adapter: Any, decoder: Path, tmp_path: Path
) -> None:
    model, folder = make_adapter(dora=True)
    told = export(
        folder, tmp_path / "out", engine="vllm", base=str(decoder), merged=True, texts=FEW
    )
    assert told["certificate"]["dtype"] == "float32"
    assert "--enable-lora" not in told["commands"][0]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").eval()
    ids = torch.randint(3, 300, (1, 8))
    with torch.no_grad(), loralab.use(model, "a"):
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    assert read_probe_file(tmp_path / "out").scales == {"base": 0.0, "adapter": 1.0}


def test_merged_for_llama_cpp_is_one_file(source: Path, decoder: Path, tmp_path: Path) -> None:
    told = export(
        source,
        tmp_path / "out",
        engine="llama.cpp",
        base=str(decoder),
        merged=True,
        dtype="f16",
        probes=False,
    )
    assert "model.gguf" in told["files"]
    assert not (tmp_path / "out" / "model").exists()


def test_dora_by_plain_pairs_states_what_is_kept(
    make_adapter: Any, decoder: Path, tmp_path: Path
) -> None:
    _, folder = make_adapter(dora=True, targets=["q_proj", "down_proj"])
    kept = []
    for rank in (4, 64):
        told = export(
            folder,
            tmp_path / str(rank),
            engine="vllm",
            base=str(decoder),
            rank=rank,
            name="a",
            texts=FEW,
        )
        assert set(told["errors"]) <= set(read_adapter(folder).pairs)
        kept.append(told["effect_kept"])
    assert kept[0] < kept[1]
    assert kept[1] > 0.999


class TestTheWayRound:
    """An export that is served by something else is found applied there."""

    def test_llama_cpp_applies_it_and_the_probe_says_so(
        self, source: Path, decoder: Path, tmp_path: Path
    ) -> None:
        pytest.importorskip("xllamacpp")
        from test_llama_cpp import start

        out = tmp_path / "reviews"
        export(source, out, engine="llama.cpp", base=str(decoder), texts=TEXTS[:4])
        served = start(out / "base.gguf", out / "adapter.gguf")
        found = probe(served.listening_address, out)
        assert found["verdict"] == "applied", found
        assert found["factor"] == pytest.approx(1, abs=0.01)
        plain = start(out / "base.gguf")
        assert probe(plain.listening_address, out)["verdict"] == "not applied"


def test_a_run_knows_its_base_and_its_texts(decoder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {n}:", "completion": f" the answer is {n}"} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = parse_config(
        {
            "model": {"name": str(decoder), "task": "causal"},
            "data": {"train": str(tmp_path / "rows.jsonl"), "max_tokens": 32},
            "method": {"rank": 2, "scaling": "alpha/sqrt(rank)"},
            "training": {
                "learning_rate": 2e-2,
                "max_steps": 4,
                "device": "cpu",
                "threads": 1,
                "memory_plan": "off",
            },
        }
    )
    train(config, tmp_path / "run", splits=("validation",))
    told = export(tmp_path / "run", tmp_path / "out", engine="llama.cpp")
    assert told["base"] == str(decoder)
    assert told["effect_kept"] > 0.9999
    probes = read_probe_file(tmp_path / "out")
    assert probes.probes[0].text.startswith("Question")
    assert probes.original == {"rank": 2, "alpha": 32.0, "scaling": "alpha/sqrt(rank)"}
    told = export(tmp_path / "run", tmp_path / "whole", engine="sglang", merged=True, probes=False)
    assert (tmp_path / "whole" / "model" / "tokenizer.json").is_file()


class TestClassifier:
    def test_its_labels_are_probed(self, tmp_path: Path) -> None:
        base = save_decoder(tmp_path / "base")
        model = loralab.load_model(str(base), task="classification", num_labels=3)
        lora = loralab.LoRAConfig(rank=2, alpha=4, whole_modules=["score"])
        loralab.attach(model, lora, name="a")
        with torch.no_grad():
            for parameter in adapter_parameters(model, "a").values():
                parameter.normal_(std=0.2)
        loralab.save_adapter(model, "a", tmp_path / "a")
        told = export(tmp_path / "a", tmp_path / "out", engine="vllm", base=str(base), texts=FEW)
        assert "--runner pooling --convert classify --max-lora-cls-labels 3" in told["commands"][0]
        probes = read_probe_file(tmp_path / "out")
        assert probes.task == "classification"
        assert set(probes.scales.values()) >= {0.0, 0.5, 1.0}
        one = probes.probes[0]
        with torch.no_grad(), loralab.use(model, "a"):
            wanted = model(torch.tensor([one.token_ids])).logits[0].log_softmax(-1)
        torch.testing.assert_close(torch.tensor(one.next["adapter"]), wanted, atol=1e-4, rtol=0)
        weights = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
        assert "base_model.model.score.weight" in weights


class TestBadInput:
    def test_an_unknown_engine_gets_the_nearest(self, source: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"unknown engine 'lama.cpp'\n.*'llama.cpp'"):
            export(source, tmp_path / "x", engine="lama.cpp")

    def test_an_output_that_exists(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "file").touch()
        with pytest.raises(OutputError, match="exists already"):
            export(source, tmp_path / "x", engine="vllm")

    def test_an_output_of_a_failed_export_is_not_left(
        self, make_adapter: Any, tmp_path: Path
    ) -> None:
        _, folder = make_adapter(dora=True)
        with pytest.raises(AdapterError):
            export(folder, tmp_path / "x", engine="vllm")
        assert list(tmp_path.iterdir()) == []

    def test_a_base_that_is_not_known(self, source: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"does not say which base.*\n.*--base"):
            export(source, tmp_path / "x", engine="llama.cpp")

    def test_a_run_without_an_adapter(self, tmp_path: Path) -> None:
        run = tmp_path / "run"
        (run / "model").mkdir(parents=True)
        (run / "manifest.json").write_text('{"state": "finished"}')
        (run / "config.toml").write_text(
            '[model]\nname = "smollm2"\n[data]\nname = "tweets"\n[method]\nkind = "full"\n'
        )
        with pytest.raises(RunError, match=r"trained by full and has no adapter to export"):
            export(run, tmp_path / "x", engine="vllm")

    def test_options_that_do_not_go_together_are_all_named(
        self, source: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(ConfigError) as caught:
            export(
                source,
                tmp_path / "x",
                engine="vllm",
                merged=True,
                rank=4,
                dtype="f16",
                adapter_only=True,
                name="../x",
            )
        for word in ("--dtype", "--rank", "--adapter-only", "'../x' is no name"):
            assert word in caught.value.cause

    def test_no_adapter_at_all(self, tmp_path: Path) -> None:
        with pytest.raises(AdapterError, match=r"adapter_config.json is missing"):
            export(tmp_path / "nothing", tmp_path / "x", engine="vllm")


class TestCommandLine:
    def test_export_and_probe(
        self, source: Path, decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out, prompts = tmp_path / "reviews", tmp_path / "prompts.txt"
        prompts.write_text("The lazy fox rests.\n\nWill it rain tomorrow?\n")
        line = f"export {source} --for vllm --output {out} --base {decoder} --prompts {prompts}"
        assert main([*line.split(), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["probes"]["num"] == 2
        assert main(["probe", "http://127.0.0.1:9", "--probes", str(out), "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["verdict"] == "unreachable"
        assert main(["probe", "file:///x", "--probes", str(out)]) == 2
        assert main(f"export {source} --for vlm --output {tmp_path / 'y'}".split()) == 2


def test_a_rank_above_every_limit_is_refused(make_adapter: Any) -> None:
    from loralab.exporting import canonical

    model, _ = make_adapter(rank=600, targets=["q_proj"])
    with pytest.raises(AdapterError, match=r"rank 600 is above vllm's largest, 512\n.*--rank 512"):
        canonical(extract(model, "a"), find_engine("vllm"))


def test_every_engine_has_a_launch_for_both_forms() -> None:
    for name in ("vllm", "sglang", "llama.cpp", "ollama", "peft"):
        for merged in (False, True):
            launch = plan_launch(find_engine(name), Exported("a", "b", 16, merged))
            assert bool(launch.commands) == (name != "peft")
            assert launch.script.startswith("#!/bin/sh\nset -e\n")
