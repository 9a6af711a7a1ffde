"""suture serve OUT --write-triton DIR: a model repository for Triton's python backend.

The model there is a bridge: it passes requests on to `suture serve` and its text back, piece by piece (decoupled), so the scheduler
stays one process for all clients, with libraries that Triton's backend does not have to share. Names of inputs and
outputs are those of Triton's vLLM backend.
"""

import argparse
import json
import re
from pathlib import Path

from suture.core.errors import UserError

MODEL = Path(__file__).with_name("triton_model.py")
CONFIG = """\
# Asks `suture serve` at the parameter "url". No batching here: the server does that.
name: "{name}"
backend: "python"
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
input [
  {{ name: "text_input" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "stream" data_type: TYPE_BOOL dims: [ 1 ] optional: true }},
  {{ name: "sampling_parameters" data_type: TYPE_STRING dims: [ 1 ] optional: true }}
]
output [ {{ name: "text_output" data_type: TYPE_STRING dims: [ 1 ] }} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
parameters [
  {{ key: "url" value {{ string_value: {url} }} }},
  {{ key: "model" value {{ string_value: {model} }} }}
]
"""


def write_repository(options: argparse.Namespace) -> Path:
    """DIR/NAME/config.pbtxt and DIR/NAME/1/model.py. Raises UserError where a model of that name lies there already, or the name is
    none that Triton can look for."""
    model = options.name or options.out.resolve().name
    name = re.sub(r"[^\w.-]", "_", model, flags=re.ASCII)
    folder = options.write_triton / name
    if folder.exists():
        raise UserError(folder, "is there already", "name another folder with --write-triton, or another model with --name")
    (folder / "1").mkdir(parents=True)
    url = f"http://{options.host}:{options.port}"
    config = CONFIG.format(name=name, url=json.dumps(url), model=json.dumps(model))
    (folder / "config.pbtxt").write_text(config, encoding="utf-8")
    (folder / "1" / "model.py").write_text(MODEL.read_text(encoding="utf-8"), encoding="utf-8")
    return folder
