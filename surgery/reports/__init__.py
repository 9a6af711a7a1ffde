"""What surgery says it did.

report    counts of nodes, matches and near misses, as a table and as JSON
picture   one layer of a graph, drawn as SVG
"""
