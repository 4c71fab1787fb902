"""The shared vocabulary: messages, contracts, configuration, plug-ins, randomness, errors."""
