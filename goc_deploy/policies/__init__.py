"""SPECs to schedules: `resolve.schedule_from_policy` is the entry.

A new base: a function in ``bases.py``, or in a file of its own, and a line in `resolve.BASES`. A new
correction: a function and a line in `resolve.CORRECTIONS`. Other packages register theirs, see `registration`.
"""
