"""Quantisation of the weights of the blocks' units."""
