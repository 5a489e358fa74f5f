"""Evaluation: how well a model does on a task, what training it costs, and a paired comparison with the base."""
