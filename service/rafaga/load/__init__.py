"""`rafaga load`: the load generator, installed with the `load` extra.

schedule     when requests are due, before anything is sent     generator   sending them, on the event loop's clock
tally        what happened, as raw counts that merge            figures     what is read off a tally
targets      which requests to which method                     codecs/     what a protocol's replies say
worker       one process of the generator                       fleet       all of them
session      a run, step by step                                search      the highest rate that meets an objective
document     a run as JSON, and the merging of several          report/     a run as one HTML page
options      the command line                                   command     from the command line to an exit code

Two rules make the figures honest. Latency counts from the time a request was *due*, not from the time it was sent, so
every request that was due during a stall of the server shows it (no coordinated omission: Gil Tene, "How NOT to Measure
Latency"). And percentiles are taken from merged raw counts, never averaged.
"""
