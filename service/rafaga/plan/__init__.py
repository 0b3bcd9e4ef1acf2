"""`rafaga plan`: how many replicas, and how they should batch, for a rate and an objective.

profile      what one replica was measured to need, as a JSON file     measure   the measuring of it
simulation   the real batcher in simulated time                        replica   a replica of a profile in it
planning     replicas and settings from what such replicas can take    text      a plan for people
options      the command line                                          command   from the command line to an exit code

No formula for batching: the server's own batcher runs in simulated time.
"""
