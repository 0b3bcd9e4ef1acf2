"""The commands that ask about a series or a sequence. Each prints its answer and returns an exit code."""

from __future__ import annotations

import sys
from argparse import Namespace

from rafaga import Client
from rafaga.cli._errors import ExitCode, UsageError, complain
from rafaga.cli._models import chosen
from rafaga.cli._output import show_footer, show_json, show_table, warn_if_untrained
from rafaga.series import SeriesError, read_series


def predict(args: Namespace, client: Client) -> int:
    """One argument is a string of symbols, several are one symbol each."""
    symbols = args.symbols[0] if len(args.symbols) == 1 else args.symbols
    model = chosen(args, client, "sequence")
    found = client.predict(symbols, model=model, version=args.model_version, top_k=args.top_k)
    if args.json:
        show_json(found)
    else:
        rows = [(rank, p.label, p.index, f"{p.probability:.4f}") for rank, p in enumerate(found.predictions, start=1)]
        show_table(("RANK", "NEXT", "INDEX", "PROBABILITY"), rows)
        show_footer(found.model, found.timing)
    warn_if_untrained(found.model)
    return ExitCode.OK


def forecast(args: Namespace, client: Client) -> int:
    try:
        if args.file == "-":
            if sys.stdin.isatty():
                complain("reading a number per line from this terminal; Ctrl-D ends")
            history = read_series(sys.stdin, args.column)
        else:
            with open(args.file, encoding="utf-8-sig", newline="") as file:
                history = read_series(file, args.column)
    except SeriesError as error:
        raise UsageError(str(error)) from None
    model = chosen(args, client, "forecasting")
    found = client.forecast(history, model=model, version=args.model_version, horizon=args.horizon)
    if args.json:
        quantiles = {"levels": found.levels, "values": found.values}
        show_json(quantiles | {"model": found.model, "timing": found.timing})
    else:
        headings = ("STEP", *(f"Q{level:g}" for level in found.levels))
        rows = [(step, *map(float, values)) for step, values in enumerate(found.values.T, start=1)]
        show_table(headings, rows)
        show_footer(found.model, found.timing)
    warn_if_untrained(found.model)
    return ExitCode.OK
