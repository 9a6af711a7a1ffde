"""Attention masks and token positions, recognised by what they compute.

masks          which kind of mask a tensor is
mask_probe     evaluates a mask's subgraph on small inputs
mask_builders  writes masks in the one form that the portable and the lowered graph use
position_ids   which tensor holds the tokens' positions
"""
