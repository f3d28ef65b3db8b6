"""GET /api/experimental/model-recommendations: which models somebody recommends who runs them.

Source: ollama api/types.go ModelRecommendation, server/model_recommendations.go validateModelRecommendations, fb30760.
"""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from corral.wire.errors import CorralError
from corral.wire.names import Source, parse_reference

RECOMMENDATIONS_PATH: Final = "/api/experimental/model-recommendations"
_MAX_RECOMMENDATIONS = 100
_MAX_TEXT = 300


class Recommendation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One model. model: as it is asked for, with its cloud suffix. vram_bytes: what it takes on a machine of one's own."""

    model: str
    description: str
    context_length: int = 0
    max_output_tokens: int = 0
    vram_bytes: int = 0
    required_plan: str = ""


def parse_recommendations(body: bytes) -> list[Recommendation]:
    """Those of a foreign answer that can be used: every model once, and none in the cloud whose limits are not told."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return []
    rows = value.get("recommendations") if isinstance(value, dict) else None
    found: dict[str, Recommendation] = {}
    for row in rows[:_MAX_RECOMMENDATIONS] if isinstance(rows, list) else []:
        one = _recommendation(row)
        if one is not None:
            found.setdefault(one.model, one)
    return list(found.values())


def _recommendation(row: object) -> Recommendation | None:
    try:
        one = msgspec.convert(row, Recommendation)
        is_cloud = parse_reference(one.model.strip()).source is Source.CLOUD
    except (msgspec.ValidationError, CorralError):
        return None
    lacks_limits = is_cloud and (one.context_length <= 0 or one.max_output_tokens <= 0)
    if not one.model.strip() or lacks_limits:
        return None
    texts = {name: getattr(one, name).strip()[:_MAX_TEXT] for name in ("model", "description", "required_plan")}
    return msgspec.structs.replace(one, **texts)


def recommendations_body(rows: Sequence[Recommendation]) -> dict[str, Any]:
    """The answer."""
    return {"recommendations": list(rows)}
