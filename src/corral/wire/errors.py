"""The one table of error codes, and how each dialect writes an error down.

Everything that can go wrong is raised as a `CorralError` with a code of this table. The edge turns the code into a status and
the caller's dialect into a body, once. Nobody matches on message text.
"""

from collections.abc import Mapping
from typing import Any

#: code -> (HTTP status, default text). The default text is shown when the raiser gives none.
CODES: Mapping[str, tuple[int, str]] = {
    "bad_request": (400, "the request could not be understood"),
    "two_credentials": (400, "send one credential, not several"),
    "unauthorized": (401, "unauthorized"),
    "clock_skew": (403, "request time is too far from the server's clock; check this machine's clock"),
    "stale_signature": (403, "a newer signed request from this device was already seen; sign again with the current time"),
    "forbidden": (403, "this credential may not do that"),
    "cloud_disabled": (403, "ollama cloud is disabled"),
    "not_found": (404, "not found"),
    "method_not_allowed": (405, "method not allowed"),
    "too_slow": (408, "the request body did not arrive in time"),
    "conflict": (409, "that already exists"),
    "range_invalid": (416, "the range cannot be satisfied"),
    "gone": (410, "this link was used or has expired"),
    "too_large": (413, "the request is too large"),
    "misdirected": (421, "this server does not answer for that host name"),
    "invalid": (422, "a value is not acceptable"),
    "rate_limited": (429, "too many requests; try again later"),
    "headers_too_large": (431, "the request headers are too large"),
    "canceled": (499, "request canceled"),
    "internal": (500, "internal error"),
    "engine_failed": (500, "the model runner stopped unexpectedly"),
    "out_of_memory": (500, "the model needs more memory than there is"),
    "not_supported": (501, "not supported"),
    "upstream_failed": (502, "the upstream server could not be reached"),
    "busy": (503, "server busy, please try again.  maximum pending requests exceeded"),
    "unavailable": (503, "temporarily unavailable"),
    "storage_full": (507, "no space left on the server"),
    # The registry's own, by the names of the OCI distribution specification in lower case.
    "blob_unknown": (404, "blob unknown to this repository"),
    "blob_upload_invalid": (400, "the upload is not valid"),
    "blob_upload_unknown": (404, "upload unknown"),
    "digest_invalid": (400, "the digest does not match the content or is none"),
    "manifest_blob_unknown": (400, "the manifest names a blob that is not in this repository"),
    "manifest_invalid": (400, "the manifest is not valid"),
    "manifest_unknown": (404, "manifest unknown"),
    "name_invalid": (400, "that is no repository name"),
    "name_unknown": (404, "repository unknown"),
    "size_invalid": (400, "the length does not match"),
    "unsupported": (405, "that operation is not supported here"),
}


class CorralError(Exception):
    """A failure somebody can act on.

    code: a key of `CODES`. message: what was wrong, with which value, and what to do next; shown to the caller, so it never
    holds a secret, a path of the host or SQL. detail: extra members of the native error body (`signin_url`). retry_after_s:
    seconds, becomes `Retry-After`. status: set only to pass on the status an engine or a hub answered with. headers: sent with
    the answer, such as the `Content-Range` of a 416.
    """

    def __init__(
        self,
        code: str,
        message: str | None = None,
        *,
        detail: Mapping[str, Any] | None = None,
        retry_after_s: int | None = None,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        default_status, default_message = CODES[code]
        self.code = code
        self.status = status or default_status
        self.message = message or default_message
        self.detail = dict(detail or {})
        self.retry_after_s = retry_after_s
        self.headers = dict(headers or {})
        super().__init__(self.message)

    def again(self) -> "CorralError":
        """The same error for another caller: one that is raised twice gathers the tracebacks of both."""
        return CorralError(
            self.code,
            self.message,
            detail=self.detail,
            retry_after_s=self.retry_after_s,
            status=self.status,
            headers=self.headers,
        )


def shutting_down() -> CorralError:
    """What is said to whoever waits for what a server that ends takes away."""
    return CorralError("unavailable", "the server is shutting down", retry_after_s=5)


_OPENAI_TYPES = {400: "invalid_request_error", 404: "not_found_error"}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


def native_body(error: CorralError) -> dict[str, Any]:
    """`{"error": text, ...detail}`; the status of another server, which Go's struct begins with, stands in front. Source: ollama
    api/types.go StatusError, AuthorizationError."""
    if "StatusCode" in error.detail:
        return {**error.detail, "error": error.message}
    return {"error": error.message, **error.detail}


def openai_body(error: CorralError) -> dict[str, Any]:
    """The OpenAI error object as Ollama's /v1 routes send it. Source: ollama openai/openai.go NewError."""
    kind = _OPENAI_TYPES.get(error.status, "api_error")
    return {"error": {"message": error.message, "type": kind, "param": None, "code": None}}


_REGISTRY_CODES = {
    "unauthorized": "UNAUTHORIZED",
    "forbidden": "DENIED",
    "rate_limited": "TOOMANYREQUESTS",
    "not_found": "NAME_UNKNOWN",
    "method_not_allowed": "UNSUPPORTED",
    "not_supported": "UNSUPPORTED",
    "too_large": "SIZE_INVALID",
    "range_invalid": "BLOB_UPLOAD_INVALID",
    "conflict": "BLOB_UPLOAD_INVALID",
}
_OCI_CODES = frozenset(code for code in CODES if code.startswith(("blob_", "digest_", "manifest_", "name_", "size_", "unsupp")))


def registry_body(error: CorralError) -> dict[str, Any]:
    """The error object of the OCI distribution specification. Source: its chapter "Error Codes", 1.1."""
    code = error.code.upper() if error.code in _OCI_CODES else _REGISTRY_CODES.get(error.code, "UNKNOWN")
    return {"errors": [{"code": code, "message": error.message, "detail": error.detail or None}]}


def anthropic_body(error: CorralError, request_id: str) -> dict[str, Any]:
    """The Anthropic error object. request_id: `req_` + 24 hex digits."""
    kind = _ANTHROPIC_TYPES.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id}
