"""`rafaga predict`."""

from __future__ import annotations

from argparse import Namespace

from rafaga import Client
from rafaga.cli._errors import ExitCode
from rafaga.cli._models import chosen
from rafaga.cli._output import show_footer, show_json, show_table, warn_if_untrained


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
