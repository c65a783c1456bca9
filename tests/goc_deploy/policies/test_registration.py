"""Policies and corrections of other packages."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, make_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from goc_deploy import Schedule, register_correction, register_policy
from goc_deploy.errors import EnvironmentUnsupportedError, ScheduleError, UsageError
from goc_deploy.policies.context import PolicyContext
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.options import argument, option
from goc_deploy.policies.registration import (
    base_named,
    correction_named,
    installed_policies,
    registered_names,
)
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.policies.tables import BASES, CORRECTIONS
from goc_deploy.schedule import gradient
from goc_deploy.spec import ModelSpec

SPEC = ModelSpec(2, 8, 2, 16, 2, 2, 4, 10, False)
MODULE = """
import goc_deploy

@goc_deploy.register_correction("lasting")
@goc_deploy.register_correction("fading")
def fading(schedule, argument, context):
    return schedule
"""

Packages = Callable[..., Path]


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """What a test registers is gone after it."""
    bases, corrections = dict(BASES), dict(CORRECTIONS)
    yield
    BASES.clear()
    CORRECTIONS.clear()
    BASES.update(bases)
    CORRECTIONS.update(corrections)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packages:
    """Lay a module and its metadata out as pip does."""

    def install(
        package: str, module: str, code: str, *names: str, folder: Path = tmp_path / "site"
    ) -> Path:
        metadata = folder / f"{package}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (folder / f"{module}.py").write_text(code)
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        )
        lines = "".join(f"{name} = {module}\n" for name in names)
        (metadata / "entry_points.txt").write_text(f"[goc_deploy.policies]\n{lines}")
        return folder

    monkeypatch.syspath_prepend(tmp_path / "site")
    return install


def made(text: str, steps: int = 6) -> Schedule:
    return schedule_from_policy(parse_policy(text), SPEC, steps)


def reuse_after_the_first(_argument: str, context: PolicyContext) -> Schedule:
    rows = [
        [[] if step == 0 else [np.float32(1)]] * context.spec.units for step in range(context.steps)
    ]
    return Schedule(context.spec.depth, context.spec.branches, rows)  # type: ignore[arg-type]


def weak_gradient(schedule: Schedule, argument: str, context: PolicyContext) -> Schedule:
    eta = float(argument or 0.5) * float(context.options.get("times", 1))
    rows = tuple(
        tuple(gradient(eta) if row == (1.0,) else row for row in step)
        for step in schedule.coefficients
    )
    return replace(schedule, coefficients=rows, short_history="reuse")


def test_a_registered_policy_and_correction_are_parts_of_specs() -> None:
    assert register_policy("once")(reuse_after_the_first) is reuse_after_the_first
    assert register_correction("weak_2", options=("times",))(weak_gradient) is weak_gradient
    schedule = made("once+weak_2:0.25,times=2")
    assert [set(rows) for rows in schedule.coefficients] == [{()}, {(1.0,)}, *[{gradient(0.5)}] * 4]
    assert schedule.policy == "once+weak_2:0.25,times=2"
    assert parse_policy("l2c:a+b.pt+weak_2:0.25").correction == ("weak_2", "0.25")
    with pytest.raises(
        UsageError, match="option 'other' is not one of history, level, both_branches, times"
    ):
        made("once+weak_2,other=1")


def test_lists_and_numbers_of_numpy_become_plain_floats() -> None:
    register_policy("once")(reuse_after_the_first)
    assert type(made("once").coefficients[1]) is tuple
    assert type(made("once").coefficients[1][0][0]) is float


def test_a_search_tries_a_registered_correction() -> None:
    register_correction("weak")(weak_gradient)

    @register_policy("tries")
    def tries(argument: str, context: PolicyContext) -> Schedule:
        plain = reuse_after_the_first(argument, context)
        return context.correct(made("fora:6"), "weak:0.25") if argument else plain

    assert made("tries:yes").coefficients[2] == (gradient(0.25),) * 4


@dataclass(frozen=True)
class WeakOptions:
    eta: float = argument("Strength.", default=0.5, low=0, high=1)
    times: int = option("Factor.", default=1, low=1, high=9)


def test_a_function_with_an_options_dataclass_takes_an_instance() -> None:
    @register_policy("once", options=WeakOptions)
    def once(options: WeakOptions, context: PolicyContext) -> Schedule:
        assert options == WeakOptions(0.25, 2)
        return reuse_after_the_first("", context)

    @register_correction("weak", options=WeakOptions)
    def weak(schedule: Schedule, options: WeakOptions, context: PolicyContext) -> Schedule:
        return weak_gradient(
            schedule, str(options.eta * options.times), replace(context, options={})
        )

    assert made("once:0.25+weak:0.25,times=2").coefficients[2] == (gradient(0.5),) * 4
    with pytest.raises(UsageError, match=r"eta must be a number within 0..1, got '2'"):
        made("fora:2+weak:2")
    with pytest.raises(UsageError, match=r"option times must be a whole number within 1..9"):
        made("fora:2+weak,times=x")
    with pytest.raises(UsageError, match=r"\.once: field 'a' of Bad must be made by argument"):
        register_policy("bad", options=make_dataclass("Bad", [("a", int)], frozen=True))(once)


def test_both_branches_is_honored_for_a_registered_correction() -> None:
    register_correction("weak")(weak_gradient)

    @register_policy("uneven")
    def uneven(_argument: str, context: PolicyContext) -> Schedule:
        rows = [[()] * 4, [()] * 4, [(), (1.0,), (1.0,), (1.0,)]]
        return Schedule(context.spec.depth, context.spec.branches, rows)  # type: ignore[arg-type]

    assert made("uneven+weak", 3).coefficients[2][1] == gradient(0.5)
    assert made("uneven+weak,both_branches", 3).coefficients[2][1] == (1.0,)
    assert made("uneven+weak,both_branches", 3).coefficients[2][2] == gradient(0.5)


def test_a_history_that_a_correction_does_not_read_is_refused() -> None:
    @register_correction("fresh")
    def fresh(schedule: Schedule, _argument: str, _context: PolicyContext) -> Schedule:
        return replace(schedule, history="computed")

    assert made("fora:2+fresh").history == "computed"
    assert made("fora:2+fresh,history=computed").history == "computed"
    with pytest.raises(UsageError, match="reads computed features only; leave out history=used"):
        made("fora:2+fresh,history=used")


def test_the_number_of_steps_is_the_schedule_s_only_if_the_policy_chooses_it() -> None:
    def ten(argument: str, context: PolicyContext) -> Schedule:
        return reuse_after_the_first(argument, replace(context, steps=10))

    register_policy("ten", chooses_steps=True)(ten)
    assert made("ten").steps == 10
    register_policy("ten")(ten)
    with pytest.raises(
        ScheduleError, match="SPEC 'ten': the schedule has 10 steps but 6 are asked for"
    ):
        made("ten")


@pytest.mark.parametrize("name", ["", "Upper", "a-b", "../a", "a/b", "2a", "a" * 33, "a b"])
def test_a_name_that_is_not_file_safe_is_refused(name: str) -> None:
    for register in (register_policy, register_correction):
        with pytest.raises(
            UsageError,
            match=r"test_registration\.\S+: the name .* must be 1 to 32 lower-case letters",
        ):
            register(name)(reuse_after_the_first)  # type: ignore[type-var]
    with pytest.raises(UsageError, match="the option 'a=b' must be"):
        register_policy("fine", options=("a=b",))(reuse_after_the_first)


def test_a_name_that_is_taken_is_refused_and_the_same_function_again_is_not() -> None:
    with pytest.raises(
        UsageError,
        match=r"the name 'fora' is taken by goc_deploy\.policies\.bases\.fora; choose another name",
    ):
        register_policy("fora")(reuse_after_the_first)
    with pytest.raises(UsageError, match="the name 'goc' is taken by"):
        register_correction("goc")(weak_gradient)
    register_policy("once")(reuse_after_the_first)
    register_policy("once")(reuse_after_the_first)
    with pytest.raises(UsageError, match=r"the name 'once' is taken by \S+\.reuse_after_the_first"):
        register_policy("once")(lambda argument, context: reuse_after_the_first(argument, context))


def test_a_built_in_name_is_taken_before_anything_has_used_it() -> None:
    code = "import goc_deploy; goc_deploy.register_policy('fora')(lambda argument, context: None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "the name 'fora' is taken" in done.stderr


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, r"SPEC 'bad': \S*returns returned a NoneType, it must return a goc_deploy.Schedule"),
        (
            Schedule(2, ("attn", "mlp"), (((),) * 3,) * 6),
            r"returns: step 0 has 3 units, the schedule says 4",
        ),
        (
            Schedule(2, ("attn", "mlp"), ((("x",),) * 4,) * 6),
            r"returns: coefficients must be numbers",
        ),  # type: ignore[arg-type]
        (
            Schedule(2, ("attn", "mlp"), (((1.0,),) * 4,) * 6),
            r"step 0, block 0, attn: reuse at step 0",
        ),
        (Schedule(1, ("attn", "mlp"), (((),) * 2,) * 6), r"the schedule is for 1 blocks"),
    ],
)
def test_what_a_policy_returns_is_checked(returned: Any, message: str) -> None:
    def returns(_argument: str, _context: PolicyContext) -> Schedule:
        return returned  # type: ignore[no-any-return]

    register_policy("bad")(returns)
    with pytest.raises(UsageError, match=message):
        made("bad")


def test_what_a_function_raises_is_named_with_its_place() -> None:
    register_correction("weak")(weak_gradient)
    with pytest.raises(
        UsageError, match=r"SPEC 'fora:2\+weak:x': \S+weak_gradient raised ValueError: could not"
    ):
        made("fora:2+weak:x")


def test_an_installed_policy_is_imported_only_if_a_spec_names_it(installed: Packages) -> None:
    installed("a-package", "lazy_module", MODULE, "fading", "lasting")
    assert {"fading", "lasting"} <= set(registered_names())
    assert "; from installed packages" in installed_policies()
    assert made("fora:2").computed == 12
    assert "lazy_module" not in sys.modules
    assert made("fora:2+fading").computed == 12
    assert correction_named("lasting") is not None
    assert "lazy_module" in sys.modules


def test_a_broken_package_is_named_and_breaks_no_other(installed: Packages) -> None:
    installed("good-package", "good_module", MODULE, "fading")
    installed("bad-package", "bad_module", "raise RuntimeError('no licence')", "broken")
    with pytest.raises(
        EnvironmentUnsupportedError,
        match=r"'broken' of the package bad-package \(bad_module\) cannot be imported: "
        r"RuntimeError: no",
    ):
        made("broken")
    assert made("fora:2+fading").computed == 12
    with pytest.raises(
        UsageError, match=r"unknown policy 'nothing'; .*; registered are broken, fading, lasting"
    ):
        made("nothing")


def test_an_entry_point_that_registers_nothing_and_one_of_two_packages_are_refused(
    installed: Packages,
) -> None:
    installed("empty-package", "empty_module", "", "empty")
    with pytest.raises(
        EnvironmentUnsupportedError, match="registers no policy or correction of that name"
    ):
        base_named("empty")
    installed("first-package", "first_module", MODULE, "twice")
    installed("second-package", "second_module", MODULE, "twice")
    with pytest.raises(
        EnvironmentUnsupportedError, match="in the packages first-package and second-package"
    ):
        base_named("twice")
