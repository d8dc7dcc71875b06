"""The frozen model: families, stacks, loading, the partial PLM, the loss at labelled positions."""
