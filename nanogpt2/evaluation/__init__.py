"""What GPT-2 is measured by: perplexity, LAMBADA, HellaSwag, classification; one task a file."""
