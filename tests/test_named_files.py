"""Files that an option names: what such a run wrote before is replaced, anything else is not."""

import json

import pytest
from decoder_graphs import decoder_graph

from suture.core.errors import UserError
from suture.core.junit import JUnitCase, write_junit
from suture.core.named import BEGINNINGS, appearing, check_results, write_text
from suture.core.network.check import check
from suture.core.network.record import save_record
from suture.core.network.reports import as_json
from suture.generate.command import _write
from suture.validate.options import ValidateOptions
from suture.validate.results import write_results


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    path = tmp_path_factory.mktemp("checked") / "model.onnx"
    path.write_bytes(decoder_graph(static=True).SerializeToString())
    return check(path)


@pytest.fixture(params=["check", "validate", "junit", "save", "generate"])
def written(request, checked, tmp_path):
    """The option, and a file that it has written."""
    path = tmp_path / "result"
    if request.param == "check":
        write_text(path, as_json(checked))
    elif request.param == "validate":
        write_results('a "title" ↔ b', "passed", 0, [], ValidateOptions(json=path))
    elif request.param == "junit":
        write_junit('suture check a"<b', [JUnitCase("a", "b")], path)
    elif request.param == "save":
        save_record(checked, path)
    else:
        answer = {"prompt": "a\n", "text": '"}', "finish": "length", "prompt_tokens": 1, "tokens": 2}
        _write(iter([json.dumps(answer), json.dumps(answer)]), path)
    return {"junit": "--junit", "save": "--save", "generate": "--out"}.get(request.param, "--json"), path


def test_its_own_result_is_replaced(written):
    option, path = written
    check_results({option: path}, [])


def test_the_result_of_another_option_is_not(written):
    option, path = written
    for other in BEGINNINGS.keys() - {option}:
        with pytest.raises(UserError, match="would be replaced"):
            check_results({other: path}, [])


def test_what_was_there_stays_where_writing_fails(tmp_path):
    path = tmp_path / "result"
    path.write_text("before")

    def fails():
        with appearing(path) as file:
            file.write(b"half")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fails()
    assert [each.read_text() for each in tmp_path.iterdir()] == ["before"]
