"""The examples do what they say, on small models; and the documents keep their promises about themselves."""

import json
import re
import subprocess
from pathlib import Path

import onnx
import pytest
from decoder_graphs import decoder_graph
from exporting import traced
from onnx import parser

import suture
from suture.export import stage as export_stage

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def graph(tmp_path) -> Path:
    onnx.save(decoder_graph(static=False), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture(autouse=True)
def found(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_fuse_and_prove(graph, capsys):
    import fuse_and_prove

    fuse_and_prove.main(graph, 32)
    portable = onnx.load(graph.parent / "portable.onnx")
    assert [node.op_type for node in portable.graph.node].count("TensorScatter") == 4
    assert (graph.parent / "lowered.onnx").is_file()
    assert "nodes: {'before'" in capsys.readouterr().out


@pytest.mark.seconds
def test_check_in_ci(graph, capsys):
    import check_in_ci

    assert check_in_ci.main(str(graph)) in (0, 1)
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{graph}: ")
    mistaken = parser.parse_model('<ir_version: 10, opset_import: ["": 17]> g (float[4,4] x) => (float[4,4] y) {y = Trilu(x)}')
    onnx.save(mistaken, graph)
    assert check_in_ci.main(str(graph)) == 1
    assert "write upper=1" in capsys.readouterr().out
    sound = parser.parse_model('<ir_version: 10, opset_import: ["": 17]> g (float[4,4] x) => (float[4,4] y) {y = Relu(x)}')
    onnx.save(sound, graph)
    assert check_in_ci.main(str(graph)) == 0


def test_checkpoint_to_engine_and_generate_text(tiny_export, tmp_path, monkeypatch):
    import checkpoint_to_engine
    import generate_text

    monkeypatch.setattr(export_stage, "trace", lambda model, dtype: traced(tiny_export / "model.onnx", dtype))
    engine = checkpoint_to_engine.main(str(ROOT / "models" / "tiny-qwen"), tmp_path, dtype="float32")
    assert engine.stat().st_size > 100_000
    assert generate_text.main(str(tmp_path / "export" / "model.onnx"), "The cache").strip()


def test_the_template_of_a_pass_has_a_test_that_passes(tmp_path):
    import test_own_pass

    test_own_pass.test_it_leaves_out_a_clip_without_bounds()
    test_own_pass.test_a_bound_that_is_computed_is_a_near_miss()


def test_the_notebook_runs():
    notebook = json.loads((EXAMPLES / "look_at_surgery.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict = {}
    for cell in cells:
        exec(cell, names)
    assert [node.op_type for node in names["operated"].portable.graph.node] == ["RMSNormalization", "Swish"]
    assert names["checked"].verdict == "agrees"
    assert names["report"].unfused
    assert not any(cell.get("outputs") for cell in notebook["cells"])  # results of one machine do not go into git


def test_every_example_is_listed_and_none_is_missing():
    listed = set(re.findall(r"\]\(([\w.]+)\)", (EXAMPLES / "README.md").read_text()))
    assert listed == {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}


# --- documents -----------------------------------------------------------------------------------------------------------

# Words that belong together, apart, so that a search for the phrase finds nothing here either.
DIALECT = tuple(map(" ".join, (
    ("mapped", "from", "no", "file"), ("told,", "not", "judged"), ("mend", "it"), ("different", "speed"), ("activation", "bends"),
    ("own", "operators"), ("heads", "of", "16", "to", "256"), ("way", "out"),
)))  # fmt: skip


def test_readme_can_be_read_in_minutes():
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_readme_says_on_its_first_screen_that_no_engine_has_run_on_a_gpu():
    first = (ROOT / "README.md").read_text().splitlines()[:30]
    assert "**No engine has run on a GPU yet**" in " ".join(first)


def test_no_private_dialect():
    files = subprocess.run(
        ["git", "ls-files", "-z", "*.py", "*.md", "*.j2"], cwd=ROOT, capture_output=True, check=True, text=True
    )
    for name in filter(None, files.stdout.split("\0")):
        if not (ROOT / name).is_file():
            continue
        text = re.sub(r"\s+", " ", (ROOT / name).read_text(encoding="utf-8")).lower()
        assert not [phrase for phrase in DIALECT if phrase in text], name


def test_links_of_documents_lead_somewhere():
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), EXAMPLES / "README.md"]
    for document in documents:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            assert "://" in target or (document.parent / target).exists() or target in MADE, f"{document.name}: {target}"


MADE = ("architecture.md", "contributing.md", "changelog.md", "security.md", "commands.md")  # by .ci/site_pages.py


@pytest.mark.parametrize(
    ("package", "others"),
    [("core", ""), ("models", "core"), ("runtime", "core"), ("export", "core models"), ("surgery", "core models"),
     ("build", "core"), ("validate", "core models runtime"), ("generate", "core models runtime serve"),
     ("serve", "core models runtime generate")],
)  # fmt: skip
def test_packages_import_what_architecture_md_says(package, others):
    source = "\n".join(path.read_text() for path in (ROOT / package).rglob("*.py"))
    imported = set(re.findall(r"^\s*(?:from|import) suture\.(\w+)", source, re.MULTILINE))
    assert imported - {package} <= set(others.split())


def test_the_scheduler_knows_no_text():
    """generate's loop is its client, and the server a client of generate's."""
    for name in ("engine", "lookup", "request", "rows", "sampling", "speed"):
        imported = re.findall(r"^from suture\.(\w+)\.?(\w*) ", (ROOT / "serve" / f"{name}.py").read_text(), re.MULTILINE)
        assert {package for package, _ in imported} <= {"core", "runtime", "serve"}


def test_the_version_is_in_the_changelog():
    assert f"({suture.__version__})" in (ROOT / "CHANGELOG.md").read_text()
