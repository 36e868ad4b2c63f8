"""What a job says while it works: one line a fact, from our own loggers only."""

import logging
import warnings


def show() -> None:
    """Print the pipeline's own log lines of this process, with the time."""
    logger = logging.getLogger("pipeline")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    # DeepSpeed's calls into torch.distributed, which no user of ours can change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
