"""Tasks, readers, token ids, batches and metrics."""
