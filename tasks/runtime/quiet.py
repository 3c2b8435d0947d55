"""What libraries may say in a stage's process: their errors. Imports nothing, for it comes before their imports."""

import logging
import os
import threading
import warnings

LOGGERS = ("ray", "lm_eval", "transformers", "datasets", "torchao", "torch.utils._pytree")
# Ray has an actor that watches a run. Both wait for answers for ten seconds, and log a traceback where none comes. On a
# busy machine this happens at the end of a good run. It does no harm: the actor holds no CPU and ends with the cluster.
HARMLESS = ("ray.train.v2._internal.callbacks.placement_group_callback",)
HARMLESS_THREAD = "PlacementGroupCleanerMonitor"


def silence_libraries() -> None:
    """Leave out the warnings, notes and bars of libraries; a stage has its own.

    Ray's workers run this when they start. Without Ray's dashboard, which nobody asked for, its helpers would warn
    every second that they cannot reach it. torch.distributed.checkpoint warns at every save of a process on its own.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm reads it when it is imported; our bars say disable=False
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import sets its logger's level anew
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in HARMLESS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|lm_eval|ray|datasets)(\.|$)")
    warnings.filterwarnings("ignore", category=FutureWarning)
    threading.excepthook = _show_failed_thread


def _show_failed_thread(failed: threading.ExceptHookArgs) -> None:
    if failed.thread is None or failed.thread.name != HARMLESS_THREAD:
        threading.__excepthook__(failed)
