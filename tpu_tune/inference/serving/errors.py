"""The API's errors: a status and an object that says what is wrong with which parameter."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """What a request is answered with in place of a result.

    Args:
      status: the HTTP status.
      message: what is wrong, and what to do.
      param: the request's field that it is about.
      code: OpenAI's word for it, for programs.
      headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """The object that the API returns."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad(param: str, message: str, code: str | None = None) -> ApiError:
    """A request that cannot be answered because of one of its fields."""
    return ApiError(400, f"'{param}' {message}", param, code)
