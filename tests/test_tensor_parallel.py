"""Graphs of several ranks: what is divided, and that all ranks together compute what the whole graph does."""

import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs.weightless import load

from benchmarks import tensor_parallel
from suture.core.errors import UserError
from suture.core.proof.prove import compare_two
from suture.core.proof.subject import Subject
from suture.core.signature import find_signature
from suture.core.tensors import references
from suture.core.weights import load_graph, weights_root
from suture.runtime.decoders import StaticDecoder
from suture.runtime.graphs import open_graph
from suture.runtime.ranks import RankModel, open_rank, segments
from suture.surgery.graph import files, weights
from suture.surgery.operate import operate
from suture.surgery.options import SurgeryOptions
from suture.surgery.parallel import pieces
from suture.surgery.parallel.placement import Placement, Share
from suture.surgery.parallel.proof import joined, part, prove_ranks
from suture.surgery.parallel.stage import divided
from suture.surgery.parallel.views import carried
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


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A portable graph with its weights beside it, and the folder of its two ranks."""
    folder = tmp_path_factory.mktemp("written")
    model = operate(load("qwen3-dynamo-23-float32"), OPTIONS).portable
    (folder / "graph").mkdir()
    whole = folder / "graph" / "model.onnx"
    onnx.save(model, whole, save_as_external_data=True, location="model.data", size_threshold=1024)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "INLINE", 1024)  # bytes from which a piece is no longer written into the graph
        assert main([str(whole), "--tensor-parallel", "2", "--out", str(folder / "ranks")]) == 0
    return whole, folder / "ranks"


def test_command(written, tmp_path, capsys):
    """Pieces that lie in one place stay references, all under one root; a second run finds them up to date."""
    whole, out = written
    ranks = [f"rank{rank}{form}.onnx" for rank in (0, 1) for form in ("", ".trt")]
    assert {path.name for path in out.iterdir()} == {"joint.onnx", "report.json", "manifest.json", "ranks.data", *ranks}
    lowered = load_graph(out / "rank1.trt.onnx")
    assert weights_root(out / "rank1.trt.onnx") == out.parent
    places = {tensor.name: reference["location"] for tensor, reference in references(lowered)}
    assert set(places.values()) == {"graph/model.data", "ranks/ranks.data"}
    cut = [name for name in places if name.endswith("/rank1")]
    made_by = {node.output[0]: node for node in lowered.graph.node}
    sums = [made_by[node.input[0]] for node in lowered.graph.node if node.op_type == "DistCollective"]
    by_rows = {node.input[1] for node in sums}  # of weights [in, out], whose rows lie in one piece
    assert by_rows == {name for name in cut if places[name] == "graph/model.data"}
    assert json.loads((out / "report.json").read_text())["proof"]["status"] == "passed"
    assert main([str(whole), "--tensor-parallel", "2", "--out", str(out)]) == 0
    assert "up to date, proven" in capsys.readouterr().out
    with pytest.raises(UserError, match="portable graph"):
        main([str(out / "rank0.trt.onnx"), "--tensor-parallel", "2", "--out", str(tmp_path / "twice")])


@pytest.mark.parametrize("fixed", [(), (1, 3)], ids=["any-size", "fixed-sizes"])
def test_ranks_generate_what_the_whole_graph_does(written, fixed):
    """In onnxruntime, cut at the collectives: a padded prompt, then greedy tokens; every rank sees the same logits."""
    whole, out = written
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda model: greedy(model.decoder(2)), opened_together(out, 2, fixed))
    expected = greedy(StaticDecoder(open_graph(whole).decoder(2).session, find_signature(load_graph(whole)), noise=False))
    for ours, theirs, wanted in zip(first, second, expected):
        np.testing.assert_array_equal(ours, theirs)
        assert np.abs(ours[:, -1] - wanted[:, -1]).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.slow
def test_ranks_in_processes_of_their_own(written, tmp_path, capsys):
    """Each a process, adding up through gloo: the tokens of the whole graph, step by step."""
    whole, out = written
    line = ["--whole", str(whole.parent), "--ranks", str(out), "--rows", "2", "--length", "6", "--steps", "8"]
    assert tensor_parallel.main([*line, "--cells", "decode 2x7", "prompt 5"]) == 0
    found = json.loads(capsys.readouterr().out)["divided"]
    assert (found["agree"], found["ties"]) == (9, 0)
    assert found["error"] < 1e-5
    assert set(found["ms"]) == {"decode 2x7", "prompt 5"}


def test_no_arithmetic_on_shapes_crosses_a_collective(written):
    """It is done on the CPU, and a step that a GPU is to compute without waiting on the host may read nothing from there."""
    _, out = written
    parts = segments(load_graph(out / "rank0.onnx"))
    crossing = {value.name: value.type.tensor_type for part in parts for value in part.model.graph.output}
    whole_numbers = [name for name, each in crossing.items() if each.elem_type == onnx.TensorProto.INT64]
    assert [crossing[name].shape.dim[0].dim_param for name in whole_numbers] == ["batch"], "of the rows' lengths alone"
    assert sum(node.op_type == "Shape" for part in parts for node in part.model.graph.node) > 1
    last = parts[-1]  # whose token ids no node reads once sizes are fixed: where they lie says nothing of a step
    assert "input_ids" in {value.name for value in last.model.graph.input} - last.values


def test_each_rank_sees_one_gpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [tensor_parallel.gpu_of(rank) for rank in (0, 1)] == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [tensor_parallel.gpu_of(rank) for rank in (0, 1)] == ["3", "5"]


def opened_together(folder: Path, ranks: int, fixed: tuple[int, ...] = ()) -> list[RankModel]:
    """Of one process, a thread a rank."""
    barrier, places = threading.Barrier(ranks), [None] * ranks

    def all_reduce(rank: int):
        def add_up(tensor):
            places[rank] = tensor
            barrier.wait()
            total = sum(places)
            barrier.wait()
            tensor.copy_(total)

        return add_up

    return [open_rank(folder / f"rank{rank}.onnx", all_reduce(rank), fixed=fixed) for rank in range(ranks)]


def greedy(decoder) -> list[np.ndarray]:
    """Logits of a prompt of three and two tokens, and of three steps after it."""
    alpha = np.ones(2, np.float32)
    logits = [decoder.step(np.array([[5, 7, 11], [3, 9, 0]]), np.array([3, 2]), alpha).copy()]
    for _ in range(3):
        logits.append(decoder.step(logits[-1][:, -1:].argmax(-1), np.array([1, 1]), alpha).copy())
    return logits


def test_carried_through_views():
    two = Share(8, 2)
    assert carried(Placement(1, (two,)), [3, 8, 4], [3, 32]) == Placement(1, (Share(32, 2),))
    assert carried(Placement(2, (two,)), [5, 3, 8, 4], [5, 96]) == Placement(1, (Share(32, 2),) * 3)
    assert carried(Placement(1, (Share(32, 2),) * 3), [5, 96], [5, 3, 8, 4]) == Placement(2, (two,))
    assert carried(Placement(1, (two,)), [5, 8, 2, 7], [5, 16, 7]) == Placement(1, (Share(16, 2),))


@pytest.mark.parametrize("placement", [Placement(1, (Share(8, 2),)), Placement(1, (Share(4, 4), Share(2, 2), Share(2, 1)))])
def test_parts_join_to_the_whole(placement):
    whole = np.arange(3 * 8).reshape(3, 8)
    parts = [part(whole, placement, rank, 4) for rank in range(4)]
    assert all(each.shape[1] == placement.local for each in parts)
    assert (joined(parts, placement) == whole).all()


def test_stages_compute_the_whole(tmp_path, capsys):
    """Cut behind the first layer: bit for bit in onnxruntime, equal as networks, and each stage has its own caches alone."""
    made = operate(load("qwen3-dynamo-23-float32"), OPTIONS)
    (tmp_path / "surgery").mkdir()
    for name, model in made.files.items():
        onnx.save(model, tmp_path / "surgery" / name)
    arguments = [str(tmp_path / "surgery"), "--stages", "2", "--out", str(tmp_path / "stages")]
    assert main(arguments) == 0
    assert "100% of the weights" not in capsys.readouterr().out
    proof = json.loads((tmp_path / "stages" / "report.json").read_text())["proof"]
    assert [pair["status"] for pair in proof["pairs"]] == ["passed", "passed"]
    assert all(error == 0 for step in proof["pairs"][0]["comparisons"][0]["steps"] for error in step["errors"].values())
    for stage in (0, 1):
        for form in ("", ".trt"):
            part = onnx.load(tmp_path / "stages" / f"stage{stage}{form}.onnx")
            assert {value.name for value in part.graph.input if "past" in value.name} == {
                f"past_key_values.{stage}.{role}" for role in ("key", "value")
            }
    with pytest.raises(UserError, match="2 layers"):
        main([*arguments[:2], "3", "--out", str(tmp_path / "three")])
