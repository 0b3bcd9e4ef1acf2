"""`python -m demo`: the whole way once, from weights to answers, in about a minute.

It exports two of the shipped models, starts a server on free ports, asks it for 10,000 digits and for the future of the
atmosphere's CO2, and stops it. Every step is what a user would do; nothing here is special to the demonstration.

    bundles     trained weights → verified bundles            server     the server as a process of its own
    digits      real digits, 32 callers, accuracy, latency     co2        a forecast beside what followed
    batches     what /metrics says about batch sizes           page       how it all is printed
"""
