"""Errors in the form of OpenAI's API."""

from collections.abc import Mapping

from starlette.responses import JSONResponse


def failure(
    message: str,
    status: int,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
    param: str | None = None,
) -> JSONResponse:
    """The error as a JSON object. param: the field of the request that is at fault."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status, headers)
