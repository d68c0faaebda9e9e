"""Errors as clients of OpenAI's protocol know them: an HTTP status, and a body that names the field."""

from __future__ import annotations

from typing import Any

from engine.errors import (
    EmptyPrompt,
    ForetoldError,
    InvalidOption,
    NonFiniteLogits,
    PoolExhausted,
    PromptTooLong,
)

_STATUS: dict[type[ForetoldError], tuple[int, str | None]] = {
    PromptTooLong: (400, "context_length_exceeded"),
    EmptyPrompt: (400, None),
    InvalidOption: (400, None),
    PoolExhausted: (503, "pool_exhausted"),
    NonFiniteLogits: (500, "non_finite_logits"),
}


class ApiError(Exception):
    """What a request is answered with instead of a completion.

    status: of HTTP. message: for the caller. param: the field that is wrong. code: a word for programs. retry_after_s: when to ask again.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after_s = status, message, param, code, retry_after_s

    @property
    def kind(self) -> str:
        """OpenAI's `type` of the error."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """HTTP headers that go with it."""
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


def as_api_error(error: ForetoldError, param: str | None = None) -> ApiError:
    """The engine's error in the protocol's form. param: the field it came from, where the error does not begin with a field's name."""
    status, code = next((found for kind, found in _STATUS.items() if isinstance(error, kind)), (500, None))
    message = f"{error.what} ({error.remedy})"
    first = error.what.split(" ", 1)[0]
    named = first if first.isidentifier() and "_" in first else param
    return ApiError(status, message, param=named if status == 400 else None, code=code, retry_after_s=1 if status == 503 else None)
