"""`dpp compare`: strategies side by side on one configuration."""
