"""Supporting code of sample.py: prompts, streaming, the prompt loop, comparisons, explanations."""
