"""`nox`: the tests on each supported version of Python that is installed."""

import nox

nox.options.error_on_missing_interpreters = False


@nox.session(python=["3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """Arguments after `--` go to pytest."""
    session.install("-c", "requirements/constraints.txt", "-e", ".[dev]")
    session.run("pytest", *(session.posargs or ["-m", "not nightly and not gpu"]))
