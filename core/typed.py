"""What a JSON file may say: each key that is read has a type and bounds, as a pydantic model, and no value is converted."""

import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from suture.core.errors import UserError
from suture.core.reader import read_json


class Strict(BaseModel):
    """`"false"` is no boolean and `8.0` no count. Keys that it does not name may hold anything."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


def read_typed(file: Path, kind: type[BaseModel], remedy: str) -> dict:
    """The object in a JSON file, as it stands. Raises UserError where there is none, or a value is not what `kind` says."""
    content = read_json(file, remedy)
    check(content, kind, file, remedy)
    return content


def check(content: dict, kind: type[BaseModel], where: object, remedy: str) -> None:
    """Raises UserError for the first value that is not what `kind` says."""
    try:
        kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key, found = [], content
        for part in first["loc"]:  # which names pydantic's types, too
            if (isinstance(found, dict) and part in found) or (isinstance(found, list) and isinstance(part, int)):
                key.append(str(part))
                found = found[part]
        allowed = re.sub(r"valid dictionary or .*", "valid object", first["msg"].removeprefix("Input "))
        wrong = f"'{'.'.join(key)}' is {_short(first['input'])}, but {allowed}"
        if first["type"] == "missing":
            wrong = f"has no '{'.'.join([*key, str(first['loc'][-1])])}'"
        raise UserError(where, wrong, remedy) from None


def _short(value: object) -> str:
    try:
        written = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a very large number"
    return written if len(written) <= 60 else f"{written[:60]}…"
