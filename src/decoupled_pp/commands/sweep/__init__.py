"""`dpp sweep`: variants of one configuration, over seeds, in one table."""
