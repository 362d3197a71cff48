"""Every option of a run: the only declaration of its name, type, default and check."""
