"""Code for a GPU only: the decoding step as a CUDA graph."""
