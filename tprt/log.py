"""Loggers under ``tprt.*``.

A library configures nothing: the package logger has a NullHandler. Only the command line calls
``setup_cli_logging``.
"""

import logging
import os
import sys

logging.getLogger("tprt").addHandler(logging.NullHandler())


def get_logger(name: str) -> logging.Logger:
    return logging.getLogger(name)


def setup_cli_logging(level: str = "info") -> None:
    """Log to stderr with the rank in front where there is more than one; rank 0 alone below warning."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    handler = logging.StreamHandler(sys.stderr)
    tag = f"[rank {rank}] " if size > 1 else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s {tag}%(message)s", "%H:%M:%S"))
    logger = logging.getLogger("tprt")
    logger.handlers[:] = [handler]
    logger.propagate = False
    numeric = getattr(logging, level.upper())
    logger.setLevel(numeric if rank == 0 else max(numeric, logging.WARNING))
