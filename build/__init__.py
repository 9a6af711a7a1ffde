"""Parses a lowered graph with TensorRT and builds its engine, in a child process, and says what was built.

stage.py      top to bottom what a build does
flavour.py    what differs between standard TensorRT and TensorRT-RTX
options.py    what it can be asked for
profiles.py   ranges of the inputs' shapes, from the graph's signature
audit.py      what would make an engine wrong or slow, found before it is built
memory.py     what building and running it will take, and refusal of what cannot fit
weights.py    weights as inputs of the engine instead of constants in it
process.py    starts the child, shows its progress, names its death
worker.py     the child: parse, audit, build
progress.py   TensorRT's nested phases as one fraction
kernels.py    the builder's list of fused kernels, read from its log
cost.py       bytes that each kernel must move, against the least that a decode step can
"""
