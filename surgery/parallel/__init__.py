"""One graph for each of N GPUs (tensor parallelism): what is divided, the ranks' graphs, and the joint graph that proves it.

placement   which part of a tensor each rank has
relations   what a placement of one of a node's tensors means for the others, operator by operator
views       a placement on another view of the same elements
division    what can be divided of a whole graph
rank_graph  the graph of one rank
joint_graph all ranks in one standard graph
stage       files in, files out; `python -m surgery ranks`
"""
