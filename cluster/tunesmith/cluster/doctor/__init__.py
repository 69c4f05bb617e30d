"""What is wrong with a machine or a cluster: facts gathered by real probes, findings decided from the facts alone."""
