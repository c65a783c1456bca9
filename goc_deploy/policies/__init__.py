"""SPECs to schedules: `resolve.schedule_from_policy` is the entry.

To add a base policy or a correction, write a function with its options dataclass (`options`), in a
file of its own or beside a similar one, and add a line to `tables.BASES` or `tables.CORRECTIONS`.
The grammar, the checks of a SPEC, the error messages and ``goc-plan --help`` derive from that line.
These modules import NumPy inside functions only, because help texts and ``import goc_deploy`` do
without it. Other packages register theirs, see `registration`.
"""
