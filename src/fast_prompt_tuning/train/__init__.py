"""Training: the loop, checkpoints, several processes, callbacks for a Trainer of your own."""
