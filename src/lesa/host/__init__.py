"""What touches a pipeline: the two seams, streams, taps, the executor."""
