"""The tree of methods: one file of at most 60 lines each, or a recipe of at most 10, in a folder per branch."""
