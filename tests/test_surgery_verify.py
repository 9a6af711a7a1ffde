"""--verify, --bisect and --pass: what a pass changes, named down to its first match."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from decoder_graphs import decoder_graph
from onnx import TensorProto, helper, numpy_helper

from suture.core import command
from suture.core.errors import UserError
from suture.core.proof.steps import STEPS, Runner, Unrunnable
from suture.core.signature import find_signature
from suture.core.weights import load_graph
from suture.surgery.__main__ import main
from suture.surgery.graph import files
from suture.surgery.options import SurgeryOptions
from suture.surgery.plan import make_plan
from suture.surgery.verification import verify

ROOT = Path(__file__).parents[1]
WRONG = '''"""Another epsilon for the third norm."""
def run(graph):
    seen = []
    def change(graph, node):
        seen.append(node)
        if len(seen) == {number}:
            node.attrs["epsilon"] = 0.5
        return True
    return graph.match(change, graph.nodes("RMSNormalization"))
'''
HARMLESS = '''"""x → x: norms get a name."""
def run(graph):
    def name(graph, node):
        node.name += "/own_pass_was_here"
        return True
    return graph.match(name, graph.nodes("RMSNormalization"))
'''


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def state(model: onnx.ModelProto) -> verify.State:
    return verify.State(model, find_signature(model), Path())


@pytest.fixture(scope="module")
def growing(tmp_path_factory) -> Path:
    """A decoder of two layers, four norms and one at the end, with a growing cache."""
    return saved(decoder_graph(static=False), tmp_path_factory.mktemp("growing"))


def own_pass(folder: Path, text: str) -> Path:
    path = folder / "own_pass.py"
    path.write_text(text)
    return path


# --- steps: what --verify runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_growing_and_static_graphs_compare(dtype):
    error = verify.compare("", *[state(decoder_graph(static, dtype)) for static in (False, False, True)])
    assert error < (1e-5 if dtype is np.float32 else 5e-3)


def test_all_logits_and_last_logits_compare():
    verify.compare("", *[state(decoder_graph(True, last=last)) for last in (False, False, True)])


@pytest.mark.parametrize("fault", [{"scale": 1.1}, {"mask": 1}, {"swap": True}, {"late": 1}, {"disturb": 1e-2}, {"nan": True}])
def test_a_planted_fault_is_a_difference(fault):
    good = state(decoder_graph(static=False))
    with pytest.raises(verify.ChangedOutput):
        verify.compare("", good, good, state(decoder_graph(static=True, **fault)))


def test_a_graph_that_no_longer_runs_is_a_difference(growing):
    graph = files.read(growing)
    verifier = verify.Verifier(load_graph(growing), graph.signature, graph.root)
    graph.nodes("Attention")[0].attrs["scale"] = "a string"
    with pytest.raises(verify.ChangedOutput, match="cannot load"):
        verifier("wrong", graph)


def test_bfloat16_runs_as_its_shadow_copy():
    model = decoder_graph(static=True)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = helper.make_tensor(tensor.name, TensorProto.BFLOAT16, tensor.dims, numpy_helper.to_array(tensor).ravel())
            tensor.CopyFrom(values)
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    runner = Runner(model, find_signature(model), Path())
    assert np.isfinite(runner.read(STEPS[1])["logits"]).all()


def test_a_step_that_does_not_fit_is_not_taken():
    model = decoder_graph(static=True)
    signature = replace(find_signature(model), capacity=0)
    assert not [step.name for step in STEPS if Runner(model, signature, Path()).fits(step)]
    with pytest.raises(Unrunnable, match="none of the steps"):
        verify.State(model, signature, Path()).outputs  # noqa: B018


# --- --verify, --bisect, --pass ----------------------------------------------------------------------------------------


@pytest.mark.seconds
def test_verify_passes_and_says_so(growing, tmp_path, capsys):
    assert main([str(growing), "--out", str(tmp_path), "--capacity", "32", "--verify"]) == 0
    assert "worst error" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert all(each["verdict"]["error"] < 1e-4 for each in report["passes"])
    assert {"static_cache", "attention_mask"} <= {each["name"] for each in report["passes"]}


def test_verify_names_the_pass_and_leaves_both_graphs(growing, tmp_path, capsys):
    wrong = own_pass(tmp_path, WRONG.format(number=3))
    out = tmp_path / "out"
    status = main([str(growing), "--out", str(out), "--verify", "--pass", f"{wrong}@rms_norm"])
    assert status == command.FOUND_DIFFERENCE
    said = capsys.readouterr().out
    assert "own_pass: changes" in said
    assert "first at the RMSNormalization" in said
    assert not (out / "model.onnx").exists()
    assert "an earlier run" not in said
    before, after = (load_graph(out / "difference" / f"{name}.onnx") for name in ("before", "after"))
    norms = [[node for node in graph.graph.node if node.op_type == "RMSNormalization"] for graph in (before, after)]
    assert [index for index, (ours, theirs) in enumerate(zip(*norms)) if ours.attribute != theirs.attribute] == [2]
    ort.InferenceSession(out / "difference" / "after.onnx")


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.seconds
def test_bisect_finds_the_match(growing, tmp_path, capsys, number):
    wrong = own_pass(tmp_path, WRONG.format(number=number))
    assert main([str(growing), "--out", str(tmp_path / "out"), "--bisect", "--pass", str(wrong)]) == command.FOUND_DIFFERENCE
    norms = [node.name for node in load_graph(tmp_path / "out" / "difference" / "before.onnx").graph.node
             if node.op_type == "RMSNormalization"]  # fmt: skip
    assert f"match {number} of {len(norms)}, at {norms[number - 1]}" in capsys.readouterr().out


@pytest.mark.seconds
def test_bisect_knows_what_is_no_match(growing, tmp_path, capsys):
    text = WRONG.format(number=2).replace("graph.match(change, ", "sum(change(graph, node) for node in ")
    assert main([str(growing), "--out", str(tmp_path / "out"), "--bisect", "--pass", str(own_pass(tmp_path, text))]) == 1
    assert "outside its matches" in capsys.readouterr().out


@pytest.mark.seconds
def test_a_difference_within_the_tolerance_is_none(growing, tmp_path):
    text = WRONG.format(number=3).replace("0.5", "1.1e-5")
    assert main([str(growing), "--out", str(tmp_path / "out"), "--verify", "--pass", str(own_pass(tmp_path, text))]) == 0


@pytest.mark.seconds
def test_own_pass_runs_where_it_is_told_to(growing, tmp_path):
    own = own_pass(tmp_path, HARMLESS)
    for after, place in (("rms_norm", "portable"), ("attention_mask", "lowered")):
        out = tmp_path / after
        assert main([str(growing), "--out", str(out), "--pass", f"{own}@{after}"]) == 0
        names = [each["name"] for each in json.loads((out / "report.json").read_text())["passes"]]
        assert names[names.index("own_pass") - 1] == after, place


@pytest.mark.seconds
def test_a_changed_own_pass_runs_again(growing, tmp_path, capsys):
    arguments = [str(growing), "--out", str(tmp_path / "out"), "--pass", str(own_pass(tmp_path, HARMLESS))]
    assert main(arguments) == 0
    assert main(arguments) == 0
    assert "up to date" in capsys.readouterr().out
    own_pass(tmp_path, HARMLESS.replace("was_here", "was_there"))
    assert main(arguments) == 0
    assert "up to date" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("def run(graph): return 0", "has no docstring or no run"),
        ('"""x → x"""', "has no docstring or no run"),
        ("import nothing_like_it", "does not load"),
    ],
)
def test_own_pass_that_is_none(growing, tmp_path, text, wrong):
    with pytest.raises(UserError, match="own_pass") as error:
        make_plan(SurgeryOptions(capacity=64, own=(str(own_pass(tmp_path, text)),)))
    assert wrong in str(error.value)
    for argument in (str(tmp_path / "absent.py"), f"{own_pass(tmp_path, HARMLESS)}@no_such_pass"):
        with pytest.raises(UserError, match="--pass"):
            make_plan(SurgeryOptions(capacity=64, own=(argument,)))


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ("    return graph.producer", "raised AttributeError: 'Graph' object has no attribute 'producer' in line 4"),
        ("    return 1 / 0", "raised ZeroDivisionError: division by zero in line 4"),
        ("    return None", "returned None, not how often it matched"),
    ],
)
def test_own_pass_that_fails_is_said_with_its_line(growing, tmp_path, run, said):
    """It is the user's, so no fault of this program."""
    with pytest.raises(UserError) as error:
        main(
            [
                str(growing),
                "--out",
                str(tmp_path / "out"),
                "--pass",
                str(own_pass(tmp_path, f'"""x → x"""\n\ndef run(graph):\n{run}\n')),
            ]
        )
    assert said in str(error.value)


@pytest.mark.seconds
def test_how_often_an_own_pass_matched_is_printed(growing, tmp_path, capsys):
    assert main([str(growing), "--out", str(tmp_path / "out"), "--no-verify", "--pass", str(own_pass(tmp_path, HARMLESS))]) == 0
    assert "own_pass.py: " in capsys.readouterr().out


@pytest.mark.seconds
def test_a_failed_verification_says_whose_the_results_are(growing, tmp_path, capsys):
    """What an earlier run wrote stays, with the manifest that belongs to it; nobody is to take it for this run's."""
    assert main([str(growing), "--out", str(tmp_path / "out"), "--capacity", "32"]) == 0
    before = (tmp_path / "out" / "model.onnx").read_bytes()
    wrong = own_pass(tmp_path, WRONG.format(number=3))
    assert main([str(growing), "--out", str(tmp_path / "out"), "--verify", "--pass", str(wrong)]) == command.FOUND_DIFFERENCE
    assert f"{tmp_path}/out/model.onnx is an earlier run's" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.onnx").read_bytes() == before
