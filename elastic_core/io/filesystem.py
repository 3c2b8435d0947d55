"""The fsspec file system of a location, its retries, its open files, and its errors translated into StorageError.

A location is a local path or a URL. Only this file imports fsspec and the packages that fsspec needs for a scheme.
Credentials and endpoint come from the environment (for S3, from botocore's usual variables), never from a file of
ours. Messages name only the class or the code of an error. They never repeat the text of a library or a server,
because such texts can contain addresses and secrets.
"""

import io
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from elastic_core.errors import UserError

logger = logging.getLogger(__name__)

Location = str | os.PathLike  # a local path, or a URL (only a str can be a URL)

S3_SCHEMES = ("s3", "s3a")
# botocore waits a random part of 1, 2, 4, ... up to 20 s before each retry: about five minutes in total on average.
_ATTEMPTS = 34
# Parallel requests of one transfer. botocore allows about 100 retries at a time, shared by all requests of a client.
REQUESTS_AT_ONCE = 3
_READ_ATTEMPTS = 3  # requests for one block if the connection breaks in the middle of the answer
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
_EXISTS_CODES = {"ConditionalRequestConflict", "PreconditionFailed"}  # of a request that must not overwrite
_BUSY_CODES = {"RequestLimitExceeded", "RequestTimeout", "SlowDown", "Throttling", "ThrottlingException"}
_BUSY_STATUSES = {429, 500, 502, 503, 504}


class StorageError(UserError):
    """A location cannot be used. The text names the location, the reason and where to change it."""


class StorageUnavailable(StorageError):
    """A server did not answer, or was too busy, after all retries. The same request may succeed later."""


class AlreadyExists(StorageError):
    """A file that was to be created exists."""


