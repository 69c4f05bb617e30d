"""What may change: each adaptation is one module with `adapt(model, spec, ...)`."""
