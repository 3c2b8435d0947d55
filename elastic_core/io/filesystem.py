"""The file system behind a place, with patience for a server that is away, and its errors in our words.

fsspec and what it brings for a scheme are imported here only. Credentials and endpoint come from the environment (for
S3 botocore's usual variables), never from a file of ours; and no message repeats what a library or a server said, only
the names and codes of errors, since texts carry addresses and more.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

Location = str | os.PathLike

S3_SCHEMES = ("s3", "s3a")
# botocore waits a random part of 1, 2, 4, ... up to 20 s before each next attempt: five minutes on average.
_ATTEMPTS = 34
REQUESTS_AT_ONCE = 3  # of one transfer: botocore allows about 100 retries at a time, shared by all of them
_READS = 3  # how often a block is asked for anew, when the answer breaks off in the middle
_S3_ACCOUNT = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN, where one is used)"
_CREDENTIAL_CODES = {
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidSecurity",
    "InvalidToken",
    "SignatureDoesNotMatch",
}
_DENIED_CODES = {"403", "AccessDenied", "AllAccessDisabled", "Forbidden"}
_ABSENT_CODES = {"404", "NoSuchKey", "NotFound"}
_BUSY_CODES = {"RequestLimitExceeded", "RequestTimeout", "SlowDown", "Throttling", "ThrottlingException"}
_BUSY_STATUSES = {429, 500, 502, 503, 504}


class StorageError(ValueError):
    """A place that cannot be used, with the place, the reason and where to change it."""


class StorageUnavailable(StorageError):
    """A server that did not answer, or was too busy, for as long as it was waited for; later it may."""


def is_url(place: Location) -> bool:
    """Whether `place` is a URL; all else is a local path."""
    return isinstance(place, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", place) is not None


def scheme_of(place: Location) -> str:
    """The part before ``://``; ``file`` for a local path."""
    return place.split("://")[0].lower() if is_url(place) else "file"


def open_filesystem(place: Location, patient: bool = True):
    """The fsspec file system that serves `place`, and the path in it.

    Where not `patient`, a server that does not answer at once is given up. Raises StorageError for a scheme that no
    installed library serves, a URL that carries a secret, and an endpoint that is no address.
    """
    import fsspec

    if not is_url(place):
        return fsspec.filesystem("file", auto_mkdir=True), os.path.abspath(place)
    scheme = scheme_of(place)
    if re.match(r"[^:]+://[^/]*@", place) or (scheme in ("http", "https") and "?" in place):
        raise StorageError(
            f"a {scheme}:// URL carries a user, a password or a signature, which would end in logs and files; "
            "write the URL without it and give credentials by environment variables"
        )
    options = {"auto_mkdir": True} if scheme in ("file", "local") else {}
    if scheme in S3_SCHEMES:
        options = _s3_options(patient)
    try:
        filesystem, path = fsspec.core.url_to_fs(place, **options)
    except ImportError:
        advice = "pip install 'nemotron-elastic[s3]'"
        if scheme not in S3_SCHEMES:
            advice = "install fsspec's package for it (such as gcsfs for gs://, adlfs for abfs://)"
        raise StorageError(f"{place}: no library for {scheme}:// is installed; {advice}") from None
    except ValueError:
        raise StorageError(f"{place}: {scheme}:// is no scheme that fsspec knows; s3:// is one") from None
    if scheme in S3_SCHEMES:
        _connect(filesystem, patient)
    return filesystem, path


def _s3_options(patient: bool) -> dict:
    return {
        "use_listings_cache": False,
        "max_concurrency": REQUESTS_AT_ONCE,
        "skip_instance_cache": not patient,
        "config_kwargs": {
            "retries": {"mode": "standard", "total_max_attempts": _ATTEMPTS if patient else 1},
            "connect_timeout": 5 if patient else 3,
            "read_timeout": 60 if patient else 5,
        },
    }


def _connect(filesystem, patient: bool) -> None:
    """Make the client, which asks no server yet, and have its retries logged."""
    filesystem.retries = _READS if patient else 1
    try:
        client = filesystem.s3
    except ValueError:
        raise StorageError(
            "the S3 endpoint or region is not valid; AWS_ENDPOINT_URL is like http://host:port, AWS_DEFAULT_REGION "
            "like us-east-1"
        ) from None
    if patient:
        client.meta.events.register("needs-retry.s3", _log_retry, unique_id="nemotron-elastic")


