"""The command line, from its words to the rows, and what it refuses."""

import builtins
import json

import pytest

from lora_lite.bench import catalogue, report, rows
from lora_lite.bench.runner import Protocol
from lora_lite.cli import main

SHORT = ["--steps", "2", "--seeds", "1", "--rates", "0.01"]


def test_bench_writes_a_row_and_shows_it_beside_base_and_full(tmp_path, capsys):
    assert main(["bench", "jora", "--k", "4", *SHORT, "--results", str(tmp_path)]) == 0
    found = {row.method: row for row in rows.read(tmp_path, "digits")}
    assert set(found) == {"base", "full fine-tuning", "jora k=4"}
    row = found["jora k=4"]
    assert row.hyperparameters["k"] == 4
    assert row.protocol["steps"] == 2
    assert 0 <= row.mean("target_pct") <= 100
    assert row.mean("peak_memory_mib") > 0 and row.mean("samples_per_s") > 0
    assert set(row.environment) == {"python", "torch", "lora_lite", "processor"}
    assert row.commit is None or len(row.commit.rstrip("+")) == 40
    out = capsys.readouterr().out
    assert all(name in out for name in ("base", "full", "jora k=4"))


def test_another_configuration_leaves_a_row_alone(tmp_path):
    for more in ([], ["--targets", "q_proj", "v_proj"], ["--r", "2"], ["--no_rslora"]):
        assert main(["bench", "lora", *SHORT, *more, "--results", str(tmp_path)]) == 0
    methods = sorted(row.method for row in rows.read(tmp_path, "digits"))
    assert methods == [
        "base",
        "full fine-tuning",
        "lora",
        "lora r=2",
        "lora targets=q_proj+v_proj",
    ]


@pytest.mark.parametrize(
    "words, message",
    [
        ("bench jorra", "no variant 'jorra'; did you mean 'jora'"),
        ("describe lorra", "no variant 'lorra'; did you mean 'lora'"),
        ("bench lora --rang 3", "lora has no hyperparameter or option 'rang'"),
        ("bench lora --step 3", "'step'; did you mean 'steps'"),
        ("bench oft --block-sice=4", "'block_sice'; did you mean 'block_size'"),
        ("bench lora --r 0", "lora: r=0 must be ≥ 1"),
        ("bench lora --r some", "invalid literal"),
        ("bench jora --core blok", "invalid choice 'blok'"),
        ("bench oft --block_size 7", "block_size=7 does not fit; use 2, 3"),
        ("bench lora --targets q_prj", "'q_prj' matches no layer; did you mean 'q_proj'"),
        ("bench lora --steps 0", "steps=0 must be ≥ 1"),
        ("bench no/such.py", "there is no file no/such.py"),
        ("bench", "Missing"),
        ("bank", "bank"),
    ],
)
def test_refusals_exit_with_2_and_say_why(words, message, capsys):
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.replace("│", " ").split())
    assert "Traceback" not in error


def test_a_missing_extra_is_one_line(monkeypatch, capsys):
    real = builtins.__import__

    def without_tyro(name, *args, **kwargs):
        if name == "tyro":
            raise ModuleNotFoundError("No module named 'tyro'", name="tyro")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tyro)
    assert main(["bench", "lora"]) == 2
    assert capsys.readouterr().err == (
        'lora-lite: tyro is not installed; pip install "lora-lite[bench]"\n'
    )


def test_a_variant_in_a_file_of_its_own(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(
        "from lora_lite.variants.lora import LoRA\n\n\n"
        "class BenchTestLoRA(LoRA):\n"
        '    """LoRA at rank 1."""\n\n'
        "    r: int = 1\n"
    )
    assert main(["bench", str(path), *SHORT, "--results", str(tmp_path)]) == 0
    assert "benchtestlora" in [row.method for row in rows.read(tmp_path, "digits")]
    assert main(["bench", str(path), "--r", "0"]) == 2


def test_help_lists_a_variants_hyperparameters(capsys):
    assert main(["bench", "jora", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("--core", "--lr_theta", "--steps", "--targets"))


def test_variants_and_describe(capsys):
    assert main(["variants"]) == 0
    assert main(["describe", "dora"]) == 0
    out = capsys.readouterr().out
    assert "pissa" in out and "2402.09353" in out


def test_report_makes_the_readme_block_and_the_plot_from_results(tmp_path, monkeypatch):
    root = tmp_path
    (root / "docs").mkdir()
    (root / "README.md").write_text("# A title\n\nText.\n")
    assert main(["report", "--root", str(root / "docs")]) == 2
    short = Protocol(steps=2, seeds=1, rates=(0.01,))
    assert main(["bench", "lora", *SHORT, "--results", str(root / "results")]) == 0
    for module in (report, catalogue):
        monkeypatch.setattr(module, "Protocol", lambda: short)
    assert main(["report", "--root", str(root)]) == 0
    text = (root / "README.md").read_text()
    assert (
        text.startswith("# A title\n\nText.\n")
        and "| [lora](src/lora_lite/variants/lora.py) |" in text
    )
    assert not report.stale(root)
    assert (root / "docs/digits.png").stat().st_size > 1000
    # The block stays where it is put, and follows the files.
    (root / "README.md").write_text(text + "\nAfter.\n")
    path = next((root / "results/digits").glob("lora*.json"))
    data = json.loads(path.read_text())
    data["trainable_parameters"] = 12345
    path.write_text(json.dumps(data))
    assert report.stale(root) == ["README.md", "docs/digits.md", "docs/variants.md"]
    assert main(["report", "--root", str(root)]) == 0
    text = (root / "README.md").read_text()
    assert "12,345" in text and text.endswith("After.\n") and text.count(catalogue.BEGIN) == 1


def test_the_projects_own_readme_is_current():
    root = rows.checkout()
    if root is None or not (root / "results").is_dir():
        pytest.skip("not in a source checkout")
    assert not report.stale(root), "run `just report`"
