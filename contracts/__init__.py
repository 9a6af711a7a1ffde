"""What the stages agree on: graph signatures, manifests, weights by reference, errors and command lines."""
