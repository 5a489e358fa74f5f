"""Real pretrained models and real data from package registries: no model hub, no account."""
