"""`rafaga plan`: how many replicas, and how they should batch, for a rate and an objective.

simulation   the real batcher in simulated time
"""
