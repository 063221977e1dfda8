"""The three stages of Reconstructive Neuron Pruning and what follows them, as functions that pass tensors."""
