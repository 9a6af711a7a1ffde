"""Pickles of weights become safetensors; anything else in one is refused, and nothing of it runs."""

import argparse
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from suture.core.errors import UserError
from suture.models.pickles import convert, load, write

ROOT = Path(__file__).parents[1]


@pytest.fixture
def weights():
    torch.manual_seed(0)
    table = torch.randn(12, 8, dtype=torch.bfloat16)
    return {
        "embed.weight": table,
        "head.weight": table,  # shared
        "turned.weight": torch.randn(6, 4).T,  # not contiguous
        "part": torch.randn(100)[3:9],
        "counts": torch.arange(5),
        "scalar": torch.tensor(2.5, dtype=torch.float16),
        "empty": torch.zeros(0, 3),
        "fp8": torch.randn(4).to(torch.float8_e4m3fn),
    }


def here(file: Path, out: Path, shard_bytes: int = 1 << 30) -> tuple[list[str], list[str]]:
    """What the child does, without the seconds that one takes."""
    weights, left_out = load(file)
    out.mkdir()
    return write(weights, file, file.stat().st_size, out, "model", shard_bytes), left_out


def same(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert (
            found[name].contiguous().reshape(-1).view(torch.uint8).tolist()
            == tensor.contiguous().reshape(-1).view(torch.uint8).tolist()
        )


@pytest.mark.parametrize("wrapped", [(), ("state_dict",), ("model", "module")], ids=["bare", "state_dict", "nested"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_weights_keep_names_types_and_values(weights, wrapped, zipped, tmp_path):
    content = weights
    for key in wrapped:
        content = {key: content, "step": 3}
    if not zipped:
        del weights["fp8"]  # which torch itself cannot read in its old format
    torch.save(content, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    names, left_out = here(tmp_path / "model.pth", tmp_path / "out")
    assert names == ["model.safetensors"]
    assert left_out == []
    same(tmp_path / "out", weights)


@pytest.mark.seconds
def test_large_ones_are_cut_and_have_an_index(weights, tmp_path):
    del weights["empty"]
    torch.save({**weights, "epoch": 4}, tmp_path / "model.bin")
    names, left_out = convert(tmp_path / "model.bin", tmp_path / "out", shard_bytes=250)
    assert len(names) > 2
    assert left_out == ["epoch"]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights.keys()
    for name, shard in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / shard)
    same(tmp_path / "out", weights)
    assert sorted(os.listdir(tmp_path / "out")) == sorted(path.name for path in names)


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["pickle", "beside weights"])
def test_nothing_in_a_pickle_runs(kind, weights, tmp_path):
    bomb, file = Bomb(tmp_path / "ran"), tmp_path / "model.ckpt"
    if kind == "pickle":
        file.write_bytes(pickle.dumps(bomb))
    else:
        torch.save({"state_dict": weights, "more": bomb}, file)
    done = subprocess.run(
        [sys.executable, "-m", "suture.models.convert", file, tmp_path / "out"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "model.ckpt: holds more than weights" in done.stderr
    assert not (tmp_path / "ran").exists()
    assert os.listdir(tmp_path / "out") == []


def refused(content: object, tmp_path: Path) -> str:
    torch.save(content, tmp_path / "model.bin")
    with pytest.raises(UserError) as error:
        here(tmp_path / "model.bin", tmp_path / "out")
    return str(error.value)


def test_a_view_that_repeats_is_refused(tmp_path):
    assert "repeats its values" in refused({"a": torch.zeros(1).expand(10**6, 10**6)}, tmp_path)


def test_names_that_share_too_much_are_refused(tmp_path):
    table = torch.zeros(100_000)
    assert "more than 4 times" in refused({f"a{i}": table for i in range(100)}, tmp_path)


@pytest.mark.parametrize("content", [[], {}, {"a": 1}, torch.zeros(3), {3: torch.zeros(3)}, {"a": torch.zeros(3).to_sparse()}],
                         ids=["list", "empty", "no tensors", "tensor", "number for a name", "sparse"])  # fmt: skip
def test_what_holds_no_weights_by_name_is_refused(content, tmp_path):
    assert "model.bin: " in refused(content, tmp_path)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(2, 2)

    def forward(self, x):
        return self.inner(x)


def tar(file: Path) -> None:
    """The format of torch before 0.1.10."""
    with tarfile.open(file, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.addfile(tarfile.TarInfo(name), None)


def deflated(file: Path) -> None:
    """A pickle of 6 GB of zeros in 6 MB."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a/data.pkl", "w", force_zip64=True) as out:
        for _ in range(6):
            out.write(bytes(1 << 30))


ODD = {
    "TorchScript": lambda file: torch.jit.script(Net()).save(str(file)),
    "a module": lambda file: torch.save(Net(), file),
    "a module's class by name": lambda file: file.write_bytes(b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81."),
    "a tar archive": tar,
    "arguments of training": lambda file: torch.save({"args": argparse.Namespace(lr=1), "model": {"a": torch.zeros(1)}}, file),
    "numpy's numbers": lambda file: torch.save({"a": np.float32(1), "b": torch.zeros(1)}, file),
    "numpy's arrays": lambda file: torch.save({"a": np.zeros(3)}, file),
    "an optimizer alone": lambda file: torch.save({"optimizer": {"state": {0: {"step": torch.zeros(1)}}}}, file),
    "weights of no device": lambda file: torch.save({"a": torch.zeros(3, device="meta")}, file),
    "quantised weights": lambda file: torch.save({"a": torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)}, file),
    "a name that is safetensors' own": lambda file: torch.save({"__metadata__": torch.zeros(1)}, file),
    "a lone surrogate in a name": lambda file: torch.save({"\ud800": torch.zeros(1)}, file),
    "nested lists": lambda file: torch.save([[{"a": torch.zeros(1)}]], file),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_form_is_one_line(name, tmp_path):
    file = tmp_path / "model.bin"
    ODD[name](file)
    with pytest.raises(UserError, match=r"model.bin: ") as error:
        here(file, tmp_path / "out")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_pickle_that_grows_ends_at_its_limit(tmp_path):
    deflated(tmp_path / "model.bin")
    with pytest.raises(UserError, match=r"model.bin: "):
        convert(tmp_path / "model.bin", tmp_path / "out")


def test_weights_that_training_saved_beside_the_models_are_told(tmp_path):
    ema = {"shadow": {"a": torch.zeros(1)}}
    torch.save({"epoch": 5, "ema": ema, "state_dict": {"a": torch.zeros(1), "step": 3}}, tmp_path / "model.ckpt")
    weights, left_out = load(tmp_path / "model.ckpt")
    assert list(weights) == ["a"]
    assert left_out == ["ema", "step"]


@pytest.mark.parametrize(
    "content", [b"", b"PK\3\4" + bytes(60), b"\x80\x02}q\0.", os.urandom(500)], ids=["empty", "zip", "dict", "noise"]
)
def test_a_broken_file_is_one_line(content, tmp_path):
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"model.bin: ") as error:
        here(tmp_path / "model.bin", tmp_path / "out")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("existing", ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"])
def test_nothing_is_replaced(existing, weights, tmp_path):
    torch.save(weights, tmp_path / "model.bin")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / existing).write_bytes(b"mine")
    with pytest.raises(UserError, match="exists"):
        convert(tmp_path / "model.bin", tmp_path / "out")
    assert (tmp_path / "out" / existing).read_bytes() == b"mine"


@pytest.mark.seconds
def test_memory_holds_the_largest_weight_alone(tmp_path):
    """Written in pieces from mapped storage: a small limit of a child that only writes is enough."""
    weights = {f"w{i}": torch.full((1 << 20,), float(i)) for i in range(8)}
    torch.save(weights, tmp_path / "model.bin")
    loaded = torch.load(tmp_path / "model.bin", weights_only=True, mmap=True)
    assert write(loaded, tmp_path / "model.bin", 1 << 25, tmp_path, "model", 1 << 30) == ["model.safetensors"]
    same(tmp_path, weights)
