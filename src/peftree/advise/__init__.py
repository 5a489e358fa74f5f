"""Advice before anything runs: which methods fit a model, data and a budget, ranked by measured evidence."""
