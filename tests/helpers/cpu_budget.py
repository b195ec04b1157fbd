"""A pytest plugin: no test without the marker ``slow`` or ``real_model`` takes more than ten seconds of CPU.

Counted are user and system seconds of the test process and of child processes that have ended, in the setup and the
call of a test: a test pays for the module fixture that it is the first to use, and not for the session's processes.
Machines differ and CPU seconds grow when cores are shared, so a test over the budget is listed, and the run fails only
at a multiple of it.
"""

from __future__ import annotations

import os
from collections import defaultdict

import pytest

BUDGET = 10.0  # CPU seconds
FAILS_AT = 3 * BUDGET


def cpu_seconds() -> float:
    """Return the user and system seconds of this process and its ended children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class CPUBudget:
    """Measures where tests run (in xdist's workers), and sums up and judges where they are reported."""

    def __init__(self) -> None:
        self._last = cpu_seconds()
        self._spent: dict[str, float] = defaultdict(float)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item):
        self._last = cpu_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        now = cpu_seconds()
        report.cpu_seconds, self._last = now - self._last, now
        report.within_budget = not any(item.get_closest_marker(name) for name in ("slow", "real_model"))
        return report

    def pytest_runtest_logreport(self, report):
        if report.when != "teardown" and getattr(report, "within_budget", False):
            self._spent[report.nodeid] += report.cpu_seconds

    def over(self, limit: float) -> list[tuple[float, str]]:
        """Return seconds and id of the tests that took more than ``limit``, the longest first."""
        return sorted(((spent, name) for name, spent in self._spent.items() if spent > limit), reverse=True)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session):
        if self.over(FAILS_AT) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if not self.over(BUDGET):
            return
        terminalreporter.section("over the CPU budget")
        for spent, name in self.over(BUDGET):
            verdict = "FAILED" if spent > FAILS_AT else "WARNING"
            terminalreporter.line(f"{verdict} {name}: {spent:.1f} s; mark it slow, or make it faster", red=True)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(CPUBudget(), "cpu_budget_of_tests")
