"""What sample.py does with a model and a prompt: the parts that are not the lesson."""
