"""What one client does: local training, the statistics a rule may ask for, and the pools that run clients."""
