"""What Ray's own processes may say on our terminal: errors. Each runs this when it starts, so it imports little."""

import logging


def quiet() -> None:
    """Without Ray's dashboard, which nobody asked for here, its helpers warn every second that they cannot ask it."""
    logging.getLogger("ray").setLevel(logging.ERROR)
