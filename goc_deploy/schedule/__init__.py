"""The schedule: the action of every unit at every step (`schedule`), and its rules (`legality`)."""

from goc_deploy.schedule.legality import (
    begin_second_set,
    check_amplification,
    check_schedule,
    check_schedule_fits,
    check_whole_steps,
    fill_short_history,
)
from goc_deploy.schedule.schedule import (
    COMPUTE,
    HISTORY_KINDS,
    LEVELS,
    MAX_HISTORY,
    MAX_STEPS,
    REUSE,
    SHORT_HISTORY_KINDS,
    HistoryKind,
    Level,
    Schedule,
    ShortHistory,
    gradient,
)

__all__ = [
    "COMPUTE",
    "HISTORY_KINDS",
    "LEVELS",
    "MAX_HISTORY",
    "MAX_STEPS",
    "REUSE",
    "SHORT_HISTORY_KINDS",
    "HistoryKind",
    "Level",
    "Schedule",
    "ShortHistory",
    "begin_second_set",
    "check_amplification",
    "check_schedule",
    "check_schedule_fits",
    "check_whole_steps",
    "fill_short_history",
    "gradient",
]
