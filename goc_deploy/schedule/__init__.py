"""The schedule: the action of every unit at every step (`schedule`), and its rules (`legality`)."""

from goc_deploy.schedule.legality import (
    check_amplification,
    check_schedule,
    check_schedule_fits,
    fill_short_history,
)
from goc_deploy.schedule.schedule import (
    COMPUTE,
    HISTORY_KINDS,
    MAX_BLOCKS,
    MAX_HISTORY,
    MAX_STEPS,
    REUSE,
    SHORT_HISTORY_KINDS,
    HistoryKind,
    Schedule,
    ShortHistory,
    gradient,
)

__all__ = [
    "COMPUTE",
    "HISTORY_KINDS",
    "MAX_BLOCKS",
    "MAX_HISTORY",
    "MAX_STEPS",
    "REUSE",
    "SHORT_HISTORY_KINDS",
    "HistoryKind",
    "Schedule",
    "ShortHistory",
    "check_amplification",
    "check_schedule",
    "check_schedule_fits",
    "fill_short_history",
    "gradient",
]
