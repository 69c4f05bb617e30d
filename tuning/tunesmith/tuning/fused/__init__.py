"""LoRA trials that train side by side on one frozen base."""
