"""Evaluation: perplexity, LAMBADA, HellaSwag and classification, one task a file."""
