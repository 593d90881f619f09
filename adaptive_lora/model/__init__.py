"""What touches a live model: targets, adapters, changes of rank, quantised bases, memory."""
