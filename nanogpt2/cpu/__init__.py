"""Code that only a CPU needs: prepacked linear layers, the inference model, malloc."""
