"""Models: frozen backbones, adapters that are injected into them, and the head."""
