"""The three stages of Reconstructive Neuron Pruning, as functions that pass tensors."""
