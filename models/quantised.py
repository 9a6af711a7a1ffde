"""Which quantised checkpoints are read: those whose packed words stay (models.packed), those whose meaning does (models.scaled)."""

from suture.core.errors import UserError
from suture.models import packed, scaled

METHODS = (*packed.PACKINGS, *scaled.METHODS)


def check_quantisation(config: dict, where: object) -> None:
    """Raises UserError where a config.json (at `where`) describes weights that are quantised by another method."""
    method = (config.get("quantization_config") or {}).get("quant_method", METHODS[0])
    if method not in METHODS:
        raise UserError(
            where, f"describes weights quantised by {method}", f"use one of {', '.join(METHODS)}, or the model's own"
        )
