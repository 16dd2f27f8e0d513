"""`fastprune prune` end to end on a tiny model: what it writes, and how it refuses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TEXT, VOCABULARY, tiny_checkpoint, tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config

from fastprune import cli, progress
from fastprune.inspect import conclude, verdict
from fastprune.pruning import pipeline, run
from fastprune.workplace import claimed


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT * 40)
    return file


@pytest.fixture
def prune(model, text, tmp_path, capsys, monkeypatch):
    """Run the command with small settings; returns (status, stdout, stderr)."""
    monkeypatch.setattr(progress, "DELAY", 3600)  # no progress lines on a slow machine

    def run(*flags: str, source: Path | str = model, out: Path | None = tmp_path / "out"):
        args = ["prune", str(source), *(["--out", str(out)] if out else [])]
        args += ["--calib", str(text), "--calib-samples", "4", "--calib-seq-len", "32"]
        args += ["--eval", str(text), "--eval-seq-len", "32", "--eval-windows", "2"]
        capsys.readouterr()  # what the test's own set-up printed
        status = cli.main([*args, *flags])
        return (status, *capsys.readouterr())

    return run


@pytest.fixture
def refused(prune, tmp_path):
    """Run the command and check that it refused: one line on stderr, nothing written.

    Where the input was sound the run's log is in its place.
    """

    def run(*flags: str, status: int = 2, **options) -> str:
        before = set(tmp_path.rglob("*"))
        log = tmp_path / "out/fastprune/run.log"
        got, stdout, stderr = prune(*flags, **options)
        assert (got, stdout) == (status, "")
        assert stderr.startswith("fastprune: error: ")
        assert stderr.count("\n") == 1
        kept = set() if status == 2 else {log, *log.parents[:2]}
        assert set(tmp_path.rglob("*")) == before | kept
        assert status == 2 or stderr.split(": ", 2)[2] in log.read_text()
        return stderr

    return run


def test_it_writes_a_checkpoint_and_its_records(prune, tmp_path):
    status, stdout, _ = prune("--ratio", "0.3", "--json", str(tmp_path / "result.json"))
    assert status == 0
    out = tmp_path / "out"
    metrics = json.loads((out / "fastprune" / "metrics.json").read_text())
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["params"] == metrics["params"]
    assert metrics["ratio"]["requested"] == pytest.approx(0.3, abs=1e-4)  # a whole parameter count
    for key in ("before", "after"):
        assert metrics["perplexity"][0][key] > 1
        assert f"{metrics['perplexity'][0][key]:.2f}" in stdout
    stages = {"load", "score", "plan", "surgery", "compensate", "evaluate", "save", "total"}
    assert stages <= set(metrics["seconds"])
    assert {"plan.json", "report.html", "run.log"} <= {
        p.name for p in (out / "fastprune").iterdir()
    }
    assert (out / "tokenizer.json").is_file()
    assert "GQA ratio: all layers kept 2:1" in stdout.splitlines()
    run_log = (out / "fastprune" / "run.log").read_text()
    perplexity = metrics["perplexity"][0]
    params = metrics["params"]
    for line in (
        f"achieved ratio: {metrics['ratio']['achieved']:.2%} of the block parameters (requested 30",
        f"parameters: {params['before']:,} -> {params['after']:,}",
        "GQA ratio: all layers kept 2:1",
        f"(2 windows of 32): {perplexity['before']:.2f} -> {perplexity['after']:.2f}",
    ):
        assert line in run_log

    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert sum(p.numel() for p in loaded.parameters()) == metrics["params"]["after"]


def test_it_ends_with_a_verdict_and_the_next_command(prune, tmp_path):
    status, stdout, _ = prune("--ratio", "0.3")
    assert status == 0
    metrics = json.loads((tmp_path / "out/fastprune/metrics.json").read_text())
    said = metrics["verdict"]
    p = metrics["perplexity"][0]
    assert f"×{p['after'] / p['before']:.3g} of the dense one; with 30." in said["what"]
    lines = stdout.splitlines()
    assert said["what"] in lines
    assert f"  {said['advice'][0]['command']}" in lines
    assert f"verdict: {said['what']}" in (tmp_path / "out/fastprune/run.log").read_text()


def test_a_broken_result_is_written_and_called_so(prune, tmp_path, monkeypatch):
    monkeypatch.setattr(verdict, "SAME", 1e-3)
    monkeypatch.setattr(verdict, "REMOVED", ((0.0, 1e-3, 2e-3), (1.0, 1e-3, 2e-3)))
    status, stdout, stderr = prune("--ratio", "0.3")
    assert status == 0, stderr
    assert "is broken: ×" in stdout
    model = json.loads((tmp_path / "out/fastprune/metrics.json").read_text())["model"]
    assert f"  fastprune prune {model} --out {tmp_path / 'out'}-again" in stdout
    assert (tmp_path / "out/model.safetensors").is_file()


def test_a_result_beyond_any_use_is_not_written_unless_it_is_wanted(
    prune, refused, tmp_path, monkeypatch
):
    monkeypatch.setattr(conclude, "HOPELESS", 1e-3)
    assert "beyond any use" in refused("--ratio", "0.3", status=3)
    assert prune("--ratio", "0.3", "--gate-ppl-ratio", "100")[0] == 0  # as it was asked for
    assert prune("--ratio", "0.3", "--keep-worse", "--overwrite")[0] == 0
    assert "give one" in prune("--ratio", "0.3", "--keep-worse", "--gate-ppl-ratio", "2")[2]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_run_that_is_cut_off_leaves_its_log_and_goes_on(prune, tmp_path, monkeypatch, error):
    """The second is what a kill looks like from within: no one handles it."""

    def cut_off(*args, **options):
        raise error

    log = tmp_path / "out/fastprune/run.log"
    with monkeypatch.context() as patch:
        patch.setattr("fastprune.pruning.pipeline.PruneRun.make_plan", cut_off)
        prune("--ratio", "0.3")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [log]
    text = log.read_text()
    assert f"ended by {error.__name__}" in text
    assert prune("--ratio", "0.3")[0] == 0
    assert log.read_text().startswith(text)
    assert "achieved ratio" in log.read_text()


def test_the_log_is_there_while_the_run_lives(prune, tmp_path, monkeypatch):
    seen = []
    real = pipeline.load_model

    def load(*args, **options):
        seen.append((tmp_path / "out/fastprune/run.log").read_text())
        return real(*args, **options)

    monkeypatch.setattr(pipeline, "load_model", load)
    assert prune("--ratio", "0.3")[0] == 0
    assert "INFO" in seen[0]


def test_of_two_runs_the_second_is_refused_before_it_loads(prune, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_load", lambda _: pytest.fail("it loads"))
    with claimed(tmp_path / "out"):
        status, _, stderr = prune("--ratio", "0.2")
    assert status == 2
    assert "another fastprune" in stderr
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_the_plan_that_prune_applies(prune, tmp_path):
    assert prune("--ratio", "0.3", "--dry-run", out=tmp_path / "dry")[0] == 0
    assert not list((tmp_path / "dry").glob("*.safetensors"))
    plan = tmp_path / "dry" / "fastprune" / "plan.json"
    assert prune("--plan", str(plan), out=tmp_path / "out")[0] == 0
    applied = tmp_path / "out" / "fastprune" / "plan.json"
    assert json.loads(applied.read_text()) == json.loads(plan.read_text())


def test_a_dry_run_of_a_config_alone_prints_what_the_run_would_cost(prune, tmp_path):
    tiny_config("llama").save_pretrained(tmp_path / "bare")
    flags = ("--ratio", "0.2", "--dry-run", "--ranks", "4", "--layout", "uniform")
    flags += ("--structures", "attention,mlp")
    status, stdout, stderr = prune(*flags, source=tmp_path / "bare", out=None)
    assert (status, stderr) == (0, "")
    assert "layout   uniform: MistralForCausalLM in float32" in stdout
    for way in ("in memory", "--stream"):
        _, _, lines = stdout.partition(f"estimated, not measured: {way}, each of 4 processes\n")
        assert lines.startswith("stage"), way


def test_a_config_file(prune, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("ratio: 0.9\nimportance: magnitude-l2\ncalib-samples: 3\n")
    assert prune("--config", str(file), "--ratio", "0.2")[0] == 0
    settings = json.loads((tmp_path / "out/fastprune/metrics.json").read_text())["settings"]
    assert (settings["ratio"], settings["importance"]) == (0.2, "magnitude-l2")
    assert settings["calib_samples"] == 4, "flags override the file"


class TestModel:
    def test_missing_folder(self, refused, tmp_path):
        assert "no such file or folder" in refused("--ratio", "0.2", source=tmp_path / "nowhere")

    def test_not_a_model(self, refused, tmp_path):
        (tmp_path / "folder").mkdir()
        assert "config.json" in refused("--ratio", "0.2", source=tmp_path / "folder")

    def test_unsupported_family(self, refused, tmp_path):
        config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=VOCABULARY, n_positions=64)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
        tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
        assert "gpt2" in refused("--ratio", "0.2", source=tmp_path / "gpt2")

    @pytest.mark.parametrize("damage", ["truncated", "corrupt", "missing"])
    def test_damaged_weights(self, refused, tmp_path, damage):
        folder = tiny_checkpoint(tmp_path / "damaged")
        file = folder / "model.safetensors"
        if damage == "missing":
            file.unlink()
        elif damage == "truncated":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        else:
            file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])
        assert "safetensors" in refused("--ratio", "0.2", source=folder)

    def test_no_tokenizer(self, refused, tmp_path):
        folder = tiny_checkpoint(tmp_path / "mute")
        for file in folder.glob("token*"):
            file.unlink()
        assert "tokenizer" in refused("--ratio", "0.2", source=folder)

    def test_weights_that_are_not_finite(self, refused, tmp_path):
        folder = tiny_checkpoint(tmp_path / "sick")
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        refused("--ratio", "0.2", source=folder, status=4)


class TestFlags:
    @pytest.mark.parametrize("ratio", ["0", "1", "-0.1", "1.5", "nan", "inf", "much", ""])
    def test_ratio(self, refused, ratio):
        assert "--ratio" in refused("--ratio", ratio)

    def test_no_budget(self, refused):
        assert "--ratio" in refused()

    def test_a_ratio_that_empties_a_layer(self, refused):
        assert "97.0% of the block parameters cannot be reached" in refused("--ratio", "0.97")

    @pytest.mark.parametrize(
        ("flag", "value"),
        [
            ("--importance", "guess"),
            ("--structures", "attention,nose"),
            ("--layout", "round"),
            ("--layers", "3"),
            ("--layers", "7:9"),
            ("--device", "tpu"),
            ("--eval-windows", "0"),
        ],
    )
    def test_unknown_values(self, refused, flag, value):
        line = refused("--ratio", "0.2", flag, value)
        assert flag.strip("-") in line

    def test_no_out(self, refused):
        assert "--out" in refused("--ratio", "0.2", out=None)


class TestText:
    @pytest.mark.parametrize("content", [b"", b"  \n", b"\x00\xff\xfe\x89PNG" * 100])
    @pytest.mark.parametrize("flag", ["--calib", "--eval"])
    def test_empty_or_binary(self, refused, tmp_path, flag, content):
        file = tmp_path / "bad.txt"
        file.write_bytes(content)
        assert "bad.txt" in refused("--ratio", "0.2", flag, str(file))

    def test_missing(self, refused, tmp_path):
        assert "gone.txt" in refused("--ratio", "0.2", "--calib", str(tmp_path / "gone.txt"))

    def test_too_short(self, refused, text, tmp_path):
        (tmp_path / "short.txt").write_text("One sentence.")
        refused("--ratio", "0.2", "--eval", str(tmp_path / "short.txt"))
        both = f"{text},{tmp_path / 'short.txt'}"
        assert "short.txt: 2 samples of 32 tokens need" in refused(
            "--ratio", "0.2", "--calib", both
        )

    @pytest.mark.parametrize("flag", ["--calib-seq-len", "--eval-seq-len"])
    def test_longer_than_the_model_can_read(self, prune, refused, flag):
        assert f"{flag} 513: the model has 512 positions" in refused("--ratio", "0.2", flag, "513")
        small = ("--calib-samples", "1", "--eval-windows", "1", "--dry-run")
        assert prune("--ratio", "0.2", flag, "512", *small)[0] == 0


class TestOut:
    def test_other_content_stays(self, refused, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("years of work")
        assert "--overwrite" in refused("--ratio", "0.2")
        assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"

    def test_overwrite(self, prune, tmp_path):
        assert prune("--ratio", "0.2")[0] == 0
        assert prune("--ratio", "0.3")[0] == 2
        assert prune("--ratio", "0.3", "--overwrite")[0] == 0
        metrics = json.loads((tmp_path / "out/fastprune/metrics.json").read_text())
        assert metrics["settings"]["ratio"] == 0.3

    def test_what_is_read_is_not_replaced(self, prune, refused, tmp_path):
        out = tmp_path / "out"
        assert prune("--ratio", "0.2")[0] == 0
        plan = str(out / "fastprune" / "plan.json")
        (out / "settings.yaml").write_text("quiet: true")
        for flags, source in (
            (("--ratio", "0.2"), out),
            (("--plan", plan), None),
            (("--ratio", "0.2", "--layer-importance", plan), None),
            (("--ratio", "0.2", "--calib", f"builtin:pydocs,{plan}"), None),
            (("--ratio", "0.2", "--config", str(out / "settings.yaml")), None),
        ):
            named = {} if source is None else {"source": source}
            assert "the run reads" in refused(*flags, "--overwrite", **named)


class TestPlan:
    def test_for_another_model(self, prune, refused, tmp_path):
        other = tiny_checkpoint(tmp_path / "other", layers=3)
        assert prune("--ratio", "0.2", "--dry-run", source=other, out=tmp_path / "dry")[0] == 0
        plan = tmp_path / "dry/fastprune/plan.json"
        assert "another model" in refused("--plan", str(plan))

    @pytest.mark.parametrize("content", ["", "{}", "[1, 2]", "{not json"])
    def test_broken(self, refused, tmp_path, content):
        (tmp_path / "plan.json").write_text(content)
        assert "plan.json" in refused("--plan", str(tmp_path / "plan.json"))


def test_a_gate_that_is_not_met(refused):
    assert "gate" in refused("--ratio", "0.5", "--gate-ppl-ratio", "0.01", status=3)


@pytest.mark.parametrize(
    ("module", "stage"),
    [
        (pipeline, "load_model"),
        (run, "plan_in_steps"),
        (run, "apply_plan"),
        (pipeline, "save_checkpoint"),
        (pipeline, "check_read_back"),
    ],
)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_ctrl_c_leaves_the_log_alone(prune, tmp_path, monkeypatch, module, stage, before):
    real = getattr(module, stage)

    def interrupted(*args, **kwargs):
        if not before:
            real(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, stage, interrupted)
    status, stdout, stderr = prune("--ratio", "0.2")
    assert (status, stdout, stderr) == (130, "", "fastprune: interrupted\n")
    log = tmp_path / "out/fastprune/run.log"
    assert set(tmp_path.rglob("*")) == {log, *log.parents[:2]}
