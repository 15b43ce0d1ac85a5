"""Foreign text on a terminal: control characters become visible and lose their effect."""

import logging

from rewards.isolation.output import escaped as escaped


class EscapingFormatter(logging.Formatter):
    """Warnings as Python prints them by default, escaped: they may quote a reward or a checkpoint."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))
