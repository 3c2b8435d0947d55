"""Errors of the Hugging Face hub: whether the same request may succeed later."""

from elastic_core.errors import UserError
from elastic_core.io.storage import StorageUnavailable

SECONDS = 5.0  # to wait for the hub's answer


def kind_of(error: BaseException | None) -> type[UserError]:
    """StorageUnavailable if the hub did not answer or was too busy, so that the same request may succeed later."""
    from huggingface_hub import is_offline_mode
    from huggingface_hub.utils import httpx

    while error is not None and not is_offline_mode():
        if isinstance(error, (ConnectionError, TimeoutError, httpx.TransportError)):
            return StorageUnavailable
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None and (status >= 500 or status == 429):
            return StorageUnavailable
        error = error.__cause__
    return UserError
