"""Searches beside sampling and beams: diverse, constrained, contrastive and stochastic."""