def is_url(location: Location) -> bool:
    """Whether `location` is a URL; everything else is a local path."""
    return isinstance(location, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", location) is not None


def why_impossible(path: str | os.PathLike) -> str | None:
    """Why no file can have this path (a name is too long, or has characters that no name can have), or None."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


def scheme_of(location: Location) -> str:
    """The part before ``://`` in lower case; ``file`` for a local path."""
    return location.split("://")[0].lower() if is_url(location) else "file"


def open_filesystem(location: Location, patient: bool = True):
    """The fsspec file system of `location`, and the path of `location` in it.

    `patient` False: give up after the first attempt, with short timeouts.
    Raises StorageError for a scheme without an installed library, a URL with a secret in it, and an invalid endpoint.
    """
    import fsspec

    if not is_url(location):
        return fsspec.filesystem("file", auto_mkdir=True), os.path.abspath(location)
    scheme = scheme_of(location)
    if re.match(r"[^:]+://[^/]*@", location) or (scheme in ("http", "https") and "?" in location):
        raise StorageError(
            f"a {scheme}:// URL carries a user, a password or a signature, which would appear in logs and files; "
            "write the URL without it and give credentials by environment variables"
        )
    options = {"auto_mkdir": True} if scheme in ("file", "local") else {}
    if scheme in S3_SCHEMES:
        options = _s3_options(patient)
    try:
        filesystem, path = fsspec.core.url_to_fs(location, **options)
    except ImportError:
        advice = "pip install 'nemotron-elastic[s3]'"
        if scheme not in S3_SCHEMES:
            advice = "install fsspec's package for it (such as gcsfs for gs://, adlfs for abfs://)"
        raise StorageError(f"{location}: no library for {scheme}:// is installed; {advice}") from None
    except ValueError:
        raise StorageError(f"{location}: fsspec does not know {scheme}://; it knows s3://, for example") from None
    if scheme in S3_SCHEMES:
        _create_s3_client(filesystem, patient)
    return filesystem, path


def _s3_options(patient: bool) -> dict:
    return {
        "use_listings_cache": False,
        "max_concurrency": REQUESTS_AT_ONCE,
        "skip_instance_cache": not patient,
        "config_kwargs": {
            "retries": {"mode": "standard", "total_max_attempts": _ATTEMPTS if patient else 1},
            "connect_timeout": 5 if patient else 3,  # seconds
            "read_timeout": 60 if patient else 5,
        },
    }


def _create_s3_client(filesystem, patient: bool) -> None:
    """Create the client, which sends no request yet, and log its retries."""
    filesystem.retries = _READ_ATTEMPTS if patient else 1
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
    """botocore calls this after every attempt. It returns None, so botocore itself decides whether to retry."""
    status = response[0].status_code if response else 0
    if attempts < _ATTEMPTS and (caught_exception is not None or status >= 500 or status == 429):
        problem = type(caught_exception).__name__ if caught_exception is not None else f"status {status}"
        logger.warning("S3 %s: %s, attempt %d of %d; trying again", operation.name, problem, attempts, _ATTEMPTS)


@contextmanager
def storage_errors(location: Location, action: str) -> Iterator[None]:
    """Translate the errors of the file system's library: StorageError("LOCATION: cannot ACTION it: REASON")."""
    try:
        yield
    except _library_errors(location) as error:
        kind = StorageUnavailable if _is_temporary(location, error) else StorageError
        if isinstance(error, FileExistsError) or _server_code(error) in _EXISTS_CODES:
            kind = AlreadyExists
        raise kind(f"{location}: cannot {action} it: {_reason(error)}") from None


class BlockReader(io.BufferedReader):
    """Requests whole blocks for `read1` too. Python's own requests only the few KiB that a text reader asks for."""

    def read1(self, size: int = -1) -> bytes:
        self.peek(1)  # fills an empty buffer with a block
        return super().read1(size)


class RemoteFile(io.RawIOBase):
    """Reads from `file`, an open file of fsspec, and translates its errors."""

    def __init__(self, file, location: Location):
        self.file, self.location = file, location

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def readinto(self, buffer) -> int:
        with storage_errors(self.location, "read"):
            return self.file.readinto(buffer)

    def readall(self) -> bytes:
        with storage_errors(self.location, "read"):  # Python's own readall requests only 8 KiB at a time
            return self.file.read()


def _library_errors(location: Location) -> tuple[type[BaseException], ...]:
    scheme, errors = scheme_of(location), (OSError,)
    if scheme in S3_SCHEMES:
        from botocore.exceptions import BotoCoreError, ClientError

        errors += (BotoCoreError, ClientError)
    if scheme in (*S3_SCHEMES, "http", "https"):
        from aiohttp import ClientError as HttpError

        errors += (HttpError,)
    return errors


def _reason(error: BaseException) -> str:
    """Why the operation failed and what to change, without any text of the library or the server."""
    name, code = type(error).__name__, _server_code(error)
    if code == "NoSuchBucket":
        return "there is no such bucket at this endpoint; create it, change the URL, or set AWS_ENDPOINT_URL"
    if code in _CREDENTIAL_CODES:
        return f"the server does not accept the credentials ({code}); set {_S3_ACCOUNT}"
    if code in _DENIED_CODES:
        return f"the account of these credentials may not do this ({code}); set {_S3_ACCOUNT} of an account that may"
    if code in _ABSENT_CODES:
        return f"the server has nothing under this name ({code}); check the URL and AWS_ENDPOINT_URL"
    if isinstance(error, FileNotFoundError) and error.filename is None:
        return "nothing is there"
    if name == "ParamValidationError":
        return "no valid bucket and name; a URL is like s3://bucket/name"
    if code is not None:
        return f"the server answered {code}"
    if "Credential" in name:
        return f"no complete credentials were found ({name}); set {_S3_ACCOUNT}"
    if isinstance(error, OSError) and error.filename is not None:  # an error of the local disk
        return f"{error.strerror} ({error.filename})"
    if isinstance(error, OSError):  # the number says more than the name only where it has no class of its own
        return os.strerror(error.errno) if type(error) is OSError and error.errno is not None else name
    return f"no answer ({name}); check that the server is up, and AWS_ENDPOINT_URL and AWS_DEFAULT_REGION"


def _is_temporary(location: Location, error: BaseException) -> bool:
    """Whether the same request may succeed later: no answer, a broken connection, or a busy server."""
    answer = _server_answer(error)
    if answer is not None:
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status in _BUSY_STATUSES or _server_code(error) in _BUSY_CODES
    if (status := getattr(error, "status", None)) is not None:  # the answer of an http:// server
        return status in _BUSY_STATUSES
    is_refused = any(word in type(error).__name__ for word in ("SSL", "Certificate"))
    return isinstance(error, _connection_errors(location)) and not is_refused


def _connection_errors(location: Location) -> tuple[type[BaseException], ...]:
    scheme, errors = scheme_of(location), (ConnectionError, TimeoutError)
    if scheme in S3_SCHEMES:
        from botocore import exceptions

        errors += (exceptions.ConnectionError, exceptions.HTTPClientError)
    if scheme in (*S3_SCHEMES, "http", "https"):
        from aiohttp import ClientConnectionError, ClientPayloadError

        errors += (ClientConnectionError, ClientPayloadError)
    return errors


def _server_code(error: BaseException) -> str | None:
    """The error code in an S3 server's answer; None for an error without an answer."""
    answer = _server_answer(error)
    return None if answer is None else str(answer.get("Error", {}).get("Code"))


def _server_answer(error: BaseException) -> dict | None:
    """An S3 server's answer as botocore parses it. s3fs raises an OSError with botocore's error as its cause."""
    for candidate in (error, error.__cause__):
        if isinstance(answer := getattr(candidate, "response", None), dict):
            return answer
    return None