def _log_retry(operation, attempts: int, response, caught_exception, **_) -> None:
    """Called by botocore after every attempt; returning None leaves the decision to botocore."""
    status = response[0].status_code if response else 0
    if attempts < _ATTEMPTS and (caught_exception is not None or status >= 500 or status == 429):
        problem = type(caught_exception).__name__ if caught_exception is not None else f"status {status}"
        logger.warning("S3 %s: %s, attempt %d of %d; trying again", operation.name, problem, attempts, _ATTEMPTS)


@contextmanager
def explained(place: Location, doing: str) -> Iterator[None]:
    """Turn what a file system's library raises into a StorageError: ``<place>: cannot <doing>: <why>``."""
    try:
        yield
    except _foreign_errors(place) as error:
        kind = StorageUnavailable if _is_temporary(place, error) else StorageError
        raise kind(f"{place}: cannot {doing} it: {_reason(error)}") from None


def _foreign_errors(place: Location) -> tuple[type[BaseException], ...]:
    scheme, errors = scheme_of(place), (OSError,)
    if scheme in S3_SCHEMES:
        from botocore.exceptions import BotoCoreError, ClientError

        errors += (BotoCoreError, ClientError)
    if scheme in (*S3_SCHEMES, "http", "https"):
        from aiohttp import ClientError as HttpError

        errors += (HttpError,)
    return errors


def _reason(error: BaseException) -> str:
    name, code = type(error).__name__, _server_code(error)
    if code == "NoSuchBucket":
        return "there is no such bucket at this endpoint; create it, change the URL, or set AWS_ENDPOINT_URL"
    if code in _CREDENTIAL_CODES:
        return f"the server does not accept the credentials ({code}); set {_S3_ACCOUNT}"
    if code in _DENIED_CODES:
        return f"these credentials do not allow it ({code}); set {_S3_ACCOUNT} of one that may"
    if code in _ABSENT_CODES:
        return f"the server finds nothing there ({code}); see that the URL and AWS_ENDPOINT_URL are right"
    if isinstance(error, FileNotFoundError) and error.filename is None:
        return "nothing is there"
    if name == "ParamValidationError":
        return "no valid bucket and name; a URL is like s3://bucket/name"
    if code is not None:
        return f"the server answered {code}"
    if "Credential" in name:
        return f"no complete credentials were found ({name}); set {_S3_ACCOUNT}"
    if isinstance(error, OSError) and error.filename is not None:  # of the local machine
        return f"{error.strerror} ({error.filename})"
    if isinstance(error, OSError):
        return name
    return f"no answer ({name}); see that the server is up, and that AWS_ENDPOINT_URL and AWS_DEFAULT_REGION are right"


def _is_temporary(place: Location, error: BaseException) -> bool:
    """Whether the same request may be answered later: nobody did, the answer broke off, or the server was too busy."""
    answer = _server_answer(error)
    if answer is not None:
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status in _BUSY_STATUSES or _server_code(error) in _BUSY_CODES
    if (status := getattr(error, "status", None)) is not None:  # of an http:// server
        return status in _BUSY_STATUSES
    refused = any(word in type(error).__name__ for word in ("SSL", "Certificate"))
    return isinstance(error, _connection_errors(place)) and not refused


def _connection_errors(place: Location) -> tuple[type[BaseException], ...]:
    scheme, errors = scheme_of(place), (ConnectionError, TimeoutError)
    if scheme in S3_SCHEMES:
        from botocore import exceptions

        errors += (exceptions.ConnectionError, exceptions.HTTPClientError)
    if scheme in (*S3_SCHEMES, "http", "https"):
        from aiohttp import ClientConnectionError, ClientPayloadError

        errors += (ClientConnectionError, ClientPayloadError)
    return errors


def _server_code(error: BaseException) -> str | None:
    """The code in an S3 server's answer."""
    answer = _server_answer(error)
    return None if answer is None else str(answer.get("Error", {}).get("Code"))


def _server_answer(error: BaseException) -> dict | None:
    """An S3 server's answer in botocore's words; s3fs raises an OSError from it."""
    for candidate in (error, error.__cause__):
        if isinstance(answer := getattr(candidate, "response", None), dict):
            return answer
    return None
