"""Graphs of several ranks: what is divided, and that all ranks together compute what the whole graph does."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs.weightless import load

from suture.core.errors import UserError
from suture.core.proof.prove import compare_two
from suture.core.proof.subject import Subject
from suture.core.tensors import references
from suture.core.weights import load_graph, weights_root
from suture.surgery.graph import files, weights
from suture.surgery.operate import operate
from suture.surgery.options import SurgeryOptions
from suture.surgery.parallel import pieces
from suture.surgery.parallel.placement import Part, Placement
from suture.surgery.parallel.proof import joined, part, prove_ranks
from suture.surgery.parallel.relations import carried
from suture.surgery.parallel.stage import divided
from suture.surgery.plan import make_plan
from suture.surgery.ranks import main

OPTIONS = SurgeryOptions(capacity=32, no_verify=True)
LOWERING = make_plan(OPTIONS).lowering


def portable(name: str):
    return files.of_model(operate(load(name), OPTIONS).portable, Path(name), Path())


def subject(graph) -> Subject:
    return Subject(files.without_shapes(files.to_model(graph)), graph.signature, graph.root)


GRAPHS = [  # name, ranks, sums, of each past the heads on a rank
    ("llama-dynamo-24-float16", 2, 4, 1),
    ("qwen3-dynamo-23-float32", 4, 4, 1),  # two kv_heads, each on two ranks
    ("gptbigcode-dynamo-18-float32", 2, 4, 1),  # one head of keys and values, on every rank
    ("bloom-dynamo-18-float32", 2, 4, 2),  # ALiBi's slopes by heads
    ("phi3-dynamo-18-float32", 2, 4, 1),  # packed projections, taken apart by Slices
    ("whisper-dynamo-18-float32", 2, 6, 2),  # two attentions a layer
]


@pytest.mark.parametrize(("name", "ranks", "sums", "heads"), GRAPHS, ids=[f"{name}-{ranks}" for name, ranks, *_ in GRAPHS])
def test_ranks_compute_the_whole(name, ranks, sums, heads):
    whole = portable(name)
    made = divided(whole, ranks, LOWERING)
    assert len(made.division.sums) == sums
    assert len(made.division.whole) == 1, "all products but the logits'"
    ops = [Counter(node.op_type for node in each.graph.node) for each in made.portable]
    assert all(each == ops[0] for each in ops)
    assert ops[0]["DistCollective"] == sums
    pasts = {cache.past for cache in (*whole.signature.caches, *whole.signature.encoder_caches)}
    for each in made.lowered:
        found = {value.name: value.type.tensor_type.shape.dim[1].dim_value for value in each.graph.input if value.name in pasts}
        assert set(found) == pasts
        assert set(found.values()) == {heads}
    joint = Subject(made.joint, whole.signature, made.root)
    onnx.checker.check_model(made.joint)
    assert {node.domain for node in made.joint.graph.node} == {""}
    compared = compare_two(subject(whole), joint)
    assert compared.status == "passed", compared.said
    assert compared.comparisons[0].worst < 5e-6


def test_networks_in_lock_step():
    """TensorRT's parser makes a collective of each sum, and the networks together give the whole graph's outputs."""
    whole = portable("gptbigcode-dynamo-18-float32")
    made = divided(whole, 2, LOWERING)
    ranks = [Subject(each, whole.signature, made.root) for each in made.lowered]
    proof = prove_ranks(subject(whole), Subject(made.joint, whole.signature, made.root), ranks, made.division)
    assert [pair.status for pair in proof.pairs] == ["passed", "passed"], proof.headline
    for node in ranks[1].model.graph.node:  # a rank that adds up with another number of ranks
        for attribute in node.attribute:
            attribute.i = 4 if attribute.name == "nb_rank" else attribute.i
    ranks[0].model.graph.CopyFrom(ranks[1].model.graph)
    assert "sum of 4 ranks" in prove_ranks(subject(whole), subject(whole), ranks, made.division).pairs[1].reason


def test_a_wrong_piece_is_a_difference(monkeypatch):
    whole = portable("llama-dynamo-24-float16")

    def first(self, rank, ranks):
        return [(0, part.local) for part in self.parts]

    with monkeypatch.context() as patch:
        patch.setattr(pieces.Placement, "spans", first)
        made = divided(whole, 2, LOWERING)
    assert compare_two(subject(whole), Subject(made.joint, whole.signature, made.root)).status == "different"


@pytest.mark.parametrize(("ranks", "said"), [(3, "3 ranks do not divide"), (8, "4 does not divide by 8")])
def test_what_does_not_divide_is_refused_with_the_number(ranks, said):
    with pytest.raises(UserError, match=said):
        divided(portable("llama-dynamo-24-float16"), ranks, LOWERING)


def test_command(tmp_path, capsys, monkeypatch):
    """Pieces that lie in one place stay references, all under one root; a second run finds them up to date."""
    model = operate(load("qwen3-dynamo-23-float32"), OPTIONS).portable
    monkeypatch.setattr(weights, "INLINE", 1024)  # bytes from which a piece is no longer written into the graph
    (tmp_path / "graph").mkdir()
    onnx.save(model, tmp_path / "graph" / "model.onnx", save_as_external_data=True, location="model.data", size_threshold=1024)
    whole, out = tmp_path / "graph" / "model.onnx", tmp_path / "ranks"
    arguments = [str(whole), "--tensor-parallel", "2", "--out", str(out)]
    assert main(arguments) == 0
    assert "proven" in capsys.readouterr().out
    names = {
        "joint.onnx",
        "report.json",
        "manifest.json",
        "ranks.data",
        *(f"rank{r}{form}.onnx" for r in (0, 1) for form in ("", ".trt")),
    }
    assert {path.name for path in out.iterdir()} == names
    rank = load_graph(out / "rank1.trt.onnx")
    assert weights_root(out / "rank1.trt.onnx") == tmp_path
    locations = Counter(reference["location"] for _, reference in references(rank))
    assert set(locations) == {"graph/model.data", "ranks/ranks.data"}
    columns = (out / "ranks.data").stat().st_size
    assert columns < whole.with_name("model.data").stat().st_size / 2, "products by columns are references"
    assert json.loads((out / "report.json").read_text())["proof"]["status"] == "passed"
    assert main(arguments) == 0
    assert "up to date" in capsys.readouterr().out
    with pytest.raises(UserError, match="portable graph"):
        main([str(out / "rank0.trt.onnx"), "--tensor-parallel", "2", "--out", str(tmp_path / "twice")])


def test_carried_through_views():
    two = Part(8, 2)
    assert carried(Placement(1, (two,)), [3, 8, 4], [3, 32]) == Placement(1, (Part(32, 2),))
    assert carried(Placement(2, (two,)), [5, 3, 8, 4], [5, 96]) == Placement(1, (Part(32, 2),) * 3)
    assert carried(Placement(1, (Part(32, 2),) * 3), [5, 96], [5, 3, 8, 4]) == Placement(2, (two,))
    assert carried(Placement(1, (two,)), [5, 8, 2, 7], [5, 16, 7]) == Placement(1, (Part(16, 2),))


@pytest.mark.parametrize("placement", [Placement(1, (Part(8, 2),)), Placement(1, (Part(4, 4), Part(2, 2), Part(2, 1)))])
def test_parts_join_to_the_whole(placement):
    whole = np.arange(3 * 8).reshape(3, 8)
    parts = [part(whole, placement, rank, 4) for rank in range(4)]
    assert all(each.shape[1] == placement.local for each in parts)
    assert (joined(parts, placement) == whole).all()
