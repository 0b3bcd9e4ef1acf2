"""`rafaga plan`: from the command line to an exit code."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from rafaga.load.arguments import OptionsError
from rafaga.load.command import LoadError, LoadExit
from rafaga.load.fleet import FleetError
from rafaga.load.payloads import PayloadError
from rafaga.plan import profile as profiles
from rafaga.plan import text
from rafaga.plan.measure import measure
from rafaga.plan.options import PlanOptions, parse
from rafaga.plan.planning import Unreachable, plan
from rafaga.plan.profile import Profile, ProfileError


def run(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Raises LoadError, RafagaError, OSError."""
    try:
        return _plan(parse(arguments))
    except (OptionsError, PayloadError, ProfileError) as error:
        raise LoadError(str(error), usage=True) from None
    except (FleetError, Unreachable) as error:
        raise LoadError(str(error), usage=False) from None


def _plan(options: PlanOptions) -> int:
    profile = _profile(options)
    if options.wanted is None:
        return LoadExit.OK
    wanted = options.wanted
    made = plan(profile, wanted.rate, wanted.slo_p99_ms, wanted.headroom, options.seed, _note)
    if options.json == "-":
        print(msgspec.json.format(msgspec.json.encode(made), indent=1).decode())
        return LoadExit.OK
    for line in text.lines(made):
        print(line)
    if options.json is not None:
        Path(options.json).write_bytes(msgspec.json.encode(made) + b"\n")
    return LoadExit.OK


def _profile(options: PlanOptions) -> Profile:
    if options.measuring is None:
        assert options.profile is not None, "the options see to it"
        return profiles.read(options.profile)
    what = options.measuring
    found = measure(
        what.connection,
        what.model,
        what.payloads,
        step_s=what.step_s,
        processes=what.processes,
        channels=what.channels,
        note=_note,
    )
    if options.profile is not None:
        profiles.write(found, options.profile)
        _note(f"{options.profile}: the profile of {what.model}")
    return found


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
