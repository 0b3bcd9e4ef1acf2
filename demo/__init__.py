"""`python -m demo`: from weights to answers in about a minute.

It exports two of the shipped models, starts a server on free ports, sends it 10,000 digits and a CO2 history to
forecast, and stops it, with the same commands and calls that users have.

    bundles     trained weights → verified bundles             server     the server as a separate process
    digits      digits, 32 callers, accuracy, latency          co2        a forecast next to the measurements
    batches     batch sizes from /metrics                      page       plain-text output
"""
