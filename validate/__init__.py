"""Checks each step of the pipeline against the one before, and says what it found in a report.

reference    a checkpoint -> the same in PyTorch
scenarios    what is asked of a decoder: prompts, chunks, decoding, ragged batches
compare      two decoders through the same scenarios, by Polygraphy
tokens       two decoders on real text: KL divergence, perplexity, greedy agreement
levels       which comparisons a pipeline's folder allows, and their verdicts
report       the verdicts as JSON and HTML
summary      the same as Markdown, short enough for a comment on a pull request
network      what TensorRT's parser understood, evaluated without a GPU
bundle       a folder that a machine with a GPU runs (bundle_run is its run.py), and the results that it brings back
"""
