"""What training is: data, batches, objectives, adaptations, the loop, checkpoints and receipts."""
