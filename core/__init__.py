"""What the stages agree on: graph signatures, manifests, weights by reference, errors, findings, progress and command lines."""
