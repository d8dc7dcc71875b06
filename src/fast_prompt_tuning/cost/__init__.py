"""What a step, a run and a plan cost: FLOPs, memory, seconds."""
